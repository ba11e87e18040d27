"""
How the next token is chosen: which tokens may be, and the draw among them.

A draw is an argmax. Gumbel noise added to logits is largest, in sum, at each token with just that
token's probability (arXiv 1411.0030, section 2). The noise is a hash of a key and a number, so that
a draw depends on nothing but its key and its row of logits, in a batch of any size, on any device.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F

from runtime.hashing import splitmix64

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
    return logits.masked_fill(
        probabilities < p * probabilities.amax(-1, keepdim=True), float("-inf")
    )


def penalize_repeats(logits, seen, penalty: float):
    """Make the tokens seen (B, S) less likely than logits (B, V) have them: a positive logit is
    divided by the penalty, a negative one multiplied (CTRL, arXiv 1909.05858, section 4.1)."""
    of_seen = logits.gather(-1, seen)
    return logits.scatter(-1, seen, torch.where(of_seen > 0, of_seen / penalty, of_seen * penalty))


def draw_key(seed: int, sample: int, position: int) -> int:
    """The key of a draw: an int32, hashed of seed, sample and position."""
    key = splitmix64(splitmix64(splitmix64(seed) + sample) + position) & 0xFFFFFFFF
    return key - (key >> 31 << 32)


def gumbel_noise(keys, count: int):
    """Standard Gumbel noise (B, count) of the keys (B,), int32. The hash is lowbias32 of Wellons's
    hash prospector, in 32 bits that wrap around."""
    # The xor keeps the compiler from multiplying the loop's index itself, whose overflow C++ does not define.
    number = torch.arange(count, dtype=torch.int32, device=keys.device) ^ 0x2545F491
    x = number * -1640531527 ^ keys[:, None]  # 2**32 / golden ratio
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * -2073254261
    x = (x ^ (x >> 16 & 0xFFFF)) & 0x7FFFFFFF
    uniform = ((x.float() + 0.5) * 2**-31).clamp(max=1 - 2**-24)  # never 0 or 1
    return -(-torch.log1p(-uniform)).log()


BLOCK = 128  # tokens
ATTEMPTS = 3  # at a draw among some of the tokens, before the others are looked for


def draw(logits, keys, attempts: range):
    """Tokens (B, A) of logits (B, V), drawn independently for each of the attempts at the keys (B,). First
    a block of tokens is drawn and then one of it: noise for each of 32,000 tokens would take longer
    than all else that is done with their logits."""
    blocks = F.pad(logits, (0, -logits.shape[-1] % BLOCK), value=float("-inf")).unflatten(
        -1, (-1, BLOCK)
    )
    sizes = [blocks.shape[1], BLOCK]
    noise = gumbel_noise(keys, attempts.stop * sum(sizes)).unflatten(-1, (-1, sum(sizes)))[
        :, attempts.start :
    ]
    of_blocks, of_tokens = noise.split(sizes, dim=-1)
    block = (blocks.logsumexp(-1)[:, None] + of_blocks).argmax(-1)  # (B, A)
    of_block = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))  # (B, A, BLOCK)
    return block * BLOCK + (of_block + of_tokens).argmax(-1)


def first_choice(
    logits, keys, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
):
    """Draw as if nothing were truncated until it is a token that the truncations leave: tokens (B,), and
    whether each is one (B,), so that nothing need be truncated. Where False, after too many attempts or as
    only truncating would tell, the token is nothing."""
    if temperature < 1e-6:  # a float32 cannot tell it from 0
        tokens = logits.argmax(-1)
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    if not top_k and top_p == 1 and not min_p:
        tokens = draw(scaled, keys, range(1))[:, 0]
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
    if top_k and top_p < 1:  # p of what k leaves
        return logits.argmax(-1), torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    tokens = draw(scaled, keys, range(ATTEMPTS))  # (B, A)
    own, scaled = scaled.gather(-1, tokens)[..., None], scaled[:, None]  # (B, A, 1), (B, 1, V)
    inside = torch.ones_like(
        tokens, dtype=torch.bool
    )  # not changed in place: a compiled loop forbids that
    if top_k:
        inside = inside & ((scaled > own).sum(-1) < top_k)
    if top_p < 1:
        number = torch.arange(logits.shape[-1], device=logits.device)
        before = (scaled > own) | (scaled == own) & (number < tokens[..., None])
        inside = inside & ((scaled.softmax(-1) * before).sum(-1) < top_p)
    if min_p:
        probabilities = scaled.softmax(-1)[:, 0]
        inside = inside & (
            probabilities.gather(-1, tokens) >= min_p * probabilities.amax(-1, keepdim=True)
        )
    first = inside.int().argmax(-1, keepdim=True)
    return tokens.gather(-1, first)[:, 0], inside.any(-1)


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
    # With noise of its own: that of the attempts is known to lead elsewhere.
    drawn = draw(logits, keys[~inside], range(ATTEMPTS, ATTEMPTS + 1))[:, 0]
    return tokens.masked_scatter(~inside, drawn)


class BadWords:
    """Strings that may not appear in a text, however it is cut into tokens. token_bytes: what each
    token of the vocabulary adds to the text."""

    def __init__(self, words: Collection[str], token_bytes: list[bytes]):
        words = [word.encode() for word in words]
        self.token_bytes, self.longest = token_bytes, max(map(len, words), default=0)
        self.always = [
            i for i, text in enumerate(token_bytes) if any(word in text for word in words)
        ]
        self.after: dict[
            bytes, list[int]
        ] = {}  # the beginning of a word -> the tokens that complete it
        for word in words:
            for cut in range(1, len(word)):
                completing = [
                    i for i, text in enumerate(token_bytes) if text.startswith(word[cut:])
                ]
                self.after[word[:cut]] = self.after.get(word[:cut], []) + completing

    def completed_by(self, tokens: list[int]) -> list[int]:
        """The tokens that would complete one of the words after these."""
        tail = b"".join(self.token_bytes[token] for token in tokens[-self.longest :])
        return self.always + [
            i for start, ids in self.after.items() if tail.endswith(start) for i in ids
        ]
