"""
The data loader: which windows each batch holds, and their tensors.

The order of training is a pure function of (seed, position): the sequence at position p of the run
is the same for any number of processes, restarts and micro-batches. It takes no memory.
"""

import atexit
import functools
import queue
import threading
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from runtime.hashing import splitmix64
from runtime.threads import JoinableThread
from textdata.token_shards import TokenDataset

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets
POLL_INTERVAL = 0.1  # seconds between checks whether the reader of a full queue is to stop
STOP_SECONDS = 10.0  # to wait for a reader that is to stop; a network drive may hang for longer


def feistel_permute(index: int, count: int, key: int) -> int:
    """The image of index under a permutation of range(count) that is selected by key.

    A Feistel network permutes the smallest power of four that is at least count. It is applied
    until the result is below count (Black and Rogaway, Ciphers with Arbitrary Finite Domains,
    2002)."""
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
    """The window at a position of the run. Each epoch has all count windows once, in another
    order."""
    epoch, index = divmod(position, count)
    return feistel_permute(index, count, splitmix64(seed + splitmix64(epoch + 1)))


def collate(windows: list[np.ndarray], batch_size: int, seq_len: int) -> Batch:
    """Inputs and targets, each (batch_size, seq_len) int64. Positions after the end of a window
    have input 0 and target -1, which the loss ignores."""
    inputs = torch.zeros(batch_size, seq_len, dtype=torch.int64)
    targets = torch.full((batch_size, seq_len), -1, dtype=torch.int64)
    for row, window in enumerate(windows):
        inputs[row, : len(window) - 1] = torch.from_numpy(window[:-1])
        targets[row, : len(window) - 1] = torch.from_numpy(window[1:])
    return inputs, targets


def training_indices(dataset: TokenDataset, seed: int, batch_size: int, position: int) -> list[int]:
    """The windows of the batch whose first sequence is at this position of the run."""
    return [epoch_index(position + i, len(dataset), seed) for i in range(batch_size)]


def dropout_seed(seed: int, position: int) -> int:
    """The dropout seed of the batch at this position of the run, for any number of processes."""
    return splitmix64(splitmix64(seed) + position)


def training_batches(
    dataset: TokenDataset, seed: int, batch_size: int, positions: Iterable[int]
) -> Iterator[Batch]:
    """Yield a batch for each position of the run, which is that of its first sequence."""
    for position in positions:
        indices = training_indices(dataset, seed, batch_size, position)
        yield collate([dataset[i] for i in indices], batch_size, dataset.seq_len)


def evaluation_indices(dataset: TokenDataset, batch_size: int, num_batches: int) -> list[int]:
    """The windows of an evaluation, spread evenly over the split; all of it for 0 batches."""
    num_windows = min(num_batches * batch_size or len(dataset), len(dataset))
    return [i * len(dataset) // num_windows for i in range(num_windows)]


def evaluation_batches(
    dataset: TokenDataset, batch_size: int, num_batches: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Yield this rank's batches of an evaluation, the same windows at every evaluation.

    Args:
        dataset: the windows of the split.
        batch_size: sequences per batch.
        num_batches: batches of all ranks together, spread evenly over the split; 0 for all of it.
        rank: this process.
        world_size: number of processes. Each gets as many batches; its last may have no targets.
    """
    indices = evaluation_indices(dataset, batch_size, num_batches)
    for start in range(0, len(indices), batch_size * world_size):
        rank_indices = indices[start + rank * batch_size :][:batch_size]
        yield collate([dataset[i] for i in rank_indices], batch_size, dataset.seq_len)


def prefetch(
    batches: Iterable[tuple[torch.Tensor, ...]], device: str, ahead: int = 4
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the batches on the device. A thread reads and copies up to `ahead` batches while the
    device computes. An exception while reading is raised where the batch is requested.

    The thread ends with the generator, or before the process does: PyTorch aborts the process if
    the interpreter ends while a thread is in its code."""
    ready: queue.Queue[tuple[torch.Tensor, ...] | BaseException | None] = queue.Queue(ahead)
    stop = threading.Event()
    read = functools.partial(read_batches, batches, device, ready, stop)
    reader = JoinableThread(target=read, daemon=True)
    reader.start()
    stop_reader = functools.partial(stop_thread, reader, stop)
    atexit.register(stop_reader)  # an exception's traceback may keep the generator open
    try:
        while True:
            item = ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop_reader()
        atexit.unregister(stop_reader)


def stop_thread(thread: JoinableThread, stop: threading.Event) -> None:
    """Set stop and wait until the thread has ended, for at most STOP_SECONDS."""
    stop.set()
    thread.join(STOP_SECONDS)


def read_batches(
    batches: Iterable[tuple[torch.Tensor, ...]],
    device: str,
    ready: queue.Queue,
    stop: threading.Event,
) -> None:
    """Put the batches into the queue, copied to the device, then None or the exception that ended
    them. Returns early when stop is set."""
    try:
        for batch in batches:
            pinned = (t.pin_memory() for t in batch) if device.startswith("cuda") else batch
            put(ready, tuple(t.to(device, non_blocking=True) for t in pinned), stop)
            if stop.is_set():
                return
        put(ready, None, stop)
    except BaseException as error:
        put(ready, error, stop)


def put(ready: queue.Queue, item: object, stop: threading.Event) -> None:
    """Put an item into the queue as soon as there is space, unless stop is set."""
    while not stop.is_set():
        try:
            return ready.put(item, timeout=POLL_INTERVAL)
        except queue.Full:
            continue
