"""
One forward pass of the model over the KV cache, with a sampled token after each position.

decode_step is the function that the engine runs, uncompiled or compiled (see compile.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from generation.sampling import SamplingTensors, sample_next
from model import Transformer
from ops.kv_cache import KVCache


class StepInputs(NamedTuple):
    """Inputs of a step. B: rows of the KV cache, from the first on; T: tokens to read."""

    tokens: Tensor  # (B, T) int64
    start_pos: Tensor  # (B,) int64: position in the cache of each row's first token
    positions: Tensor  # (B * T,) int64: position in the sequence of each token to sample
    kv_len: int  # positions in use in the longest row, these tokens included
    sampling: SamplingTensors  # of B * T rows


class StepOutput(NamedTuple):
    """Outputs of a step."""

    tokens: Tensor  # (B * T,) int64: the token sampled after each of the inputs
    logits: Tensor  # (B * T, V)


def decode_step(model: Transformer, cache: KVCache, inputs: StepInputs) -> StepOutput:
    """Run the model on tokens (B, T), which are added to the cache, and sample after each."""
    start_pos: Tensor | int = inputs.start_pos
    is_compiling = torch.compiler.is_compiling()
    if len(inputs.tokens) == 1 and not is_compiling:
        start_pos = int(inputs.start_pos)  # uncompiled code is faster without tensors of positions
    x = model.forward_hidden(
        inputs.tokens, cache, start_pos, inputs.kv_len, exact_kv_len=not is_compiling
    )
    logits = model.output(x).flatten(0, 1)  # (B * T, V)
    return StepOutput(sample_next(logits, inputs.sampling, inputs.positions), logits)


# decode_step, or the same compiled; see compile.py
DecodeStep = Callable[[Transformer, KVCache, StepInputs], StepOutput]


def check_no_nan(logits: Tensor) -> None:
    """Raise ValueError if logits or log-probabilities contain NaN."""
    if logits.isnan().any():
        raise ValueError(NAN_MESSAGE)


NAN_MESSAGE = (
    "the model's logits are not numbers: its weights are damaged, or its training diverged"
)
