"""
How probable a model finds a given text: log-probabilities, loss, perplexity, bits per byte.
"""

import math
from typing import NamedTuple

import torch

from generation.engine import InferenceEngine
from generation.prepared_model import PreparedModel
from generation.request import Request, context_start
from generation.steps import check_no_nan
from model import Transformer
from textdata.tokenizer import Tokenizer

CHUNK = 256  # positions whose logits are in memory together


@torch.inference_mode()
def token_logprobs(model: Transformer | PreparedModel, tokens: list[int]) -> list[float]:
    """The natural log-probability of each token after the first.

    Each token has the context that an InferenceEngine would give it. Raises ValueError for NaN."""
    engine = InferenceEngine(model)
    engine.batch.ensure_capacity(len(tokens))
    logprobs: list[float] = []
    while len(logprobs) < len(tokens) - 1:
        start = context_start(len(logprobs) + 1, engine.max_seq_len)
        end = min(start + engine.max_seq_len, len(tokens) - 1)
        row = engine.batch.add(Request(tokens[start:end]))
        while row.uncached:
            position = start + len(row.cached) + 1  # of the first token that this chunk scores
            chunk = row.uncached[:CHUNK]
            logits = engine.model.output(engine.forward([row], [chunk])[0])  # (T, V)
            check_no_nan(logits)
            targets = torch.tensor(tokens[position : position + len(chunk)], device=engine.device)
            scores = logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
            logprobs += scores[max(0, len(logprobs) + 1 - position) :].tolist()
        engine.batch.free(row)
        row.cached = []  # all tokens of the next context are computed, since all are scored
    return logprobs


class TextScore(NamedTuple):
    """The log-probabilities of the tokens of a text."""

    ids: list[int]  # tokens, without BOS
    logprobs: list[float]  # of each token, in nats
    num_bytes: int  # of the text in UTF-8

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token."""
        return -math.fsum(self.logprobs) / len(self.logprobs)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))  # exp(710) overflows

    @property
    def bits_per_byte(self) -> float:
        return -math.fsum(self.logprobs) / math.log(2) / self.num_bytes

    def summary(self) -> dict[str, float]:
        """The number of tokens and bytes, and all averages, for a JSON record."""
        return {
            "tokens": len(self.ids),
            "bytes": self.num_bytes,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }


def score_text(model: Transformer | PreparedModel, tokenizer: Tokenizer, text: str) -> TextScore:
    """The log-probabilities of the tokens of a text after BOS. The text must not be empty."""
    ids = tokenizer.encode(text, bos=True)
    logprobs = token_logprobs(model, ids)
    return TextScore(ids[1:], logprobs, len(text.encode()))
