"""
Tokens on disk and in training order.

A data set is a folder of shards, flat arrays of uint16 or uint32 token ids in which every
document begins with BOS, and one meta.json that says what they are: vocabulary size and hash,
dtype, and for each shard how many tokens it has and which of them train and which validate.

The order of training is a pure function of (seed, position): position p of the run reads the
same window however many processes, restarts or micro-batches there are. It takes no memory.
"""

import queue
import threading
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from runtime.hashing import splitmix64
from textdata.token_shards import TokenDataset


def feistel_permute(index: int, count: int, key: int) -> int:
    """Where index goes in the permutation of range(count) that belongs to key.

    A Feistel network permutes the smallest power of four that holds count, and is walked until
    it lands inside (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002)."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_key in range(4):
            left, right = right, left ^ (splitmix64(right + splitmix64(key + round_key)) & mask)
        index = left << half | right
        if index < count:
            return index


def epoch_index(position: int, count: int, seed: int) -> int:
    """The window that the run reads at this position: all count windows once an epoch, in
    another order each time."""
    epoch, index = divmod(position, count)
    return feistel_permute(index, count, splitmix64(seed + splitmix64(epoch + 1)))


def collate(windows: list[np.ndarray], batch_size: int, seq_len: int):
    """(inputs, targets), each (batch_size, seq_len) int64; what the windows do not fill is
    token 0 with target -1, which the loss leaves out."""
    inputs = torch.zeros(batch_size, seq_len, dtype=torch.int64)
    targets = torch.full((batch_size, seq_len), -1, dtype=torch.int64)
    for row, window in enumerate(windows):
        inputs[row, : len(window) - 1] = torch.from_numpy(window[:-1])
        targets[row, : len(window) - 1] = torch.from_numpy(window[1:])
    return inputs, targets


def training_indices(windows: TokenDataset, seed: int, batch_size: int, position: int) -> list[int]:
    """The windows of the batch whose first sequence stands at this position in the run."""
    return [epoch_index(position + i, len(windows), seed) for i in range(batch_size)]


def dropout_seed(seed: int, position: int) -> int:
    """Dropout is a function of the batch's position, like the data: the same on any number of processes."""
    return splitmix64(splitmix64(seed) + position)


def training_batches(
    windows: TokenDataset, seed: int, batch_size: int, positions: Iterable[int]
) -> Iterator:
    """One (inputs, targets) for every position, which is where its first sequence stands in the run."""
    for position in positions:
        indices = training_indices(windows, seed, batch_size, position)
        yield collate([windows[i] for i in indices], batch_size, windows.seq_len)


def evaluation_batches(
    windows: TokenDataset, batch_size: int, num_batches: int, rank: int = 0, world_size: int = 1
):
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
