import copy
import functools
import shutil

import pytest
import torch
from generation.sequence import SequenceState

from generation.compile import CompiledDecodeStep, convert_weights, prepare_for_inference
from generation.engine import InferenceEngine
from generation.sampling_params import SamplingParams, TruncationParams
from generation.steps import DraftModel, PreparedModel, StepInputs, decode_step
from tests import helpers
from tests.helpers import generate_batch

V = helpers.GENERATION_MODEL["vocab_size"]
random_model = functools.partial(helpers.random_model, helpers.GENERATION_MODEL, 0.3)

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler here"
)

TOLERANCES = [("float32", 1e-4), ("bfloat16", 0.2), ("float16", 0.03), ("int8", 0.3)]


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
def test_converted_logits_are_within_the_precision_of_the_dtype(dtype, tolerance):
    model = random_model()
    before = copy.deepcopy(model.state_dict())
    tokens = torch.randint(V, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens)[0]
        logits = convert_weights(model, dtype)(tokens)[0]
    assert dtype == "float32" or not torch.equal(logits, expected)
    assert (logits - expected).abs().mean() < tolerance * expected.std()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


OPTIONS = [
    dict(temperature=0),
    dict(),
    dict(top_k=10, top_p=0.8, min_new_tokens=20),
    dict(repetition_penalty=1.2),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "drafted_by", ["itself in 8 bits", pytest.param("another model", marks=pytest.mark.slow)]
)
def test_speculative_decoding_changes_no_token(drafted_by, options):
    """Past the context, to the end of each text, whether or not the two models agree."""
    model, other = random_model(max_seq_len=64), random_model(max_seq_len=64)
    with torch.no_grad():
        other.layers[1].feed_forward.w2.weight.mul_(-1)
    draft_model = other if drafted_by == "another model" else convert_weights(model, "int8")
    prepared = PreparedModel(model, draft=DraftModel(draft_model, num_tokens=5))
    params = SamplingParams(max_new_tokens=150, **options)
    for stop_ids in ([], [V - 1, 3, 5]):
        for prompt in ([1], list(range(50)), list(range(60)) * 2):
            expected = generate_batch(model, [prompt], 1, stop_ids, max_new_tokens=150, **options)
            sequence = SequenceState(prompt)
            engine = InferenceEngine(prepared, params, 1, stop_ids)
            list(engine.generate([sequence]))
            assert sequence.tokens == expected[0]
            sequence.tokens += [7, 8]
            prompts = [sequence.tokens]
            expected = generate_batch(model, prompts, 1, stop_ids, max_new_tokens=150, **options)
            list(engine.generate([sequence]))  # the cache has rejected tokens
            assert sequence.tokens == expected[0]


def test_several_sequences_may_be_drafted_at_once():
    model, prompts = random_model(max_seq_len=64), [[1], [2, 3, 4], [5] * 30]
    draft = DraftModel(convert_weights(model, "int8"), num_tokens=3)
    options = dict(stop_ids=[V - 1], max_new_tokens=100)
    drafted = generate_batch(PreparedModel(model, draft=draft), prompts, 2, **options)
    assert drafted == generate_batch(model, prompts, 1, **options)


@needs_compiler
@pytest.mark.parametrize(
    "dtype, batch_size", [pytest.param("int8", 1, marks=pytest.mark.slow), ("float32", 3)]
)
def test_a_compiled_step_has_the_same_logits(dtype, batch_size, capfd):
    """The compiler's product of one row of 8-bit integers was garbage once."""
    model = convert_weights(random_model(max_seq_len=64), dtype, batch_size)
    steps = decode_step, CompiledDecodeStep()
    tokens = torch.randint(V, (30, batch_size), generator=torch.Generator().manual_seed(0))
    caches = [model.new_kv_cache(batch_size, 64) for _ in steps]
    start_pos = torch.arange(batch_size)
    seeds = torch.arange(batch_size, dtype=torch.int32)
    params = TruncationParams(top_k=9)
    with torch.inference_mode():
        for index, row in enumerate(tokens):
            inputs = StepInputs(
                row[:, None], start_pos + index, index + batch_size, seeds[:, None] + index
            )
            eager, compiled = (
                step(model, cache, inputs, params)
                for step, cache in zip(steps, caches, strict=True)
            )
            error = (compiled.logits - eager.logits).abs().max() / eager.logits.std()
            # A rounding to 8 bits may go the other way.
            assert error < (0.1 if dtype == "int8" else 1e-4)
            if error < 1e-4:
                assert torch.equal(compiled.tokens, eager.tokens)
                assert torch.equal(compiled.accepted, eager.accepted)
    assert "cannot compile" not in capfd.readouterr().err


@needs_compiler
@pytest.mark.slow
def test_a_compiled_step_fits_other_caches_and_options(capfd):
    """Code compiled for one length of cache must not run with another, or at the same kv_len."""
    model = convert_weights(random_model(max_seq_len=128), "float32")
    prepared = PreparedModel(model, CompiledDecodeStep())
    cases = [([1], 20, 1.0), ([1] * 40, 50, 1.0), ([1], 20, 1.0), ([2], 20, 0.5)]
    for prompt, count, temperature in cases:
        options = dict(max_new_tokens=count, temperature=temperature)
        compiled = generate_batch(prepared, [prompt], 1, **options)
        assert compiled == generate_batch(model, [prompt], 1, **options)
    assert "cannot compile" not in capfd.readouterr().err


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("truncation", [dict(top_k=9), dict(top_p=0.7), dict(min_p=0.1)], ids=str)
def test_a_loop_with_truncation_can_be_compiled(truncation, capfd):
    """An operation in place within the loop could not."""
    model = random_model(max_seq_len=64)
    step = CompiledDecodeStep(4)
    prepared = PreparedModel(convert_weights(model, "float32"), step, tokens_per_call=4)
    compiled = generate_batch(prepared, [[1]], 1, max_new_tokens=40, **truncation)
    assert compiled == generate_batch(model, [[1]], 1, max_new_tokens=40, **truncation)
    assert "cannot compile" not in capfd.readouterr().err


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(top_k=3), dict(top_p=0.2, temperature=0.8)], ids=str)
def test_compiled_float32_sequence_with_truncation_is_the_eager_one(options, capfd):
    """A rejected draft token ended in a traceback: its tensor had the strides of a slice."""
    model = random_model(max_seq_len=64)
    prepared = prepare_for_inference(model, "float32", 1, compile=True)
    compiled = generate_batch(prepared, [[1]], 1, max_new_tokens=60, **options)
    assert "cannot compile" not in capfd.readouterr().err
    eager = prepare_for_inference(model, "float32", 1)
    assert compiled == generate_batch(eager, [[1]], 1, max_new_tokens=60, **options)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2])
