"""
Token shards on disk.

A data set is a folder of shards and one meta.json. A shard is a flat array of uint16 or uint32
token ids, in which every document begins with BOS. meta.json holds the vocabulary's size and hash,
the dtype, and for each shard its number of tokens and the ranges for training and validation.
"""

import json
import os
from types import TracebackType
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from runtime.atomic_files import AtomicFile, write_atomically

META_FILE = "meta.json"
SCAN_SIZE = 2**20  # tokens searched at a time for the beginning of a document


def token_dir(data_dir: str, vocab_source: str, vocab_size: int) -> str:
    """The folder of a vocabulary's tokens: DATA_DIR/llama2 or DATA_DIR/tokSIZE."""
    return os.path.join(data_dir, "llama2" if vocab_source == "llama2" else f"tok{vocab_size}")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that holds every token id: little-endian uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class ShardWriter:
    """Writes one shard in a with block. The file appears only when it is complete. num_tokens is
    the number of tokens written."""

    def __init__(self, path: str, vocab_size: int):
        self.atomic_file = AtomicFile(path)
        self.dtype = token_dtype(vocab_size)
        self.num_tokens = 0

    def __enter__(self) -> "ShardWriter":
        self.file: BinaryIO = self.atomic_file.__enter__()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.atomic_file.__exit__(error_type, error, traceback)

    def write(self, ids: npt.ArrayLike) -> None:
        """Append token ids. Raises OverflowError for an id that the dtype cannot hold."""
        self.write_bytes(np.asarray(ids, dtype=self.dtype).tobytes())

    def write_bytes(self, ids: bytes) -> None:
        """Append token ids that are encoded as in the file."""
        self.file.write(ids)
        self.num_tokens += len(ids) // self.dtype.itemsize


def train_val_cut(path: str, dtype: np.dtype, bos_id: int, val_fraction: float) -> int:
    """The index that splits a shard into training and validation tokens: the first document that
    begins in the last val_fraction of the tokens, or the start of that fraction if none does."""
    tokens = np.memmap(path, dtype, mode="r") if os.path.getsize(path) else np.empty(0, dtype)
    cut = round(len(tokens) * (1 - val_fraction))
    for start in range(cut, len(tokens), SCAN_SIZE):
        begins = np.flatnonzero(tokens[start : start + SCAN_SIZE] == bos_id)
        if len(begins):
            return start + int(begins[0])
    return cut


def write_meta(folder: str, meta: dict) -> None:
    """Write the folder's meta.json."""
    write_atomically(os.path.join(folder, META_FILE), (json.dumps(meta, indent=1) + "\n").encode())


