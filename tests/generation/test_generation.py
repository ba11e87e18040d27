import functools
import itertools
import math

import pytest
import torch

from generation.engine import Decoder, Decoding, Sequence, continuation, tell, window_start
from generation.sampling import (
    BadWords,
    choose,
    draw_key,
    gumbel_noise,
    penalize_repeats,
    truncate_min_p,
    truncate_top_k,
    truncate_top_p,
)
from generation.scoring import SCORED_AT_ONCE, log_probabilities
from generation.streaming import Story
from tests import helpers
from tests.helpers import generate_batch
from textdata.tokenizer import Tokenizer

INF = math.inf
V = helpers.GENERATION_MODEL["vocab_size"]
random_model = functools.partial(helpers.random_model, helpers.GENERATION_MODEL, 0.3)


GREEDY = dict(temperature=0)


@pytest.mark.parametrize(
    "prompt", [[1], [1, 5, 9, 2, 7], list(range(16)), list(range(40))], ids=len
)
@pytest.mark.parametrize("max_seq_len", [16, 15, 1])
def test_cached_and_uncached_greedy_tokens_are_equal_up_to_and_past_max_seq_len(
    prompt, max_seq_len
):
    """nanoGPT PR #613: the cache changed the output."""
    model, expected = random_model(max_seq_len=max_seq_len), list(prompt)
    with torch.no_grad():
        for _ in range(100):
            context = expected[window_start(len(expected), max_seq_len) :]
            expected.append(model(torch.tensor([context]))[0][0, -1].argmax().item())
    assert continuation(model, prompt, max_new_tokens=100, **GREEDY) == expected[len(prompt) :]
    uncached = Sequence(prompt)
    list(Decoder(model, Decoding(100, **GREEDY), use_cache=False).run([uncached]))
    assert uncached.tokens == expected


def tell_several(model, cache, token, starts, end, keys, stop_ids=(), **how):
    """What a compiled loop does: as many tokens as there are keys, if all are known but the last, and none
    but the last ends a text."""
    told = []
    for i in range(keys.shape[1]):
        logits, token, known = tell(model, cache, token, starts + i, end + i, keys[:, i:], **how)
        told.append(token)
        ends = torch.isin(token[:, 0], torch.tensor(stop_ids))
        if ((ends | ~known) & (starts > 0)).any():  # those at 0 are over
            break
    return logits, torch.cat(told, dim=1), known


HOW = {
    "": {},
    "of a fixed size": dict(tell=tell),
    "several at once": dict(tell=tell_several, at_once=5),
}


OPTIONS = [
    GREEDY,
    dict(top_k=20, top_p=0.9, repetition_penalty=1.1),
    dict(top_p=0.6),
    dict(temperature=2.0, top_k=3, min_new_tokens=30),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_texts_told_together_are_those_told_alone_over_1000_tokens(options):
    """Of different lengths, past the context; and some that end early, so that rows become free."""
    model, draw = random_model(max_seq_len=600), torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(V, (length,), generator=draw).tolist() for length in (1, 30, 7, 620, 2)
    ]
    for stop_ids, batch_size, how in (([], 5, ""), *(([V - 1, 17], 3, how) for how in HOW)):
        alone = generate_batch(model, prompts, 1, stop_ids, max_new_tokens=1000, **options)
        assert (
            generate_batch(
                model, prompts, batch_size, stop_ids, HOW[how], max_new_tokens=1000, **options
            )
            == alone
        )
    assert max(map(len, alone)) < 1000


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_texts_go_on_in_any_company_as_if_they_had_been_alone(how):
    """The cache that they left may hold others, or more than them."""
    model, draw = random_model(max_seq_len=64), torch.Generator().manual_seed(0)
    texts = [
        Sequence(torch.randint(V, (length,), generator=draw).tolist(), length)
        for length in (3, 9, 1)
    ]
    decoder, other = (Decoder(model, Decoding(30), 2, [V - 1, 7], **how) for _ in range(2))
    a, b, c = texts
    for company in ([a], [b, a], [b, a], [a, b, c], [c, b], [c], [c, b]):
        alone = [Sequence(text.tokens, text.sample) for text in company]
        for text in alone:
            list(Decoder(model, Decoding(30), 1, [V - 1, 7]).run([text]))
        list((other if company == [c] else decoder).run(company))
        assert [text.tokens for text in company] == [text.tokens for text in alone]
    for _ in decoder.run([a]):
        break  # and one that was broken off
    a.tokens += [3, 1, 4, 1, 5, 9, 2, 6]
    alone = Sequence(a.tokens, a.sample)
    list(Decoder(model, Decoding(30), 1, [V - 1, 7]).run([alone]))
    list(decoder.run([a]))
    assert a.tokens == alone.tokens