def test_compiled_steps_generate_the_same_past_the_context(batch_size, capfd):
    """A cache filled to the last position was an error of the compiler's."""
    model, prompts = random_model(max_seq_len=32), [[1], [2, 3, 4]][:batch_size]
    prepared = prepare_for_inference(model, "float32", batch_size, compile=True)
    compiled = generate_batch(prepared, prompts, batch_size, max_new_tokens=70)
    assert compiled == generate_batch(model, prompts, 1, max_new_tokens=70)
    assert "cannot compile" not in capfd.readouterr().err


@needs_compiler
@pytest.mark.slow
def test_a_compiled_loop_ends_with_an_active_row_only():
    """A stop token in an unused row must not end it."""
    model, prompts = random_model(max_seq_len=64), [[1], [2, 3, 4]]
    options, stop_ids = dict(max_new_tokens=60, seed=0), [41]
    unstopped = generate_batch(model, prompts, 1, **options)[1]
    compiled, calls = CompiledDecodeStep(8), []

    def spy(model, cache, inputs, params, stop_ids=()):
        output = compiled(model, cache, inputs, params, stop_ids)
        is_stop = torch.isin(output.tokens, torch.tensor(stop_ids))
        is_active = inputs.start_pos > 0
        calls.append((inputs.seeds.shape[1], is_stop[is_active], is_stop[~is_active]))
        return output

    prepared = PreparedModel(model, spy, tokens_per_call=8)
    sequences = generate_batch(prepared, prompts, 2, stop_ids, **options)
    assert sequences == generate_batch(model, prompts, 1, stop_ids, **options)
    assert len(sequences[0]) < 60 and sequences[1] == unstopped
    for requested, is_stop, _ in calls:
        assert not is_stop[:, :-1].any()
        assert is_stop.shape[1] == requested or is_stop[:, -1].any()
    assert any(is_stop.shape[1] < requested for requested, is_stop, _ in calls)
    assert any(in_unused_row[:, :-1].any() for _, _, in_unused_row in calls)


@needs_compiler
@pytest.mark.slow
def test_compiled_models_are_not_mistaken_for_one_another():
    """PyTorch keeps what it compiled with the code of the step. Models shared it, and after some
    more were compiled one was taken for another."""
    import torch._dynamo

    models = [random_model(vocab_size=size, max_seq_len=64) for size in (V, V + 40)]
    prepared = [prepare_for_inference(model, "float32", compile=True) for model in models]
    expected = [generate_batch(model, [[1]], 1, max_new_tokens=20) for model in models]
    with torch._dynamo.config.patch(recompile_limit=2):
        for model, tokens in zip(prepared, expected, strict=True):
            assert generate_batch(model, [[1]], 1, max_new_tokens=20) == tokens


@needs_compiler
@pytest.mark.slow
def test_compiled_int8_sequences_are_equal_in_batch_and_alone():
    """Their keys and values are kept in 16 bits, in a batch and alone."""
    model, results = random_model(max_seq_len=64), []
    for batch_size in (1, 3):
        prepared = prepare_for_inference(model, "int8", batch_size, compile=True)
        engine = InferenceEngine(prepared, SamplingParams(100), batch_size)
        sequences = [SequenceState([1, 2 + index], index) for index in range(3)]
        list(engine.generate(sequences))
        assert engine.cache.keys[0].dtype == torch.bfloat16
        results.append([sequence.tokens for sequence in sequences])
    assert results[0] == results[1]


@needs_compiler
@pytest.mark.slow
def test_draft_tokens_of_a_compiled_step_are_mostly_accepted(monkeypatch):
    model, counts = random_model(max_seq_len=64), []
    speculative_step = InferenceEngine.speculative_step

    def spy(engine, draft):
        new_tokens = speculative_step(engine, draft)
        counts.append(len(new_tokens))
        return new_tokens

    monkeypatch.setattr(InferenceEngine, "speculative_step", spy)
    prepared = prepare_for_inference(model, compile=True)
    drafted = generate_batch(prepared, [[1]], 1, max_new_tokens=200)
    assert drafted == generate_batch(model, [[1]], 1, max_new_tokens=200)
    assert sum(counts) / len(counts) > 4  # of 8


def test_a_failed_compilation_falls_back_to_the_eager_step(monkeypatch, capsys):
    def broken(function, **options):
        def call(*arguments):
            raise RuntimeError("no compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    model = convert_weights(random_model(), "int8")
    prepared = PreparedModel(model, CompiledDecodeStep(8), tokens_per_call=8)
    tokens = generate_batch(prepared, [[1]], 1, max_new_tokens=30)
    assert tokens == generate_batch(model, [[1]], 1, max_new_tokens=30)
    assert capsys.readouterr().err.count("cannot compile here (RuntimeError)") == 1
