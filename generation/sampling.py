"""
Sampling of the next token: temperature, truncation, repetition penalty and banned strings.

Sampling is an argmax (the Gumbel-max trick): if Gumbel noise is added to the logits, each token has
the largest sum with exactly its probability (arXiv 1411.0030, section 2). The noise is a hash of a
seed and a token's index. A sample therefore depends only on its seed and its row of logits, in a
batch of any size, on any device.

Shapes: B batch, V vocabulary. Seeds are int32 tensors.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F

from generation.sampling_params import TruncationParams
from runtime.hashing import splitmix64

TOPK_PREFIX = 512  # tokens sorted first for top-p; a nucleus is rarely larger
GROUP_SIZE = 128  # tokens in a group of the two-level Gumbel argmax
REJECTION_TRIES = 3  # samples of the full distribution before the logits are truncated
NO_TRUNCATION = TruncationParams()


class UntruncatedSample(NamedTuple):
    """Tokens sampled from the full distribution, and whether the truncations accept them."""

    tokens: torch.Tensor  # (B,) int64; undefined where not accepted
    accepted: torch.Tensor  # (B,) bool


def truncate_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Set all but the k largest logits (B, V) to -inf; ties with the k-th stay."""
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < kth, float("-inf"))


def truncate_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the fewest most likely tokens of logits (B, V) whose probabilities add up to p.

    This is nucleus sampling (arXiv 1904.09751). The most likely token always stays. Of tokens with
    equal logits the first ones stay."""
    log_total = logits.logsumexp(-1, keepdim=True)
    for count in (min(TOPK_PREFIX, logits.shape[-1]), logits.shape[-1]):
        sorted_logits = logits.topk(count, dim=-1).values  # (B, count)
        cumulative = (sorted_logits - log_total).exp().cumsum(-1)
        if (cumulative[:, -1] >= p).all():
            break
    num_kept = 1 + (cumulative[:, :-1] < p).sum(-1, keepdim=True)  # (B, 1)
    threshold = sorted_logits.gather(-1, num_kept - 1)
    ties_kept = num_kept - (logits > threshold).sum(-1, keepdim=True)
    is_tie = logits == threshold
    removed = (logits < threshold) | is_tie & (is_tie.cumsum(-1) > ties_kept)
    return logits.masked_fill(removed, float("-inf"))


def truncate_min_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep tokens at least p times as probable as the most probable one (arXiv 2407.01082)."""
    probs = logits.softmax(-1)  # (B, V)
    return logits.masked_fill(probs < p * probs.amax(-1, keepdim=True), float("-inf"))


def apply_repetition_penalty(
    logits: torch.Tensor, token_ids: torch.Tensor, penalty: float
) -> torch.Tensor:
    """Make the tokens token_ids (B, S) less likely in logits (B, V).

    A positive logit is divided by the penalty, a negative one multiplied (CTRL, arXiv 1909.05858,
    section 4.1)."""
    selected = logits.gather(-1, token_ids)  # (B, S)
    penalized = torch.where(selected > 0, selected / penalty, selected * penalty)
    return logits.scatter(-1, token_ids, penalized)


def sample_seed(seed: int, sample_index: int, position: int) -> int:
    """The seed of one token, an int32: a hash of the user's seed, the sample and the position."""
    key = splitmix64(splitmix64(splitmix64(seed) + sample_index) + position) & 0xFFFFFFFF
    return key - (key >> 31 << 32)


def gumbel_noise(seeds: torch.Tensor, count: int) -> torch.Tensor:
    """Standard Gumbel noise (B, count) for int32 seeds (B,).

    The hash is lowbias32 of Wellons's hash prospector, in 32-bit arithmetic that wraps around."""
    # Without the xor the compiler would multiply the loop index; its overflow is undefined in C++.
    index = torch.arange(count, dtype=torch.int32, device=seeds.device) ^ 0x2545F491
    x = index * -1640531527 ^ seeds[:, None]  # 2**32 / golden ratio
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * -2073254261
    x = (x ^ (x >> 16 & 0xFFFF)) & 0x7FFFFFFF
    uniform = ((x.float() + 0.5) * 2**-31).clamp(max=1 - 2**-24)  # never 0 or 1
    return -(-torch.log1p(-uniform)).log()


def gumbel_argmax(logits: torch.Tensor, seeds: torch.Tensor, tries: range) -> torch.Tensor:
    """Sample tokens (B, len(tries)) from logits (B, V) with seeds (B,), independently for each try.

    Sampling has two levels: a group of tokens, then a token of that group. Noise for each of 32,000
    tokens would take longer than all other work on their logits."""
    padding = (0, -logits.shape[-1] % GROUP_SIZE)
    groups = F.pad(logits, padding, value=float("-inf")).unflatten(-1, (-1, GROUP_SIZE))
    sizes = [groups.shape[1], GROUP_SIZE]  # groups: (B, G, GROUP_SIZE)
    noise = gumbel_noise(seeds, tries.stop * sum(sizes)).unflatten(-1, (-1, sum(sizes)))
    group_noise, token_noise = noise[:, tries.start :].split(sizes, dim=-1)
    group = (groups.logsumexp(-1)[:, None] + group_noise).argmax(-1)  # (B, A)
    group_logits = groups.gather(1, group[..., None].expand(-1, -1, GROUP_SIZE))
    return group * GROUP_SIZE + (group_logits + token_noise).argmax(-1)