def test_what_was_told_ahead_is_not_taken_for_what_comes_after_a_break():
    model, text = random_model(max_seq_len=64), Sequence([1])
    decoder = Decoder(model, Decoding(20, **GREEDY), **HOW["several at once"])
    for number, _ in enumerate(decoder.run([text])):
        if number == 2:
            break
    text.tokens += [3, 1, 4, 1, 5, 9, 2, 6]
    alone = continuation(model, text.tokens, max_new_tokens=20, **GREEDY)
    list(decoder.run([text]))
    assert text.tokens[-20:] == alone


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_a_text_may_be_lengthened_as_soon_as_it_is_over(how):
    model, text, more = random_model(max_seq_len=64), Sequence([1]), [3, 1, 4, 1, 5, 9, 2, 6]
    decoder = Decoder(model, Decoding(20, **GREEDY), **how)
    for number, (_, token) in enumerate(decoder.run([text])):
        if number == 2:
            text.finish = "stop"
        if token is None:
            text.tokens += more
    alone = continuation(model, text.tokens, max_new_tokens=20, **GREEDY)
    list(decoder.run([text]))
    assert text.tokens[-20:] == alone


def test_a_text_that_goes_on_is_not_read_again():
    model, lengths = random_model(max_seq_len=64), []
    decoder, text = Decoder(model, Decoding(10)), Sequence([1, 2, 3])
    list(decoder.run([text]))
    hidden = model.forward_hidden
    model.forward_hidden = lambda tokens, *rest, **more: (
        lengths.append(tokens.shape[1]) or hidden(tokens, *rest, **more)
    )
    text.tokens += [4, 5]
    list(decoder.run([text]))
    assert lengths == [3, *[1] * 9]  # what was said last, and what was added


@pytest.mark.parametrize(
    "impossible", [lambda: Sequence([]), lambda: Decoder(random_model(), Decoding(), 0)]
)
def test_impossible_arguments_are_refused(impossible):
    with pytest.raises(ValueError, match=r"begin with at least one token|batch_size=0: must be"):
        impossible()


def test_greedy_tokens_of_the_model_under_test_vary():
    assert len(set(continuation(random_model(), [1], max_new_tokens=100, **GREEDY))) > 10


def test_the_prompt_is_left_as_it_was():
    prompt = [1, 2, 3]
    continuation(random_model(), prompt, max_new_tokens=5)
    assert prompt == [1, 2, 3]


def test_generates_under_autocast_past_max_seq_len():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(continuation(random_model(), [1], max_new_tokens=40, **GREEDY)) == 40


@pytest.mark.parametrize("count", [1, 20])
def test_yields_as_many_tokens_as_asked_for(count):
    assert len(continuation(random_model(), [1], max_new_tokens=count)) == count


@pytest.mark.parametrize("position", [0, 1, 30])
def test_ends_before_the_first_stop_token(position):
    """nanoGPT #36, llama2.c PR #243: text went on after its end."""
    model = random_model()
    free = continuation(model, [1], max_new_tokens=60, **GREEDY)
    stop = {free[position], V + 1}
    assert (
        continuation(model, [1], stop, max_new_tokens=60, **GREEDY)
        == free[: free.index(free[position])]
    )


@pytest.mark.parametrize("least", [0, 1, 5, 40])
def test_does_not_end_by_itself_before_min_new_tokens(least):
    model, options = random_model(), dict(max_new_tokens=60, min_new_tokens=least, **GREEDY)
    first = continuation(model, [1], max_new_tokens=1, **GREEDY)[0]
    told = continuation(model, [1], set(range(V - 1)), **options)
    assert told == [V - 1] * least  # the one token that ends nothing
    assert continuation(model, [1], {first}, **options)[:1] != [first]


def test_a_penalty_keeps_a_greedy_text_from_repeating_itself():
    model, options = random_model(), dict(max_new_tokens=15, **GREEDY)
    free = continuation(model, [1], **options)
    penalized = continuation(model, [1], **options, repetition_penalty=100)
    assert len(set(free)) < 15 and len({1, *penalized}) == 16


