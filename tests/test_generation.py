import functools
import itertools
import math

import pytest
import torch

from generation import choose, generate, truncate_top_k, truncate_top_p, window_start
from model import ModelArgs, Transformer

INF = math.inf
V = 61


def random_model(max_seq_len=16) -> Transformer:
    """Weights large enough that the tokens it likes best depend on all of the context."""
    torch.manual_seed(0)
    args = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=V, max_seq_len=max_seq_len)
    model = Transformer(args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    return model.eval()


GREEDY = functools.partial(choose, temperature=0)


@pytest.mark.parametrize("prompt", [[1], [1, 5, 9, 2, 7], list(range(16)), list(range(40))], ids=len)
@pytest.mark.parametrize("max_seq_len", [16, 15, 1])
def test_cached_and_uncached_greedy_tokens_are_equal_up_to_and_past_max_seq_len(prompt, max_seq_len):
    """nanoGPT PR #613: the cache changed the output."""
    model, expected = random_model(max_seq_len), list(prompt)
    with torch.no_grad():
        for _ in range(100):
            context = expected[window_start(len(expected), max_seq_len) :]
            expected.append(model(torch.tensor([context]))[0][0, -1].argmax().item())
    expected = expected[len(prompt) :]
    assert list(generate(model, prompt, 100, GREEDY)) == expected
    assert list(generate(model, prompt, 100, GREEDY, use_cache=False)) == expected


def test_greedy_tokens_of_the_model_under_test_vary():
    assert len(set(generate(random_model(), [1], 100, GREEDY))) > 10


def test_the_prompt_is_left_as_it_was():
    prompt = [1, 2, 3]
    list(generate(random_model(), prompt, 5, GREEDY))
    assert prompt == [1, 2, 3]


def test_generates_under_autocast_past_max_seq_len():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(list(generate(random_model(), [1], 40, GREEDY))) == 40


@pytest.mark.parametrize("count", [0, 1, 20])
def test_yields_as_many_tokens_as_asked_for(count):
    assert len(list(generate(random_model(), [1], count))) == count


@pytest.mark.parametrize("position", [0, 1, 30])
def test_ends_before_the_first_stop_token(position):
    """nanoGPT #36, llama2.c PR #243: text went on after its end."""
    model = random_model()
    free = list(generate(model, [1], 60, GREEDY))
    stop = {free[position], V + 1}
    assert list(generate(model, [1], 60, GREEDY, stop)) == free[: free.index(free[position])]


def drawn(seed: int) -> list[int]:
    pick = functools.partial(choose, top_k=30, top_p=0.95, generator=torch.Generator().manual_seed(seed))
    return list(generate(random_model(), [1], 40, pick))


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others():
    first = drawn(7)
    torch.manual_seed(99)  # of no concern to a draw from its own generator
    assert drawn(7) == first != drawn(8)


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


@pytest.mark.parametrize("p, count", [(1e-9, 1), (0.125, 1), (0.25, 2), (0.5, 4), (0.51, 5), (0.875, 7), (1.0, 8)])
def test_top_p_keeps_exactly_enough_of_equally_likely_tokens(p, count):
    """Eighths add up without rounding, so that the sum equals p on the boundary."""
    assert len(kept(truncate_top_p(torch.zeros(1, 8), p))[0]) == count


def test_top_p_brings_back_nothing_that_top_k_left_out():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    assert kept(truncate_top_p(truncate_top_k(logits, 2), 0.999999)) == [{0, 1}]


def test_temperature_0_takes_the_likeliest_and_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    logits = torch.tensor([[0.0, 0.1, -1.0], [7.0, 0.0, 6.9]])
    assert choose(logits, temperature=0, top_k=2, top_p=0.5, generator=generator).tolist() == [1, 0]
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    "options, allowed",
    [
        (dict(), {0, 1, 2, 3, 4, 5, 6, 7}),
        (dict(temperature=0.5), {0, 1, 2, 3, 4, 5, 6, 7}),
        (dict(temperature=2.0, top_k=4), {1, 3, 5, 7}),
        (dict(top_p=0.7), {1, 3, 5}),  # 0.42 + 0.23 + 0.13
        (dict(temperature=0.7, top_k=2, top_p=0.99), {1, 3}),
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(options, allowed):
    logits = torch.tensor([-2.0, 1.2, -1.0, 0.6, -0.9, 0.0, -1.5, -0.6])
    draws = choose(logits.expand(100_000, -1), **options, generator=torch.Generator().manual_seed(0))
    counts = draws.bincount(minlength=8).double()
    weights = (logits.double() / options.get("temperature", 1.0)).exp()
    assert set(counts.nonzero().flatten().tolist()) == allowed
    inside = sorted(allowed)
    expected = 100_000 * weights[inside] / weights[inside].sum()
    chi_square = ((counts[inside] - expected) ** 2 / expected).sum()
    half_degrees = torch.tensor((len(inside) - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(half_degrees, chi_square / 2) > 0.001


def test_each_row_is_drawn_from_its_own_distribution():
    logits = torch.full((50, 50), -INF)
    logits[range(50), torch.arange(50).flip(0)] = 0.0
    assert choose(logits).tolist() == list(range(50))[::-1]


@pytest.mark.parametrize("max_seq_len", [1, 2, 3, 7, 16])
def test_the_window_fits_keeps_half_a_context_and_moves_rarely(max_seq_len):
    starts = [window_start(length, max_seq_len) for length in range(1, 101)]
    sizes = [length - start for length, start in enumerate(starts, 1)]
    moves = [length for length, pair in enumerate(itertools.pairwise(starts), 2) if pair[0] != pair[1]]
    assert starts[:max_seq_len] == [0] * max_seq_len
    assert starts == sorted(starts)
    assert max(sizes) == max_seq_len
    assert all(size > max_seq_len // 2 for size in sizes[max_seq_len:])
    assert moves == list(range(max_seq_len + 1, 101, max(1, max_seq_len // 2)))
