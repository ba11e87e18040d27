"""
Decoding: how the next token is chosen, and the loop that chooses one after another. No files here.
"""

from collections.abc import Callable, Collection, Iterator

import torch

from model import KVCache, Transformer


def truncate_top_k(logits, k: int):
    """Keep the k most likely of logits (B, V) and what is as likely as the last of them."""
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < kth, float("-inf"))


def truncate_top_p(logits, p: float):
    """Keep the fewest most likely of logits (B, V) whose probabilities reach p (nucleus sampling,
    arXiv 1904.09751); the most likely token always stays."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    outside = probabilities.cumsum(-1) - probabilities >= p  # the more likely ones reach p already
    outside[:, 0] = False
    return logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))


def choose(logits, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, generator=None):
    """The next token of each row of logits (B, V), as ids (B,). Temperature 0 is greedy; top_k 0
    and top_p 1 leave all tokens in. The draw is made on the CPU, from the generator."""
    if temperature < 1e-6:  # a float32 cannot tell it from 0
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        logits = truncate_top_k(logits, top_k)
    if top_p < 1:
        logits = truncate_top_p(logits, top_p)
    drawn = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)  # (B, 1)
    return drawn[:, 0].to(logits.device)


def window_start(length: int, max_seq_len: int) -> int:
    """Where the model's context begins when length tokens are there: at 0 as long as they fit,
    then it moves on by half a context at a time, so that a cache is refilled rarely."""
    stride = max(1, max_seq_len // 2)
    return max(0, -(-(length - max_seq_len) // stride)) * stride


@torch.inference_mode()
def generate(
    model: Transformer,
    prompt: list[int],
    max_new_tokens: int,
    choose: Callable = choose,
    stop: Collection[int] = (),
    use_cache: bool = True,
) -> Iterator[int]:
    """Yield up to max_new_tokens ids that go on from the prompt (at least one id), ending before
    an id in stop. choose maps logits (1, V) to an id (1,). Works past max_seq_len: see
    window_start. Without the cache the same tokens come, more slowly."""
    weight = model.tok_embeddings.weight
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    length = min(model.args.max_seq_len, len(prompt) + max_new_tokens)  # no more than will be filled
    cache = KVCache(model.args, 1, length, weight.device, dtype) if use_cache else None
    tokens, start, cached = list(prompt), 0, 0  # cached: how many positions from start on are in the cache
    for _ in range(max_new_tokens):
        moved_start = window_start(len(tokens), model.args.max_seq_len)
        if moved_start != start or not use_cache:
            start, cached = moved_start, 0
        inputs = torch.tensor([tokens[start + cached :]], device=weight.device)  # (1, T)
        logits, _ = model(inputs, cache=cache, start_pos=cached)
        cached = len(tokens) - start
        token = int(choose(logits[:, -1]))
        if token in stop:
            return
        tokens.append(token)
        yield token
