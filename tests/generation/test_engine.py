import functools
import itertools

import pytest
import torch

from generation import engine as engine_module
from generation.banned_strings import BannedStrings
from generation.batch import MIN_SHARED_PREFIX
from generation.engine import InferenceEngine, generate_tokens
from generation.inference_model import convert_weights
from generation.prepared_model import PreparedModel
from generation.request import Request, context_start
from generation.sampling_params import SamplingParams
from generation.steps import decode_loop, decode_step
from tests import helpers
from tests.helpers import generate_batch, run_requests

V = helpers.GENERATION_MODEL["vocab_size"]
random_model = functools.partial(helpers.random_model, helpers.GENERATION_MODEL, 0.3)
GREEDY = dict(temperature=0)
TOKEN_BYTES = [b"%c" % (40 + token) for token in range(V)]


def several_tokens_step(model, cache, inputs, num_tokens):
    """As a CompiledStep: several tokens per call, and the positions are not exact."""
    if inputs.tokens.shape[1] > 1:
        return decode_step(model, cache, inputs)
    inputs = inputs._replace(kv_len=inputs.kv_len + num_tokens - 1)
    return decode_loop(model, cache, inputs, torch.tensor(num_tokens))


several_tokens_step.max_tokens = 8


class StepsOfAllRows:
    """As a StepCompiler that has a step for each number of rows; it computes free rows too."""

    failures = ()
    workers = ()

    def find(self, rows, length):
        return several_tokens_step

    def start(self, rows, length):
        pass


def prepare_with_draft(model, compiler=None):
    draft = PreparedModel(convert_weights(model, "draft"), compiler=compiler)
    return PreparedModel(model, draft=draft, compiler=compiler)


PREPARE = {
    "uncompiled": PreparedModel,
    "fixed batch size": lambda model: PreparedModel(model, compiler=StepsOfAllRows()),
    "draft model": prepare_with_draft,
    "draft model, several tokens": lambda model: prepare_with_draft(model, StepsOfAllRows()),
}
all_steps = pytest.mark.parametrize("prepare", PREPARE.values(), ids=PREPARE)


def random_tokens(*lengths) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(V, (length,), generator=generator).tolist() for length in lengths]


def run_alone(model, request) -> list[int]:
    """The tokens of the same request in an engine of its own."""
    return run_requests(model, [Request(request.tokens, request.params, request.index)], 1)[0]


def greedy_without_cache(model, prompt, count) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            context = tokens[context_start(len(tokens), model.args.max_seq_len) :]
            tokens.append(model(torch.tensor([context]))[0][0, -1].argmax().item())
    return tokens[len(prompt) :]


PROMPTS = [[1], [1, 5, 9, 2, 7], list(range(16)), list(range(40))]


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@pytest.mark.parametrize("max_seq_len", [16, pytest.param(15, marks=pytest.mark.slow), 1])
def test_cached_and_uncached_tokens_are_equal_past_max_seq_len(prompt, max_seq_len):
    """nanoGPT PR #613: the cache changed the output."""
    model = random_model(max_seq_len=max_seq_len)
    expected = greedy_without_cache(model, prompt, 100)
    assert generate_tokens(model, prompt, max_new_tokens=100, **GREEDY) == expected


@pytest.mark.slow
@pytest.mark.parametrize("max_seq_len", [2000, 300])
def test_1000_cached_tokens_equal_uncached_ones(max_seq_len):
    model = random_model(max_seq_len=max_seq_len)
    expected = greedy_without_cache(model, [1, 2, 3], 1000)
    for prepare in PREPARE.values():
        tokens = generate_tokens(prepare(model), [1, 2, 3], max_new_tokens=1000, **GREEDY)
        assert tokens == expected
    assert len(set(expected)) > 10


