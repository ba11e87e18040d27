"""
Sampling of the next token: a pure function; every row has its own sampling parameters.

A sample is an argmax (the Gumbel-max trick): with Gumbel noise added to the logits, each token has
the largest sum with exactly its probability (arXiv 1411.0030, section 2). The noise is a hash of
seed, position and token, so a sample does not depend on the batch or the device. Truncation is
exact rejection sampling without sorting, as in FlashInfer's sampling kernels.

Shapes: B rows, V vocabulary, G groups of GROUP_SIZE tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.hashing import splitmix64

GROUP_SIZE = 128  # tokens in a group of the two-level argmax
MIN_TEMPERATURE = 1e-6  # below: greedy; float32 cannot distinguish such a temperature from 0
EXP_UNDERFLOW = 104.0  # exp(-104) is 0 in float32


class SamplingTensors(NamedTuple):
    """The sampling parameters of each row as tensors, so that a compiled step serves them all."""

    is_active: Tensor  # (B,) bool; the token of an inactive row is undefined
    key: Tensor  # (B,) int32, from sampling_key
    temperature: Tensor  # (B,) float32
    top_k: Tensor  # (B,) int64; 0: no limit
    top_p: Tensor  # (B,) float32; 1: no limit
    min_p: Tensor  # (B,) float32; 0: no limit
    repetition_penalty: Tensor  # (B,) float32; 1: none
    min_length: Tensor  # (B,) int64: stop tokens are suppressed at positions before it
    is_seen: Tensor  # (B, V) bool: tokens that the repetition penalty applies to
    is_stop: Tensor  # (B, V) bool
    bias: Tensor  # (B, V) float32, added to the logits; -inf bans a token

    @property
    def is_greedy(self) -> Tensor:
        """(B,) bool"""
        return self.temperature < MIN_TEMPERATURE

    @classmethod
    def new(cls, batch_size: int, vocab_size: int, device: torch.device) -> "SamplingTensors":
        """Tensors for rows that are inactive and without limits."""
        row = torch.zeros(batch_size, device=device)  # (B,)
        table = torch.zeros(batch_size, vocab_size, device=device)  # (B, V)
        return cls(
            is_active=row.bool(),
            key=row.int(),
            temperature=row + 1,
            top_k=row.long(),
            top_p=row + 1,
            min_p=row.clone(),
            repetition_penalty=row + 1,
            min_length=row.long(),
            is_seen=table.bool(),
            is_stop=table.bool(),
            bias=table,
        )


def sampling_key(seed: int, index: int) -> int:
    """The int32 that selects all random draws of a sequence: a hash of the seed and its index."""
    key = splitmix64(splitmix64(seed) + index) & 0xFFFFFFFF
    return key - (key >> 31 << 32)


def hash_int32(x: Tensor) -> Tensor:
    """A hash of int32 values: lowbias32 of Wellons's hash prospector. The arithmetic wraps."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * -2073254261
    return x ^ (x >> 16 & 0xFFFF)


def gumbel_noise(seeds: Tensor, count: int) -> Tensor:
    """Standard Gumbel noise (B, count) for int32 seeds (B,)."""
    # Without the xor the compiler would multiply the loop index; its overflow is undefined in C++.
    index = torch.arange(count, dtype=torch.int32, device=seeds.device) ^ 0x2545F491
    bits = hash_int32(index * -1640531527 ^ seeds[:, None]) & 0x7FFFFFFF  # 2**32 / golden ratio
    negative_uniform = (bits.float() + 0.5) * (-(2**-31) * (1 - 2**-24))  # never 0 or -1
    return -(-torch.log1p(negative_uniform)).log()


def apply_penalties(logits: Tensor, params: SamplingTensors, positions: Tensor) -> Tensor:
    """Repetition penalty, bias and early stop tokens, then temperature: logits (B, V), float32.

    The penalty divides a positive logit and multiplies a negative one (CTRL, arXiv 1909.05858,
    section 4.1). Uncompiled code skips what no row uses."""
    logits = logits.float()
    is_compiling = torch.compiler.is_compiling()
    if is_compiling or (params.repetition_penalty != 1).any():
        penalty = params.repetition_penalty[:, None]
        penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(params.is_seen, penalized, logits)
    is_early = positions < params.min_length  # (B,)
    if is_compiling or is_early.any():
        logits = torch.where(params.is_stop & is_early[:, None], float("-inf"), logits)
    logits = logits + params.bias
    return logits / torch.where(params.is_greedy, 1.0, params.temperature)[:, None]


class Candidates(NamedTuple):
    """The distribution that a token is drawn from."""

    logits: Tensor  # (B, G, GROUP_SIZE), padded with -inf
    weights: Tensor  # (B, G, GROUP_SIZE): the probabilities times a constant of the row


