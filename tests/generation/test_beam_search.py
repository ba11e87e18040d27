import functools
import itertools
import math

import pytest
import torch

from generation.beam_search import beam_search
from generation.engine import window_start
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
def twin(model):
    return to_transformers(model)


def search_in_transformers(twin, num_beams, length_penalty=1.0, stop=(), **options):
    """(tokens, score) of num_beams texts. One beam is greedy there, and has no score: None."""
    out = twin.generate(
        torch.tensor([PROMPT]), num_beams=num_beams, num_return_sequences=num_beams, do_sample=False,
        early_stopping=False, length_penalty=length_penalty, eos_token_id=list(stop) or None, pad_token_id=0,
        max_new_tokens=12, return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    scores = [None] if num_beams == 1 else out.sequences_scores.tolist()
    rows = [
        itertools.takewhile(lambda token: token not in stop, row[len(PROMPT) :])
        for row in out.sequences.tolist()
    ]
    return list(zip(map(list, rows), scores, strict=True))


def plain_search(model, prompt, num_beams, max_new_tokens, length_penalty=1.0, stop=()):
    """The same search without a cache and without tensors to choose from: (tokens, score), best first."""
    live, finished = {(): 0.0}, {}
    for length in range(1, max_new_tokens + 1):
        texts = {}
        for text, logprob in live.items():
            tokens = [*prompt, *text]
            context = tokens[window_start(len(tokens), model.args.max_seq_len) :]
            with torch.no_grad():
                row = model(torch.tensor([context]))[0][0, -1].log_softmax(-1)
            texts |= {(*text, token): logprob + value for token, value in enumerate(row.tolist())}
        ranked = sorted(texts, key=texts.get, reverse=True)
        over = [text for text in ranked[:num_beams] if text[-1] in stop or length == max_new_tokens]
        finished |= {text: texts[text] / length**length_penalty for text in over}
        best = sorted(finished, key=finished.get, reverse=True)[:num_beams]
        live = {
            text: texts[text]
            for text in [text for text in ranked if text[-1] not in stop][:num_beams]
        }
        if (
            len(best) == num_beams
            and max(live.values()) / length**length_penalty <= finished[best[-1]]
        ):
            break
    return [([token for token in text if token not in stop], finished[text]) for text in best]


def assert_same(found, expected):
    assert [hypothesis.tokens for hypothesis in found] == [tokens for tokens, _ in expected]
    scores = [
        (hypothesis.score, score) for hypothesis, (_, score) in zip(found, expected, strict=True)
    ]
    assert all(score is None or abs(ours - score) < 1e-4 * abs(score) for ours, score in scores)


@pytest.mark.parametrize("stop", [(), (13,), STOP, range(0, 61, 2)], ids=len)
@pytest.mark.parametrize("length_penalty", PENALTIES)
@pytest.mark.parametrize("num_beams", [1, 2, 4, 7])
def test_texts_and_scores_equal_those_of_transformers(model, twin, num_beams, length_penalty, stop):
    found = beam_search(model, PROMPT, num_beams, 12, length_penalty, stop, num_best=num_beams)
    assert_same(found, search_in_transformers(twin, num_beams, length_penalty, stop))


def test_the_searches_compared_with_transformers_differ_and_end_in_every_way(model):
    """Else the test above could not fail."""
    searches = [
        beam_search(model, PROMPT, 4, 12, penalty, STOP, num_best=4) for penalty in PENALTIES
    ]
    assert len({str(texts) for texts in searches}) == len(PENALTIES)
    assert {"stop"} in [{text.finish for text in texts} for texts in searches]
    assert {"stop", "length"} in [{text.finish for text in texts} for texts in searches]


def test_forbidden_and_too_early_tokens_are_skipped_as_in_transformers(model, twin):
    """And keep their share of the probability, or the scores would differ."""
    plain = beam_search(model, PROMPT, 4, 12, stop=STOP, num_best=4)
    first, second = plain[0].tokens[0], plain[1].tokens[:2]
    forbidden = lambda tokens: [first, second[1]] if tokens[-1] == second[0] else [first]
    found = beam_search(
        model, PROMPT, 4, 12, stop=STOP, num_best=4, min_new_tokens=9, forbidden=forbidden
    )
    options = dict(min_new_tokens=9, bad_words_ids=[[first], second])
    assert_same(found, search_in_transformers(twin, 4, stop=STOP, **options))
    assert min(len(text.tokens) for text in plain) < 9


def test_forbidden_sees_the_prompt_and_all_new_tokens_of_its_own_beam(model):
    texts = beam_search(model, PROMPT, 4, 20, num_best=4, forbidden=lambda tokens: tokens)
    assert len(texts) == 4
    assert all(
        len({*PROMPT, *text.tokens}) == len(PROMPT) + 20 for text in texts
    )  # each token once


@pytest.mark.parametrize("min_new_tokens", [0, 1, 5, 12])
def test_no_text_has_fewer_than_min_new_tokens(model, min_new_tokens):
    stop = range(0, 61, 2)  # so many that each text would end early
    texts = beam_search(model, PROMPT, 4, 12, 0.0, stop, num_best=4, min_new_tokens=min_new_tokens)
    assert (
        min(len(text.tokens) for text in texts) == min_new_tokens
    )  # and none is held back any longer
    assert not any(token in stop for text in texts for token in text.tokens)


@pytest.mark.parametrize("length_penalty", PENALTIES)
def test_a_search_wide_enough_finds_every_text_in_order(length_penalty):
    """More beams than tokens, too: those that do not exist are not made up."""
    model, stop, found = random_model(vocab_size=4), 3, []
    for length in range(1, 4):
        for text in itertools.product(range(4), repeat=length):
            if stop not in text[:-1] and (text[-1] == stop or length == 3):
                tokens = torch.tensor([[1, 2, *text]])
                with torch.no_grad():
                    logprobs = (
                        model(tokens)[0][0, 1:-1].log_softmax(-1).gather(-1, tokens[0, 2:, None])
                    )
                finish, new = ("stop", text[:-1]) if text[-1] == stop else ("length", text)
                found.append(
                    (
                        list(new),
                        logprobs.sum().item(),
                        logprobs.sum().item() / length**length_penalty,
                        finish,
                    )
                )
    found.sort(key=lambda text: text[2], reverse=True)
    texts = beam_search(model, [1, 2], 64, 3, length_penalty, [stop], num_best=64)
    assert len(texts) == 1 + 3 + 9 * 4
    assert [(text.tokens, text.finish) for text in texts] == [
        (tokens, finish) for tokens, _, _, finish in found
    ]
    for text, (_, logprob, score, _) in zip(texts, found, strict=True):
        assert text.logprob == pytest.approx(logprob, abs=1e-4)
        assert text.score == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("stop", [(), STOP], ids=len)
def test_one_beam_is_greedy(model, stop):
    expected = list(PROMPT)
    with torch.no_grad():
        while len(expected) < 30 and expected[-1] not in stop:
            expected.append(model(torch.tensor([expected]))[0][0, -1].argmax().item())
    (text,) = beam_search(model, PROMPT, 1, 27, stop=stop)
    assert PROMPT + text.tokens == [token for token in expected if token not in stop]
    assert text.finish == ("stop" if stop else "length")


@pytest.mark.parametrize("stop", [(), (16, 45)], ids=len)
@pytest.mark.parametrize("prompt", [[1], list(range(8)), list(range(21))], ids=len)
@pytest.mark.parametrize("max_seq_len", [8, 7, 2])
def test_past_max_seq_len_the_texts_are_those_of_a_search_without_a_cache(
    max_seq_len, prompt, stop
):
    model = random_model(max_seq_len=max_seq_len, tie_embeddings=False)
    found = beam_search(model, prompt, 3, 20, 2.0, stop, num_best=3)
    assert_same(found, plain_search(model, prompt, 3, 20, 2.0, stop))


def test_the_prompt_is_read_once_and_then_one_token_of_every_beam(model, monkeypatch):
    """And the classifier, whose product is the largest, sees the last position alone."""
    read, classified, hidden, prompt = [], [], model.forward_hidden, list(PROMPT)

    def noted(tokens, cache, start_pos):
        read.append((*tokens.shape, start_pos))
        return hidden(tokens, cache, start_pos)

    monkeypatch.setattr(model, "forward_hidden", noted)
    hook = model.output.register_forward_hook(
        lambda layer, inputs, output: classified.append(inputs[0].shape)
    )
    beam_search(model, prompt, 4, 6)
    hook.remove()
    assert read == [(1, 3, 0), *((4, 1, position) for position in range(3, 8))]
    assert classified == [(1, 32), *[(4, 32)] * 5]
    assert prompt == PROMPT


def test_under_autocast_the_cache_has_its_type(model, monkeypatch):
    made = []
    new_cache = model.new_kv_cache
    monkeypatch.setattr(
        model, "new_kv_cache", lambda *args: made.append(new_cache(*args)) or made[-1]
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (text,) = beam_search(model, PROMPT, 4, 12)
    assert [cache.keys[0].dtype for cache in made] == [torch.bfloat16]
    with torch.no_grad():
        tokens = torch.tensor([PROMPT + text.tokens])
        logprobs = model(tokens)[0][0, 2:-1].log_softmax(-1).gather(-1, tokens[0, 3:, None])
    assert text.logprob == pytest.approx(logprobs.sum().item(), rel=0.05)  # bfloat16 has 8 bits


def test_a_search_without_a_way_on_returns_what_has_ended_before_or_says_so(model):
    everything = range(61)
    with pytest.raises(ValueError, match="no token is left"):
        beam_search(model, PROMPT, 4, 12, forbidden=lambda tokens: everything)
    with pytest.raises(ValueError, match="no token is left"):
        beam_search(model, PROMPT, 4, 12, stop=everything, min_new_tokens=1)
    only_stop = lambda tokens: everything[:7] if len(tokens) == len(PROMPT) else everything
    texts = beam_search(model, PROMPT, 61, 12, stop=[7], num_best=4, forbidden=only_stop)
    assert [(text.tokens, text.finish) for text in texts] == [([], "stop")]


@pytest.mark.parametrize(
    "mistake",
    [
        dict(num_beams=0), dict(num_beams=-1), dict(num_best=0), dict(num_best=4), dict(max_new_tokens=0),
        dict(length_penalty=math.nan), dict(length_penalty=1e4), dict(prompt=[]),
    ],
    ids=str,
)  # fmt: skip
def test_an_impossible_argument_is_named(model, mistake):
    arguments = dict(prompt=PROMPT, num_beams=3, max_new_tokens=4) | mistake
    with pytest.raises(ValueError, match=next(iter(mistake))):
        beam_search(model, **arguments)