OPTIONS = [
    GREEDY,
    dict(top_k=20, top_p=0.9, repetition_penalty=1.1),
    dict(top_p=0.6),
    dict(temperature=2.0, top_k=3, min_new_tokens=30),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("length", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_batch_generates_what_each_request_generates_alone(options, length):
    """Of different lengths, past the context; some end early, so that rows become free."""
    model = random_model(max_seq_len=length * 6 // 10)
    prompts = random_tokens(1, 30, 7, length * 62 // 100, 2)
    generate = functools.partial(generate_batch, max_new_tokens=length, **options)
    assert generate(model, prompts, 5) == generate(model, prompts, 1)
    stop_ids = [V - 1, 17]
    expected = generate(model, prompts, 1, stop_ids=stop_ids)
    for prepare in PREPARE.values():
        assert generate(prepare(model), prompts, 3, stop_ids=stop_ids) == expected
    lengths = [len(tokens) - len(prompt) for tokens, prompt in zip(expected, prompts, strict=True)]
    num_early = sum(count < length for count in lengths)
    assert num_early == 5 if length == 1000 else num_early > 0


MIXED_OPTIONS = [
    *OPTIONS,
    dict(min_p=0.1, seed=5, max_new_tokens=70),
    dict(banned_strings=BannedStrings(["+", "AB"], TOKEN_BYTES)),
    dict(stop_ids=range(20), min_new_tokens=10),
    dict(repetition_penalty=5.0, top_k=4),
]


@all_steps
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_requests_of_one_batch_may_differ_in_all_options(prepare, batch_size):
    model = random_model(max_seq_len=48)
    requests = [
        Request(prompt, SamplingParams(**dict(max_new_tokens=60) | options), index)
        for index, (prompt, options) in enumerate(
            zip(random_tokens(1, 30, 7, 60, 2, 4, 9, 50), MIXED_OPTIONS, strict=True)
        )
    ]
    expected = [run_alone(model, request) for request in requests]
    assert run_requests(prepare(model), requests, batch_size) == expected


@all_steps
def test_a_conversation_continues_in_any_batch_as_if_alone(prepare):
    """The cache may hold other requests, or more than the tokens that are shared."""
    model, params = random_model(max_seq_len=128), SamplingParams(30, stop_ids=(V - 1, 7))
    a, b, c = random_tokens(3, 49, 1)
    tokens = {"a": a, "b": b, "c": c}
    engine = InferenceEngine(prepare(model), 2)
    other = InferenceEngine(prepare(model), 2)
    for names in ("a", "ba", "ba", "abc", "cb", "c", "ca", "aa", "abc", "b", "abc"):
        requests = [Request(tokens[name], params, index) for index, name in enumerate(names)]
        expected = [run_alone(model, request) for request in requests]
        list((other if names == "c" else engine).generate(requests))
        assert [request.tokens for request in requests] == expected
        for name, request in zip(names, requests, strict=True):
            tokens[name] = [*request.tokens, 3, 1, 4]
    assert max(map(len, tokens.values())) > 128


@all_steps
@pytest.mark.parametrize("count", [0, 3, 17])
def test_a_conversation_continues_after_an_unfinished_iteration(prepare, count):
    """The tokens after those that were read are not used."""
    model, params = random_model(max_seq_len=64), SamplingParams(20, **GREEDY)
    engine, prompt = InferenceEngine(prepare(model)), random_tokens(40)[0]
    request = Request(prompt, params)
    new_tokens = [new.token for new in itertools.islice(engine.generate([request]), count)]
    assert new_tokens == generate_tokens(model, prompt, max_new_tokens=20, **GREEDY)[:count]
    assert not engine.has_requests
    following = [*prompt, *new_tokens, 3, 1, 4, 1, 5, 9, 2, 6]
    expected = run_alone(model, Request(following, params))
    assert run_requests_in(engine, [Request(following, params)]) == [expected]


def run_requests_in(engine, requests) -> list[list[int]]:
    list(engine.generate(requests))
    return [request.tokens for request in requests]


def spy_on_forward_shapes(model, monkeypatch) -> list[torch.Size]:
    """A list that will have the shape of the tokens (B, T) of each pass of the model."""
    shapes = []
    forward_hidden = model.forward_hidden

    def spy(tokens, *args, **kwargs):
        shapes.append(tuple(tokens.shape))
        return forward_hidden(tokens, *args, **kwargs)

    monkeypatch.setattr(model, "forward_hidden", spy)
    return shapes


@pytest.mark.parametrize("length", [MIN_SHARED_PREFIX - 1, MIN_SHARED_PREFIX, 40])
def test_a_continued_request_is_not_prefilled_again(length, monkeypatch):
    """If it shares MIN_SHARED_PREFIX tokens with what a row has cached."""
    model, (prompt,) = random_model(max_seq_len=128), random_tokens(length - 9)
    engine, params = InferenceEngine(model), SamplingParams(10)
    (tokens,) = run_requests_in(engine, [Request(prompt, params)])  # all but one are cached
    shapes = spy_on_forward_shapes(model, monkeypatch)
    run_requests_in(engine, [Request([*tokens, 4, 5], params)])
    is_shared = length >= MIN_SHARED_PREFIX
    # The last generated token and the two new ones.
    assert shapes == [(1, 3 if is_shared else length + 3), *[(1, 1)] * 9]


def test_a_prefix_is_shared_with_a_running_request_too(monkeypatch):
    """A system prompt that several conversations begin with is computed once."""
    model, (prompt,) = random_model(max_seq_len=128), random_tokens(50)
    requests = [Request([*prompt, index], SamplingParams(20), index) for index in range(3)]
    expected = [run_alone(model, request) for request in requests]
    engine = InferenceEngine(model, 3)
    shapes = spy_on_forward_shapes(model, monkeypatch)
    engine.add(requests[0])
    engine.step()
    assert run_requests_in(engine, requests[1:]) == expected[1:]
    assert requests[0].tokens == expected[0]
    assert [shape for shape in shapes if shape[1] > 1] == [(1, 51)]


def test_short_prompts_are_prefilled_together(monkeypatch):
    model, requests = random_model(), [Request(prompt) for prompt in random_tokens(6, 3, 5)]
    engine = InferenceEngine(model, 3)
    shapes = spy_on_forward_shapes(model, monkeypatch)
    for request in requests:
        engine.add(request)
    assert [new.request for new in engine.step()] == requests
    assert shapes == [(3, 6)]


def test_prompts_prefilled_together_stay_within_the_cache():
    """The padding of a short one, after its cached prefix, was written past the end of it."""
    model, params = random_model(max_seq_len=512), SamplingParams(1)
    prefix, long = random_tokens(40, 110)
    engine = InferenceEngine(model, 2)
    run_requests_in(engine, [Request(prefix, params)])
    requests = [Request(long, params), Request([*prefix, 1, 2], params)]
    expected = [run_alone(model, request) for request in requests]
    assert run_requests_in(engine, requests) == expected


@pytest.mark.parametrize("num_running", [1, 2])
def test_a_long_prompt_is_prefilled_while_others_are_decoded(num_running, monkeypatch):
    """In chunks, so that each of the others gets a token in every step."""
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 8)
    model = random_model(max_seq_len=64)
    engine, params = InferenceEngine(model, 3), SamplingParams(40)
    running = [Request([1], params, index) for index in range(num_running)]
    joining = Request(random_tokens(44)[0], params, 7)
    expected = [run_alone(model, request) for request in (*running, joining)]
    for request in running:
        engine.add(request)
    engine.step()
    engine.add(joining)
    shapes = spy_on_forward_shapes(model, monkeypatch)
    for number in range(1, 6):
        assert [new.request for new in engine.step()] == running
        assert shapes == [(1, 8), (num_running + 1, 1)] * number  # a row without a new token too
    requests = [new.request for new in engine.step()]
    assert requests[0] is joining and set(running) <= set(requests)
    assert max(shape[1] for shape in shapes) == 8
    while engine.has_requests:
        engine.step()
    assert [request.tokens for request in (*running, joining)] == expected


def test_a_request_that_outgrows_its_context_does_not_delay_others(monkeypatch):
    """Its context is computed again in chunks while the others are decoded."""
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 8)
    model = random_model(max_seq_len=64)
    engine, params = InferenceEngine(model, 2), SamplingParams(60, **GREEDY)
    other, growing = Request([1], params), Request(random_tokens(50)[0], params)
    expected = [run_alone(model, request) for request in (other, growing)]
    engine.add(other)
    engine.add(growing)
    shapes = spy_on_forward_shapes(model, monkeypatch)
    engine.step()
    engine.step()
    shapes.clear()
    while not other.finish_reason:
        assert other in [new.request for new in engine.step()]
    assert max(shape[1] for shape in shapes) == 8
    while engine.has_requests:
        engine.step()
    assert [other.tokens, growing.tokens] == expected


def test_a_cancelled_request_frees_its_row_at_once():
    model, params = random_model(), SamplingParams(10)
    running, waiting, third = [Request([1], params, index) for index in range(3)]
    expected = run_alone(model, third)
    engine = InferenceEngine(model)
    for request in (running, waiting, third):
        engine.add(request)
    assert [new.request for new in engine.step()] == [running]
    engine.cancel(waiting)
    engine.cancel(running)
    assert engine.batch.num_active == 0
    assert [new.request for new in engine.step()] == [third]
    while engine.has_requests:
        engine.step()
    assert [request.finish_reason for request in (running, waiting)] == ["cancelled"] * 2
    assert (third.tokens, third.finish_reason) == (expected, "length")
    assert running.num_generated == 1 and waiting.num_generated == 0


def test_a_free_row_with_a_full_context_is_no_error():
    """A step with a fixed number of rows computes it too, at a position after its tokens."""
    model = random_model(max_seq_len=16)
    running = [Request([1], SamplingParams(40), index) for index in range(2)]
    full = Request(list(range(16)), SamplingParams(5, stop_ids=range(V)))
    expected = [run_alone(model, request) for request in running]
    tokens = run_requests(PREPARE["fixed batch size"](model), [*running, full], 3)
    assert tokens == [*expected, list(range(16))] and full.finish_reason == "stop"


def test_a_request_without_tokens_left_does_not_disturb_others():
    model = random_model()
    bad = Request([1], SamplingParams(5, stop_ids=range(V), min_new_tokens=1))
    good = Request([1, 2], SamplingParams(5))
    expected = run_alone(model, good)
    engine = InferenceEngine(model, 2)
    engine.add(bad)
    engine.add(good)
    while engine.has_requests:
        engine.step()
    assert (bad.finish_reason, bad.completion) == ("error", [])
    assert "no token is left" in bad.error
    assert good.tokens == expected


def test_an_error_says_that_no_token_is_left():
    options = dict(stop_ids=range(V), max_new_tokens=5, min_new_tokens=1)
    with pytest.raises(ValueError, match="no token is left"):
        generate_tokens(random_model(), [1], **options)


@pytest.mark.parametrize("prompt", [[1], [1, 2, 3]], ids=len)
def test_nan_logits_are_reported(prompt):
    model = random_model()
    with torch.no_grad():
        model.norm.weight.fill_(3e38)  # its products overflow
    with pytest.raises(ValueError, match="logits are not numbers"):
        generate_tokens(model, prompt, max_new_tokens=5)


@all_steps
def test_logprobs_are_those_of_the_model(prepare):
    """In its own distribution, before temperature and truncation."""
    model, prompt = random_model(max_seq_len=64), [1, 2, 3]
    params = SamplingParams(30, temperature=0.5, top_k=5, logprobs=3)
    request = Request(prompt, params)
    *new_tokens, end = InferenceEngine(prepare(model)).generate([request])
    assert end.token is None and end.logprob is None
    with torch.no_grad():
        logprobs = model(torch.tensor([request.tokens[:-1]]))[0][0, 2:].log_softmax(-1)
    for row, new in zip(logprobs, new_tokens, strict=True):
        assert new.logprob == pytest.approx(row[new.token].item(), abs=1e-4)
        top = row.topk(3)
        assert [token for token, _ in new.top_logprobs] == top.indices.tolist()
        top_logprobs = [logprob for _, logprob in new.top_logprobs]
        assert top_logprobs == pytest.approx(top.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("token", [-1, V])
def test_a_token_outside_the_vocabulary_is_refused(token):
    with pytest.raises(ValueError, match=f"outside 0 to {V - 1}"):
        generate_tokens(random_model(), [1, token])


def test_a_top_p_that_float32_rounds_to_0_is_greedy():
    """Sampling did not end."""
    model, options = random_model(), dict(max_new_tokens=20)
    expected = generate_tokens(model, [1], **options, temperature=0)
    assert generate_tokens(model, [1], **options, top_p=1e-50) == expected


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="begin with at least one token"):
        Request([])


def test_a_batch_size_of_0_is_refused():
    with pytest.raises(ValueError, match="batch_size=0: must be"):
        InferenceEngine(random_model(), 0)


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


@all_steps
@pytest.mark.parametrize("count", [1, 20])
def test_generates_max_new_tokens(prepare, count):
    request = Request([1], SamplingParams(count))
    *new_tokens, end = InferenceEngine(prepare(random_model())).generate([request])
    assert len(request.completion) == len(new_tokens) == request.num_generated == count
    assert end.token is None and request.finish_reason == "length"


@all_steps
@pytest.mark.parametrize("position", [0, 1, 30])
def test_ends_before_the_first_stop_token(prepare, position):
    """nanoGPT #36, llama2.c PR #243: text went on after its end."""
    model = random_model()
    unstopped = generate_tokens(model, [1], max_new_tokens=60, **GREEDY)
    stop = unstopped[position]
    request = Request([1], SamplingParams(60, stop_ids={stop, V + 1}, **GREEDY))
    list(InferenceEngine(prepare(model)).generate([request]))
    assert request.completion == unstopped[: unstopped.index(stop)]
    assert request.finish_reason == "stop"


@all_steps
@pytest.mark.parametrize("count", [0, 1, 5, 40])
def test_does_not_stop_before_min_new_tokens(prepare, count):
    model, options = random_model(), dict(max_new_tokens=60, min_new_tokens=count, **GREEDY)
    generate = functools.partial(generate_tokens, prepare(model), [1], **options)
    assert generate(stop_ids=range(V - 1)) == [V - 1] * count
    first = generate_tokens(model, [1], max_new_tokens=1, **GREEDY)[0]
    assert generate(stop_ids={first})[:1] != [first]


@all_steps
def test_a_repetition_penalty_prevents_greedy_repetition(prepare):
    model, options = random_model(), dict(max_new_tokens=15, **GREEDY)
    assert len(set(generate_tokens(model, [1], **options))) < 15
    penalized = generate_tokens(prepare(model), [1], **options, repetition_penalty=100)
    assert len({1, *penalized}) == 16


@all_steps
def test_no_completion_contains_a_banned_string(prepare):
    """Not across tokens either, nor together with the end of the prompt."""
    model, options = random_model(), dict(max_new_tokens=80, **GREEDY)
    unbanned = [1, *generate_tokens(model, [1], **options)]
    text = b"".join(TOKEN_BYTES[token] for token in unbanned).decode()
    strings = [text[:2], text[5:8], text[20:21]]
    banned = BannedStrings(strings, TOKEN_BYTES)
    tokens = [1, *generate_tokens(prepare(model), [1], banned_strings=banned, **options)]
    text = b"".join(TOKEN_BYTES[token] for token in tokens).decode()
    assert len(text) == 81 and not any(string in text for string in strings)


def test_samples_depend_on_seed_and_request_index_only():
    def sample(seed: int, index: int = 0) -> list[int]:
        params = SamplingParams(40, top_k=30, top_p=0.95, seed=seed)
        return run_requests(random_model(), [Request([1], params, index)], 1)[0]

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
