"""
Attention by the fastest kernel for the shape and the device.

On a CPU, causal attention is plain matrix products, without most of the masked half. The queries
are split into blocks of rows. Each block multiplies only with the keys up to its own last position:
two blocks skip 1/4 of the work, eight blocks 7/16. The attention weights of the blocks are saved
for the backward pass, so nothing is recomputed. In bfloat16, at the sequence lengths of small
models, this takes half the time of PyTorch's fused kernel.

Shapes: B batch, H heads, T time, S keys, G queries per key-value head, D head_dim.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F

# Up to this sequence length, blockwise attention is faster than PyTorch's fused kernel on a CPU.
# Blockwise attention saves its weights for the backward pass, which takes much memory.
BLOCKWISE_ATTENTION_MAX_LEN = 1024
MIN_BLOCK_ROWS = 128  # smaller products are slow, and many blocks take long to compile
MAX_BLOCKS = 8


def row_blocks(length: int) -> list[tuple[int, int]]:
    """The (start, stop) rows of each block."""
    rows = max(MIN_BLOCK_ROWS, -(-length // MAX_BLOCKS))
    return [(start, min(start + rows, length)) for start in range(0, length, rows)]


def dot_product_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """softmax(q @ k.T) @ v; the scores are not scaled.

    q and the result are (B, n_heads, T, D), k and v (B, n_kv_heads, S, D). mask: see ForwardContext
    in ops/kv_cache.py. dropout is the probability of zeroing an attention weight."""
    length, kv_len = q.shape[2], k.shape[2]
    queries_per_kv = q.shape[1] // k.shape[1]
    if length == 1:  # the queries of a group become rows of one product: no copies of k and v
        grouped = q.reshape(len(q), -1, queries_per_kv, q.shape[-1])
        if torch.compiler.is_compiling() and q.device.type == "cpu" and not dropout:
            return single_query_attention(grouped, k, v, mask).reshape(q.shape)
        grouped = F.scaled_dot_product_attention(grouped, k, v, mask, dropout, scale=1.0)
        return grouped.reshape(q.shape)
    if queries_per_kv > 1:
        k = k.repeat_interleave(queries_per_kv, dim=1)  # (B, n_heads, S, D)
        v = v.repeat_interleave(queries_per_kv, dim=1)
    use_blocks = q.device.type == "cpu" and length == kv_len <= BLOCKWISE_ATTENTION_MAX_LEN
    if use_blocks and mask is None:
        return causal_attention(q, k, v, dropout)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=1.0
    )


class CausalAttention(torch.autograd.Function):
    """Blockwise causal attention with a hand-written backward pass. See causal_attention."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        """Map q, k and v (B, H, T, D) to the output (B, H, T, D)."""
        acc_dtype = torch.promote_types(q.dtype, torch.float32)  # of the softmax
        # Slices of a non-contiguous tensor would be copied for each block.
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        positions = torch.arange(q.shape[2], device=q.device)
        weights: list[torch.Tensor] = []
        dropped_weights: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        for start, stop in row_blocks(q.shape[2]):
            scores = q[:, :, start:stop] @ k[:, :, :stop].transpose(-2, -1)  # (B, H, rows, stop)
            is_visible = positions[:stop] <= positions[start:stop, None]
            scores = torch.where(is_visible, scores, float("-inf"))
            weights.append(scores.to(acc_dtype).softmax(-1).to(q.dtype))
            dropped_weights.append(F.dropout(weights[-1], dropout))
            outputs.append(dropped_weights[-1] @ v[:, :, :stop])  # (B, H, rows, D)
        output = torch.cat(outputs, dim=2)
        ctx.save_for_backward(q, k, v, output, *weights, *(dropped_weights if dropout else ()))
        return output

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        """Map the gradient of the output (B, H, T, D) to those of q, k and v, each (B, H, T, D)."""
        q, k, v, output, *saved = ctx.saved_tensors
        acc_dtype = torch.promote_types(q.dtype, torch.float32)
        grad = grad.contiguous()
        # The gradient of softmax needs each row's sum of weights times their gradients. The row sum
        # of output times grad is equal and shorter (FlashAttention, arXiv 2205.14135, appendix B).
        row_sums = (output.to(acc_dtype) * grad.to(acc_dtype)).sum(-1, keepdim=True)  # (B, H, T, 1)
        blocks = row_blocks(q.shape[2])
        all_weights = saved[: len(blocks)]
        all_dropped = saved[-len(blocks) :]
        q_grads: list[torch.Tensor] = []
        k_parts: list[torch.Tensor] = []
        v_parts: list[torch.Tensor] = []
        for (start, stop), weights, dropped in zip(blocks, all_weights, all_dropped, strict=True):
            block_grad = grad[:, :, start:stop]
            dropped_grad = block_grad @ v[:, :, :stop].transpose(-2, -1)  # (B, H, rows, stop)
            scores_grad = dropped.to(acc_dtype) * dropped_grad.to(acc_dtype)
            scores_grad = scores_grad - weights.to(acc_dtype) * row_sums[:, :, start:stop]
            scores_grad = scores_grad.to(q.dtype)
            q_grads.append(scores_grad @ k[:, :, :stop])
            k_parts.append(scores_grad.transpose(-2, -1) @ q[:, :, start:stop])  # (B, H, stop, D)
            v_parts.append(dropped.transpose(-2, -1) @ block_grad)
        q_grad = torch.cat(q_grads, dim=2)
        k_grad = accumulate_prefix_grads(k_parts, blocks)
        return q_grad, k_grad, accumulate_prefix_grads(v_parts, blocks), None


def accumulate_prefix_grads(
    parts: list[torch.Tensor], blocks: list[tuple[int, int]]
) -> torch.Tensor:
    """The sum (B, H, T, D) of one part (B, H, stop, D) per block. A part covers the rows from 0 to
    the end of its block, so each block of the sum adds only the parts that reach it."""
    acc_dtype = torch.promote_types(parts[0].dtype, torch.float32)
    block_sums = []
    for first, (start, stop) in enumerate(blocks):
        block_sum = sum(part[:, :, start:stop].to(acc_dtype) for part in parts[first:])
        block_sums.append(cast(torch.Tensor, block_sum).to(parts[0].dtype))
    return torch.cat(block_sums, dim=2)


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float = 0.0
) -> torch.Tensor:
    """softmax(q @ k.T) @ v with a causal mask. q, k, v and the result are (B, H, T, D).

    The dtype is that of q; autocast has no effect. The scores are not scaled, because scaling q
    costs less. dropout is the probability of zeroing an attention weight."""
    return CausalAttention.apply(q, k, v, dropout)


def single_query_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(q @ k.T) @ v for the queries of one position, for torch.compile.

    q and the result are (B, n_kv_heads, G, D), k and v (B, n_kv_heads, S, D). mask (B, 1, 1, S) is
    True where a key is visible; None: all are. Written as elementwise operations and sums, which
    the compiler fuses into loops that read each key and value once. Slow without compilation."""
    scores = (q[:, :, :, None].float() * k[:, :, None].float()).sum(-1)  # (B, n_kv_heads, G, S)
    if mask is not None:
        scores = torch.where(mask, scores, float("-inf"))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    weighted = (weights[..., None] * v[:, :, None].float()).sum(-2)  # (B, n_kv_heads, G, D)
    # Dividing the result by the softmax's denominator takes fewer divisions than the weights.
    return (weighted / weights.sum(-1, keepdim=True)).type_as(q)