@pytest.mark.parametrize("added", [[], [3], [4, 5, 6]], ids=len)
def test_a_text_goes_on_after_what_was_added_as_if_it_had_been_there(added):
    model, text = random_model(), Sequence([1, 2])
    decoder = Decoder(model, Decoding(20, **GREEDY))
    for _ in range(4):  # past the context
        list(decoder.run([text]))
        text.tokens += added
        before = list(text.tokens)
        list(decoder.run([text]))
        assert text.tokens == before + continuation(model, before, max_new_tokens=20, **GREEDY)


@pytest.mark.parametrize(
    "option, value", [("temperature", -1), ("top_p", 0), ("min_new_tokens", 300), ("seed", -1)]
)
def test_impossible_options_are_refused(option, value):
    with pytest.raises(ValueError, match=f"{option}={value}: must be"):
        Decoding(**{option: value})


PIECES = [
    b"",
    b"a",
    b"b",
    b"c",
    b"ab",
    b"bc",
    b"ca",
    b"abc",
    b"cab",
    b"\xc3",
    b"\xab",
    "ë".encode(),
    "aë".encode(),
]


@pytest.mark.parametrize(
    "words", [["ab"], ["ca", "abc"], ["aa"], ["ë"], ["caë", "bb"], ["a", "b"], ["caab"]], ids=str
)
def test_bad_words_forbid_just_the_tokens_that_complete_one(words):
    bad, words = BadWords(words, PIECES), [word.encode() for word in words]
    for tokens in itertools.product(range(1, len(PIECES)), repeat=3):
        text = b"".join(PIECES[token] for token in tokens)
        if any(word in text for word in words):
            continue  # such a text does not come about
        completing = {
            i for i, piece in enumerate(PIECES) if any(word in text + piece for word in words)
        }
        assert set(bad.completed_by(list(tokens))) == completing


def test_where_no_token_is_left_that_is_said():
    with pytest.raises(ValueError, match="no token is left"):
        continuation(random_model(), [1], range(V), max_new_tokens=5, min_new_tokens=1)


def test_the_same_seed_draws_the_same_tokens_and_another_seed_or_sample_others():
    def drawn(seed: int, sample: int = 0) -> list[int]:
        sequence = Sequence([1], sample)
        list(Decoder(random_model(), Decoding(40, top_k=30, top_p=0.95, seed=seed)).run([sequence]))
        return sequence.tokens

    first = drawn(7)
    torch.manual_seed(99)  # of no concern to a draw by its own key
    assert drawn(7) == first != drawn(8)
    assert drawn(7, 1) != first


def kept(logits) -> list[set[int]]:
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in logits]


@pytest.mark.parametrize(
    "k, expected",
    [
        (1, {3}),
        (2, {0, 3}),
        (3, {0, 2, 3, 4}),  # the third and fourth are equally likely
        (4, {0, 2, 3, 4}),
        (5, {0, 1, 2, 3, 4}),
        (6, {0, 1, 2, 3, 4, 5}),
        (300, {0, 1, 2, 3, 4, 5}),
    ],
)
def test_top_k_keeps_the_k_likeliest_and_ties_with_the_last(k, expected):
    row = torch.tensor([2.0, 0.0, 1.0, 5.0, 1.0, -1.0])
    logits = torch.stack([row, row.flip(0)])
    truncated = truncate_top_k(logits, k)
    assert kept(truncated) == [expected, {5 - token for token in expected}]
    assert torch.equal(truncated[truncated.isfinite()], logits[truncated.isfinite()])


LIKELY = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15], dtype=torch.float64)  # in order: 1, 3, 4, 0, 2


@pytest.mark.parametrize(
    "p, expected",
    [
        (1e-9, {1}),
        (0.4 - 1e-6, {1}),
        (0.4 + 1e-6, {1, 3}),
        (0.7 - 1e-6, {1, 3}),
        (0.7 + 1e-6, {1, 3, 4}),
        (0.85 + 1e-6, {0, 1, 3, 4}),
        (0.95 + 1e-6, {0, 1, 2, 3, 4}),
        (1.0, {0, 1, 2, 3, 4}),
    ],
)
def test_top_p_keeps_the_fewest_likeliest_that_reach_p(p, expected):
    logits = torch.stack([LIKELY, LIKELY.flip(0)]).log() + 3
    truncated = truncate_top_p(logits, p)
    assert kept(truncated) == [expected, {4 - token for token in expected}]
    assert torch.equal(truncated[truncated.isfinite()], logits[truncated.isfinite()])