def sample_untruncated(
    logits: torch.Tensor, seeds: torch.Tensor, truncation: TruncationParams = NO_TRUNCATION
) -> UntruncatedSample:
    """Sample from the full distribution until the truncations accept a token (rejection sampling).

    This avoids truncating logits (B, V) at nearly every step. A row is not accepted after
    REJECTION_TRIES tries, or where both top_k and top_p apply: sample_next then truncates.
    No operation is in place because torch.while_loop forbids that."""
    if truncation.temperature < 1e-6:  # float32 cannot distinguish it from 0
        tokens = logits.argmax(-1)
        return UntruncatedSample(tokens, torch.ones_like(tokens, dtype=torch.bool))
    scaled = (
        logits.float() if truncation.temperature == 1 else logits.float() / truncation.temperature
    )
    # A new truncation needs a test here and in passes_truncation, and a step in sample_next.
    if not truncation.top_k and truncation.top_p == 1 and not truncation.min_p:
        tokens = gumbel_argmax(scaled, seeds, range(1))[:, 0]
        return UntruncatedSample(tokens, torch.ones_like(tokens, dtype=torch.bool))
    if truncation.top_k and truncation.top_p < 1:  # top_p applies to what top_k leaves
        rejected = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        return UntruncatedSample(logits.argmax(-1), rejected)
    tokens = gumbel_argmax(scaled, seeds, range(REJECTION_TRIES))  # (B, A)
    accepted = passes_truncation(scaled, tokens, truncation)  # (B, A)
    first = accepted.int().argmax(-1, keepdim=True)
    return UntruncatedSample(tokens.gather(-1, first)[:, 0], accepted.any(-1))


def passes_truncation(
    scaled: torch.Tensor, tokens: torch.Tensor, truncation: TruncationParams
) -> torch.Tensor:
    """Whether the truncations keep tokens (B, A) of scaled logits (B, V): (B, A) bool."""
    token_logits = scaled.gather(-1, tokens)[..., None]  # (B, A, 1)
    scaled = scaled[:, None]  # (B, 1, V)
    accepted = torch.ones_like(tokens, dtype=torch.bool)
    if truncation.top_k:
        accepted = accepted & ((scaled > token_logits).sum(-1) < truncation.top_k)
    if truncation.top_p < 1:
        index = torch.arange(scaled.shape[-1], device=scaled.device)
        is_tie = scaled == token_logits
        precedes = (scaled > token_logits) | is_tie & (index < tokens[..., None])
        accepted = accepted & ((scaled.softmax(-1) * precedes).sum(-1) < truncation.top_p)
    if truncation.min_p:
        probs = scaled.softmax(-1)[:, 0]
        threshold = truncation.min_p * probs.amax(-1, keepdim=True)
        accepted = accepted & (probs.gather(-1, tokens) >= threshold)
    return accepted


def sample_next(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    truncation: TruncationParams = NO_TRUNCATION,
    first_sample: UntruncatedSample | None = None,
) -> torch.Tensor:
    """Sample the next token of each row of logits (B, V): token ids (B,).

    Args:
        seeds: (B,) int32, one for each row; see sample_seed.
        first_sample: the result of sample_untruncated for the same arguments, if there is one.
    """
    tokens, accepted = first_sample or sample_untruncated(logits, seeds, truncation)
    if accepted.all():
        return tokens
    logits = logits[~accepted].float() / truncation.temperature
    if truncation.top_k:
        logits = truncate_top_k(logits, truncation.top_k)
    if truncation.top_p < 1:
        logits = truncate_top_p(logits, truncation.top_p)
    if truncation.min_p:
        logits = truncate_min_p(logits, truncation.min_p)
    # Fresh noise: the noise of the earlier tries is known to select rejected tokens.
    tries = range(REJECTION_TRIES, REJECTION_TRIES + 1)
    resampled = gumbel_argmax(logits, seeds[~accepted], tries)[:, 0]
    return tokens.masked_scatter(~accepted, resampled)


class BannedStrings:
    """Strings that a sequence must not contain, in any tokenization.

    Args:
        strings: the banned strings.
        token_bytes: the bytes that each token of the vocabulary adds to the text.
    """

    def __init__(self, strings: Collection[str], token_bytes: list[bytes]) -> None:
        banned = [string.encode() for string in strings]
        self.token_bytes = token_bytes
        self.max_length = max(map(len, banned), default=0)
        self.always_banned = [
            token for token, text in enumerate(token_bytes) if any(b in text for b in banned)
        ]
        self.completions: dict[bytes, list[int]] = {}  # prefix of a string -> completing tokens
        for string in banned:
            for cut in range(1, len(string)):
                prefix, rest = string[:cut], string[cut:]
                tokens = [i for i, text in enumerate(token_bytes) if text.startswith(rest)]
                self.completions[prefix] = self.completions.get(prefix, []) + tokens

    def banned_next_tokens(self, tokens: list[int]) -> list[int]:
        """The tokens that would complete a banned string if they followed these tokens."""
        tail = b"".join(self.token_bytes[token] for token in tokens[-self.max_length :])
        matching = [ids for prefix, ids in self.completions.items() if tail.endswith(prefix)]
        return self.always_banned + [token for ids in matching for token in ids]
