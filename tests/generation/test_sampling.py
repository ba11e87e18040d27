import itertools
import math

import pytest
import torch

from generation.sampling import (
    BannedStrings,
    apply_repetition_penalty,
    gumbel_noise,
    sample_next,
    sample_seed,
    truncate_min_p,
    truncate_top_k,
    truncate_top_p,
)
from generation.sampling_params import SamplingParams, TruncationParams

INF = math.inf
V = 61
SEEDS = torch.tensor([sample_seed(0, 0, position) for position in range(100_000)]).int()

INVALID = [("temperature", -1), ("top_p", 0), ("min_new_tokens", 300), ("seed", -1)]


@pytest.mark.parametrize("option, value", INVALID)
def test_invalid_sampling_params_are_refused(option, value):
    with pytest.raises(ValueError, match=f"{option}={value}: must be"):
        SamplingParams(**{option: value})


def kept_tokens(logits) -> list[set[int]]:
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
def test_top_k_keeps_the_k_likeliest_and_ties(k, expected):
    row = torch.tensor([2.0, 0.0, 1.0, 5.0, 1.0, -1.0])
    logits = torch.stack([row, row.flip(0)])
    truncated = truncate_top_k(logits, k)
    assert kept_tokens(truncated) == [expected, {5 - token for token in expected}]
    assert torch.equal(truncated[truncated.isfinite()], logits[truncated.isfinite()])


PROBS = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15], dtype=torch.float64)  # in order: 1, 3, 4, 0, 2


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
    logits = torch.stack([PROBS, PROBS.flip(0)]).log() + 3
    truncated = truncate_top_p(logits, p)
    assert kept_tokens(truncated) == [expected, {4 - token for token in expected}]
    assert torch.equal(truncated[truncated.isfinite()], logits[truncated.isfinite()])


EIGHTHS = [(1e-9, 1), (0.125, 1), (0.25, 2), (0.5, 4), (0.51, 5), (0.875, 7), (1.0, 8)]


@pytest.mark.parametrize("p, count", EIGHTHS)
def test_top_p_keeps_just_enough_equally_likely_tokens(p, count):
    """Eighths add up without rounding, so that the sum equals p on the boundary."""
    assert len(kept_tokens(truncate_top_p(torch.zeros(1, 8), p))[0]) == count


def test_top_p_does_not_restore_tokens_removed_by_top_k():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    assert kept_tokens(truncate_top_p(truncate_top_k(logits, 2), 0.999999)) == [{0, 1}]


@pytest.mark.parametrize("p", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
def test_min_p_equals_transformers(p):
    logits = torch.randn(20, V, generator=torch.Generator().manual_seed(0)) * 3
    expected = pytest.importorskip("transformers").MinPLogitsWarper(min_p=p)(None, logits)
    assert torch.equal(truncate_min_p(logits, p), expected)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 10.0])
def test_repetition_penalty_equals_transformers(penalty):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, V, generator=generator) * 3
    token_ids = torch.randint(V, (20, 30), generator=generator)
    transformers = pytest.importorskip("transformers")
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(token_ids, logits.clone())
    assert torch.equal(apply_repetition_penalty(logits, token_ids, penalty), expected)


def test_temperature_0_takes_the_likeliest_token():
    logits = torch.tensor([[0.0, 0.1, -1.0], [7.0, 0.0, 6.9]])
    params = TruncationParams(temperature=0, top_k=2, top_p=0.5)
    assert sample_next(logits, SEEDS[:2], params).tolist() == [1, 0]


def test_noise_follows_gumbel_and_depends_on_seed_and_index():
    noise = gumbel_noise(SEEDS[:2000], 500)
    assert torch.equal(noise[1234:1236, :50], gumbel_noise(SEEDS[1234:1236], 50))
    ordered = noise.flatten().double().sort().values
    expected = (-(-ordered).exp()).exp()  # cumulative distribution function
    empirical = torch.arange(1, len(ordered) + 1) / len(ordered)
    # Kolmogorov-Smirnov test at 0.001
    assert (empirical - expected).abs().max() < 1.95 / len(ordered) ** 0.5
    for other in (noise[1:], noise[:-1].roll(1, dims=1)):  # independent across seeds and indices
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
@pytest.mark.parametrize(
    "stride",
    [
        pytest.param(1, id="one group"),
        pytest.param(100, id="several groups", marks=pytest.mark.slow),
    ],
)
def test_samples_follow_the_exact_distribution(options, allowed, stride):
    logits = torch.full((701,), -INF)
    logits[: 8 * stride : stride] = torch.tensor([-2.0, 1.2, -1.0, 0.6, -0.9, 0.0, -1.5, -0.6])
    logits = logits[: 7 * stride + 1]
    samples = sample_next(logits.expand(100_000, -1), SEEDS, TruncationParams(**options))
    assert set((samples % stride).tolist()) == {0}
    counts = (samples // stride).bincount(minlength=8)
    assert set(counts.nonzero().flatten().tolist()) == allowed
    kept = sorted(allowed)
    scaled = logits[::stride].double() / options.get("temperature", 1.0)
    assert_sampled_from(scaled[kept], counts[kept])


def test_samples_of_many_tokens_follow_the_exact_distribution():
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0)) / 2
    samples = sample_next(logits.expand(len(SEEDS), -1), SEEDS)
    assert_sampled_from(logits.double(), samples.bincount(minlength=1000))


def assert_sampled_from(logits, counts):
    """A chi-square test at 0.001."""
    expected = counts.sum() * logits.softmax(-1)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    half_degrees = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(half_degrees, chi_square / 2) > 0.001


def test_each_row_is_sampled_from_its_own_distribution():
    logits = torch.full((50, 50), -INF)
    logits[range(50), torch.arange(50).flip(0)] = 0.0
    assert sample_next(logits, SEEDS[:50]).tolist() == list(range(50))[::-1]


TOKEN_BYTES = [b"", b"a", b"b", b"c", b"ab", b"bc", b"ca", b"abc", b"cab", b"\xc3", b"\xab"]
TOKEN_BYTES += ["ë".encode(), "aë".encode()]
BANNED = [["ab"], ["ca", "abc"], ["aa"], ["ë"], ["caë", "bb"], ["a", "b"], ["caab"]]


@pytest.mark.parametrize("strings", BANNED, ids=str)
def test_banned_strings_ban_just_the_tokens_that_complete_one(strings):
    banned_strings = BannedStrings(strings, TOKEN_BYTES)
    banned = [string.encode() for string in strings]
    for tokens in itertools.product(range(1, len(TOKEN_BYTES)), repeat=3):
        text = b"".join(TOKEN_BYTES[token] for token in tokens)
        if any(string in text for string in banned):
            continue  # such a text is never generated
        expected = {
            token
            for token, added in enumerate(TOKEN_BYTES)
            if any(string in text + added for string in banned)
        }
        assert set(banned_strings.banned_next_tokens(list(tokens))) == expected
