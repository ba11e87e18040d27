"""
Linear layers for inference.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def frozen(tensor) -> nn.Parameter:
    """A parameter that is not trained. Not a buffer: at each call, a compiled step looks whether its
    buffers are still as they were, which takes longer than some of the products."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


PARTS = 4
SMALL_MATRIX = 2**19  # weights, which a cache near the processor soon holds


def row_product(x, weight):
    """A row x (1, in) of float32 times a matrix (out, in), transposed: (1, out). As sums and products of
    several parts at once, which the compiler makes one loop. A large matrix is parted by its rows, and
    so memory is read in several places: to read it in one takes half as long again, as processors fetch
    ahead, but not far. A small one by its columns, as there is then nothing to join."""
    if weight.numel() >= SMALL_MATRIX:
        parts = weight.unflatten(0, (math.gcd(PARTS, len(weight)), -1))
        return torch.cat([(x * part.float()).sum(-1) for part in parts])[None]
    fitting = [
        parts for parts in range(1, PARTS + 1) if x.shape[-1] % (16 * parts) == 0
    ]  # 16 numbers a register
    pieces, parts = (y.unflatten(-1, (max(fitting, default=1), -1)).unbind(-2) for y in (x, weight))
    return sum(piece * part.float() for piece, part in zip(pieces, parts, strict=True)).sum(-1)[
        None
    ]


class Int8Linear(nn.Module):
    """A matrix (out, in) of 8-bit integers with a scale for each of its rows. On a CPU the input is
    quantized too, with a scale for each of its rows, so that the product is one of integers: exact, and
    the same in a batch of any size. Elsewhere only the matrix is."""

    def __init__(self, weight):
        super().__init__()
        weight = weight.detach().float()
        scale = weight.abs().amax(1) / 127  # (out,)
        quantized = (weight / scale.clamp(min=1e-30)[:, None]).round().to(torch.int8)
        self.shape = quantized.shape
        self.lie_in(frozen(quantized.flatten()), frozen(scale))

    def lie_in(self, weights, scales, weight_at: int = 0, scale_at: int = 0):
        """Have the matrix in a tensor with others, from there on, and its scales in another."""
        self.weights, self.weight_at = weights, weight_at
        self.scales, self.scale_at = scales, scale_at

    @property
    def weight(self):
        return self.weights[self.weight_at : self.weight_at + self.shape.numel()].view(self.shape)

    @property
    def scale(self):
        return self.scales[self.scale_at : self.scale_at + self.shape[0]]

    def forward(self, x):
        if x.device.type != "cpu":
            return F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        # Flat before it is quantized: to _int_mm, one row must not come with a stride of its own.
        rows = x.flatten(0, -2).float()
        scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        quantized = (rows / scale).round()
        if len(rows) == 1 and torch.compiler.is_compiling():
            # As it is, but as_strided makes the compiler store it: it would round anew for each row of the matrix.
            quantized = quantized.as_strided(quantized.shape, quantized.stride())
            product = row_product(quantized, self.weight)  # a float32 holds integers up to 2**24
        else:
            product = torch._int_mm(quantized.to(torch.int8), self.weight.t()).float()
        return (product * (scale * self.scale)).to(x.dtype).unflatten(0, x.shape[:-1])


def lie_together(layers: list[Int8Linear]):
    """Have all matrices in one tensor. Compiled code makes itself a handle of each tensor that it is given,
    for each token: so many that it takes a part of a small model's step. The model is to stay on its device."""
    weights = frozen(torch.cat([layer.weights for layer in layers]))
    scales = frozen(torch.cat([layer.scales for layer in layers]))
    weight_at = scale_at = 0
    for layer in layers:
        layer.lie_in(weights, scales, weight_at, scale_at)
        weight_at += layer.shape.numel()
        scale_at += layer.shape[0]


def packable_kinds() -> list[str]:
    """The number formats that oneDNN multiplies on this processor."""
    if not torch.backends.mkldnn.is_available():
        return []
    return ["float32"] + ["bfloat16"] * torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PackedLinear(nn.Module):
    """A matrix (out, in) in the layout that oneDNN multiplies fastest for so many rows on a CPU."""

    def __init__(self, weight, rows: int):
        super().__init__()
        self.out_features = len(weight)
        self.weight = frozen(torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows))

    def forward(self, x):
        return torch.ops.cria.packed_linear(
            x.to(self.weight.dtype), self.weight, self.out_features
        ).to(x.dtype)


# An operation of our own, because the compiler takes oneDNN's only with weights that are constants.
LIBRARY = torch.library.Library("cria", "DEF")


@torch.library.impl(LIBRARY, "packed_linear", "CompositeExplicitAutograd")
def packed_linear(x, weight, out_features: int):
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


@torch.library.impl(LIBRARY, "packed_linear", "Meta")
def packed_linear_shape(x, weight, out_features: int):
    return x.new_empty(*x.shape[:-1], out_features)


class CastLinear(nn.Module):
    """A matrix (out, in) in another number format than what it is multiplied with."""

    def __init__(self, weight):
        super().__init__()
        self.weight = frozen(weight)

    def forward(self, x):
        return F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)


class Joined(nn.Module):
    """One product in the place of several of the same input."""

    def __init__(self, layer: nn.Module, sizes: list[int]):
        super().__init__()
        self.layer, self.sizes = layer, sizes

    def forward(self, x):
        return self.layer(x).split(self.sizes, dim=-1)
