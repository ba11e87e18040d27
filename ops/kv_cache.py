"""
The key-value cache.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class KVCache:
    """Keys and values of the positions read so far: a row a sequence, which may all be of different
    lengths. What lies beyond a row's own length is never attended to.

    keys and values: a tensor (batch_size, n_kv_heads, length, head_dim) for each layer."""

    def __init__(
        self,
        n_layers: int,
        shape: tuple[int, int, int, int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """shape: (batch_size, n_kv_heads, length, head_dim)."""
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(n_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(n_layers)]

    @property
    def batch_size(self) -> int:
        return len(self.keys[0])

    @property
    def length(self) -> int:
        return self.keys[0].shape[2]

    def grow(self, length: int):
        """Make room for more positions, up to length."""
        added = (0, 0, 0, length - self.length)
        self.keys = [F.pad(keys, added) for keys in self.keys]
        self.values = [F.pad(values, added) for values in self.values]

    def select_rows(self, rows):
        """Keep these rows (N,), in this order; one may be there several times."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]


class ForwardContext(NamedTuple):
    """Where the tokens (B, T) of a forward pass stand, and what was read before them."""

    cos: torch.Tensor  # of their positions, ([B,] T, head_dim/2)
    sin: torch.Tensor
    cache: KVCache | None = None
    start_pos: int | torch.Tensor = 0  # the first token's position, or one per row (B,)
    kv_len: int = 0  # one beyond the last position of the longest row
    batch_idx: torch.Tensor | None = None  # of the cache (B,); None: the first B
    mask: torch.Tensor | None = (
        None  # which positions each token sees (B, 1, T, kv_len); None: it is causal
    )

    def update_kv_cache(self, layer: int, k, v):
        """Store k and v (B, n_kv_heads, T, head_dim) in the cache, in its number format; returns those
        of all positions up to the end."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        batch, heads, length = k.shape[:3]
        if isinstance(self.start_pos, int):
            rows = slice(batch) if self.batch_idx is None else self.batch_idx
            keys[rows, :, self.start_pos : self.kv_len] = k.type_as(keys)
            values[rows, :, self.start_pos : self.kv_len] = v.type_as(values)
            if not self.start_pos:
                return k, v
        else:
            rows, number = slice(batch), torch.arange(max(batch, heads, length), device=k.device)
            positions = self.start_pos[:, None, None] + number[:length]
            places = (number[:batch, None, None], number[:heads, None], positions)
            keys.index_put_(places, k.type_as(keys))
            values.index_put_(places, v.type_as(values))
        return keys[rows, :, : self.kv_len].type_as(k), values[rows, :, : self.kv_len].type_as(v)
