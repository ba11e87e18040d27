"""
Several linear layers of the same input as one matrix product.
"""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F


def fused_linear(x: torch.Tensor, *layers: nn.Linear) -> Sequence[torch.Tensor]:
    """Apply linear layers without bias to the same x (B, T, C); returns one output per layer.

    Training computes one product with the concatenated weights, which is faster than several.
    Inference keeps them apart: for a few tokens, concatenating the weights would cost more."""
    if not torch.is_grad_enabled():
        return [layer(x) for layer in layers]
    fused = F.linear(x, torch.cat([layer.weight for layer in layers]))
    return fused.split([layer.out_features for layer in layers], dim=-1)