def read_meta(folder: str) -> dict:
    """The validated content of the folder's meta.json. Raises ValueError if it is missing, damaged
    or unfinished, with the command to run."""
    path = os.path.join(folder, META_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        is_complete = meta["complete"]
        if not is_consistent(meta):
            raise ValueError("its numbers contradict each other")
    except FileNotFoundError:
        raise ValueError(
            f"{folder}: no tokens here; run python tinystories.py pretokenize first"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged; delete it and run python tinystories.py pretokenize again"
        ) from error
    if not is_complete:
        raise ValueError(
            f"{folder}: pretokenizing has not finished; run python tinystories.py pretokenize again"
        )
    return meta


def is_consistent(meta: dict) -> bool:
    """Whether the values of a meta.json fit together. Raises KeyError, TypeError or ValueError for
    missing values and wrong types."""
    consistent = (
        meta["dtype"] in ("<u2", "<u4") and meta["vocab_size"] > 0 and bool(meta["tokenizer_hash"])
    )
    for shard in meta["shards"]:
        train_start, train_stop = shard["train"]
        val_start, val_stop = shard["val"]
        consistent &= 0 == train_start <= train_stop == val_start <= val_stop == shard["tokens"]
        consistent &= os.path.basename(shard["file"]) == shard["file"]
    return consistent


class SplitRange(NamedTuple):
    """The tokens of one split in one shard: start <= index < stop."""

    path: str
    start: int
    stop: int

    @property
    def num_predicted(self) -> int:
        """Every token but the first is a target."""
        return max(0, self.stop - self.start - 1)


class WindowLocation(NamedTuple):
    """A window on disk: the shard, the index of its first token and its number of tokens."""

    path: str
    start: int
    num_tokens: int


class TokenDataset:
    """The windows of seq_len + 1 tokens of one split. Consecutive windows share one token, so that
    every token but a shard's first is a target exactly once.

    Windows are read from the file, not mapped: mapped pages would count as resident memory and grow
    to the size of the data.

    Args:
        folder: the folder with meta.json.
        split: train or val.
        seq_len: targets in a window.
        include_partial: whether to include the shorter window at the end of each shard.

    Raises ValueError if the folder is damaged or unfinished, or there is not one window.
    """

    def __init__(self, folder: str, split: str, seq_len: int, include_partial: bool = False):
        meta = read_meta(folder)
        self.seq_len = seq_len
        self.dtype = np.dtype(meta["dtype"])
        self.vocab_size = meta["vocab_size"]
        self.shards: list[SplitRange] = []
        counts = []
        for shard in meta["shards"]:
            path = os.path.join(folder, shard["file"])
            self.check_size(path, shard["tokens"])
            split_range = SplitRange(path, *shard[split])
            num_predicted = split_range.num_predicted
            counts.append(
                -(-num_predicted // seq_len) if include_partial else num_predicted // seq_len
            )
            self.shards.append(split_range)
        self.ends = np.cumsum(counts, dtype=np.int64)  # windows up to and including each shard
        if not len(self):
            self.raise_too_short(folder, split, include_partial)

    def raise_too_short(self, folder: str, split: str, include_partial: bool) -> NoReturn:
        """Raise ValueError with both numbers of tokens and the option to change."""
        longest = max((shard.stop - shard.start for shard in self.shards), default=0)
        needed = 2 if include_partial else self.seq_len + 1
        advice = "raise --val_fraction" if include_partial else "lower --max_seq_len"
        raise ValueError(
            f"{folder}: the longest {split} shard has {longest} tokens, "
            f"but one window takes {needed}; {advice} or add text"
        )

    @property
    def unused(self) -> float:
        """The fraction of tokens that are in no window because a shard ends."""
        num_predicted = sum(shard.num_predicted for shard in self.shards)
        return max(0.0, 1 - len(self) * self.seq_len / num_predicted)

    def check_size(self, path: str, num_tokens: int) -> None:
        """Raise ValueError unless the file exists and has this number of tokens."""
        expected = num_tokens * self.dtype.itemsize
        size = os.path.getsize(path) if os.path.exists(path) else None
        if size != expected:
            problem = "is missing" if size is None else f"has {size} bytes, not {expected}"
            raise ValueError(f"{path} {problem}; run python tinystories.py pretokenize again")

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, index: int) -> WindowLocation:
        """The location of a window on disk."""
        shard_number = int(np.searchsorted(self.ends, index, side="right"))
        shard = self.shards[shard_number]
        first_window = int(self.ends[shard_number - 1]) if shard_number else 0
        start = shard.start + (index - first_window) * self.seq_len
        return WindowLocation(shard.path, start, min(self.seq_len + 1, shard.stop - start))

    def __getitem__(self, index: int) -> np.ndarray:
        """The token ids of a window, (seq_len + 1,) int64, or fewer at the end of a shard. Raises
        ValueError if the file changed or holds ids outside of the vocabulary."""
        path, start, num_tokens = self.locate(index)
        tokens = np.fromfile(path, self.dtype, num_tokens, offset=start * self.dtype.itemsize)
        if len(tokens) != num_tokens or tokens.max() >= self.vocab_size:
            raise ValueError(
                f"{path} changed or is damaged; "
                "delete it and run python tinystories.py pretokenize again"
            )
        return tokens.astype(np.int64)
