"""
Rotary positions (RoPE, arXiv 2104.09864): each pair of a query's or key's values is turned by an angle that
grows with its position, so that their product knows how far apart they are.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

MAX_CONTEXT = 2**31  # a context beyond it is damage


@dataclass(frozen=True)
class RopeScaling:
    """Rotary positions stretched to a longer context. linear: every frequency divided by factor
    (arXiv 2306.15595). llama3: only those whose wavelength is long beside the original context,
    with a ramp between the two limits (Llama 3.1). Raises ValueError for impossible values."""

    type: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self):
        if self.type not in ("linear", "llama3"):
            raise ValueError(f"rope scaling of type {self.type!r}: linear and llama3 are known")
        if not (0 < self.factor < 1e6 and 0 < self.low_freq_factor < self.high_freq_factor < 1e6):
            raise ValueError(
                f"{self}: factors must be positive, and low_freq_factor below high_freq_factor"
            )
        if not 1 <= self.original_max_seq_len < MAX_CONTEXT:
            raise ValueError(
                f"{self}: original_max_seq_len must be at least 1 and below {MAX_CONTEXT}"
            )


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None):
    """Radians by which each pair turns from one position to the next (head_dim/2,)."""
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    if scaling is None:
        return frequencies
    kept = (
        0.0  # share of the frequency as it was: none of it, or growing with the turns in a context
    )
    if scaling.type == "llama3":
        turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies / scaling.factor * (1 - kept) + frequencies * kept


def precompute_rope_cache(
    head_dim: int, length: int, theta: float, scaling: RopeScaling | None = None
):
    """Cosine and sine of every position's angles (arXiv 2104.09864), each (length, head_dim/2)."""
    frequencies = rope_frequencies(head_dim, theta, scaling)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Turn each neighbouring pair of x (B, T, heads, head_dim) by its position's angle, in
    float32; cos and sin are ([B,] T, head_dim/2). Meta's interleaved layout."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, heads, head_dim/2)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # ([B,] T, 1, head_dim/2)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).type_as(x)