class Draw(NamedTuple):
    """A token of each row, and its logit."""

    token: Tensor  # (B,) int64
    logit: Tensor  # (B,)


def draw_token(candidates: Candidates, group_weights: Tensor, before: Draw, seeds: Tensor) -> Draw:
    """Draw one of the tokens that precede `before` in the order of decreasing logits.

    First a group is drawn, then a token of it, because noise for each of 32,000 tokens would take
    longer than all other work on their logits. group_weights (B, G) are the sums over the tokens
    that may be drawn."""
    num_groups = group_weights.shape[1]
    noise = gumbel_noise(seeds, num_groups + GROUP_SIZE)
    group = (group_weights.log() + noise[:, :num_groups]).argmax(-1)  # (B,)
    selected = group[:, None, None].expand(-1, -1, GROUP_SIZE)
    logits = candidates.logits.gather(1, selected)[:, 0]  # (B, GROUP_SIZE)
    index = torch.arange(GROUP_SIZE, device=seeds.device)
    tokens = group[:, None] * GROUP_SIZE + index  # (B, GROUP_SIZE)
    is_tie = logits == before.logit[:, None]
    precedes = (logits > before.logit[:, None]) | is_tie & (tokens < before.token[:, None])
    logits = torch.where(precedes, logits, float("-inf"))
    chosen = (logits + noise[:, num_groups:]).argmax(-1, keepdim=True)
    return Draw(tokens.gather(1, chosen)[:, 0], logits.gather(1, chosen)[:, 0])


def most_likely(logits: Tensor, group_max: Tensor) -> Tensor:
    """The token (B,) with the largest of logits (B, G, GROUP_SIZE); group_max is (B, G)."""
    group = group_max.argmax(-1)  # (B,)
    selected = group[:, None, None].expand(-1, -1, GROUP_SIZE)
    return group * GROUP_SIZE + logits.gather(1, selected)[:, 0].argmax(-1)


