"""
Causal attention as plain matrix products, without the half that lies in the future.

The queries are taken in blocks of rows, and each block meets only the keys up to its own last
position: with two blocks a quarter of the work is never done, with eight 7/16. What the backward
pass needs is kept, the attention weights of the blocks; nothing is computed twice. On a CPU, in
bfloat16 and at the lengths that small models train with, this takes half the fused kernel's time.

Shapes: B batch, H heads, T time, D head_dim.
"""

import torch
import torch.nn.functional as F

SMALLEST_BLOCK = 128  # rows; smaller ones are slow as products, and many to compile
MOST_BLOCKS = 8


def row_blocks(length: int) -> list[tuple[int, int]]:
    """Where each block of rows starts and stops."""
    rows = max(SMALLEST_BLOCK, -(-length // MOST_BLOCKS))
    return [(start, min(start + rows, length)) for start in range(0, length, rows)]


class CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, dropout: float):
        wide = torch.promote_types(q.dtype, torch.float32)  # of the softmax
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # or every block would be copied
        positions = torch.arange(q.shape[2], device=q.device)
        weights, kept, outputs = [], [], []  # kept: the weights after dropout
        for start, stop in row_blocks(q.shape[2]):
            scores = q[:, :, start:stop] @ k[:, :, :stop].transpose(-2, -1)  # (B, H, rows, stop)
            is_past = positions[:stop] <= positions[start:stop, None]
            scores = torch.where(is_past, scores, float("-inf"))
            weights.append(scores.to(wide).softmax(-1).to(q.dtype))
            kept.append(F.dropout(weights[-1], dropout))
            outputs.append(kept[-1] @ v[:, :, :stop])  # (B, H, rows, D)
        output = torch.cat(outputs, dim=2)
        ctx.save_for_backward(q, k, v, output, *weights, *(kept if dropout else ()))
        return output

    @staticmethod
    def backward(ctx, grad):
        q, k, v, output, *saved = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)
        grad = grad.contiguous()
        # A softmax's backward pass takes each row's sum of its weights times their gradients; output
        # times grad has the same, and is far shorter (FlashAttention, arXiv 2205.14135, appendix B).
        row_sums = (output.to(wide) * grad.to(wide)).sum(-1, keepdim=True)  # (B, H, T, 1)
        ends = row_blocks(q.shape[2])
        q_grads, k_parts, v_parts = [], [], []
        for (start, stop), weights, kept in zip(
            ends, saved[: len(ends)], saved[-len(ends) :], strict=True
        ):
            block_grad = grad[:, :, start:stop]
            kept_grad = (block_grad @ v[:, :, :stop].transpose(-2, -1)).to(
                wide
            )  # (B, H, rows, stop)
            scores_grad = (
                kept.to(wide) * kept_grad - weights.to(wide) * row_sums[:, :, start:stop]
            ).to(q.dtype)
            q_grads.append(scores_grad @ k[:, :, :stop])
            k_parts.append(scores_grad.transpose(-2, -1) @ q[:, :, start:stop])  # (B, H, stop, D)
            v_parts.append(kept.transpose(-2, -1) @ block_grad)
        return (
            torch.cat(q_grads, dim=2),
            accumulate_prefix_grads(k_parts, ends),
            accumulate_prefix_grads(v_parts, ends),
            None,
        )


def accumulate_prefix_grads(parts: list, ends: list[tuple[int, int]]):
    """The sum (B, H, T, D) of parts (B, H, stop, D), which all begin at 0 and end with their block;
    summed block by block, as nothing is to be added beyond a part's end."""
    wide = torch.promote_types(parts[0].dtype, torch.float32)  # of the sum
    sums = [
        sum(part[:, :, start:stop].to(wide) for part in parts[first:]).to(parts[0].dtype)
        for first, (start, stop) in enumerate(ends)
    ]
    return torch.cat(sums, dim=2)


def causal_attention(q, k, v, dropout: float = 0.0):
    """softmax(q @ k.T) @ v, where each position sees itself and those before it; q, k, v and the
    result are (B, H, T, D), in the type of the products, which autocast is not asked for. dropout: the
    share of the weights zeroed. The scores are not scaled: it costs less to scale q."""
    return CausalAttention.apply(q, k, v, dropout)


def single_query_attention(q, k, v, mask=None):
    """The same for the queries of one position, which see all keys, or where a mask (B, 1, 1, S) is true:
    q (B, n_kv_heads, G, D), as many as share a key, k and v (B, n_kv_heads, S, D). As sums and products,
    which the compiler makes into loops that read each key and value once; uncompiled they are slow."""
    scores = (q[:, :, :, None].float() * k[:, :, None].float()).sum(-1)  # (B, n_kv_heads, G, S)
    if mask is not None:
        scores = torch.where(mask, scores, float("-inf"))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    attended = (weights[..., None] * v[:, :, None].float()).sum(-2)  # (B, n_kv_heads, G, D)
    return (attended / weights.sum(-1, keepdim=True)).type_as(q)  # last: a division takes long