@pytest.mark.parametrize(
    "p, count", [(1e-9, 1), (0.125, 1), (0.25, 2), (0.5, 4), (0.51, 5), (0.875, 7), (1.0, 8)]
)
def test_top_p_keeps_exactly_enough_of_equally_likely_tokens(p, count):
    """Eighths add up without rounding, so that the sum equals p on the boundary."""
    assert len(kept(truncate_top_p(torch.zeros(1, 8), p))[0]) == count


def test_top_p_brings_back_nothing_that_top_k_left_out():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    assert kept(truncate_top_p(truncate_top_k(logits, 2), 0.999999)) == [{0, 1}]


@pytest.mark.parametrize("p", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
def test_min_p_keeps_what_transformers_keeps(p):
    logits = torch.randn(20, V, generator=torch.Generator().manual_seed(0)) * 3
    theirs = pytest.importorskip("transformers").MinPLogitsWarper(min_p=p)(None, logits)
    assert torch.equal(truncate_min_p(logits, p), theirs)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 10.0])
def test_repetition_penalty_is_that_of_transformers(penalty):
    draw = torch.Generator().manual_seed(0)
    logits, seen = (
        torch.randn(20, V, generator=draw) * 3,
        torch.randint(V, (20, 30), generator=draw),
    )
    theirs = pytest.importorskip("transformers").RepetitionPenaltyLogitsProcessor(penalty)(
        seen, logits.clone()
    )
    assert torch.equal(penalize_repeats(logits, seen, penalty), theirs)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """By definition: up to the stop string that is complete first, and of those the longest."""
    for end in range(len(text) + 1):
        if begins := [end - len(stop) for stop in stops if text[:end].endswith(stop)]:
            return text[: min(begins)], True
    return text, False


@pytest.mark.parametrize(
    "text, stops",
    [
        ("Once upon a time. The end", ["The end"]),
        ("Once upon a time.", ["The end"]),
        ("aaab", ["aab"]),
        ("ababac", ["abac", "xx"]),
        ("one\n\ntwo\n\nthree", ["\n\n"]),
        ("so he said", ["said", "he s", "aid"]),
        ("The en", ["The end"]),
        ("nothing stops", []),
        ("", ["x"]),
        ("xyz", ["x", "xyz"]),
    ],
)
def test_a_stop_string_ends_the_text_wherever_its_pieces_are_cut(text, stops):
    """nanoGPT #36: and nothing of the stop string is shown before it is known to be one."""

    def run(pieces):
        story = Story(Spelled(["", *pieces]), "", stops=stops)
        shown = ""
        for token in [*range(1, len(pieces) + 1), None]:
            shown += story.show(token)
            if story.finish:
                break
        return shown + story.show(None) if story.finish else shown, bool(story.finish)

    assert run(text) == cut(text, stops)  # a character at a time
    for places in itertools.combinations(range(len(text) + 1), 2):
        pieces = [text[: places[0]], text[places[0] : places[1]], "", text[places[1] :]]
        assert run(pieces) == cut(text, stops)


class Spelled(Tokenizer):
    """A vocabulary of these pieces; a text is its first one."""

    def __init__(self, pieces):
        self.token_bytes, self.bos_id = [piece.encode() for piece in pieces], None

    def encode(self, text, bos):
        return [0]


@pytest.mark.parametrize("max_seq_len", [16, 15, 1, SCORED_AT_ONCE + 100])
@pytest.mark.parametrize("length", [1, 2, 16, 17, 60, SCORED_AT_ONCE + 60])
def test_log_probabilities_are_those_of_the_context_that_generation_sees(max_seq_len, length):
    model = random_model(max_seq_len=max_seq_len)
    tokens = torch.randint(V, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = []
    with torch.no_grad():
        for end in range(1, length):
            context = tokens[window_start(end, max_seq_len) : end]
            expected.append(model(torch.tensor([context]))[0][0, -1].log_softmax(-1)[tokens[end]])
    found = log_probabilities(model, tokens)
    assert found.shape == (length - 1,)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-4)


