import itertools
import os
import threading

import numpy as np
import pytest
import torch

from textdata.loader import (
    epoch_index,
    evaluation_batches,
    feistel_permute,
    prefetch,
    training_batches,
)
from textdata.token_shards import (
    ShardWriter,
    TokenDataset,
    read_meta,
    token_dir,
    token_dtype,
    train_val_cut,
    write_meta,
)

SEQ_LEN = 8


def write_folder(
    folder, shards: list[list[int]], cuts: list[int] | None = None, vocab_size: int = 1000
) -> str:
    """A data set of these shards, of which the tokens before each cut (default: all) train."""
    os.makedirs(folder, exist_ok=True)
    entries = []
    for number, tokens in enumerate(shards):
        with ShardWriter(os.path.join(folder, f"{number:05d}.bin"), vocab_size) as writer:
            writer.write(tokens)
        cut = len(tokens) if cuts is None else cuts[number]
        entries.append(
            {
                "file": f"{number:05d}.bin",
                "tokens": len(tokens),
                "train": [0, cut],
                "val": [cut, len(tokens)],
            }
        )
    meta = {
        "vocab_size": vocab_size,
        "dtype": token_dtype(vocab_size).str,
        "tokenizer_hash": "x",
        "complete": True,
    }
    write_meta(str(folder), meta | {"shards": entries})
    return str(folder)


@pytest.fixture
def folder(tmp_path) -> str:
    """Three shards, all tokens distinct: 100 to 199, 200 to 204 (less than a window), 300 to 363."""
    return write_folder(tmp_path / "tok", [range(100, 200), range(200, 205), range(300, 364)])


def test_a_vocabulary_has_a_folder_of_its_own():
    assert token_dir("data", "custom", 4096) == os.path.join("data", "tok4096")
    assert token_dir("data", "llama2", 32000) == os.path.join("data", "llama2")


@pytest.mark.parametrize(
    "vocab_size, name", [(512, "<u2"), (65536, "<u2"), (65537, "<u4"), (128256, "<u4")]
)
def test_ids_take_two_bytes_as_long_as_they_fit(vocab_size, name):
    assert token_dtype(vocab_size).str == name
    assert np.iinfo(token_dtype(vocab_size)).max >= vocab_size - 1


def test_id_70000_survives_the_disk(tmp_path):
    tokens = [1, 70_000, 65_535, 65_536, 0, 99_999] * 3
    windows = TokenDataset(
        write_folder(tmp_path / "wide", [tokens], vocab_size=100_000), "train", 17
    )
    assert os.path.getsize(tmp_path / "wide" / "00000.bin") == 4 * len(tokens)
    assert windows[0].tolist() == tokens


def test_an_id_too_large_for_its_type_is_refused_and_leaves_no_shard(tmp_path):
    with pytest.raises(OverflowError), ShardWriter(str(tmp_path / "a.bin"), 512) as writer:
        writer.write([1, 70_000])
    assert os.listdir(tmp_path) == []


def test_a_shard_counts_what_was_written(tmp_path):
    with ShardWriter(str(tmp_path / "a.bin"), 512) as writer:
        writer.write([1, 2, 3])
        writer.write([])
        writer.write([258])
        assert os.listdir(tmp_path) != ["a.bin"]  # not under its name yet
    assert writer.tokens == 4
    assert (tmp_path / "a.bin").read_bytes() == bytes([1, 0, 2, 0, 3, 0, 2, 1])


@pytest.mark.parametrize(
    "tokens, val_fraction, cut",
    [
        ([1, 5, 5, 5, 1, 5, 5, 5, 1, 5], 0.5, 8),  # the first document after the half
        ([1, 5, 5, 5, 5, 1, 5, 5, 5, 5], 0.5, 5),  # a document begins just there
        ([1, 5, 5, 5, 5, 5, 5, 5, 5, 5], 0.3, 7),  # no document begins after it
        ([1, 5, 1, 5], 1.0, 0),
        ([1, 5, 1, 5], 0.0, 4),
        ([], 0.5, 0),
    ],
)
def test_a_shard_is_split_where_a_document_begins(tmp_path, tokens, val_fraction, cut):
    path = tmp_path / "a.bin"
    path.write_bytes(np.array(tokens, "<u2").tobytes())
    assert train_val_cut(str(path), np.dtype("<u2"), 1, val_fraction) == cut


