"""
How probable a model finds a given text: log-probabilities, loss, perplexity, bits per byte.
"""

import math
from typing import NamedTuple

import torch

from generation.sequence import context_start
from generation.steps import check_no_nan
from model import Transformer
from textdata.tokenizer import Tokenizer

CHUNK = 256  # positions whose logits are in memory together


@torch.inference_mode()
def token_logprobs(model: Transformer, tokens: list[int]) -> torch.Tensor:
    """The natural log-probability of each token after the first: (len(tokens) - 1,), float32.

    Each token has the context that an InferenceEngine would give it. Raises ValueError for NaN."""
    device = model.tok_embeddings.weight.device
    dtype = model.tok_embeddings.weight.dtype
    max_seq_len = model.args.max_seq_len
    ids = torch.tensor([tokens], device=device)  # (1, T)
    logprobs = [torch.zeros(0, device=device)]
    num_scored = 0
    while num_scored < len(tokens) - 1:
        start = context_start(num_scored + 1, max_seq_len)
        end = min(start + max_seq_len, len(tokens) - 1)  # this context scores tokens up to end
        cache = model.new_kv_cache(1, end - start, dtype)
        for chunk_start in range(start, end, CHUNK):
            chunk_end = min(chunk_start + CHUNK, end)
            chunk = ids[:, chunk_start:chunk_end]
            logits, _ = model(chunk, cache=cache, start_pos=chunk_start - start)
            targets = ids[0, chunk_start + 1 : chunk_end + 1, None]
            chunk_logprobs = logits[0].float().log_softmax(-1).gather(-1, targets)[:, 0]
            check_no_nan(chunk_logprobs)
            logprobs.append(chunk_logprobs[max(0, num_scored - chunk_start) :])
        num_scored = end
    return torch.cat(logprobs)


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


def score_text(model: Transformer, tokenizer: Tokenizer, text: str) -> TextScore:
    """The log-probabilities of the tokens of a text after BOS. The text must not be empty."""
    ids = tokenizer.encode(text, bos=True)
    logprobs = token_logprobs(model, ids).tolist()
    return TextScore(ids[1:], logprobs, len(text.encode()))
