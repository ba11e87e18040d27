"""
Tokens on disk and in training order.

A data set is a folder of shards, flat arrays of uint16 or uint32 token ids in which every
document begins with BOS, and one meta.json that says what they are: vocabulary size and hash,
dtype, and for each shard how many tokens it has and which of them train and which validate.

The order of training is a pure function of (seed, position): position p of the run reads the
same window however many processes, restarts or micro-batches there are. It takes no memory.
"""

import json
import os
import queue
import threading
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from atomic import AtomicFile, write_atomically

META_FILE = "meta.json"


def tokens_folder(data_dir: str, vocab_source: str, vocab_size: int) -> str:
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


def split_point(path: str, dtype: np.dtype, bos_id: int, val_fraction: float) -> int:
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
        is_sound = meta["dtype"] in ("<u2", "<u4") and meta["vocab_size"] > 0 and bool(meta["tokenizer_hash"])
        for shard in meta["shards"]:
            (train_start, train_stop), (val_start, val_stop) = shard["train"], shard["val"]
            is_sound &= 0 == train_start <= train_stop == val_start <= val_stop == shard["tokens"]
            is_sound &= os.path.basename(shard["file"]) == shard["file"]
        is_complete = meta["complete"]
        if not is_sound:
            raise ValueError("its numbers contradict each other")
    except FileNotFoundError:
        raise ValueError(f"{folder}: no tokens here; run python tinystories.py pretokenize first") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged; delete it and run python tinystories.py pretokenize again") from error
    if not is_complete:
        raise ValueError(f"{folder}: pretokenizing has not finished; run python tinystories.py pretokenize again")
    return meta


