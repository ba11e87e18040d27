import copy
import functools
import shutil

import pytest
import torch

from generation.compile import compiled_check, compiled_tell, for_inference, prepared
from generation.engine import Decoder, Decoding, Draft, Sequence, one_step
from ops.quantized_linear import Int8Linear, PackedLinear, row_product
from tests import helpers
from tests.helpers import generate_batch

V = helpers.GENERATION_MODEL["vocab_size"]
random_model = functools.partial(helpers.random_model, helpers.GENERATION_MODEL, 0.3)


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_one_row_and_many_multiply_alike(kind):
    torch.manual_seed(0)
    weight, x = torch.randn(96, 64), torch.randn(5, 7, 64) * torch.rand(5, 7, 1) * 10
    layer = Int8Linear(weight) if kind == "int8" else PackedLinear(weight, 1)
    whole = layer(x)
    assert whole.shape == (5, 7, 96)
    for row in range(5):
        torch.testing.assert_close(
            layer(x[row : row + 1, 3:4])[0, 0], whole[row, 3], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    "height, width", [(7, 64), (98, 48), (96, 18), (96, 32), (9000, 64), (9003, 64), (9002, 64)]
)
def test_a_row_of_integers_is_multiplied_exactly_as_many_are(height, width):
    """However many parts of the matrix can be read at once, by its columns or by its rows."""
    torch.manual_seed(0)
    x, weight = (torch.randint(-127, 128, (rows, width), dtype=torch.int8) for rows in (20, height))
    whole = torch._int_mm(x, weight.t())
    assert torch.equal(row_product(x[3:4].float(), weight), whole[3:4].float())


def test_int8_is_as_exact_as_8_bits_can_be():
    torch.manual_seed(0)
    weight, x = torch.randn(50, 64), torch.randn(20, 64)
    weight[7] = 0
    step = weight.abs().amax(1) / 127
    layer = Int8Linear(weight)
    rounding = 0.5 * (
        x.abs().amax(1, keepdim=True) / 127 * (layer.weight.float().abs().sum(1) * step)
        + x.abs().sum(1)[:, None] * step
    )
    assert ((layer(x) - x @ weight.t()).abs() <= rounding + 1e-5).all()
    assert layer(torch.zeros(1, 64)).abs().max() == 0


