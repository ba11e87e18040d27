import functools
import itertools
import math

import pytest
import torch

from generation.banned_strings import BannedStrings
from generation.sampling import (
    GROUP_SIZE,
    SamplingTensors,
    apply_penalties,
    gumbel_noise,
    hash_int32,
    sample_next,
    sampling_key,
)
from generation.sampling_params import SamplingParams

INF = math.inf
V = 61
CPU = torch.device("cpu")

INVALID = [("temperature", -1), ("top_p", 0), ("min_new_tokens", 300), ("seed", -1)]


@pytest.mark.parametrize("option, value", INVALID)
def test_invalid_sampling_params_are_refused(option, value):
    with pytest.raises(ValueError, match=f"{option}={value}: must be"):
        SamplingParams(**{option: value})


def make_params(rows: list[dict], vocab_size: int) -> SamplingTensors:
    """SamplingTensors of one row for each of these options, which may be tensors (V,) too."""
    params = SamplingTensors.new(len(rows), vocab_size, CPU)
    params.is_active.fill_(True)
    for index, options in enumerate(rows):
        for name, value in options.items():
            getattr(params, name)[index] = value
    return params


def draw(logits, rows: list[dict], count: int, keys: int = 500) -> torch.Tensor:
    """Tokens (rows, count), drawn from logits (rows, V), each row with its own options.

    All rows are in the same batch, with several sampling keys and positions."""
    params = make_params(rows, logits.shape[1])
    row_index = torch.arange(len(rows)).repeat(keys)
    params = SamplingTensors(*(tensor[row_index] for tensor in params))
    for index in range(keys):
        for row in range(len(rows)):
            params.key[index * len(rows) + row] = sampling_key(index, row)
    logits = logits[row_index]
    samples = []
    for position in range(count // keys):
        positions = torch.full_like(row_index, position)
        samples.append(sample_next(logits, params, positions).view(keys, -1))
    return torch.cat(samples).T


def drawn_sets(logits, options: dict, count: int = 1000) -> list[set[int]]:
    """The tokens that are drawn at least once from each row of logits."""
    samples = draw(logits, [options] * len(logits), count)
    return [set(row.tolist()) for row in samples]


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
        (0, {0, 1, 2, 3, 4, 5}),
    ],
)
def test_top_k_keeps_the_k_likeliest_and_ties(k, expected):
    row = torch.tensor([2.0, 0.0, 1.0, 5.0, 1.0, -1.0]) / 2
    logits = torch.stack([row, row.flip(0)])
    assert drawn_sets(logits, dict(top_k=k)) == [expected, {5 - token for token in expected}]


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
    logits = (torch.stack([PROBS, PROBS.flip(0)]).log() + 3).float()
    assert drawn_sets(logits, dict(top_p=p)) == [expected, {4 - token for token in expected}]


EIGHTHS = [(1e-9, 1), (0.125, 1), (0.25, 2), (0.5, 4), (0.51, 5), (0.875, 7), (1.0, 8)]


@pytest.mark.parametrize("p, count", EIGHTHS)
@pytest.mark.parametrize("top_k", [0, 8, 3])
def test_top_p_keeps_just_enough_equally_likely_tokens(p, count, top_k):
    """Eighths add up without rounding, so that the sum equals p on the boundary."""
    assert drawn_sets(torch.zeros(1, 8), dict(top_p=p, top_k=top_k)) == [set(range(count))]


@pytest.mark.parametrize("p, count", EIGHTHS)
def test_top_p_counts_the_probability_that_top_k_leaves(p, count):
    logits = torch.full((1, 300), -1.0)
    logits[0, 10:90:10] = 0.0
    expected = set(range(10, 10 + 10 * count, 10))
    assert drawn_sets(logits, dict(top_p=p, top_k=8)) == [expected]


def test_top_p_does_not_restore_tokens_removed_by_top_k():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    assert drawn_sets(logits, dict(top_k=2, top_p=0.999999)) == [{0, 1}]


@pytest.mark.parametrize("p", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
def test_min_p_equals_transformers(p):
    logits = torch.randn(10, V, generator=torch.Generator().manual_seed(0)) * 3
    warper = pytest.importorskip("transformers").MinPLogitsWarper(min_p=p)
    kept = [set(row.isfinite().nonzero().flatten().tolist()) for row in warper(None, logits)]
    drawn = drawn_sets(logits, dict(min_p=p))
    probs = logits.softmax(-1)
    for row, allowed, tokens in zip(probs, kept, drawn, strict=True):
        likely = {token for token in allowed if row[token] > 0.02}
        assert likely <= tokens <= allowed


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 10.0])
def test_repetition_penalty_equals_transformers(penalty):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, V, generator=generator) * 3
    token_ids = torch.randint(V, (20, 30), generator=generator)
    transformers = pytest.importorskip("transformers")
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(token_ids, logits.clone())
    params = make_params([dict(repetition_penalty=penalty)] * 20, V)
    params.is_seen.scatter_(1, token_ids, True)
    positions = torch.zeros(20, dtype=torch.int64)
    assert torch.equal(apply_penalties(logits, params, positions), expected)


