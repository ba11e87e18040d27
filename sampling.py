"""
How the next token is chosen: which tokens may be, and the draw among them.

A draw is an argmax. Gumbel noise added to logits is largest, in sum, at each token with just that
token's probability (arXiv 1411.0030, section 2). The noise is a hash of a key and the token, so that
a draw depends on nothing but its key and its row of logits, in a batch of any size, on any device.
"""

import math
from collections.abc import Collection

import torch

from dataset import mix

SORTED_FIRST = 512  # tokens; a nucleus is rarely larger


def truncate_top_k(logits, k: int):
    """Keep the k most likely of logits (B, V) and what is as likely as the last of them."""
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < kth, float("-inf"))


def truncate_top_p(logits, p: float):
    """Keep the fewest most likely of logits (B, V) whose probabilities reach p (nucleus sampling,
    arXiv 1904.09751); the most likely token always stays. Of equals the first ones are kept."""
    total = logits.logsumexp(-1, keepdim=True)
    for count in (min(SORTED_FIRST, logits.shape[-1]), logits.shape[-1]):
        ordered = logits.topk(count, dim=-1).values
        reached = (ordered - total).exp().cumsum(-1)
        if (reached[:, -1] >= p).all():
            break
    needed = 1 + (reached[:, :-1] < p).sum(-1, keepdim=True)
    last = ordered.gather(-1, needed - 1)
    of_equals = needed - (logits > last).sum(-1, keepdim=True)
    equals = logits == last
    outside = (logits < last) | equals & (equals.cumsum(-1) > of_equals)
    return logits.masked_fill(outside, float("-inf"))


def truncate_min_p(logits, p: float):
    """Keep what is at least p times as likely as the likeliest of logits (B, V) (arXiv 2407.01082)."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), float("-inf"))


def penalize_repeats(logits, seen, penalty: float):
    """Make the tokens seen (B, S) less likely than logits (B, V) have them: a positive logit is
    divided by the penalty, a negative one multiplied (CTRL, arXiv 1909.05858, section 4.1)."""
    of_seen = logits.gather(-1, seen)
    return logits.scatter(-1, seen, torch.where(of_seen > 0, of_seen / penalty, of_seen * penalty))


def draw_key(seed: int, sample: int, position: int) -> int:
    """The key of a draw: an int32, hashed of seed, sample and position."""
    key = mix(mix(mix(seed) + sample) + position) & 0xFFFFFFFF
    return key - (key >> 31 << 32)


def gumbel_noise(keys, vocab_size: int):
    """Standard Gumbel noise (B, V) of the keys (B,), int32. The hash is lowbias32 of Wellons's
    hash prospector, in 32 bits that wrap around."""
    # The xor keeps the compiler from multiplying the loop's index itself, whose overflow C++ does not define.
    token = torch.arange(vocab_size, dtype=torch.int32, device=keys.device) ^ 0x2545F491
    x = token * -1640531527 ^ keys[:, None]  # 2**32 / golden ratio
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * -2073254261
    x = (x ^ (x >> 16 & 0xFFFF)) & 0x7FFFFFFF
    uniform = ((x.float() + 0.5) * 2**-31).clamp(max=1 - 2**-24)  # never 0 or 1
    return -logarithm(-logarithm(1 - uniform, -uniform))


def logarithm(x, x_less_one=None):
    """The natural logarithm of positive, normal, finite float32 numbers, off by some 1e-6 of itself at
    most. x_less_one: x - 1, where that is known more precisely. Compiled, it takes half the time of
    PyTorch's: x is m times a power of 2, m from sqrt(1/2) to sqrt(2), and log m = 2 artanh((m - 1) / (m + 1))."""
    if not torch.compiler.is_compiling():
        return x.log() if x_less_one is None else x_less_one.log1p()
    bits = x.view(torch.int32)
    exponent = bits - 0x3F3504F3 >> 23  # of sqrt(1/2)
    m_less_one = (bits - (exponent << 23)).view(torch.float32) - 1
    if x_less_one is not None:
        m_less_one = torch.where(exponent == 0, x_less_one, m_less_one)
    tangent = m_less_one / (2 + m_less_one)
    square = tangent * tangent
    series = tangent * (2 + square * (2 / 3 + square * (2 / 5 + square * (2 / 7))))
    return exponent * math.log(2) + series


def first_choice(logits, keys, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0):
    """The draw as if nothing were truncated: tokens (B,), and whether each is among what the
    truncations leave (B,), so that they need not be done. False where only doing them would tell."""
    if temperature < 1e-6:  # a float32 cannot tell it from 0
        tokens = logits.argmax(-1)
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
    scaled = logits.float() / temperature
    tokens = (scaled + gumbel_noise(keys, logits.shape[-1])).argmax(-1)
    own = scaled.gather(-1, tokens[:, None])  # (B, 1)
    inside = torch.full_like(tokens, not (top_k and top_p < 1), dtype=torch.bool)
    if top_k:
        inside &= (scaled > own).sum(-1) < top_k
    if top_p < 1:
        number = torch.arange(logits.shape[-1], device=logits.device)
        before = (scaled > own) | (scaled == own) & (number < tokens[:, None])
        inside &= (scaled.softmax(-1) * before).sum(-1) < top_p
    if min_p:
        probabilities = scaled.softmax(-1)
        inside &= (probabilities.gather(-1, tokens[:, None]) >= min_p * probabilities.amax(-1, keepdim=True))[:, 0]
    return tokens, inside


def choose(
    logits, keys=None, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, first=None
):  # fmt: skip
    """The next token of each row of logits (B, V), as ids (B,), drawn by the keys (B,). Temperature 0
    is greedy; top_k 0, top_p 1 and min_p 0 leave all tokens in; each counts what those before it left.
    first: what first_choice says of the same, where that is known."""
    tokens, inside = first or first_choice(logits, keys, temperature, top_k, top_p, min_p)
    if inside.all():
        return tokens
    logits = logits[~inside].float() / temperature
    if top_k:
        logits = truncate_top_k(logits, top_k)
    if top_p < 1:
        logits = truncate_top_p(logits, top_p)
    if min_p:
        logits = truncate_min_p(logits, min_p)
    drawn = (logits + gumbel_noise(keys[~inside], logits.shape[-1])).argmax(-1)
    return tokens.masked_scatter(~inside, drawn)


class BadWords:
    """Strings that may not appear in a text, however it is cut into tokens. token_bytes: what each
    token of the vocabulary adds to the text."""

    def __init__(self, words: Collection[str], token_bytes: list[bytes]):
        words = [word.encode() for word in words]
        self.token_bytes, self.longest = token_bytes, max(map(len, words), default=0)
        self.always = [i for i, text in enumerate(token_bytes) if any(word in text for word in words)]
        self.after: dict[bytes, list[int]] = {}  # the beginning of a word -> the tokens that complete it
        for word in words:
            for cut in range(1, len(word)):
                completing = [i for i, text in enumerate(token_bytes) if text.startswith(word[cut:])]
                self.after[word[:cut]] = self.after.get(word[:cut], []) + completing

    def completed_by(self, tokens: list[int]) -> list[int]:
        """The tokens that would complete one of the words after these."""
        tail = b"".join(self.token_bytes[token] for token in tokens[-self.longest :])
        return self.always + [i for start, ids in self.after.items() if tail.endswith(start) for i in ids]
