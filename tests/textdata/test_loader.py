import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from tests.processes import ROOT
from textdata import loader
from textdata.loader import (
    epoch_index,
    evaluation_batches,
    feistel_permute,
    prefetch,
    training_batches,
)
from textdata.token_shards import TokenDataset

SEQ_LEN = 8


@pytest.mark.parametrize("count", [*range(1, 34), 63, 64, 65, 1000, 1023, 1024, 1025, 4097])
def test_feistel_permute_is_a_permutation(count):
    for key in (0, 1, 2**64 - 1):
        assert sorted(feistel_permute(index, count, key) for index in range(count)) == list(
            range(count)
        )


def test_feistel_permute_is_uniform_over_keys():
    """Over 6400 keys, an index has each of 16 images 400 times, within 5 standard deviations."""
    for index in (0, 7, 15):
        counts = np.bincount([feistel_permute(index, 16, key) for key in range(6400)], minlength=16)
        assert abs(counts - 400).max() < 5 * 400**0.5


def test_feistel_permute_of_a_huge_range_is_instant():
    count = 10**15
    assert len({feistel_permute(index, count, 1) for index in range(1000)}) == 1000
    assert all(
        0 <= feistel_permute(index, count, 1) < count for index in range(count - 1000, count)
    )


@pytest.mark.parametrize("count", [1, 2, 5, 37, 256])
def test_each_epoch_reads_every_window_once(count):
    for epoch in range(3):
        read = [
            epoch_index(position, count, 1337)
            for position in range(epoch * count, (epoch + 1) * count)
        ]
        assert sorted(read) == list(range(count))


def test_every_epoch_and_seed_has_another_order():
    orders = [
        tuple(epoch_index(epoch * 50 + i, 50, seed) for i in range(50))
        for epoch in range(20)
        for seed in range(20)
    ]
    assert len(set(orders)) == len(orders)
    assert tuple(range(50)) not in orders


def sequences(windows, seed: int, batch_size: int, positions) -> list[list[int]]:
    return [
        row
        for inputs, _ in training_batches(windows, seed, batch_size, positions)
        for row in inputs.tolist()
    ]


@pytest.mark.parametrize(
    "world_size, batch_size", [(1, 1), (1, 4), (1, 24), (2, 3), (3, 4), (4, 6)]
)
def test_the_order_depends_on_neither_processes_nor_micro_batches(folder, world_size, batch_size):
    windows = TokenDataset(folder, "train", SEQ_LEN)
    total = 72  # several epochs
    expected = sequences(windows, 1337, 1, range(total))
    read = [None] * total
    for rank in range(world_size):
        positions = range(rank * batch_size, total, world_size * batch_size)
        rank_rows = sequences(windows, 1337, batch_size, positions)
        assert len(rank_rows) == len(positions) * batch_size
        for number, position in enumerate(positions):
            read[position : position + batch_size] = rank_rows[
                number * batch_size : (number + 1) * batch_size
            ]
    assert read == expected


@pytest.mark.parametrize("stopped_after", [1, 7, 19, 20, 40])
def test_a_restart_continues_where_the_run_stopped(folder, stopped_after):
    whole = sequences(TokenDataset(folder, "train", SEQ_LEN), 1337, 1, range(60))
    restarted = sequences(TokenDataset(folder, "train", SEQ_LEN), 1337, 1, range(stopped_after, 60))
    assert whole[stopped_after:] == restarted


def test_targets_are_the_inputs_one_token_later(folder):
    (batch,) = training_batches(TokenDataset(folder, "train", SEQ_LEN), 1, 4, [0])
    inputs, targets = batch
    assert inputs.shape == targets.shape == (4, SEQ_LEN)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs + 1, targets)  # the tokens of the shards count up


def predicted_by(batches) -> list[int]:
    return [token for _, targets in batches for token in targets.flatten().tolist() if token != -1]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_divide_an_evaluation_without_overlap_or_gap(folder, batch_size, world_size):
    windows = TokenDataset(folder, "train", SEQ_LEN, include_partial=True)
    by_rank = [
        predicted_by(evaluation_batches(windows, batch_size, 0, rank, world_size))
        for rank in range(world_size)
    ]
    assert sorted(itertools.chain(*by_rank)) == [
        *range(101, 200),
        *range(201, 205),
        *range(301, 364),
    ]


