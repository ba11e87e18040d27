"""Loss, perplexity and bits per byte of a model over fixed windows of a split."""

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from runtime.device import autocast
from runtime.distributed import DistContext
from textdata.loader import evaluation_batches, evaluation_indices
from textdata.token_shards import TokenDataset

SINGLE_PROCESS = DistContext()
MAX_EXPONENT = 700  # exp of a larger number overflows a float


class EvalResult(NamedTuple):
    """The quality of a model on a split."""

    loss: float  # nats per token
    bits_per_byte: float  # of text; comparable between vocabularies

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, MAX_EXPONENT))


@dataclass(frozen=True)
class EvalSettings:
    """What an evaluation reads and how it computes."""

    byte_counts: np.ndarray  # (V,) bytes of text that each token stands for
    batch_size: int  # sequences in a batch
    num_batches: int  # batches spread evenly over the split; 0: the whole split
    device: str
    dtype: str  # of the matrix products
    dist_ctx: DistContext = SINGLE_PROCESS  # the processes that share the batches


@torch.no_grad()
def evaluate(model: torch.nn.Module, dataset: TokenDataset, settings: EvalSettings) -> EvalResult:
    """Evaluate a model on a split; the processes share the batches and all get the result.

    Every call reads the same windows, so results are comparable. No random state changes."""
    dist_ctx = settings.dist_ctx
    was_training = model.training
    model.eval()
    nats = 0.0
    num_tokens = 0
    num_bytes = 0
    batches = evaluation_batches(
        dataset, settings.batch_size, settings.num_batches, dist_ctx.rank, dist_ctx.size
    )
    for inputs, targets in batches:  # each (B, T)
        with autocast(settings.device, settings.dtype):
            _, loss = model(inputs.to(settings.device), targets.to(settings.device))
        has_target = targets != -1
        predicted = targets[has_target]
        nats += loss.item() * len(predicted) if len(predicted) else 0.0
        num_tokens += len(predicted)
        # SentencePiece's token after BOS contains a space that is not part of the text: byte_counts
        # is -1 at BOS.
        previous = inputs[has_target].numpy()
        num_bytes += int(settings.byte_counts[predicted.numpy()].clip(min=0).sum())
        num_bytes += int(settings.byte_counts[previous].clip(max=0).sum())
    model.train(was_training)
    nats, tokens, text_bytes = dist_ctx.all_reduce_sum([nats, num_tokens, num_bytes])
    return EvalResult(nats / tokens, nats / math.log(2) / max(1, text_bytes))


def evaluation_hash(dataset: TokenDataset, batch_size: int, num_batches: int) -> str:
    """SHA-256 of the windows that an evaluation reads: losses on the same windows compare.

    Options that read the same windows give the same hash: another path of the data, half the
    batch_size with twice the num_batches."""
    digest = hashlib.sha256()
    for index in evaluation_indices(dataset, batch_size, num_batches):
        window = dataset[index]  # (T + 1,), or fewer at the end of a shard
        digest.update(len(window).to_bytes(8, "little"))
        digest.update(window.astype("<u4").tobytes())
    return digest.hexdigest()