def while_loop(
    condition: Callable[..., Tensor], body: Callable[..., tuple], state: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Repeat state = body(*state) while condition(*state). It can be compiled."""
    if torch.compiler.is_compiling():
        return torch.while_loop(condition, body, state)
    while condition(*state):
        state = body(*state)
    return state


class Limits(NamedTuple):
    """The truncations of each row, in terms of its logits."""

    top_k: Tensor  # (B,) int64; without a limit, V or more
    top_p: Tensor  # (B,); without a limit, infinite
    min_logit: Tensor  # (B,)


class TopKBounds(NamedTuple):
    """Bounds of the total weight of the top_k most likely tokens, found by bisection.

    At least top_k tokens have logits above `low`, fewer than top_k above `high`."""

    low: Tensor  # (B,) a logit
    high: Tensor  # (B,) a logit
    max_weight: Tensor  # (B,) of the tokens above low
    min_weight: Tensor  # (B,) of the tokens above high; max_weight if that is exact


class ResampleState(NamedTuple):
    """The state of the loop that draws again while a truncation rejects the token."""

    tries: Tensor  # () int32
    token: Tensor  # (B,) int64
    logit: Tensor  # (B,) of token
    is_accepted: Tensor  # (B,) bool
    # TopKBounds
    low: Tensor
    high: Tensor
    max_weight: Tensor
    min_weight: Tensor


def bisect_top_k(candidates: Candidates, top_k: Tensor, bounds: TopKBounds) -> TopKBounds:
    """Halve the interval from low to high."""
    middle = (bounds.low + bounds.high) / 2
    is_above = torch.sign(candidates.logits - middle[:, None, None]).clamp(0, 1)  # 1.0 or 0.0
    weight = (candidates.weights * is_above).sum(-1).sum(-1)
    count = is_above.sum(-1).sum(-1)
    is_low = count >= top_k
    # Equal logits cannot be separated: the tokens tied with the last of top_k belong to it.
    is_exact = (count == top_k) | (middle <= bounds.low) | (middle >= bounds.high)
    max_weight = torch.where(is_low, weight, bounds.max_weight)
    min_weight = torch.where(is_low, bounds.min_weight, weight)
    return TopKBounds(
        low=torch.where(is_low, middle, bounds.low),
        high=torch.where(is_low, bounds.high, middle),
        max_weight=max_weight,
        min_weight=torch.where(is_exact, max_weight, min_weight),
    )


def check_and_redraw(
    candidates: Candidates, limits: Limits, seeds: Tensor, state: ResampleState
) -> ResampleState:
    """Accept the tokens that the truncations keep, and draw again in the other rows.

    A truncation that rejects a token rejects all less likely tokens too, so the next one is drawn
    from those that precede it. The token that is accepted has the truncated distribution, whatever
    was rejected before. The most likely token is always accepted."""
    logits, weights = candidates
    # 1: the token precedes, -1: it follows. Uncompiled, floats take a fifth of the time of bools.
    order = torch.sign(logits - state.logit[:, None, None])  # (B, G, GROUP_SIZE); 0: a tie
    group = torch.arange(logits.shape[1], device=logits.device)
    index = torch.arange(GROUP_SIZE, device=logits.device)
    group_order = torch.sign(state.token[:, None] // GROUP_SIZE - group).float()  # (B, G)
    index_order = torch.sign(state.token[:, None] % GROUP_SIZE - index).float()  # (B, GROUP_SIZE)
    tie_order = 2 * group_order[:, :, None] + index_order[:, None]
    precedes = (4 * order + tie_order).clamp(0, 1)  # 1.0 or 0.0
    group_weights = (weights * precedes).sum(-1)  # (B, G)
    weight_before = group_weights.sum(-1)  # (B,)
    num_above = order.clamp(0, 1).sum(-1).sum(-1)  # (B,)
    is_rejected = (num_above >= limits.top_k) | (state.logit < limits.min_logit)
    is_open = ~state.is_accepted & ~is_rejected

    def is_undecided(*state: Tensor) -> Tensor:
        bounds = TopKBounds(*state)
        may_be_below = weight_before < limits.top_p * bounds.max_weight
        may_be_above = weight_before >= limits.top_p * bounds.min_weight
        return (is_open & may_be_below & may_be_above).any()

    def bisect(*state: Tensor) -> TopKBounds:
        return bisect_top_k(candidates, limits.top_k, TopKBounds(*state))

    bounds = TopKBounds(*while_loop(is_undecided, bisect, state[4:]))
    # Nothing precedes the most likely token, even if top_p is so small that float32 makes it 0.
    is_rejected = is_rejected | (weight_before >= limits.top_p * bounds.max_weight)
    is_rejected = is_rejected & (weight_before > 0)
    is_accepted = state.is_accepted | ~is_rejected
    if not torch.compiler.is_compiling() and is_accepted.all():
        return ResampleState(state.tries, state.token, state.logit, is_accepted, *bounds)
    before = Draw(state.token, state.logit)
    redraw = draw_token(candidates, group_weights, before, hash_int32(seeds + state.tries))
    return ResampleState(
        state.tries + 1,
        torch.where(is_accepted, state.token, redraw.token),
        torch.where(is_accepted, state.logit, redraw.logit),
        is_accepted,
        *bounds,
    )


def sample_next(logits: Tensor, params: SamplingTensors, positions: Tensor) -> Tensor:
    """The next token of each row: (B,) int64.

    The order is that of transformers: repetition penalty, bias, temperature, then top_k, top_p
    among the tokens that top_k leaves, and min_p.

    Args:
        logits: (B, V).
        positions: (B,) position of the new token in its sequence; it selects the noise.
    """
    vocab_size = logits.shape[-1]
    padding = -vocab_size % GROUP_SIZE
    logits = F.pad(apply_penalties(logits, params, positions), (0, padding), value=-torch.inf)
    logits = logits.unflatten(-1, (-1, GROUP_SIZE))
    group_max = logits.amax(-1)  # (B, G)
    max_logit = group_max.amax(-1)  # (B,)
    weights = (logits - max_logit[:, None, None]).exp()
    group_weights = weights.sum(-1)  # (B, G)
    total_weight = group_weights.sum(-1)  # (B,)
    candidates = Candidates(logits, weights)
    # 1. Draw from all tokens. At temperature 0 take the most likely one.
    seeds = hash_int32(params.key ^ (positions.int() * -1640531527))
    end = Draw(torch.full_like(positions, vocab_size), torch.full_like(max_logit, -torch.inf))
    draw = draw_token(candidates, group_weights, end, seeds)
    token = torch.where(params.is_greedy, most_likely(logits, group_max), draw.token)
    # 2. Draw again where a truncation rejects the token.
    has_top_k = params.top_k > 0
    has_top_p = params.top_p < 1
    limits = Limits(
        top_k=torch.where(has_top_k, params.top_k, vocab_size),
        top_p=torch.where(has_top_p, params.top_p, torch.inf),
        min_logit=max_logit + params.min_p.log(),
    )
    is_truncated = (has_top_k | has_top_p | (params.min_p > 0)) & ~params.is_greedy
    state = ResampleState(
        tries=torch.ones((), dtype=torch.int32, device=logits.device),
        token=token,
        logit=draw.logit,
        is_accepted=~(is_truncated & params.is_active),
        low=max_logit - EXP_UNDERFLOW,
        high=max_logit.clone(),
        max_weight=total_weight,
        min_weight=torch.where(has_top_k, 0.0, total_weight),
    )
    return while_loop(
        lambda *state: ~ResampleState(*state).is_accepted.all(),
        lambda *state: check_and_redraw(candidates, limits, seeds, ResampleState(*state)),
        state,
    )[1]
