"""
The key-value cache of attention, the mask of its positions, and the context of a forward pass.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class KVCache:
    """Keys and values of earlier positions: one row per sequence; rows may have different lengths.

    Positions past a row's own length are never attended to.

    Args:
        keys: one tensor (batch_size, n_kv_heads, length, head_dim) per layer.
        values: the same.
    """

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        self.keys = keys
        self.values = values

    @classmethod
    def new(
        cls,
        n_layers: int,
        shape: tuple[int, int, int, int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "KVCache":
        """An empty cache whose keys and values have this shape in each layer."""
        tensors = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(2 * n_layers)]
        return cls(tensors[:n_layers], tensors[n_layers:])

    def first_rows(self, count: int) -> "KVCache":
        """A view of the first rows."""
        return KVCache([keys[:count] for keys in self.keys], [v[:count] for v in self.values])

    @property
    def length(self) -> int:
        """The number of positions that each row can hold."""
        return self.keys[0].shape[2]

    def grow(self, length: int) -> None:
        """Extend all rows to this many positions."""
        padding = (0, 0, 0, length - self.length)
        self.keys = [F.pad(keys, padding) for keys in self.keys]
        self.values = [F.pad(values, padding) for values in self.values]

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first length positions of a row to another row."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]

    def swap_rows(self, a: int, b: int, length: int) -> None:
        """Swap the first length positions of two rows."""
        for tensor in (*self.keys, *self.values):
            tensor[[a, b], :, :length] = tensor[[b, a], :, :length]

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep these rows (N,), in this order; a row may occur several times."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]


def attention_mask(
    positions: slice | torch.Tensor, kv_len: int, device: torch.device, exact_kv_len: bool = True
) -> torch.Tensor | None:
    """The mask for queries at these positions over kv_len keys. See ForwardContext.mask.

    Args:
        positions: a slice for all rows, or a tensor (B, T).
        exact_kv_len: False if kv_len is only an upper bound; later keys are then masked.
    """
    if isinstance(positions, slice):
        length = positions.stop - positions.start
        if not 1 < length < kv_len:
            return None
        mask = torch.ones(length, kv_len, dtype=torch.bool, device=device)  # (T, S)
        return mask.tril(kv_len - length)
    if positions.numel() == 1 and exact_kv_len:
        return None
    return torch.arange(kv_len, device=device) <= positions[:, None, :, None]  # (B, 1, T, S)


class ForwardContext(NamedTuple):
    """What every layer of a forward pass needs besides its input (B, T, C)."""

    cos: torch.Tensor  # rotation of each position, ([B,] T, head_dim/2)
    sin: torch.Tensor
    cache: KVCache | None = None
    start_pos: int | torch.Tensor = 0  # position of the first token: of all rows, or of each (B,)
    kv_len: int = 0  # positions in use in the longest row, these tokens included
    batch_idx: torch.Tensor | None = None  # rows of the cache (B,); None: the first B
    # True where a query sees a key: (T, S) or (B, 1, T, S); None: causal if T > 1, else all visible
    mask: torch.Tensor | None = None

    def update_kv_cache(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v (B, n_kv_heads, T, head_dim) in the cache of a layer.

        Returns the keys and values of all positions, (B, n_kv_heads, kv_len, head_dim), in the
        dtype of k. The cache keeps its own dtype."""
        assert self.cache is not None, "there is no cache in this forward pass"
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        batch, heads, length = k.shape[:3]
        rows: slice | torch.Tensor = slice(batch) if self.batch_idx is None else self.batch_idx
        if isinstance(self.start_pos, int) and self.batch_idx is None:
            keys, values = keys[:batch, :, : self.kv_len], values[:batch, :, : self.kv_len]
            keys[:, :, self.start_pos :] = k
            values[:, :, self.start_pos :] = v
            return (k, v) if not self.start_pos else (keys.type_as(k), values.type_as(v))
        if isinstance(self.start_pos, int):
            keys[rows, :, self.start_pos : self.kv_len] = k.type_as(keys)
            values[rows, :, self.start_pos : self.kv_len] = v.type_as(values)
            if not self.start_pos:
                return k, v
        else:
            index = torch.arange(max(batch, heads, length), device=k.device)
            row_index = index[:batch] if self.batch_idx is None else self.batch_idx
            positions = self.start_pos[:, None, None] + index[:length]  # (B, 1, T)
            indices = (row_index[:, None, None], index[:heads, None], positions)
            keys.index_put_(indices, k.type_as(keys))
            values.index_put_(indices, v.type_as(values))
        return keys[rows, :, : self.kv_len].type_as(k), values[rows, :, : self.kv_len].type_as(v)