def test_stop_tokens_are_suppressed_before_the_minimum_length():
    is_stop = torch.tensor([True, False, True])
    params = make_params([dict(min_length=5, is_stop=is_stop)] * 3, 3)
    logits = torch.tensor([[9.0, 0.0, 8.0]]).expand(3, -1)
    positions = torch.tensor([3, 4, 5])
    assert sample_next(logits, params, positions).tolist()[:2] == [1, 1]
    assert torch.equal(apply_penalties(logits, params, positions)[2], logits[2])


def test_temperature_0_takes_the_likeliest_token():
    logits = torch.tensor([[0.0, 0.1, -1.0], [7.0, 0.0, 6.9]])
    params = make_params([dict(temperature=0, top_k=2, top_p=0.5)] * 2, 3)
    assert sample_next(logits, params, torch.tensor([0, 0])).tolist() == [1, 0]


SEEDS = hash_int32(torch.arange(100_000, dtype=torch.int32))


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


def test_sampling_keys_of_seeds_and_indices_differ():
    keys = {sampling_key(seed, index) for seed in range(100) for index in range(100)}
    assert len(keys) > 9_990 and min(keys) >= -(2**31) and max(keys) < 2**31


# Distributions


def exact_probs(logits, options: dict) -> torch.Tensor:
    """The distribution (V,) that options define for logits (V,), in float64, by sorting.

    A top_p that falls between equal logits keeps those with lower indices."""
    logits = logits.double()
    if "is_seen" in options:
        penalty = options["repetition_penalty"]
        penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(options["is_seen"], penalized, logits)
    logits = logits / options.get("temperature", 1.0)
    ordered, tokens = logits.sort(descending=True, stable=True)
    if k := options.get("top_k", 0):
        ordered = torch.where(ordered < ordered[min(k, len(ordered)) - 1], -INF, ordered)
    probs = ordered.softmax(-1)
    if (p := options.get("top_p", 1.0)) < 1:
        probs = torch.where(probs.cumsum(-1) - probs < p, probs, 0.0)
        probs /= probs.sum()
    probs = torch.where(probs < options.get("min_p", 0.0) * probs[0], 0.0, probs)
    return torch.zeros_like(probs).scatter(0, tokens, probs / probs.sum())


