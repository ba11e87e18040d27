import functools
import itertools
import math

import pytest
import torch

from generation.beam_search import BeamSearchParams, beam_search
from generation.request import context_start
from tests import helpers
from tests.helpers import to_transformers

random_model = functools.partial(helpers.random_model, helpers.REFERENCE_MODEL, 0.2)

PROMPT = [1, 5, 9]
PENALTIES = [0.0, 1.0, 2.0, -1.0]
STOP = (38, 13, 27)  # tokens that the model likes


@pytest.fixture(scope="module")
def model():
    """Untied, so that it does not merely repeat the last token."""
    return random_model(n_kv_heads=2, tie_embeddings=False)


@pytest.fixture(scope="module")
def transformers_model(model):
    return to_transformers(model)


def search(model, num_beams, stop_ids=(), prompt=PROMPT, **options):
    """All num_beams hypotheses, of up to 12 new tokens unless options differ."""
    defaults = dict(max_new_tokens=12, num_best=num_beams)
    params = BeamSearchParams(num_beams, **defaults | options)
    return beam_search(model, prompt, params, stop_ids)


def search_in_transformers(model, num_beams, length_penalty=1.0, stop_ids=(), **options):
    """(tokens, score) of num_beams sequences. One beam is greedy there, without a score: None."""
    output = model.generate(
        torch.tensor([PROMPT]),
        num_beams=num_beams,
        num_return_sequences=num_beams,
        do_sample=False,
        early_stopping=False,
        length_penalty=length_penalty,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=0,
        max_new_tokens=12,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    scores = [None] if num_beams == 1 else output.sequences_scores.tolist()
    completions = [
        list(itertools.takewhile(lambda token: token not in stop_ids, row[len(PROMPT) :]))
        for row in output.sequences.tolist()
    ]
    return list(zip(completions, scores, strict=True))


def simple_search(model, prompt, params, stop_ids):
    """The same search with dictionaries, without a cache: (tokens, score), best first."""
    max_new_tokens, penalty = params.max_new_tokens, params.length_penalty
    live, finished = {(): 0.0}, {}
    for length in range(1, max_new_tokens + 1):
        logprobs = {}
        for beam, logprob in live.items():
            tokens = [*prompt, *beam]
            context = tokens[context_start(len(tokens), model.args.max_seq_len) :]
            with torch.no_grad():
                row = model(torch.tensor([context]))[0][0, -1].log_softmax(-1)
            logprobs |= {
                (*beam, token): logprob + value for token, value in enumerate(row.tolist())
            }
        ranked = sorted(logprobs, key=logprobs.get, reverse=True)
        for beam in ranked[: params.num_beams]:
            if beam[-1] in stop_ids or length == max_new_tokens:
                finished[beam] = logprobs[beam] / length**penalty
        best = sorted(finished, key=finished.get, reverse=True)[: params.num_beams]
        unstopped = [beam for beam in ranked if beam[-1] not in stop_ids]
        live = {beam: logprobs[beam] for beam in unstopped[: params.num_beams]}
        is_full = len(best) == params.num_beams
        if is_full and max(live.values()) / length**penalty <= finished[best[-1]]:
            break
    return [([token for token in beam if token not in stop_ids], finished[beam]) for beam in best]


def assert_same(hypotheses, expected):
    assert [hypothesis.tokens for hypothesis in hypotheses] == [tokens for tokens, _ in expected]
    for hypothesis, (_, score) in zip(hypotheses, expected, strict=True):
        assert score is None or abs(hypothesis.score - score) < 1e-4 * abs(score)


@pytest.mark.parametrize("stop_ids", [(), (13,), STOP, range(0, 61, 2)], ids=len)
@pytest.mark.parametrize("length_penalty", PENALTIES)
@pytest.mark.parametrize("num_beams", [1, 2, 4, 7])
def test_hypotheses_and_scores_equal_those_of_transformers(
    model, transformers_model, num_beams, length_penalty, stop_ids
):
    hypotheses = search(model, num_beams, stop_ids, length_penalty=length_penalty)
    expected = search_in_transformers(transformers_model, num_beams, length_penalty, stop_ids)
    assert_same(hypotheses, expected)


def test_the_searches_compared_with_transformers_differ(model):
    """And end in every way, else the test above could not fail."""
    searches = [search(model, 4, STOP, length_penalty=penalty) for penalty in PENALTIES]
    assert len({str(hypotheses) for hypotheses in searches}) == len(PENALTIES)
    reasons = [{hypothesis.finish for hypothesis in hypotheses} for hypotheses in searches]
    assert {"stop"} in reasons and {"stop", "length"} in reasons


def test_banned_and_early_stop_tokens_are_skipped_as_in_transformers(model, transformers_model):
    """The other tokens do not gain their probability, or the scores would differ."""
    unbanned = search(model, 4, STOP)
    first, second = unbanned[0].tokens[0], unbanned[1].tokens[:2]

    def banned_tokens(tokens):
        return [first, second[1]] if tokens[-1] == second[0] else [first]

    hypotheses = search(model, 4, STOP, min_new_tokens=9, banned_tokens=banned_tokens)
    options = dict(min_new_tokens=9, bad_words_ids=[[first], second])
    expected = search_in_transformers(transformers_model, 4, stop_ids=STOP, **options)
    assert_same(hypotheses, expected)
    assert min(len(hypothesis.tokens) for hypothesis in unbanned) < 9


def test_banned_tokens_gets_the_prompt_and_tokens_of_each_beam(model):
    hypotheses = search(model, 4, max_new_tokens=20, banned_tokens=lambda tokens: tokens)
    assert len(hypotheses) == 4
    for hypothesis in hypotheses:  # each token occurs once
        assert len({*PROMPT, *hypothesis.tokens}) == len(PROMPT) + 20


@pytest.mark.parametrize("min_new_tokens", [0, 1, 5, 12])
def test_no_hypothesis_has_fewer_than_min_new_tokens(model, min_new_tokens):
    stop_ids = range(0, 61, 2)  # so many that each would end early
    hypotheses = search(model, 4, stop_ids, length_penalty=0.0, min_new_tokens=min_new_tokens)
    lengths = [len(hypothesis.tokens) for hypothesis in hypotheses]
    assert min(lengths) == min_new_tokens  # and none is suppressed any longer
    assert not any(token in stop_ids for hyp in hypotheses for token in hyp.tokens)


def all_completions(model, stop_id):
    """(tokens, logprob, length, finish) of each completion of [1, 2] with up to 3 tokens."""
    completions = []
    for length in range(1, 4):
        for tokens in itertools.product(range(4), repeat=length):
            if stop_id in tokens[:-1] or (tokens[-1] != stop_id and length < 3):
                continue
            ids = torch.tensor([[1, 2, *tokens]])
            with torch.no_grad():
                logprobs = model(ids)[0][0, 1:-1].log_softmax(-1).gather(-1, ids[0, 2:, None])
            is_stopped = tokens[-1] == stop_id
            completion = list(tokens[:-1] if is_stopped else tokens)
            finish = "stop" if is_stopped else "length"
            completions.append((completion, logprobs.sum().item(), length, finish))
    return completions


@pytest.mark.parametrize("length_penalty", PENALTIES)
def test_a_search_wide_enough_finds_all_completions_in_order(length_penalty):
    """With more beams than tokens, too: those that do not exist are not made up."""
    model, stop_id = random_model(vocab_size=4), 3
    expected = sorted(
        all_completions(model, stop_id), key=lambda c: c[1] / c[2] ** length_penalty, reverse=True
    )
    hypotheses = search(
        model, 64, [stop_id], prompt=[1, 2], max_new_tokens=3, length_penalty=length_penalty
    )
    assert len(hypotheses) == 1 + 3 + 9 * 4
    for hypothesis, (tokens, logprob, length, finish) in zip(hypotheses, expected, strict=True):
        assert (hypothesis.tokens, hypothesis.finish) == (tokens, finish)
        assert hypothesis.logprob == pytest.approx(logprob, abs=1e-4)
        assert hypothesis.score == pytest.approx(logprob / length**length_penalty, abs=1e-4)


@pytest.mark.parametrize("stop_ids", [(), STOP], ids=len)
def test_one_beam_is_greedy(model, stop_ids):
    expected = list(PROMPT)
    with torch.no_grad():
        while len(expected) < 30 and expected[-1] not in stop_ids:
            expected.append(model(torch.tensor([expected]))[0][0, -1].argmax().item())
    (hypothesis,) = search(model, 1, stop_ids, max_new_tokens=27)
    assert PROMPT + hypothesis.tokens == [token for token in expected if token not in stop_ids]
    assert hypothesis.finish == ("stop" if stop_ids else "length")


@pytest.mark.parametrize("stop_ids", [(), (16, 45)], ids=len)
@pytest.mark.parametrize("prompt", [[1], list(range(8)), list(range(21))], ids=len)
@pytest.mark.parametrize("max_seq_len", [8, 7, 2])
def test_past_max_seq_len_the_cache_changes_nothing(max_seq_len, prompt, stop_ids):
    model = random_model(max_seq_len=max_seq_len, tie_embeddings=False)
    params = BeamSearchParams(3, max_new_tokens=20, length_penalty=2.0, num_best=3)
    hypotheses = beam_search(model, prompt, params, stop_ids)
    assert_same(hypotheses, simple_search(model, prompt, params, stop_ids))


def test_the_prompt_is_read_once_then_one_token_per_beam(model, monkeypatch):
    """And the LM head, whose product is the largest, sees the last position only."""
    inputs, head_inputs, prompt = [], [], list(PROMPT)
    forward_hidden = model.forward_hidden

    def spy(tokens, cache, start_pos, **options):
        inputs.append((*tokens.shape, start_pos))
        return forward_hidden(tokens, cache, start_pos, **options)

    monkeypatch.setattr(model, "forward_hidden", spy)
    hook = model.output.register_forward_hook(
        lambda layer, args, output: head_inputs.append(args[0].shape)
    )
    search(model, 4, prompt=prompt, max_new_tokens=6)
    hook.remove()
    assert inputs == [(1, 3, 0), *((4, 1, position) for position in range(3, 8))]
    assert head_inputs == [(1, 32), *[(4, 32)] * 5]
    assert prompt == PROMPT


def test_under_autocast_the_cache_has_its_dtype(model, monkeypatch):
    caches = []
    new_kv_cache = model.new_kv_cache

    def spy(*args):
        caches.append(new_kv_cache(*args))
        return caches[-1]

    monkeypatch.setattr(model, "new_kv_cache", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (hypothesis,) = search(model, 4, num_best=1)
    assert [cache.keys[0].dtype for cache in caches] == [torch.bfloat16]
    with torch.no_grad():
        tokens = torch.tensor([PROMPT + hypothesis.tokens])
        logprobs = model(tokens)[0][0, 2:-1].log_softmax(-1).gather(-1, tokens[0, 3:, None])
    assert hypothesis.logprob == pytest.approx(logprobs.sum().item(), rel=0.05)  # of 8 bits


def test_a_search_without_tokens_left_returns_what_is_finished(model):
    """Or says so, if nothing is finished."""
    everything = range(61)
    with pytest.raises(ValueError, match="no token is left"):
        search(model, 4, banned_tokens=lambda tokens: everything)
    with pytest.raises(ValueError, match="no token is left"):
        search(model, 4, everything, min_new_tokens=1)

    def all_but_stop_at_first(tokens):
        return everything[:7] if len(tokens) == len(PROMPT) else everything

    hypotheses = search(model, 61, [7], num_best=4, banned_tokens=all_but_stop_at_first)
    assert [(hypothesis.tokens, hypothesis.finish) for hypothesis in hypotheses] == [([], "stop")]


INVALID = [
    dict(num_beams=0),
    dict(num_beams=-1),
    dict(num_best=0),
    dict(num_best=4),
    dict(max_new_tokens=0),
    dict(length_penalty=math.nan),
    dict(length_penalty=1e4),
    dict(prompt=[]),
]


@pytest.mark.parametrize("invalid", INVALID, ids=str)
def test_an_invalid_argument_is_named(model, invalid):
    options = dict(prompt=PROMPT, num_beams=3, num_best=1, max_new_tokens=4) | invalid
    with pytest.raises(ValueError, match=next(iter(invalid))):
        search(model, **options)