def test_a_document_that_begins_far_away_is_found_too(tmp_path):
    tokens = np.full(3 * 2**20, 5, "<u2")
    tokens[[0, -10]] = 1
    path = tmp_path / "a.bin"
    path.write_bytes(tokens.tobytes())
    assert train_val_cut(str(path), tokens.dtype, 1, 0.9) == len(tokens) - 10


def test_consecutive_windows_share_one_token(folder):
    windows = TokenDataset(folder, "train", SEQ_LEN)
    assert len(windows) == 99 // SEQ_LEN + 63 // SEQ_LEN
    assert windows[0].tolist() == list(range(100, 109))
    assert windows[1].tolist() == list(range(108, 117))
    assert windows[99 // SEQ_LEN].tolist() == list(range(300, 309))
    assert all(window.dtype == np.int64 and len(window) == SEQ_LEN + 1 for window in windows)
    with pytest.raises(IndexError):
        windows[len(windows)]


@pytest.mark.parametrize("seq_len", [1, 2, 7, 8, 99, 100, 1000])
def test_with_tails_every_token_but_a_shard_s_first_is_predicted_once(folder, seq_len):
    windows = TokenDataset(folder, "train", seq_len, include_partial=True)
    predicted = [int(token) for window in windows for token in window[1:]]
    assert predicted == [*range(101, 200), *range(201, 205), *range(301, 364)]
    assert all(2 <= len(window) <= seq_len + 1 for window in windows)


def test_train_and_val_windows_keep_to_their_side_of_the_cut(tmp_path):
    folder = write_folder(tmp_path / "tok", [range(100, 200), range(300, 364)], cuts=[90, 40])
    sides = {
        split: TokenDataset(folder, split, SEQ_LEN, include_partial=True)
        for split in ("train", "val")
    }
    tokens = {
        split: {int(token) for window in windows for token in window}
        for split, windows in sides.items()
    }
    assert tokens["train"] == {*range(100, 190), *range(300, 340)}
    assert tokens["val"] == {*range(190, 200), *range(340, 364)}


def test_less_than_one_window_is_an_error_with_both_numbers_and_the_flag(folder):
    with pytest.raises(
        ValueError,
        match=r"longest train shard has 100 tokens, but one window takes 101; lower --max",
    ):
        TokenDataset(folder, "train", 100)
    assert len(TokenDataset(folder, "train", 99)) == 1


def test_no_validation_tokens_are_an_error_with_both_numbers_and_the_flag(folder):
    with pytest.raises(
        ValueError,
        match=r"longest val shard has 0 tokens, but one window takes 2; raise --val_frac",
    ):
        TokenDataset(folder, "val", SEQ_LEN, include_partial=True)


@pytest.mark.parametrize(
    "change, told",
    [(-2, "has 198 bytes, not 200"), (+2, "has 202 bytes, not 200"), (None, "is missing")],
)
def test_a_shard_of_another_length_is_refused(folder, change, told):
    path = os.path.join(folder, "00000.bin")
    if change is None:
        os.remove(path)
    else:
        os.truncate(path, os.path.getsize(path) + change)
    with pytest.raises(
        ValueError, match=rf"00000\.bin {told}; run python tinystories.py pretokenize again"
    ):
        TokenDataset(folder, "train", SEQ_LEN)


def test_a_shard_that_changes_while_it_is_read_is_refused(folder):
    windows = TokenDataset(folder, "train", SEQ_LEN)
    path = os.path.join(folder, "00000.bin")
    os.truncate(path, 100)
    assert windows[0][0] == 100
    with pytest.raises(ValueError, match=r"00000\.bin changed or is damaged"):
        windows[6]
    with open(path, "r+b") as file:
        file.write(np.array([1000], "<u2").tobytes())  # of 1000 tokens the last is 999
    with pytest.raises(ValueError, match=r"00000\.bin changed or is damaged"):
        windows[0]


def test_a_missing_folder_is_an_error_that_names_the_command(tmp_path):
    with pytest.raises(
        ValueError, match=r"nothing: no tokens here; run python tinystories\.py pretokenize first"
    ):
        read_meta(str(tmp_path / "nothing"))


def test_an_unfinished_folder_is_refused(folder):
    write_meta(folder, read_meta(folder) | {"complete": False})
    with pytest.raises(
        ValueError, match=r"has not finished; run python tinystories\.py pretokenize again"
    ):
        TokenDataset(folder, "train", SEQ_LEN)


DAMAGES = {
    "no vocab_size": lambda meta: meta.pop("vocab_size"),
    "no dtype": lambda meta: meta.pop("dtype"),
    "no tokenizer_hash": lambda meta: meta.pop("tokenizer_hash"),
    "no shards": lambda meta: meta.pop("shards"),
    "no complete": lambda meta: meta.pop("complete"),
    "another dtype": lambda meta: meta.update(dtype="<f4"),
    "no tokens in the vocabulary": lambda meta: meta.update(vocab_size=0),
    "a size in quotes": lambda meta: meta.update(vocab_size="1000"),
    "a shard that is a number": lambda meta: meta.update(shards=[5]),
    "a shard without file": lambda meta: meta["shards"][0].pop("file"),
    "a shard that ends too late": lambda meta: meta["shards"][0].update(
        train=[0, 101], val=[101, 101]
    ),
    "splits that overlap": lambda meta: meta["shards"][0].update(train=[0, 60], val=[50, 100]),
    "a negative start": lambda meta: meta["shards"][0].update(train=[-5, 60], val=[60, 100]),
    "a split without end": lambda meta: meta["shards"][0].update(val=[60]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_meta_is_refused_with_its_path(folder, damage):
    meta = read_meta(folder)
    DAMAGES[damage](meta)
    write_meta(folder, meta)
    with pytest.raises(
        ValueError, match=r"meta\.json is damaged; delete it and run python tinystories\.py pretok"
    ):
        TokenDataset(folder, "train", SEQ_LEN)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'"complete"'])
def test_a_meta_that_is_no_json_object_is_refused_with_its_path(folder, content):
    with open(os.path.join(folder, "meta.json"), "wb") as file:
        file.write(content)
    with pytest.raises(ValueError, match=r"meta\.json is damaged"):
        read_meta(folder)


@pytest.mark.parametrize("count", [*range(1, 34), 63, 64, 65, 1000, 1023, 1024, 1025, 4097])
def test_shuffling_is_a_permutation(count):
    for key in (0, 1, 2**64 - 1):
        assert sorted(feistel_permute(index, count, key) for index in range(count)) == list(
            range(count)
        )


def test_shuffling_reaches_every_place_about_equally_often():
    """Where index 0 goes, over 6400 keys: each of 16 places 400 times, give or take 5 deviations."""
    for index in (0, 7, 15):
        places = np.bincount([feistel_permute(index, 16, key) for key in range(6400)], minlength=16)
        assert abs(places - 400).max() < 5 * 400**0.5


def test_shuffling_a_huge_number_takes_no_memory_and_no_time():
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


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
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
    windows, total = TokenDataset(folder, "train", SEQ_LEN), 72  # several epochs
    expected = sequences(windows, 1337, 1, range(total))
    read = [None] * total
    for rank in range(world_size):
        positions = range(rank * batch_size, total, world_size * batch_size)
        mine = sequences(windows, 1337, batch_size, positions)
        assert len(mine) == len(positions) * batch_size
        for number, position in enumerate(positions):
            read[position : position + batch_size] = mine[
                number * batch_size : (number + 1) * batch_size
            ]
    assert read == expected


@pytest.mark.parametrize("stopped_after", [1, 7, 19, 20, 40])
def test_a_restart_goes_on_where_the_run_stopped(folder, stopped_after):
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
def test_ranks_share_an_evaluation_without_overlap_and_leave_nothing_out(
    folder, batch_size, world_size
):
    windows = TokenDataset(folder, "train", SEQ_LEN, include_partial=True)
    shares = [
        predicted_by(evaluation_batches(windows, batch_size, 0, rank, world_size))
        for rank in range(world_size)
    ]
    assert sorted(itertools.chain(*shares)) == [
        *range(101, 200),
        *range(201, 205),
        *range(301, 364),
    ]


def test_an_evaluation_of_some_batches_is_always_the_same_and_spread_over_the_split(folder):
    windows = TokenDataset(folder, "train", SEQ_LEN, include_partial=True)
    alone = predicted_by(evaluation_batches(windows, 2, 3))
    assert alone == predicted_by(evaluation_batches(windows, 2, 3))
    assert len(set(alone)) == len(alone) == 6 * SEQ_LEN
    assert min(alone) == 101 and max(alone) > 330
    shares = [predicted_by(evaluation_batches(windows, 2, 3, rank, 2)) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(alone)


def test_more_evaluation_batches_than_there_are_evaluate_everything_once(folder):
    windows = TokenDataset(folder, "train", SEQ_LEN, include_partial=True)
    assert predicted_by(evaluation_batches(windows, 4, 1000)) == predicted_by(
        evaluation_batches(windows, 4, 0)
    )


def test_what_a_tail_does_not_fill_is_left_out_of_the_loss(folder):
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


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="needs Linux to see its own memory"
)
def test_resident_memory_stays_flat_over_a_large_file(tmp_path):
    """Mapped files count as resident: a run over large data then looks as if it leaked."""
    folder, tokens = write_folder(tmp_path / "tok", [range(10)]), 128 * 2**20
    os.truncate(os.path.join(folder, "00000.bin"), 2 * tokens)  # 256 MiB of zeros that take no disk
    meta = read_meta(folder)
    meta["shards"][0] |= {"tokens": tokens, "train": [0, tokens], "val": [tokens, tokens]}
    write_meta(folder, meta)
    windows = TokenDataset(folder, "train", 2**16)
    windows[0]
    before = resident_bytes()
    assert sum(len(window) - 1 for window in windows) > 0.99 * tokens
    assert resident_bytes() - before < 32 * 2**20


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


def test_prefetch_ends_where_the_batches_end():
    assert in_time(lambda: len(list(prefetch(batches(3), "cpu")))) == 3


def test_prefetch_raises_what_went_wrong_while_reading():
    def failing():
        yield from batches(2)
        raise ValueError("00000.bin changed or is damaged")

    def read():
        reader, seen = prefetch(failing(), "cpu"), 0
        with pytest.raises(ValueError, match="changed or is damaged"):
            for _ in reader:
                seen += 1
        return seen

    assert in_time(read) == 2


def test_prefetch_reads_no_more_than_a_few_batches_ahead_and_stops_when_it_is_closed():
    started, drawn = set(threading.enumerate()), []

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


def test_pretokenized_stories_begin_with_bos_each(token_folder, tokenizer, stories):
    meta = read_meta(token_folder)
    assert meta["tokenizer_hash"] == tokenizer.hash and meta["vocab_size"] == 512
    shards = [
        np.fromfile(os.path.join(token_folder, shard["file"]), meta["dtype"])
        for shard in meta["shards"]
    ]
    assert all(shard[0] == tokenizer.bos_id for shard in shards)
    assert sum(int((shard == tokenizer.bos_id).sum()) for shard in shards) == len(stories)