@pytest.mark.parametrize(
    "kind, off", [("float32", 1e-4), ("bfloat16", 0.2), ("float16", 0.03), ("int8", 0.3)]
)
def test_a_prepared_model_is_the_model_within_the_precision_of_its_matrices(kind, off):
    model = random_model()
    before = copy.deepcopy(model.state_dict())
    tokens = torch.randint(V, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model(tokens)[0], for_inference(model, kind)(tokens)[0]
    assert kind == "float32" or not torch.equal(found, expected)
    assert (found - expected).abs().mean() < off * expected.std()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


OPTIONS = [
    dict(temperature=0),
    dict(),
    dict(top_k=10, top_p=0.8, min_new_tokens=20),
    dict(repetition_penalty=1.2),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("drafted_by", ["itself in 8 bits", "another"])
def test_drafting_changes_no_token(drafted_by, options):
    """Past the context, to the end of each text, whether or not the two models agree."""
    model, other = random_model(max_seq_len=64), random_model(max_seq_len=64)
    with torch.no_grad():
        other.layers[1].feed_forward.w2.weight.mul_(-1)
    draft = Draft(for_inference(model, "int8") if drafted_by != "another" else other, tokens=5)
    for stop_ids in ([], [V - 1, 3, 5]):
        for prompt in ([1], list(range(50)), list(range(60)) * 2):
            alone = generate_batch(model, [prompt], 1, stop_ids, max_new_tokens=150, **options)
            drafted = Sequence(prompt)
            decoder = Decoder(
                model, Decoding(max_new_tokens=150, **options), 1, stop_ids, draft=draft
            )
            list(decoder.run([drafted]))
            assert drafted.tokens == alone[0]
            drafted.tokens += [7, 8]
            again = generate_batch(
                model, [drafted.tokens], 1, stop_ids, max_new_tokens=150, **options
            )
            list(
                decoder.run([drafted])
            )  # goes on with a cache in which more was drafted than was taken
            assert drafted.tokens == again[0]


def test_several_texts_may_be_drafted_at_once():
    model, prompts = random_model(max_seq_len=64), [[1], [2, 3, 4], [5] * 30]
    draft = Draft(for_inference(model, "int8"), tokens=3)
    sequences = [Sequence(prompt, number) for number, prompt in enumerate(prompts)]
    list(Decoder(model, Decoding(100), 2, [V - 1], draft=draft).run(sequences))
    assert [sequence.tokens for sequence in sequences] == generate_batch(
        model, prompts, 1, [V - 1], max_new_tokens=100
    )


needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler here"
)


@needs_compiler
@pytest.mark.parametrize("kind, batch_size", [("int8", 1), ("float32", 3)])
def test_a_compiled_step_has_the_same_logits(kind, batch_size, capfd):
    """The compiler's product of one row of 8-bit integers was garbage once."""
    model, steps = (
        for_inference(random_model(max_seq_len=64), kind, batch_size),
        (one_step, compiled_check()),
    )
    tokens = torch.randint(V, (30, batch_size), generator=torch.Generator().manual_seed(0))
    caches = [model.new_kv_cache(batch_size, 64) for _ in steps]
    starts, keys = torch.arange(batch_size), torch.arange(batch_size, dtype=torch.int32)
    with torch.inference_mode():
        for number, row in enumerate(tokens):
            inputs = (row[:, None], starts + number, number + batch_size, keys[:, None] + number)
            plain, compiled = (
                step(model, cache, *inputs, top_k=9)
                for step, cache in zip(steps, caches, strict=True)
            )
            off = (compiled[0] - plain[0]).abs().max() / plain[0].std()
            assert off < (
                0.1 if kind == "int8" else 1e-4
            )  # a rounding to 8 bits may go the other way
            if off < 1e-4:
                assert torch.equal(compiled[1][0], plain[1][0]) and torch.equal(
                    compiled[1][1], plain[1][1]
                )
    assert "cannot compile" not in capfd.readouterr().err


@needs_compiler
def test_a_compiled_step_fits_other_caches_and_options_too(capfd):
    """What was compiled for one length of cache must not be taken for another, or at the same end."""
    model, tell = for_inference(random_model(max_seq_len=128), "float32"), compiled_tell()
    for prompt, count, temperature in (
        ([1], 20, 1.0),
        ([1] * 40, 50, 1.0),
        ([1], 20, 1.0),
        ([2], 20, 0.5),
    ):
        told, alone = Sequence(prompt), Sequence(prompt)
        list(Decoder(model, Decoding(count, temperature=temperature), tell=tell).run([told]))
        list(Decoder(model, Decoding(count, temperature=temperature)).run([alone]))
        assert told.tokens == alone.tokens
    assert "cannot compile" not in capfd.readouterr().err


@needs_compiler
@pytest.mark.parametrize("truncation", [dict(top_k=9), dict(top_p=0.7), dict(min_p=0.1)], ids=str)
def test_a_loop_with_a_truncated_draw_can_be_compiled_too(truncation, capfd):
    """An operation in place within the loop could not."""
    model, told = random_model(max_seq_len=64), Sequence([1])
    engine = dict(model=for_inference(model, "float32"), tell=compiled_tell(4), at_once=4)
    list(Decoder(options=Decoding(40, **truncation), **engine).run([told]))
    assert [told.tokens] == generate_batch(model, [[1]], 1, max_new_tokens=40, **truncation)
    assert "cannot compile" not in capfd.readouterr().err


@needs_compiler
@pytest.mark.parametrize("batch_size", [1, 2])
def test_compiled_steps_tell_the_same_texts_past_the_context(batch_size, capfd):
    """A cache filled to the last was an error of the compiler's."""
    model, prompts = random_model(max_seq_len=32), [[1], [2, 3, 4]][:batch_size]
    sequences = [Sequence(prompt, number) for number, prompt in enumerate(prompts)]
    engine = prepared(model, "float32", batch_size, compile=True)
    list(Decoder(options=Decoding(70), batch_size=batch_size, **engine).run(sequences))
    assert [sequence.tokens for sequence in sequences] == generate_batch(
        model, prompts, 1, max_new_tokens=70
    )
    assert "cannot compile" not in capfd.readouterr().err


@needs_compiler
def test_a_compiled_loop_ends_where_a_text_does_and_not_for_one_that_is_over():
    model, prompts, run, calls = (
        random_model(max_seq_len=64),
        [[1], [2, 3, 4]],
        compiled_tell(8),
        [],
    )
    options, stop_ids = dict(max_new_tokens=60, seed=0), [41]
    without_end = generate_batch(model, prompts, 1, **options)[1]

    def tell(model, cache, token, starts, end, keys, **how):
        logits, tokens, known = run(model, cache, token, starts, end, keys, **how)
        ends = torch.isin(tokens, torch.tensor(stop_ids))
        calls.append((keys.shape[1], ends[starts > 0], ends[starts == 0]))
        return logits, tokens, known

    told = [Sequence(prompt, number) for number, prompt in enumerate(prompts)]
    list(Decoder(model, Decoding(**options), 2, stop_ids, tell=tell, at_once=8).run(told))
    assert [text.tokens for text in told] == generate_batch(model, prompts, 1, stop_ids, **options)
    assert len(told[0].tokens) < 60 and told[1].tokens == without_end
    for asked, ends, _ in calls:
        assert not ends[:, :-1].any() and (ends.shape[1] == asked or ends[:, -1].any())
    assert any(ends.shape[1] < asked for asked, ends, _ in calls)
    assert any(of_those_over[:, :-1].any() for _, _, of_those_over in calls)


@needs_compiler
def test_several_compiled_models_are_not_taken_for_one_another():
    """PyTorch keeps what it compiled with the code of the step; they shared it, and after some more were
    compiled one was taken for another."""
    import torch._dynamo

    models = [random_model(vocab_size=size, max_seq_len=64) for size in (V, V + 40)]
    decoders = [
        Decoder(options=Decoding(20), **prepared(model, "float32", compile=True))
        for model in models
    ]
    alone = [generate_batch(model, [[1]], 1, max_new_tokens=20)[0] for model in models]
    with torch._dynamo.config.patch(recompile_limit=2):
        for decoder, expected in zip(decoders, alone, strict=True):
            told = Sequence([1])
            list(decoder.run([told]))
            assert told.tokens == expected


@needs_compiler
def test_compiled_8_bit_rows_are_told_together_as_alone():
    """Their keys and values are kept in 16 bits, in a batch and alone."""
    model, told = random_model(max_seq_len=64), []
    for batch_size in (1, 3):
        decoder = Decoder(
            options=Decoding(100),
            batch_size=batch_size,
            **prepared(model, "int8", batch_size, True),
        )
        sequences = [Sequence([1, 2 + number], number) for number in range(3)]
        list(decoder.run(sequences))
        assert decoder.cache.keys[0].dtype == torch.bfloat16
        told.append([sequence.tokens for sequence in sequences])
    assert told[0] == told[1]


@needs_compiler
def test_drafts_of_a_compiled_step_are_nearly_always_right():
    model = random_model(max_seq_len=64)
    decoder = Decoder(options=Decoding(200), **prepared(model, compile=True))
    counts, check = [], decoder.draft_and_check
    decoder.draft_and_check = lambda: counts.append(check()) or counts[-1]
    told = Sequence([1])
    list(decoder.run([told]))
    assert [told.tokens] == generate_batch(model, [[1]], 1, max_new_tokens=200)
    assert sum(map(len, counts)) / len(counts) > 4  # of 8


def test_where_nothing_can_be_compiled_the_step_stays_as_it_is(monkeypatch, capsys):
    def broken(function, **options):
        def call(*arguments):
            raise RuntimeError("no compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    tell, model = compiled_tell(8), for_inference(random_model(), "int8")
    told = [Sequence([1]), Sequence([1])]
    list(Decoder(model, Decoding(30), tell=tell, at_once=8).run(told[:1]))
    list(Decoder(model, Decoding(30)).run(told[1:]))
    assert told[0].tokens == told[1].tokens
    assert capsys.readouterr().err.count("cannot compile here (RuntimeError)") == 1
