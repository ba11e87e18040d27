import functools
import itertools

import pytest
import torch

from generation.engine import InferenceEngine, generate_tokens
from generation.sampling_params import SamplingParams
from generation.sequence import SequenceState, context_start
from generation.steps import PreparedModel, StepInputs, StepOutput, decode_step
from tests import helpers
from tests.helpers import generate_batch

V = helpers.GENERATION_MODEL["vocab_size"]
random_model = functools.partial(helpers.random_model, helpers.GENERATION_MODEL, 0.3)
GREEDY = dict(temperature=0)


def decode_several(model, cache, inputs, params, stop_ids=()):
    """As the compiled loop: one token per seed; a stop token or one not accepted ends it."""
    token, generated = inputs.tokens, []
    for i in range(inputs.seeds.shape[1]):
        step_inputs = StepInputs(
            token, inputs.start_pos + i, inputs.kv_len + i, inputs.seeds[:, i : i + 1]
        )
        logits, token, accepted = decode_step(model, cache, step_inputs, params)
        generated.append(token)
        ends = torch.isin(token[:, 0], torch.tensor(stop_ids))
        if ((ends | ~accepted) & (inputs.start_pos > 0)).any():  # rows at 0 are unused
            break
    return StepOutput(logits, torch.cat(generated, dim=1), accepted)


PREPARE = {
    "eager": PreparedModel,
    "fixed batch size": functools.partial(PreparedModel, decode_step=decode_step),
    "several tokens per call": functools.partial(
        PreparedModel, decode_step=decode_several, tokens_per_call=5
    ),
}
all_steps = pytest.mark.parametrize("prepare", PREPARE.values(), ids=PREPARE)


def random_tokens(*lengths) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(V, (length,), generator=generator).tolist() for length in lengths]


PROMPTS = [[1], [1, 5, 9, 2, 7], list(range(16)), list(range(40))]


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@pytest.mark.parametrize("max_seq_len", [16, pytest.param(15, marks=pytest.mark.slow), 1])
def test_cached_and_uncached_tokens_are_equal_past_max_seq_len(prompt, max_seq_len):
    """nanoGPT PR #613: the cache changed the output."""
    model, expected = random_model(max_seq_len=max_seq_len), list(prompt)
    with torch.no_grad():
        for _ in range(100):
            context = expected[context_start(len(expected), max_seq_len) :]
            expected.append(model(torch.tensor([context]))[0][0, -1].argmax().item())
    assert generate_tokens(model, prompt, max_new_tokens=100, **GREEDY) == expected[len(prompt) :]
    uncached = SequenceState(prompt)
    engine = InferenceEngine(model, SamplingParams(100, **GREEDY), use_cache=False)
    list(engine.generate([uncached]))
    assert uncached.tokens == expected


