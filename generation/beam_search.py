"""
Beam search: the completions that a model finds most probable as a whole.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from generation.engine import MAX_PREFILL_TOKENS, InferenceEngine
from generation.prepared_model import PreparedModel
from generation.request import Request
from generation.steps import check_no_nan
from model import Transformer


@dataclass(frozen=True)
class BeamSearchParams:
    """Options of beam_search. Raises ValueError for a value out of range.

    banned_tokens maps the tokens of a beam, the prompt's included, to tokens that must not come
    next. The other tokens do not gain their probability."""

    num_beams: int
    max_new_tokens: int
    min_new_tokens: int = 0  # stop tokens are suppressed before this many new tokens
    length_penalty: float = 1.0  # score = logprob / length**length_penalty
    num_best: int = 1  # hypotheses to return
    banned_tokens: Callable[[list[int]], Collection[int]] | None = None

    def __post_init__(self) -> None:
        if self.num_beams < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"num_beams={self.num_beams}, max_new_tokens={self.max_new_tokens}: "
                "each must be at least 1"
            )
        if not 1 <= self.num_best <= self.num_beams:
            raise ValueError(
                f"num_best={self.num_best}: must be at least 1, "
                f"and at most num_beams={self.num_beams}"
            )
        if not -10 <= self.length_penalty <= 10:  # a larger power of the length could overflow
            raise ValueError(f"length_penalty={self.length_penalty}: must be between -10 and 10")


class Hypothesis(NamedTuple):
    """A completion found by beam search."""

    tokens: list[int]  # the new tokens, without the stop token
    logprob: float  # sum of their natural log-probabilities, the stop token's included
    score: float  # logprob / length**length_penalty; the length includes the stop token
    finish: Literal["stop", "length"]


class Candidate(NamedTuple):
    """A beam extended by one token."""

    logprob: float
    beam: int
    token: int


def next_logprobs(engine: InferenceEngine) -> torch.Tensor:
    """The natural log-probabilities of the next token of each beam: (beams, V), float32."""
    rows = engine.batch.active
    while True:
        chunks = [row.uncached[:MAX_PREFILL_TOKENS] for row in rows]  # all of the same length
        x = engine.forward(rows, chunks)
        if not rows[0].uncached:
            logprobs = engine.model.output(x[:, -1]).float().log_softmax(-1)
            check_no_nan(logprobs)
            return logprobs


def best_candidates(logprobs: torch.Tensor, count: int) -> list[Candidate]:
    """The most probable of logprobs (beams, V), best first: at most count, all possible."""
    best = logprobs.flatten().topk(min(count, logprobs.numel()))
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [
        Candidate(logprob, *divmod(index, logprobs.shape[1]))
        for logprob, index in pairs
        if logprob > float("-inf")
    ]


def ban_tokens_(
    logprobs: torch.Tensor, beams: list[list[int]], params: BeamSearchParams, early_stop: set[int]
) -> None:
    """In place, set logprobs (beams, V) of banned tokens and of those in early_stop to -inf."""
    for beam, tokens in enumerate(beams):
        banned = set(params.banned_tokens(tokens)) if params.banned_tokens else set()
        logprobs[beam, list(banned | early_stop)] = float("-inf")


def best_hypotheses(hypotheses: list[Hypothesis], count: int) -> list[Hypothesis]:
    """At most count hypotheses with the highest scores, best first."""
    return sorted(hypotheses, key=lambda hypothesis: hypothesis.score, reverse=True)[:count]


@torch.inference_mode()
def beam_search(
    model: Transformer | PreparedModel,
    prompt: list[int],
    params: BeamSearchParams,
    stop_ids: Collection[int] = (),
) -> list[Hypothesis]:
    """The params.num_best best completions of a prompt, best first; fewer if no more are possible.

    The rules are those of transformers' generate with early_stopping=False. A hypothesis ends with
    a token in stop_ids or after max_new_tokens. It may exceed max_seq_len; see context_start.
    Raises ValueError for an empty prompt, and if all tokens are banned before a hypothesis ends."""
    stop = set(stop_ids)
    engine = InferenceEngine(model, params.num_beams)
    engine.batch.ensure_capacity(len(prompt) + params.max_new_tokens)
    engine.batch.add(Request(prompt))
    logprobs = torch.zeros(1, device=engine.device)
    finished: list[Hypothesis] = []  # best first
    for length in range(1, params.max_new_tokens + 1):  # new tokens, this step's included
        # 1. Extend each beam by every token.
        beams = [row.tokens for row in engine.batch.active]
        logprobs = logprobs[:, None] + next_logprobs(engine)  # (beams, V)
        early_stop = stop if length <= params.min_new_tokens else set()
        ban_tokens_(logprobs, beams, params, early_stop)
        # As many candidates as may end here, and num_beams more.
        candidates = best_candidates(logprobs, params.num_beams * (1 + len(stop)))
        # 2. Finish hypotheses; only the num_beams best candidates may end.
        for logprob, beam, token in candidates[: params.num_beams]:
            score = logprob / length**params.length_penalty
            tokens = beams[beam][len(prompt) :]
            if token in stop:
                finished.append(Hypothesis(tokens, logprob, score, "stop"))
            elif length == params.max_new_tokens:
                finished.append(Hypothesis([*tokens, token], logprob, score, "length"))
        finished = best_hypotheses(finished, params.num_beams)
        # 3. Continue with the best of the others.
        live = [candidate for candidate in candidates if candidate.token not in stop]
        live = live[: params.num_beams]
        if not live or is_done(finished, live[0].logprob, length, params):
            break
        requests = [Request([*beams[candidate.beam], candidate.token]) for candidate in live]
        engine.batch.fork([candidate.beam for candidate in live], requests)
        logprobs = torch.tensor([candidate.logprob for candidate in live], device=engine.device)
    if not finished:
        raise ValueError("no token is left: each is banned, or would end the sequence too early")
    return finished[: params.num_best]


def is_done(
    finished: list[Hypothesis], best_logprob: float, length: int, params: BeamSearchParams
) -> bool:
    """Whether the search ends: no live beam of this length would beat the finished hypotheses now.

    A longer hypothesis might still have a better score; this is transformers' rule."""
    if len(finished) < params.num_beams:
        return False
    return best_logprob / length**params.length_penalty <= finished[-1].score