KEYS = torch.tensor([draw_key(0, 0, position) for position in range(100_000)], dtype=torch.int32)


def test_temperature_0_takes_the_likeliest():
    logits = torch.tensor([[0.0, 0.1, -1.0], [7.0, 0.0, 6.9]])
    assert choose(logits, KEYS[:2], temperature=0, top_k=2, top_p=0.5).tolist() == [1, 0]


def test_noise_is_that_of_its_key_and_number_and_follows_gumbel():
    noise = gumbel_noise(KEYS[:2000], 500)
    assert torch.equal(noise[1234:1236, :50], gumbel_noise(KEYS[1234:1236], 50))
    ordered = noise.flatten().double().sort().values
    expected = (-(-ordered).exp()).exp()  # its distribution function
    found = torch.arange(1, len(ordered) + 1) / len(ordered)
    assert (found - expected).abs().max() < 1.95 / len(
        ordered
    ) ** 0.5  # Kolmogorov and Smirnov, at 0.001
    for other in (noise[1:], noise[:-1].roll(1, dims=1)):  # independent between keys and numbers
        pairs = torch.stack([noise[: len(other)].flatten(), other.flatten()])
        assert abs(torch.corrcoef(pairs)[0, 1]) < 4 / pairs.shape[1] ** 0.5


@pytest.mark.parametrize(
    "options, allowed",
    [
        (dict(), {0, 1, 2, 3, 4, 5, 6, 7}),
        (dict(temperature=0.5), {0, 1, 2, 3, 4, 5, 6, 7}),
        (dict(temperature=2.0, top_k=4), {1, 3, 5, 7}),
        (dict(top_k=6, top_p=0.68), {1, 3}),  # of those six
        (dict(top_p=0.68), {1, 3, 5}),  # 0.42 + 0.23 + 0.13
        (dict(temperature=0.7, top_k=2, top_p=0.99), {1, 3}),
        (dict(min_p=0.4), {1, 3}),  # at least 0.4 of 1's probability
        (dict(top_k=5, min_p=0.11), {1, 3, 4, 5, 7}),
    ],
    ids=str,
)
@pytest.mark.parametrize("spread", [1, 100], ids=["one block", "several blocks"])
def test_draws_follow_the_exact_distribution(options, allowed, spread):
    logits = torch.full((701,), -INF)
    logits[: 8 * spread : spread] = torch.tensor([-2.0, 1.2, -1.0, 0.6, -0.9, 0.0, -1.5, -0.6])
    logits = logits[: 7 * spread + 1]
    draws = choose(logits.expand(100_000, -1), KEYS, **options)
    assert set((draws % spread).tolist()) == {0}
    counts = (draws // spread).bincount(minlength=8)
    assert set(counts.nonzero().flatten().tolist()) == allowed
    inside = sorted(allowed)
    assert_drawn(
        counts[inside], (logits[::spread].double() / options.get("temperature", 1.0))[inside]
    )


def test_draws_of_many_tokens_follow_the_exact_distribution():
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0)) / 2
    draws = choose(logits.expand(len(KEYS), -1), KEYS)
    assert_drawn(draws.bincount(minlength=1000), logits.double())


def assert_drawn(counts, logits):
    """By a chi-square test, at 0.001."""
    expected = counts.sum() * logits.softmax(-1)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    half_degrees = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(half_degrees, chi_square / 2) > 0.001


def test_each_row_is_drawn_from_its_own_distribution():
    logits = torch.full((50, 50), -INF)
    logits[range(50), torch.arange(50).flip(0)] = 0.0
    assert choose(logits, KEYS[:50]).tolist() == list(range(50))[::-1]


@pytest.mark.parametrize("max_seq_len", [1, 2, 3, 7, 16])
def test_the_window_fits_keeps_half_a_context_and_moves_rarely(max_seq_len):
    starts = [window_start(length, max_seq_len) for length in range(1, 101)]
    sizes = [length - start for length, start in enumerate(starts, 1)]
    moves = [
        length for length, pair in enumerate(itertools.pairwise(starts), 2) if pair[0] != pair[1]
    ]
    assert starts[:max_seq_len] == [0] * max_seq_len
    assert starts == sorted(starts)
    assert max(sizes) == max_seq_len
    assert all(size > max_seq_len // 2 for size in sizes[max_seq_len:])
    assert moves == list(range(max_seq_len + 1, 101, max(1, max_seq_len // 2)))
