"""
A Transformer converted for inference: fused projections, matrices in another dtype, or quantized.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import Transformer, TransformerBlock
from ops.attention import dot_product_attention
from ops.kv_cache import ForwardContext
from ops.quantized_linear import CastLinear, DraftLinear, Int8Linear, PackedLinear, packed_dtypes
from ops.rope import apply_rope
from runtime.device import DTYPES


def linear_for_inference(weight: Tensor, dtype: str, rows: int) -> nn.Module:
    """The layer that multiplies with weight (out, in) fastest. See convert_weights."""
    if dtype == "int8":
        return Int8Linear(weight)
    if dtype == "draft":
        return DraftLinear(weight)
    weight = weight.to(DTYPES[dtype])
    if weight.device.type == "cpu" and dtype in packed_dtypes():
        return PackedLinear(weight, rows)
    return CastLinear(weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, in half as many operations as F.rms_norm on a CPU."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.rsqrt(norm * norm / x.shape[-1] + eps) * weight


class InferenceBlock(nn.Module):
    """A TransformerBlock with few operations: uncompiled, each takes longer than its arithmetic.

    Args:
        block: its norms are shared, its matrices converted. See convert_weights for the others.
    """

    def __init__(self, block: TransformerBlock, dtype: str, rows: int) -> None:
        super().__init__()
        attention, feed_forward = block.attention, block.feed_forward
        qkv = torch.cat([attention.wq.weight, attention.wk.weight, attention.wv.weight])
        gate_up = torch.cat([feed_forward.w1.weight, feed_forward.w3.weight])
        self.layer = attention.layer
        self.head_dim = attention.head_dim
        self.n_heads = len(attention.wq.weight) // self.head_dim
        self.n_kv_heads = len(attention.wk.weight) // self.head_dim
        self.eps = block.attention_norm.eps
        self.attention_norm = block.attention_norm.weight
        self.ffn_norm = block.ffn_norm.weight
        self.qkv = linear_for_inference(qkv, dtype, rows)
        self.wo = linear_for_inference(attention.wo.weight, dtype, rows)
        self.gate_up = linear_for_inference(gate_up, dtype, rows)
        self.w2 = linear_for_inference(feed_forward.w2.weight, dtype, rows)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """Map the residual stream x (B, T, C) to (B, T, C)."""
        normed = rms_norm(x, self.attention_norm, self.eps)
        qkv = self.qkv(normed).unflatten(-1, (-1, self.head_dim))
        num_rotated = self.n_heads + self.n_kv_heads
        rotated = apply_rope(qkv[:, :, :num_rotated], context.cos, context.sin)
        # q (B, T, n_heads, head_dim), k and v (B, T, n_kv_heads, head_dim)
        q = rotated[:, :, : self.n_heads].transpose(1, 2) * self.head_dim**-0.5
        k = rotated[:, :, self.n_heads :].transpose(1, 2)
        v = qkv[:, :, num_rotated:].transpose(1, 2)
        if context.cache is not None:
            k, v = context.update_kv_cache(self.layer, k, v)  # (B, n_kv_heads, S, head_dim)
        y = dot_product_attention(q, k, v, context.mask)  # (B, n_heads, T, head_dim)
        x = x + self.wo(y.transpose(1, 2).flatten(-2))
        normed = rms_norm(x, self.ffn_norm, self.eps)
        gate, up = self.gate_up(normed).chunk(2, dim=-1)  # (B, T, ffn_dim)
        return x + self.w2(F.silu(gate) * up)


def convert_weights(model: Transformer, dtype: str, rows: int = 1) -> Transformer:
    """A model for inference that shares its embedding and norms with the given model.

    Args:
        dtype: of the matrices: a name in runtime.device.DTYPES, int8, or draft, see DraftLinear.
        rows: of the inputs that the matrices are packed for: batch size times tokens.
    """
    converted = Transformer.on_meta(model.args)
    with torch.no_grad():
        converted.tok_embeddings = model.tok_embeddings
        converted.norm = model.norm
        converted.rope_cos = model.rope_cos
        converted.rope_sin = model.rope_sin
        converted.add_module("output", linear_for_inference(model.output.weight, dtype, rows))
        for index, block in enumerate(model.layers):
            assert isinstance(block, TransformerBlock)
            converted.layers[index] = InferenceBlock(block, dtype, rows)
    return converted.eval()