class TokenWindows:
    """The windows of seq_len + 1 tokens of one split, in which consecutive windows share one
    token, so that every token but a shard's first is predicted once.

    Windows are read from the file, not mapped: mapped pages would count as resident memory and
    grow to the size of the data. tails: whether the shorter window at a shard's end counts
    (evaluation) or not (training). Raises ValueError where there is less than one window."""

    def __init__(self, folder: str, split: str, seq_len: int, tails: bool = False):
        meta = read_meta(folder)
        self.seq_len, self.dtype, self.vocab_size = seq_len, np.dtype(meta["dtype"]), meta["vocab_size"]
        self.shards, counts = [], []
        for shard in meta["shards"]:
            path, (start, stop) = os.path.join(folder, shard["file"]), shard[split]
            self.check_size(path, shard["tokens"])
            predicted = max(0, stop - start - 1)
            counts.append(-(-predicted // seq_len) if tails else predicted // seq_len)
            self.shards.append((path, start, stop))
        self.ends = np.cumsum(counts, dtype=np.int64)  # windows up to and with each shard
        if not len(self):
            longest = max((stop - start for _, start, stop in self.shards), default=0)
            need = 2 if tails else seq_len + 1
            raise ValueError(
                f"{folder}: the longest {split} shard has {longest} tokens, but one window takes {need}; "
                + ("raise --val_fraction or add text" if tails else "lower --max_seq_len or add text")
            )

    @property
    def unused(self) -> float:
        """The share of tokens that are in no window: the ends of the shards."""
        predicted = sum(max(0, stop - start - 1) for _, start, stop in self.shards)
        return max(0.0, 1 - len(self) * self.seq_len / predicted)

    def check_size(self, path: str, tokens: int):
        size = os.path.getsize(path) if os.path.exists(path) else None
        if size != tokens * self.dtype.itemsize:
            found = "is missing" if size is None else f"has {size} bytes, not {tokens * self.dtype.itemsize}"
            raise ValueError(f"{path} {found}; run python tinystories.py pretokenize again")

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def place(self, index: int) -> tuple[str, int, int]:
        """The file of a window, which of its tokens is the first, and how many there are."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        path, start, stop = self.shards[shard]
        first = start + (index - (int(self.ends[shard - 1]) if shard else 0)) * self.seq_len
        return path, first, min(self.seq_len + 1, stop - first)

    def __getitem__(self, index: int) -> np.ndarray:
        """Window index as int64 ids (seq_len + 1,), or fewer at a tail."""
        path, first, count = self.place(index)
        tokens = np.fromfile(path, self.dtype, count, offset=first * self.dtype.itemsize)
        if len(tokens) != count or tokens.max() >= self.vocab_size:
            raise ValueError(f"{path} changed or is damaged; run python tinystories.py pretokenize again")
        return tokens.astype(np.int64)


def mix(x: int) -> int:
    """A 64-bit hash in which every bit depends on every bit (the finalizer of SplitMix64)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return x ^ (x >> 31)


def shuffled(index: int, count: int, key: int) -> int:
    """Where index goes in the permutation of range(count) that belongs to key.

    A Feistel network permutes the smallest power of four that holds count, and is walked until
    it lands inside (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002)."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_key in range(4):
            left, right = right, left ^ (mix(right + mix(key + round_key)) & mask)
        index = left << half | right
        if index < count:
            return index


def training_window(position: int, count: int, seed: int) -> int:
    """The window that the run reads at this position: all count windows once an epoch, in
    another order each time."""
    epoch, index = divmod(position, count)
    return shuffled(index, count, mix(seed + mix(epoch + 1)))


def collate(windows: list[np.ndarray], batch_size: int, seq_len: int):
    """(inputs, targets), each (batch_size, seq_len) int64; what the windows do not fill is
    token 0 with target -1, which the loss leaves out."""
    inputs = torch.zeros(batch_size, seq_len, dtype=torch.int64)
    targets = torch.full((batch_size, seq_len), -1, dtype=torch.int64)
    for row, window in enumerate(windows):
        inputs[row, : len(window) - 1] = torch.from_numpy(window[:-1])
        targets[row, : len(window) - 1] = torch.from_numpy(window[1:])
    return inputs, targets


def training_indices(windows: TokenWindows, seed: int, batch_size: int, position: int) -> list[int]:
    """The windows of the batch whose first sequence stands at this position in the run."""
    return [training_window(position + i, len(windows), seed) for i in range(batch_size)]


def dropout_seed(seed: int, position: int) -> int:
    """Dropout is a function of the batch's position, like the data: the same on any number of processes."""
    return mix(mix(seed) + position)


def training_batches(windows: TokenWindows, seed: int, batch_size: int, positions: Iterable[int]) -> Iterator:
    """One (inputs, targets) for every position, which is where its first sequence stands in the run."""
    for position in positions:
        indices = training_indices(windows, seed, batch_size, position)
        yield collate([windows[i] for i in indices], batch_size, windows.seq_len)


def evaluation_batches(windows: TokenWindows, batch_size: int, num_batches: int, rank: int = 0, world_size: int = 1):
    """This rank's share of num_batches batches spread evenly over the split, 0 for all of it: the same
    windows at every evaluation. Every rank gets as many, of which the last may have no targets."""
    wanted = min(num_batches * batch_size or len(windows), len(windows))
    indices = [i * len(windows) // wanted for i in range(wanted)]
    for start in range(0, wanted, batch_size * world_size):
        own = indices[start + rank * batch_size :][:batch_size]
        yield collate([windows[i] for i in own], batch_size, windows.seq_len)


def prefetch(batches: Iterable, device: str, ahead: int = 4) -> Iterator:
    """Yield the batches on the device, read and copied by a thread while the device computes.
    An exception while reading is raised where the batch is asked for."""
    ready, stop = queue.Queue(ahead), threading.Event()

    def put(item):
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def read():
        try:
            for batch in batches:
                pinned = (t.pin_memory() for t in batch) if device.startswith("cuda") else batch
                put(tuple(t.to(device, non_blocking=True) for t in pinned))
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            item = ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
