"""
Decoding: how the next token is chosen, the loop that chooses one after another, where a text ends,
and how likely a model finds a text that is there already. No files here.
"""

from collections.abc import Callable, Collection, Generator, Iterable, Iterator

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


def truncate_min_p(logits, p: float):
    """Keep what is at least p times as likely as the likeliest of logits (B, V) (arXiv 2407.01082)."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), float("-inf"))


def penalize_repeats(logits, seen, penalty: float):
    """Make the tokens seen (B, S) less likely than logits (B, V) have them: a positive logit is
    divided by the penalty, a negative one multiplied (CTRL, arXiv 1909.05858, section 4.1)."""
    of_seen = logits.gather(-1, seen)
    return logits.scatter(-1, seen, torch.where(of_seen > 0, of_seen / penalty, of_seen * penalty))


def choose(
    logits, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, generator=None
):  # fmt: skip
    """The next token of each row of logits (B, V), as ids (B,). Temperature 0 is greedy; top_k 0,
    top_p 1 and min_p 0 leave all tokens in; each counts what those before it left. The draw is made
    on the CPU, from the generator."""
    if temperature < 1e-6:  # a float32 cannot tell it from 0
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        logits = truncate_top_k(logits, top_k)
    if top_p < 1:
        logits = truncate_top_p(logits, top_p)
    if min_p:
        logits = truncate_min_p(logits, min_p)
    drawn = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)  # (B, 1)
    return drawn[:, 0].to(logits.device)


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
    min_new_tokens: int = 0,
    repetition_penalty: float = 1.0,
    bad_words: BadWords | None = None,
) -> Iterator[int]:
    """Yield up to max_new_tokens ids that go on from the prompt (at least one id), ending before
    an id in stop, which is not chosen before min_new_tokens are there. choose maps logits (1, V) to
    an id (1,). The penalty is for all tokens there, the prompt's too. Works past max_seq_len: see
    window_start. Without the cache the same tokens come, more slowly. Raises ValueError where no
    token is left to choose."""
    weight = model.tok_embeddings.weight
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    length = min(model.args.max_seq_len, len(prompt) + max_new_tokens)  # no more than will be filled
    cache = KVCache(model.args, 1, length, weight.device, dtype) if use_cache else None
    tokens, start, cached = list(prompt), 0, 0  # cached: how many positions from start on are in the cache
    for number in range(max_new_tokens):
        moved_start = window_start(len(tokens), model.args.max_seq_len)
        if moved_start != start or not use_cache:
            start, cached = moved_start, 0
        inputs = torch.tensor([tokens[start + cached :]], device=weight.device)  # (1, T)
        logits, _ = model(inputs, cache=cache, start_pos=cached)
        cached, logits = len(tokens) - start, logits[:, -1]
        if repetition_penalty != 1:
            logits = penalize_repeats(logits, torch.tensor([tokens], device=weight.device), repetition_penalty)
        forbidden = list(stop) if number < min_new_tokens else []
        forbidden += bad_words.completed_by(tokens) if bad_words else []
        if forbidden:
            logits = logits.index_fill(-1, torch.tensor(forbidden, device=weight.device), float("-inf"))
            if logits.isneginf().all():
                raise ValueError("no token is left to go on with: each would end the text or complete a bad word")
        token = int(choose(logits))
        if token in stop:
            return
        tokens.append(token)
        yield token


def until_stop(pieces: Iterable[str], stops: Collection[str]) -> Generator[str, None, bool]:
    """Yield text up to that of the strings in stops which is complete first, wherever the pieces are
    cut; returns whether one was there. What may begin one is held back until that is known."""
    held = ""
    for piece in pieces:
        held += piece
        found = [(place + len(stop), place) for stop in stops if (place := held.find(stop)) >= 0]
        if found:
            yield held[: min(found)[1]]
            return True
        open_length = max((overlap(held, stop) for stop in stops), default=0)
        yield held[: len(held) - open_length]
        held = held[len(held) - open_length :]
    yield held
    return False


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of text may begin a stop string: the most that do."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


SCORED_AT_ONCE = 256  # positions, whose logits are in memory together


@torch.inference_mode()
def log_probabilities(model: Transformer, tokens: list[int]):
    """The natural logarithm of each token's probability after those before it, as generate() sees
    them: (len(tokens) - 1,), float32, none for the first token."""
    longest, device, found = model.args.max_seq_len, model.tok_embeddings.weight.device, []
    ids, predicted = torch.tensor([tokens], device=device), 0
    while predicted < len(tokens) - 1:
        start = window_start(predicted + 1, longest)
        end = min(start + longest, len(tokens) - 1)  # the positions from start to end predict the next ones
        cache = KVCache(model.args, 1, end - start, device, model.tok_embeddings.weight.dtype)
        for first in range(start, end, SCORED_AT_ONCE):
            last = min(first + SCORED_AT_ONCE, end)
            logits, _ = model(ids[:, first:last], cache=cache, start_pos=first - start)
            likely = logits[0].float().log_softmax(-1).gather(-1, ids[0, first + 1 : last + 1, None])
            found.append(likely[max(0, predicted - first) :, 0])
        predicted = end
    return torch.cat(found) if found else torch.zeros(0)
