"""
Linear layers for inference: 8-bit, packed for oneDNN, in another dtype, and fused.

Their weights have shape (out_features, in_features), as in nn.Linear. None has a bias.
"""

import math
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

NUM_STREAMS = 8  # parts of a matrix that int8_matvec reads at once
SMALL_MATRIX = 2**19  # weights; a smaller matrix fits in the processor's cache

# A custom operator, because torch.compile accepts oneDNN's operator only with constant weights.
LIBRARY = torch.library.Library("cria", "DEF")
LIBRARY.define("packed_linear(Tensor x, Tensor weight, int out_features) -> Tensor")


def frozen_parameter(tensor: torch.Tensor) -> nn.Parameter:
    """A parameter without gradient."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def int8_matvec(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply a float32 row x (1, in) with the transpose of an int8 weight (out, in): (1, out).

    The product is written as elementwise operations and a sum, which the compiler fuses into one
    loop. A large matrix is split by its rows, so that memory is read as several streams; one stream
    takes half as long again because the processor prefetches only a short distance."""
    num_streams = math.gcd(NUM_STREAMS, len(weight)) if weight.numel() >= SMALL_MATRIX else 1
    row_blocks = weight.unflatten(0, (num_streams, -1))
    return torch.cat([(x * block.float()).sum(-1) for block in row_blocks])[None]


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights and one scale per row of the weight.

    On a CPU the input is quantized too, with one scale per row, so that the matrix product is exact
    integer arithmetic: its result is the same in a batch of any size. On other devices only the
    weight is quantized."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        weight = weight.detach().float()
        scale = weight.abs().amax(1) / 127  # (out,)
        quantized = (weight / scale.clamp(min=1e-30)[:, None]).round().to(torch.int8)
        self.weight = frozen_parameter(quantized)  # (out, in)
        self.scale = frozen_parameter(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (..., in) to (..., out), in the dtype of x."""
        if x.device.type != "cpu":
            return F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        # Flatten first: _int_mm does not accept one row with an unusual stride.
        rows = x.flatten(0, -2).float()  # (N, in)
        scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        quantized = (rows / scale).round()
        if len(rows) == 1 and torch.compiler.is_compiling():
            # as_strided makes the compiler store the result. It would round again for each row of
            # the weight otherwise.
            quantized = quantized.as_strided(quantized.shape, quantized.stride())
            product = int8_matvec(quantized, self.weight)  # exact: float32 holds integers to 2**24
        else:
            product = torch._int_mm(quantized.to(torch.int8), self.weight.t()).float()
        return (product * (scale * self.scale)).to(x.dtype).unflatten(0, x.shape[:-1])


class DraftLinear(Int8Linear):
    """An Int8Linear for one row on a CPU, for a draft model: faster, but less precise uncompiled.

    Uncompiled it is one operator of PyTorch's dynamic quantization."""

    packed: torch.ScriptObject | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (1, ..., in) to (1, ..., out), float32."""
        if torch.compiler.is_compiling():
            return super().forward(x)
        if self.packed is None:
            self.packed = self.pack()
        return torch.ops.quantized.linear_dynamic(x, self.packed, False)

    def pack(self) -> torch.ScriptObject:
        """The weight in the layout of the operator."""
        zero_points = torch.zeros_like(self.scale, dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch 2.13 announces its removal
            weight = torch._make_per_channel_quantized_tensor(
                self.weight, self.scale.double(), zero_points, 0
            )
            return torch.ops.quantized.linear_prepack(weight, None)


def packed_dtypes() -> list[str]:
    """The dtypes that oneDNN multiplies on this processor."""
    if not torch.backends.mkldnn.is_available():
        return []
    has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return ["float32", "bfloat16"] if has_bfloat16 else ["float32"]


class PackedLinear(nn.Module):
    """A linear layer whose weight has the layout that oneDNN multiplies fastest with this many rows
    of input on a CPU."""

    def __init__(self, weight: torch.Tensor, rows: int) -> None:
        super().__init__()
        self.out_features = len(weight)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        self.weight = frozen_parameter(packed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (..., in) to (..., out), in the dtype of x."""
        y = torch.ops.cria.packed_linear(x.to(self.weight.dtype), self.weight, self.out_features)
        return y.to(x.dtype)


@torch.library.impl(LIBRARY, "packed_linear", "CompositeExplicitAutograd")
def packed_linear(x: torch.Tensor, weight: torch.Tensor, out_features: int) -> torch.Tensor:
    """The product with a packed weight."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


@torch.library.impl(LIBRARY, "packed_linear", "Meta")
def packed_linear_meta(x: torch.Tensor, weight: torch.Tensor, out_features: int) -> torch.Tensor:
    """The shape of packed_linear's result, for the compiler."""
    return x.new_empty(*x.shape[:-1], out_features)


class CastLinear(nn.Module):
    """A linear layer that casts its input to the dtype of its weight, and the result back."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = frozen_parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (..., in) to (..., out), in the dtype of x."""
        return F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)
