"""
One forward pass of the model over a KV cache, with a sampled token after each position.

The engine calls decode_step, or a compiled function with the same signature (see compile.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from generation.sampling import sample_untruncated
from generation.sampling_params import TruncationParams
from model import Transformer
from ops.kv_cache import KVCache

NUM_DRAFT_TOKENS = 7  # that a draft model proposes for one pass of the target model


class StepInputs(NamedTuple):
    """Inputs of a step. B: rows of the KV cache; T: tokens to read; N: tokens to generate."""

    tokens: torch.Tensor  # (B, T)
    start_pos: torch.Tensor  # (B,) position of each row's first token; 0 for an unused row
    kv_len: int  # positions in use in the longest row, these tokens included
    seeds: torch.Tensor  # (B, N) int32, one for each token to generate; see sample_seed


class StepOutput(NamedTuple):
    """Outputs of a step. T is 1 except in a verification."""

    logits: torch.Tensor  # (B * T, V), of the last N generated tokens where T is 1
    tokens: torch.Tensor  # (B, N) generated tokens; the last T of them may not be accepted
    accepted: torch.Tensor  # (B * T,) whether the truncations accept them; see sample_untruncated


# step(model, cache, inputs, truncation, stop_ids). A compiled step may generate several tokens; one
# of stop_ids can then only be the last. All tokens but the last are accepted.
DecodeStep = Callable[
    [Transformer, KVCache, StepInputs, TruncationParams, tuple[int, ...]], StepOutput
]


def decode_step(
    model: Transformer,
    cache: KVCache,
    inputs: StepInputs,
    truncation: TruncationParams,
    stop_ids: tuple[int, ...] = (),
    exact_kv_len: bool = True,
) -> StepOutput:
    """Run the model on tokens (B, T) and sample the token after each: N = T tokens per row.

    Args:
        stop_ids: not used here; see DecodeStep.
        exact_kv_len: whether inputs.kv_len is exact. It may also be larger; rows are then masked.
    """
    tokens, start_pos, kv_len, seeds = inputs
    x = model.forward_hidden(tokens, cache, start_pos, kv_len, exact_kv_len=exact_kv_len)
    logits = model.output(x).flatten(0, 1)  # (B * T, V)
    sample = sample_untruncated(logits, seeds[:, : tokens.shape[1]].flatten(), truncation)
    return StepOutput(logits, sample.tokens.view(tokens.shape), sample.accepted)


class DraftModel(NamedTuple):
    """A small model for speculative decoding (arXiv 2211.17192).

    It proposes num_tokens tokens. The target model verifies them in one pass. Both models sample
    with the same Gumbel noise, so they nearly always agree."""

    model: Transformer
    decode_step: DecodeStep = decode_step  # runs the draft model; by default the eager step
    verify: DecodeStep = decode_step  # runs the target model; by default the eager step
    num_tokens: int = NUM_DRAFT_TOKENS


@dataclass(frozen=True)
class PreparedModel:
    """A model with the steps that run it. prepare_for_inference makes one.

    Args:
        decode_step: a compiled step; its batch size is fixed. None: the eager decode_step.
        tokens_per_call: the most tokens that decode_step generates in one call.
        draft: enables speculative decoding.
        cache_dtype: dtype of the KV cache; None: the model's.
    """

    model: Transformer
    decode_step: DecodeStep | None = None
    tokens_per_call: int = 1
    draft: DraftModel | None = None
    cache_dtype: torch.dtype | None = None


def check_no_nan(logits: torch.Tensor) -> None:
    """Raise ValueError if logits or log-probabilities contain NaN."""
    if logits.isnan().any():
        raise ValueError(
            "the model's logits are not numbers: its weights are damaged, or its training diverged"
        )
