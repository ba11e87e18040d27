"""
Beam search: the texts that a model finds likeliest as a whole after a prompt, where decoder.py
chooses one token after another. No files here.
"""

from collections.abc import Callable, Collection
from typing import Literal, NamedTuple

import torch

from generation.engine import check_numbers, window_start
from model import Transformer
from ops.kv_cache import KVCache


class Hypothesis(NamedTuple):
    tokens: list[int]  # the new ones, without the stop token
    logprob: float  # the sum of their natural logarithms, the stop token's with them
    score: float  # logprob / length ** length_penalty; the length counts the stop token too
    finish: Literal["stop", "length"]


def check_arguments(
    prompt: list[int], num_beams: int, max_new_tokens: int, length_penalty: float, num_best: int
):
    if not prompt:
        raise ValueError("the prompt is empty: begin with at least one token, such as BOS")
    if num_beams < 1 or max_new_tokens < 1:
        raise ValueError(
            f"num_beams={num_beams}, max_new_tokens={max_new_tokens}: each must be at least 1"
        )
    if not 1 <= num_best <= num_beams:
        raise ValueError(
            f"num_best={num_best}: must be at least 1, and at most num_beams={num_beams}"
        )
    if not -10 <= length_penalty <= 10:  # beyond, a power of the length may be no number any more
        raise ValueError(f"length_penalty={length_penalty}: must be between -10 and 10")


def next_logprobs(model: Transformer, cache: KVCache, beams: list[list[int]], read: int):
    """The natural logarithm of each token's probability after each of the beams, which are of one length:
    (beams, V), float32. The cache has a row a beam, and in it the first read tokens of each."""
    length, longest = len(beams[0]), model.args.max_seq_len
    start = window_start(length, longest)
    first = (
        read if window_start(read, longest) == start else start
    )  # a cache of another window is of no use
    inputs = torch.tensor(
        [tokens[first:] for tokens in beams], device=model.tok_embeddings.weight.device
    )  # (beams, T)
    last = model.forward_hidden(inputs, cache, first - start)[:, -1]  # (beams, C)
    logprobs = model.output(last).float().log_softmax(-1)
    check_numbers(logprobs)
    return logprobs


def best_candidates(logprobs, count: int) -> list[tuple[float, int, int]]:
    """The count likeliest of logprobs (beams, V), best first, as (logprob, beam, token); fewer where
    the others are impossible."""
    best = logprobs.flatten().topk(min(count, logprobs.numel()))
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [
        (value, *divmod(place, logprobs.shape[1]))
        for value, place in pairs
        if value > float("-inf")
    ]


@torch.inference_mode()
def beam_search(
    model: Transformer,
    prompt: list[int],
    num_beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    stop: Collection[int] = (),
    num_best: int = 1,
    min_new_tokens: int = 0,
    forbidden: Callable[[list[int]], Collection[int]] | None = None,
) -> list[Hypothesis]:
    """The num_best continuations of the prompt that a search with num_beams finds, best first; fewer
    where no more are possible. A text ends at an id in stop, which is not taken before min_new_tokens
    are there, or with max_new_tokens. forbidden maps a text's tokens, the prompt's too, to ids that may
    not come next; they keep their share of the probability. Works past max_seq_len: see window_start.

    The rules are those of transformers' generate with early_stopping=False. Raises ValueError for
    impossible arguments, and where no token is left for any beam before one text has ended."""
    check_arguments(prompt, num_beams, max_new_tokens, length_penalty, num_best)
    stop, device = set(stop), model.tok_embeddings.weight.device
    cache = model.new_kv_cache(1, min(model.args.max_seq_len, len(prompt) + max_new_tokens))
    beams, logprobs, read = [list(prompt)], torch.zeros(1, device=device), 0
    finished: list[Hypothesis] = []  # best first
    for length in range(1, max_new_tokens + 1):  # of the new tokens, with those of this turn
        logprobs = logprobs[:, None] + next_logprobs(model, cache, beams, read)  # (beams, V)
        read = len(beams[0])
        for beam, tokens in enumerate(beams):
            never = set(forbidden(tokens)) if forbidden else set()
            logprobs[beam, list(never | stop if length <= min_new_tokens else never)] = float(
                "-inf"
            )
        # As many as may end here, and num_beams more to go on with.
        candidates = best_candidates(logprobs, num_beams * (1 + len(stop)))
        for logprob, beam, token in candidates[
            :num_beams
        ]:  # a text that ends must be as likely as these
            score, tokens = logprob / length**length_penalty, beams[beam][len(prompt) :]
            if token in stop:
                finished.append(Hypothesis(tokens, logprob, score, "stop"))
            elif length == max_new_tokens:
                finished.append(Hypothesis([*tokens, token], logprob, score, "length"))
        finished = sorted(finished, key=lambda hypothesis: hypothesis.score, reverse=True)[
            :num_beams
        ]
        live = [candidate for candidate in candidates if candidate[2] not in stop][:num_beams]
        # A longer text may yet have the better score; to end here all the same is transformers' rule.
        if not live or (
            len(finished) == num_beams and live[0][0] / length**length_penalty <= finished[-1].score
        ):
            break
        likeliest, parents, chosen = zip(*live, strict=True)
        beams = [[*beams[parent], token] for parent, token in zip(parents, chosen, strict=True)]
        logprobs = torch.tensor(likeliest, device=device)
        cache.select_rows(torch.tensor(parents, device=device))
    if not finished:
        raise ValueError(
            "no token is left to go on with: each is forbidden, or would end the text too soon"
        )
    return finished[:num_best]