OPTIONS = [
    GREEDY,
    dict(top_k=20, top_p=0.9, repetition_penalty=1.1),
    dict(top_p=0.6),
    dict(temperature=2.0, top_k=3, min_new_tokens=30),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("length", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_batch_generates_what_each_sequence_generates_alone(options, length):
    """Of different lengths, past the context; some end early, so that rows become free."""
    model = random_model(max_seq_len=length * 6 // 10)
    prompts = random_tokens(1, 30, 7, length * 62 // 100, 2)
    generate = functools.partial(generate_batch, max_new_tokens=length, **options)
    assert generate(model, prompts, 5) == generate(model, prompts, 1)
    stop_ids = [V - 1, 17]
    expected = generate(model, prompts, 1, stop_ids)
    for prepare in PREPARE.values():
        assert generate(prepare(model), prompts, 3, stop_ids) == expected
    lengths = [len(tokens) - len(prompt) for tokens, prompt in zip(expected, prompts, strict=True)]
    num_early = sum(count < length for count in lengths)
    assert num_early == 5 if length == 1000 else num_early > 0


@all_steps
def test_a_sequence_continues_in_any_batch_as_if_alone(prepare):
    """The cache that it left may hold others, or more than it."""
    model = random_model(max_seq_len=64)
    a, b, c = [SequenceState(tokens, len(tokens)) for tokens in random_tokens(3, 9, 1)]
    params, stop_ids = SamplingParams(30), [V - 1, 7]

    def continue_alone(sequence) -> list[int]:
        alone = SequenceState(sequence.tokens, sequence.sample_index)
        list(InferenceEngine(model, params, 1, stop_ids).generate([alone]))
        return alone.tokens

    engine = InferenceEngine(prepare(model), params, 2, stop_ids)
    other = InferenceEngine(prepare(model), params, 2, stop_ids)
    for batch in ([a], [b, a], [b, a], [a, b, c], [c, b], [c], [c, b]):
        expected = [continue_alone(sequence) for sequence in batch]
        list((other if batch == [c] else engine).generate(batch))
        assert [sequence.tokens for sequence in batch] == expected
    for _ in engine.generate([a]):
        break  # an iteration that was not finished
    a.tokens += [3, 1, 4, 1, 5, 9, 2, 6]
    expected = continue_alone(a)
    list(engine.generate([a]))
    assert a.tokens == expected


def test_tokens_generated_in_advance_are_dropped_after_a_break():
    model, sequence = random_model(max_seq_len=64), SequenceState([1])
    prepared = PREPARE["several tokens per call"](model)
    engine = InferenceEngine(prepared, SamplingParams(20, **GREEDY))
    for count, _ in enumerate(engine.generate([sequence])):
        if count == 2:
            break
    sequence.tokens += [3, 1, 4, 1, 5, 9, 2, 6]
    expected = generate_tokens(model, sequence.tokens, max_new_tokens=20, **GREEDY)
    list(engine.generate([sequence]))
    assert sequence.tokens[-20:] == expected


@all_steps
def test_a_sequence_may_be_extended_when_it_has_ended(prepare):
    model, sequence = random_model(max_seq_len=64), SequenceState([1])
    engine = InferenceEngine(prepare(model), SamplingParams(20, **GREEDY))
    for count, (_, token) in enumerate(engine.generate([sequence])):
        if count == 2:
            sequence.finish = "stop"
        if token is None:
            sequence.tokens += [3, 1, 4, 1, 5, 9, 2, 6]
    expected = generate_tokens(model, sequence.tokens, max_new_tokens=20, **GREEDY)
    list(engine.generate([sequence]))
    assert sequence.tokens[-20:] == expected


def test_a_continued_sequence_is_not_prefilled_again(monkeypatch):
    model, lengths = random_model(max_seq_len=64), []
    engine, sequence = InferenceEngine(model, SamplingParams(10)), SequenceState([1, 2, 3])
    list(engine.generate([sequence]))
    forward_hidden = model.forward_hidden

    def spy(tokens, *args, **kwargs):
        lengths.append(tokens.shape[1])
        return forward_hidden(tokens, *args, **kwargs)

    monkeypatch.setattr(model, "forward_hidden", spy)
    sequence.tokens += [4, 5]
    list(engine.generate([sequence]))
    assert lengths == [3, *[1] * 9]  # the last generated token and the two new ones


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="begin with at least one token"):
        SequenceState([])


def test_a_batch_size_of_0_is_refused():
    with pytest.raises(ValueError, match="batch_size=0: must be"):
        InferenceEngine(random_model(), SamplingParams(), 0)


def test_greedy_tokens_of_the_test_model_vary():
    """Else the tests here could not fail."""
    assert len(set(generate_tokens(random_model(), [1], max_new_tokens=100, **GREEDY))) > 10


def test_the_prompt_is_not_changed():
    prompt = [1, 2, 3]
    generate_tokens(random_model(), prompt, max_new_tokens=5)
    assert prompt == [1, 2, 3]


def test_generates_under_autocast_past_max_seq_len():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(generate_tokens(random_model(), [1], max_new_tokens=40, **GREEDY)) == 40


@pytest.mark.parametrize("count", [1, 20])
def test_generates_max_new_tokens(count):
    assert len(generate_tokens(random_model(), [1], max_new_tokens=count)) == count


@pytest.mark.parametrize("position", [0, 1, 30])
def test_ends_before_the_first_stop_token(position):
    """nanoGPT #36, llama2.c PR #243: text went on after its end."""
    model = random_model()
    unstopped = generate_tokens(model, [1], max_new_tokens=60, **GREEDY)
    stop = unstopped[position]
    stopped = generate_tokens(model, [1], {stop, V + 1}, max_new_tokens=60, **GREEDY)
    assert stopped == unstopped[: unstopped.index(stop)]


@pytest.mark.parametrize("count", [0, 1, 5, 40])
def test_does_not_stop_before_min_new_tokens(count):
    model, options = random_model(), dict(max_new_tokens=60, min_new_tokens=count, **GREEDY)
    all_but_one = set(range(V - 1))
    assert generate_tokens(model, [1], all_but_one, **options) == [V - 1] * count
    first = generate_tokens(model, [1], max_new_tokens=1, **GREEDY)[0]
    assert generate_tokens(model, [1], {first}, **options)[:1] != [first]


def test_a_repetition_penalty_prevents_greedy_repetition():
    model, options = random_model(), dict(max_new_tokens=15, **GREEDY)
    assert len(set(generate_tokens(model, [1], **options))) < 15
    penalized = generate_tokens(model, [1], **options, repetition_penalty=100)
    assert len({1, *penalized}) == 16


@pytest.mark.parametrize("added", [[], [3], [4, 5, 6]], ids=len)
def test_added_tokens_count_as_part_of_the_prompt(added):
    model, sequence = random_model(), SequenceState([1, 2])
    engine = InferenceEngine(model, SamplingParams(20, **GREEDY))
    for _ in range(4):  # past the context
        list(engine.generate([sequence]))
        sequence.tokens += added
        before = list(sequence.tokens)
        list(engine.generate([sequence]))
        expected = generate_tokens(model, before, max_new_tokens=20, **GREEDY)
        assert sequence.tokens == before + expected


def test_an_error_says_that_no_token_is_left():
    with pytest.raises(ValueError, match="no token is left"):
        generate_tokens(random_model(), [1], range(V), max_new_tokens=5, min_new_tokens=1)


def test_samples_depend_on_seed_and_sample_index_only():
    def sample(seed: int, sample_index: int = 0) -> list[int]:
        sequence = SequenceState([1], sample_index)
        params = SamplingParams(40, top_k=30, top_p=0.95, seed=seed)
        list(InferenceEngine(random_model(), params).generate([sequence]))
        return sequence.tokens

    first = sample(7)
    torch.manual_seed(99)  # PyTorch's generator is not used
    assert sample(7) == first != sample(8)
    assert sample(7, 1) != first


@pytest.mark.parametrize("max_seq_len", [1, 2, 3, 7, 16])
def test_the_context_keeps_half_and_moves_rarely(max_seq_len):
    starts = [context_start(length, max_seq_len) for length in range(1, 101)]
    sizes = [length - start for length, start in enumerate(starts, 1)]
    pairs = enumerate(itertools.pairwise(starts), 2)
    moves = [length for length, (previous, start) in pairs if previous != start]
    assert starts[:max_seq_len] == [0] * max_seq_len
    assert starts == sorted(starts)
    assert max(sizes) == max_seq_len
    assert all(size > max_seq_len // 2 for size in sizes[max_seq_len:])
    assert moves == list(range(max_seq_len + 1, 101, max(1, max_seq_len // 2)))
