"""
Tokens on disk.
"""

import json
import os

import numpy as np

from runtime.atomic_files import AtomicFile, write_atomically

META_FILE = "meta.json"


def token_dir(data_dir: str, vocab_source: str, vocab_size: int) -> str:
    """Where the tokens of a vocabulary are: DATA_DIR/llama2 or DATA_DIR/tokSIZE."""
    return os.path.join(data_dir, "llama2" if vocab_source == "llama2" else f"tok{vocab_size}")


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class ShardWriter(AtomicFile):
    """Writes one shard, which appears when it is whole. tokens counts what was written."""

    def __init__(self, path: str, vocab_size: int):
        super().__init__(path)
        self.dtype, self.tokens = token_dtype(vocab_size), 0

    def __enter__(self):
        super().__enter__()
        return self

    def write(self, ids):
        self.write_bytes(np.asarray(ids, dtype=self.dtype).tobytes())

    def write_bytes(self, ids: bytes):
        """ids as they are in the file."""
        self.file.write(ids)
        self.tokens += len(ids) // self.dtype.itemsize


def train_val_cut(path: str, dtype: np.dtype, bos_id: int, val_fraction: float) -> int:
    """Where to cut a shard so that its last val_fraction validates: at the first document
    that begins there, or right there if none does."""
    tokens = np.memmap(path, dtype, mode="r") if os.path.getsize(path) else np.empty(0, dtype)
    cut = round(len(tokens) * (1 - val_fraction))
    for start in range(cut, len(tokens), 2**20):
        begins = np.flatnonzero(tokens[start : start + 2**20] == bos_id)
        if len(begins):
            return start + int(begins[0])
    return cut


def write_meta(folder: str, meta: dict):
    write_atomically(os.path.join(folder, META_FILE), (json.dumps(meta, indent=1) + "\n").encode())


def read_meta(folder: str) -> dict:
    """The checked content of the folder's meta.json. Raises ValueError where it is missing,
    damaged or unfinished, saying what to run."""
    path = os.path.join(folder, META_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        is_sound = (
            meta["dtype"] in ("<u2", "<u4")
            and meta["vocab_size"] > 0
            and bool(meta["tokenizer_hash"])
        )
        for shard in meta["shards"]:
            (train_start, train_stop), (val_start, val_stop) = shard["train"], shard["val"]
            is_sound &= 0 == train_start <= train_stop == val_start <= val_stop == shard["tokens"]
            is_sound &= os.path.basename(shard["file"]) == shard["file"]
        is_complete = meta["complete"]
        if not is_sound:
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


class TokenDataset:
    """The windows of seq_len + 1 tokens of one split, in which consecutive windows share one
    token, so that every token but a shard's first is predicted once.

    Windows are read from the file, not mapped: mapped pages would count as resident memory and
    grow to the size of the data. include_partial: whether the shorter window at a shard's end counts
    (evaluation) or not (training). Raises ValueError where there is less than one window."""

    def __init__(self, folder: str, split: str, seq_len: int, include_partial: bool = False):
        meta = read_meta(folder)
        self.seq_len, self.dtype, self.vocab_size = (
            seq_len,
            np.dtype(meta["dtype"]),
            meta["vocab_size"],
        )
        self.shards, counts = [], []
        for shard in meta["shards"]:
            path, (start, stop) = os.path.join(folder, shard["file"]), shard[split]
            self.check_size(path, shard["tokens"])
            predicted = max(0, stop - start - 1)
            counts.append(-(-predicted // seq_len) if include_partial else predicted // seq_len)
            self.shards.append((path, start, stop))
        self.ends = np.cumsum(counts, dtype=np.int64)  # windows up to and with each shard
        if not len(self):
            longest = max((stop - start for _, start, stop in self.shards), default=0)
            need = 2 if include_partial else seq_len + 1
            raise ValueError(
                f"{folder}: the longest {split} shard has {longest} tokens, but one window takes {need}; "
                + (
                    "raise --val_fraction or add text"
                    if include_partial
                    else "lower --max_seq_len or add text"
                )
            )

    @property
    def unused(self) -> float:
        """The share of tokens that are in no window: the ends of the shards."""
        predicted = sum(max(0, stop - start - 1) for _, start, stop in self.shards)
        return max(0.0, 1 - len(self) * self.seq_len / predicted)

    def check_size(self, path: str, tokens: int):
        size = os.path.getsize(path) if os.path.exists(path) else None
        if size != tokens * self.dtype.itemsize:
            found = (
                "is missing"
                if size is None
                else f"has {size} bytes, not {tokens * self.dtype.itemsize}"
            )
            raise ValueError(f"{path} {found}; run python tinystories.py pretokenize again")

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, index: int) -> tuple[str, int, int]:
        """The file of a window, which of its tokens is the first, and how many there are."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        path, start, stop = self.shards[shard]
        first = start + (index - (int(self.ends[shard - 1]) if shard else 0)) * self.seq_len
        return path, first, min(self.seq_len + 1, stop - first)

    def __getitem__(self, index: int) -> np.ndarray:
        """Window index as int64 ids (seq_len + 1,), or fewer at a tail."""
        path, first, count = self.locate(index)
        tokens = np.fromfile(path, self.dtype, count, offset=first * self.dtype.itemsize)
        if len(tokens) != count or tokens.max() >= self.vocab_size:
            raise ValueError(
                f"{path} changed or is damaged; run python tinystories.py pretokenize again"
            )
        return tokens.astype(np.int64)
