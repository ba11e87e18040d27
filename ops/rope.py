"""
Rotary position embedding (RoPE, arXiv 2104.09864): rotates each pair of values of a query or key by
an angle proportional to its position. Products of queries and keys then depend on their distance.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

MAX_CONTEXT = 2**31  # a file that claims a longer context is damaged


@dataclass(frozen=True)
class RopeScaling:
    """Frequencies scaled for a longer context. Raises ValueError for impossible values.

    linear divides every frequency by factor (arXiv 2306.15595). llama3 divides only the low ones:
    below low_freq_factor rotations per original context fully, above high_freq_factor not at all,
    and with a linear ramp in between (Llama 3.1)."""

    type: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        if self.type not in ("linear", "llama3"):
            raise ValueError(f"rope scaling of type {self.type!r}: must be linear or llama3")
        if not (0 < self.factor < 1e6 and 0 < self.low_freq_factor < self.high_freq_factor < 1e6):
            raise ValueError(
                f"{self}: factors must be positive, and low_freq_factor below high_freq_factor"
            )
        if not 1 <= self.original_max_seq_len < MAX_CONTEXT:
            raise ValueError(
                f"{self}: original_max_seq_len must be at least 1 and below {MAX_CONTEXT}"
            )


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> torch.Tensor:
    """The rotation of each pair per position, in radians: (head_dim/2,)."""
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    if scaling is None:
        return frequencies
    smooth: float | torch.Tensor = 0.0  # 0: scaled, 1: unchanged
    if scaling.type == "llama3":
        rotations = scaling.original_max_seq_len * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        smooth = ((rotations - low) / (high - low)).clamp(0, 1)
    return frequencies / scaling.factor * (1 - smooth) + frequencies * smooth


def precompute_rope_cache(
    head_dim: int, length: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the angles of every position, each (length, head_dim/2)."""
    frequencies = rope_frequencies(head_dim, theta, scaling)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return angles.cos(), angles.sin()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each adjacent pair of x (B, T, heads, head_dim) by its position's angle, in float32.

    cos and sin are ([B,] T, head_dim/2). Pairs are interleaved, as in Meta's checkpoints."""
    if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
        # Half as many operations; the compiler does not support complex numbers.
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        rotation = torch.complex(cos, sin).unsqueeze(-2)  # ([B,] T, 1, head_dim/2)
        return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, heads, head_dim/2)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # ([B,] T, 1, head_dim/2)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).type_as(x)