def transformers_probs(logits, options: dict) -> torch.Tensor:
    """The same by the warpers of transformers, in the order of its generate."""
    transformers = pytest.importorskip("transformers")
    warpers = {
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    scores, seen = logits[None].double(), torch.zeros(1, 0, dtype=torch.int64)
    if "is_seen" in options:
        seen = options["is_seen"].nonzero().T
        penalty = options["repetition_penalty"]
        scores = transformers.RepetitionPenaltyLogitsProcessor(penalty)(seen, scores)
    for name, warper in warpers.items():
        if name in options:
            scores = warper(options[name])(seen, scores)
    return scores[0].softmax(-1)


def assert_sampled_from(probs, samples):
    """A chi-square test at 0.001. Tokens expected less than 5 times count as one."""
    counts = samples.bincount(minlength=len(probs)).double()
    assert not counts[probs == 0].any()
    expected = len(samples) * probs
    is_rare = expected < 5
    if is_rare.any():
        counts = torch.cat([counts[~is_rare], counts[is_rare].sum()[None]])
        expected = torch.cat([expected[~is_rare], expected[is_rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    if len(counts) == 1:
        return
    chi_square = ((counts - expected) ** 2 / expected).sum()
    half_degrees = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(half_degrees, chi_square / 2) > 0.001


IS_SEEN = torch.arange(300) % 3 == 0
SETTINGS = [
    dict(),
    dict(temperature=0.7),
    dict(temperature=1.8),
    dict(top_k=1),
    dict(top_k=7),
    dict(top_k=250),
    dict(top_p=0.05),
    dict(top_p=0.6),
    dict(top_p=0.95),
    dict(min_p=0.5),
    dict(min_p=0.02),
    dict(repetition_penalty=1.5, is_seen=IS_SEEN),
    dict(repetition_penalty=0.6, is_seen=~IS_SEEN),
    dict(temperature=0.8, top_p=0.9),
    dict(temperature=1.4, top_k=40),
    dict(temperature=0.6, min_p=0.05),
    dict(top_k=20, top_p=0.7),
    dict(top_k=30, min_p=0.1),
    dict(top_p=0.8, min_p=0.1),
    dict(temperature=0.9, top_k=50, top_p=0.9, min_p=0.01),
    dict(temperature=2.0, top_k=5, top_p=0.99),
    dict(temperature=1.3, top_k=60, top_p=0.8, min_p=0.02, repetition_penalty=1.3, is_seen=IS_SEEN),
]
LOGITS = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize("options", SETTINGS, ids=range(len(SETTINGS)))
def test_the_exact_distributions_are_those_of_transformers(options):
    expected = transformers_probs(LOGITS, options)
    torch.testing.assert_close(exact_probs(LOGITS, options), expected)


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_rows_of_one_batch_follow_their_own_exact_distributions(count):
    samples = draw(LOGITS.expand(len(SETTINGS), -1), SETTINGS, count, keys=100)
    for options, row in zip(SETTINGS, samples, strict=True):
        assert_sampled_from(exact_probs(LOGITS, options), row)


def test_the_distributions_of_the_settings_differ():
    """Else the test above could not fail."""
    samples = draw(LOGITS[None], [SETTINGS[0]], 500)[0]
    for options in SETTINGS[1:]:
        with pytest.raises(AssertionError):
            assert_sampled_from(exact_probs(LOGITS, options), samples)


SIZES = [1, 2, 127, 128, 129, 1000, pytest.param(32_000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("options", [dict(), dict(top_k=3, top_p=0.9), dict(min_p=0.3)], ids=str)
def test_samples_are_exact_for_any_size_of_vocabulary(vocab_size, options):
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(0))
    samples = draw(logits, [options], 2_000, keys=100)[0]
    assert_sampled_from(exact_probs(logits[0], options), samples)


@pytest.mark.parametrize("distance", [1, GROUP_SIZE - 1, GROUP_SIZE])
@pytest.mark.parametrize(
    "options", [dict(), dict(top_k=4), dict(top_p=0.61), dict(top_k=5, top_p=0.3)], ids=str
)
def test_ties_within_and_across_groups_follow_the_exact_distribution(distance, options):
    """Equal logits are kept by top_k; top_p keeps the ones with lower indices."""
    logits = torch.full((600,), -INF)
    values = [0.5, -1.0, 0.5, 0.25, 0.5]
    logits[0 : 5 * distance : distance] = torch.tensor(values)
    samples = draw(logits[None], [options], 2_000)[0]
    assert_sampled_from(exact_probs(logits, options), samples)


@pytest.mark.parametrize("top_k", [0, 1, 2, 300])
@pytest.mark.parametrize("top_p", [1.0, 0.5, 1e-6])
@pytest.mark.parametrize("temperature", [0, 1e-5, 1e-3, 1.0, 1e4])
def test_extreme_logits_and_options_end_with_allowed_tokens(temperature, top_p, top_k):
    """The loop that draws again ends, for logits without a finite difference too."""
    rows = torch.zeros(6, 300)
    rows[1, 7] = 1e30
    rows[2] = torch.linspace(-1e4, 1e4, 300)
    rows[3, 1:] = -INF
    rows[4] = -1e30
    rows[5] = torch.linspace(0, 1e-6, 300)
    options = dict(temperature=temperature, top_p=top_p, top_k=top_k)
    params = make_params([options] * 6, 300)
    tokens = sample_next(rows, params, torch.arange(6))
    assert tokens.min() >= 0 and tokens.max() < 300
    assert tokens[1] == 7 and tokens[3] == 0
    if temperature == 0 or (temperature < 1 and top_k == 1):
        assert tokens[2] == 299


def test_rows_with_nan_or_without_tokens_end_too():
    rows = torch.zeros(3, 300)
    rows[0] = torch.nan
    rows[1] = -INF
    for is_active in (True, False):
        options = dict(top_k=5, top_p=0.5, min_p=0.1, is_active=is_active)
        tokens = sample_next(rows, make_params([options] * 3, 300), torch.arange(3))
        assert tokens.min() >= 0 and tokens.max() < 300


def test_each_row_is_sampled_from_its_own_logits():
    logits = torch.full((50, 50), -INF)
    logits[range(50), torch.arange(50).flip(0)] = 0.0
    tokens = sample_next(logits, make_params([{}] * 50, 50), torch.arange(50))
    assert tokens.tolist() == list(range(50))[::-1]


def test_a_sample_does_not_depend_on_the_other_rows():
    logits = torch.randn(len(SETTINGS), 300, generator=torch.Generator().manual_seed(1)) * 2
    params = make_params(SETTINGS, 300)
    params.key.copy_(torch.arange(len(SETTINGS)) * 77)
    sample = functools.partial(sample_next, logits, params)
    for position in range(20):
        together = sample(torch.full((len(SETTINGS),), position)).tolist()
        for index, token in enumerate(together):
            row = SamplingTensors(*(tensor[index : index + 1] for tensor in params))
            assert sample_next(logits[index : index + 1], row, torch.tensor([position])) == token


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
