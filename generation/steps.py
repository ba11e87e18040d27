"""
One forward pass of the model over the KV cache, with a sampled token after each position.

The engine runs decode_step uncompiled; compiled, decode_step or decode_loop (see compile.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from generation.sampling import SamplingTensors, sample_next, while_loop
from model import Transformer
from ops.kv_cache import KVCache

MAX_LOOP_TOKENS = 8  # of each row, in one call of a compiled step


class StepInputs(NamedTuple):
    """Inputs of a step. B: rows of the KV cache, from the first on; T: tokens to read."""

    tokens: Tensor  # (B, T) int64
    start_pos: Tensor  # (B,) int64: position in the cache of each row's first token
    positions: Tensor  # (B * T,) int64: position in the sequence of each token to sample
    kv_len: int  # at least 1 + the last position of each active row
    sampling: SamplingTensors  # of B * T rows


class StepOutput(NamedTuple):
    """Outputs of a step."""

    tokens: Tensor  # (B, N) int64: decode_step samples a token after each of the inputs, N = T
    logits: Tensor  # (B * T, V) float32, of the last T tokens of each row


def decode_step(model: Transformer, cache: KVCache, inputs: StepInputs) -> StepOutput:
    """Run the model on tokens (B, T), which are added to the cache, and sample after each."""
    start_pos: Tensor | int = inputs.start_pos
    is_compiling = torch.compiler.is_compiling()
    if len(inputs.tokens) == 1 and not is_compiling:
        start_pos = int(inputs.start_pos)  # uncompiled code is faster without tensors of positions
    x = model.forward_hidden(
        inputs.tokens, cache, start_pos, inputs.kv_len, exact_kv_len=not is_compiling
    )
    logits = model.output(x).flatten(0, 1).float()  # (B * T, V)
    tokens = sample_next(logits, inputs.sampling, inputs.positions)
    return StepOutput(tokens.view_as(inputs.tokens), logits)


def decode_loop(
    model: Transformer, cache: KVCache, inputs: StepInputs, num_tokens: Tensor
) -> StepOutput:
    """decode_step for num_tokens () int64 tokens of each row; the result has MAX_LOOP_TOKENS.

    The loop ends after a stop token of an active row; further tokens of the result are 0. It is
    compiled, because a call of compiled code takes a tenth of a small model's step. T is 1."""
    sampling = inputs.sampling
    index = torch.arange(MAX_LOOP_TOKENS, device=inputs.tokens.device)

    def continues(count: Tensor, token: Tensor, *_: Tensor) -> Tensor:
        is_end = sampling.is_active & sampling.is_stop.gather(1, token)[:, 0] & (count > 0)
        return (count < num_tokens) & ~is_end.any()

    def body(count: Tensor, token: Tensor, tokens: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
        offset = count * sampling.is_active  # an inactive row does not advance
        step_inputs = inputs._replace(
            tokens=token, start_pos=inputs.start_pos + offset, positions=inputs.positions + offset
        )
        output = decode_step(model, cache, step_inputs)
        tokens = torch.where(index == count, output.tokens, tokens)
        return count + 1, output.tokens, tokens, output.logits

    count = torch.zeros((), dtype=torch.int64, device=index.device)
    tokens = torch.zeros(
        len(inputs.tokens), MAX_LOOP_TOKENS, dtype=torch.int64, device=index.device
    )
    logits = torch.zeros(sampling.bias.shape, device=index.device)
    state = (count, inputs.tokens.clone(), tokens, logits)
    _, _, tokens, logits = while_loop(continues, body, state)
    return StepOutput(tokens, logits)


# decode_step, or decode_loop compiled; the last argument is the number of tokens. See compile.py.
DecodeStep = Callable[[Transformer, KVCache, StepInputs, int], StepOutput]


def uncompiled_step(
    model: Transformer, cache: KVCache, inputs: StepInputs, num_tokens: int = 1
) -> StepOutput:
    """decode_step as a DecodeStep, for one token."""
    assert num_tokens == 1, "only compiled steps generate several tokens"
    return decode_step(model, cache, inputs)


def check_no_nan(logits: Tensor) -> None:
    """Raise ValueError if logits or log-probabilities contain NaN."""
    if logits.isnan().any():
        raise ValueError(NAN_MESSAGE)


NAN_MESSAGE = (
    "the model's logits are not numbers: its weights are damaged, or its training diverged"
)
