"""
How good a model is: loss, perplexity and bits per byte over fixed windows.
"""

import math
from typing import NamedTuple

import torch

from runtime.device import autocast
from runtime.distributed import DistContext
from textdata.loader import evaluation_batches
from textdata.token_shards import TokenDataset

SINGLE_PROCESS = DistContext()


class EvalResult(NamedTuple):
    loss: float  # nats per token
    bits_per_byte: float  # of text; comparable between vocabularies

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))  # beyond that a float has no room


@torch.no_grad()
def evaluate(
    model,
    windows: TokenDataset,
    byte_counts,
    batch_size: int,
    num_batches: int,
    device,
    dtype,
    dist_ctx=SINGLE_PROCESS,
):
    """The Quality of a model over num_batches batches spread over the split, 0 for all of it,
    shared among the processes. byte_counts (V,): bytes of text behind each token.

    The windows, and so the figures, are the same at every call; no random state is touched."""
    was_training = model.training
    model.eval()
    nats, tokens, text_bytes = 0.0, 0, 0
    for inputs, targets in evaluation_batches(
        windows, batch_size, num_batches, dist_ctx.rank, dist_ctx.size
    ):
        with autocast(device, dtype):
            _, loss = model(inputs.to(device), targets.to(device))
        predicted = targets[targets != -1]
        nats += loss.item() * len(predicted) if len(predicted) else 0.0
        tokens += len(predicted)
        # The space before a text, which is none of it, is in the token that follows BOS.
        before = inputs[targets != -1].numpy()
        text_bytes += int(
            byte_counts[predicted.numpy()].clip(min=0).sum() + byte_counts[before].clip(max=0).sum()
        )
    model.train(was_training)
    nats, tokens, text_bytes = dist_ctx.all_reduce_sum([nats, tokens, text_bytes])
    return EvalResult(nats / tokens, nats / math.log(2) / max(1, text_bytes))