def test_a_partial_evaluation_is_constant_and_spread_over_the_split(folder):
    windows = TokenDataset(folder, "train", SEQ_LEN, include_partial=True)
    alone = predicted_by(evaluation_batches(windows, 2, 3))
    assert alone == predicted_by(evaluation_batches(windows, 2, 3))
    assert len(set(alone)) == len(alone) == 6 * SEQ_LEN
    assert min(alone) == 101 and max(alone) > 330
    by_rank = [predicted_by(evaluation_batches(windows, 2, 3, rank, 2)) for rank in range(2)]
    assert sorted(by_rank[0] + by_rank[1]) == sorted(alone)


def test_too_many_evaluation_batches_evaluate_everything_once(folder):
    windows = TokenDataset(folder, "train", SEQ_LEN, include_partial=True)
    assert predicted_by(evaluation_batches(windows, 4, 1000)) == predicted_by(
        evaluation_batches(windows, 4, 0)
    )


def test_padding_of_partial_windows_is_masked(folder):
    *_, (inputs, targets) = evaluation_batches(
        TokenDataset(folder, "train", SEQ_LEN, include_partial=True), 4, 0
    )
    assert inputs.shape == targets.shape == (4, SEQ_LEN)
    unfilled = targets == -1
    assert (
        unfilled.any()
        and (inputs[unfilled] == 0).all()
        and (inputs[~unfilled] + 1 == targets[~unfilled]).all()
    )


def in_time(function, seconds: float = 10):
    """function() in a thread, so that a hang fails the test instead of stopping it."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, "it hangs"
    return results[0]


def batches(count: int):
    return ((torch.tensor([i]), torch.tensor([-i])) for i in range(count))


def test_prefetch_yields_the_batches_in_order():
    read = prefetch(batches(100), "cpu")
    assert in_time(lambda: [tuple(map(int, next(read))) for _ in range(100)]) == [
        (i, -i) for i in range(100)
    ]


def test_prefetch_ends_with_the_batches():
    assert in_time(lambda: len(list(prefetch(batches(3), "cpu")))) == 3


def test_prefetch_raises_the_exception_of_the_reader():
    def failing():
        yield from batches(2)
        raise ValueError("00000.bin changed or is damaged")

    def read():
        reader = prefetch(failing(), "cpu")
        seen = 0
        with pytest.raises(ValueError, match="changed or is damaged"):
            for _ in reader:
                seen += 1
        return seen

    assert in_time(read) == 2


def test_prefetch_reads_few_batches_ahead_and_stops_when_closed():
    started = set(threading.enumerate())
    drawn = []

    def endless():
        for i in itertools.count():
            drawn.append(i)
            yield (torch.tensor([i]),)

    reader = prefetch(endless(), "cpu", ahead=2)
    next(reader)
    (thread,) = set(threading.enumerate()) - started
    reader.close()
    thread.join(20)
    assert not thread.is_alive()
    assert len(drawn) <= 5  # one given out, two ready, one in hand, and one asked for


# A process that ends while a reader is computing, with a generator that nothing has closed.
ENDS_WHILE_READING = f"""
import itertools, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from textdata.loader import prefetch
torch.set_num_threads(1)
batches = ((torch.ones(2_000_000).exp(),) for _ in itertools.count())
reader = prefetch((batch[:1] for (batch,) in batches), "cpu", ahead=1_000_000)
next(reader)
sys.exit(3)
"""


def test_process_can_end_while_a_reader_computes():
    """It ended in SIGABRT: "terminate called without an active exception"."""
    command = [sys.executable, "-c", ENDS_WHILE_READING]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 3 and not result.stderr, result.stderr


def test_reader_that_hangs_does_not_keep_the_process(monkeypatch):
    """It may read from a network drive that does not answer."""
    monkeypatch.setattr(loader, "STOP_SECONDS", 0.1)
    released = threading.Event()

    def hanging():
        yield (torch.tensor([0]),)
        released.wait(60)

    reader = prefetch(hanging(), "cpu")
    next(reader)
    in_time(reader.close)
    assert not released.is_set()
    released.set()
