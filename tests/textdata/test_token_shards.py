import os

import numpy as np
import pytest

from tests.textdata.helpers import write_token_folder
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


def test_each_vocabulary_has_its_folder():
    assert token_dir("data", "custom", 4096) == os.path.join("data", "tok4096")
    assert token_dir("data", "llama2", 32000) == os.path.join("data", "llama2")


@pytest.mark.parametrize(
    "vocab_size, name", [(512, "<u2"), (65536, "<u2"), (65537, "<u4"), (128256, "<u4")]
)
def test_token_ids_take_two_bytes_if_they_fit(vocab_size, name):
    assert token_dtype(vocab_size).str == name
    assert np.iinfo(token_dtype(vocab_size)).max >= vocab_size - 1


def test_id_70000_survives_the_disk(tmp_path):
    tokens = [1, 70_000, 65_535, 65_536, 0, 99_999] * 3
    windows = TokenDataset(
        write_token_folder(tmp_path / "wide", [tokens], vocab_size=100_000), "train", 17
    )
    assert os.path.getsize(tmp_path / "wide" / "00000.bin") == 4 * len(tokens)
    assert windows[0].tolist() == tokens


def test_an_id_too_large_for_the_dtype_leaves_no_shard(tmp_path):
    with pytest.raises(OverflowError), ShardWriter(str(tmp_path / "a.bin"), 512) as writer:
        writer.write([1, 70_000])
    assert os.listdir(tmp_path) == []


def test_a_shard_writer_counts_its_tokens(tmp_path):
    with ShardWriter(str(tmp_path / "a.bin"), 512) as writer:
        writer.write([1, 2, 3])
        writer.write([])
        writer.write([258])
        assert os.listdir(tmp_path) != ["a.bin"]  # not under its name yet
    assert writer.num_tokens == 4
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
def test_with_partial_windows_every_token_is_predicted_once(folder, seq_len):
    windows = TokenDataset(folder, "train", seq_len, include_partial=True)
    predicted = [int(token) for window in windows for token in window[1:]]
    assert predicted == [*range(101, 200), *range(201, 205), *range(301, 364)]
    assert all(2 <= len(window) <= seq_len + 1 for window in windows)


def test_train_and_val_windows_do_not_overlap(tmp_path):
    folder = write_token_folder(tmp_path / "tok", [range(100, 200), range(300, 364)], cuts=[90, 40])
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


def test_less_than_one_window_is_refused_with_the_option(folder):
    with pytest.raises(
        ValueError,
        match=r"longest train shard has 100 tokens, but one window takes 101; lower --max",
    ):
        TokenDataset(folder, "train", 100)
    assert len(TokenDataset(folder, "train", 99)) == 1


def test_no_validation_tokens_are_refused_with_the_option(folder):
    with pytest.raises(
        ValueError,
        match=r"longest val shard has 0 tokens, but one window takes 2; raise --val_frac",
    ):
        TokenDataset(folder, "val", SEQ_LEN, include_partial=True)


@pytest.mark.parametrize(
    "change, problem",
    [(-2, "has 198 bytes, not 200"), (+2, "has 202 bytes, not 200"), (None, "is missing")],
)
def test_a_shard_of_another_length_is_refused(folder, change, problem):
    path = os.path.join(folder, "00000.bin")
    if change is None:
        os.remove(path)
    else:
        os.truncate(path, os.path.getsize(path) + change)
    with pytest.raises(
        ValueError, match=rf"00000\.bin {problem}; run python tinystories.py pretokenize again"
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


def test_a_missing_folder_is_refused_with_the_command(tmp_path):
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
def test_a_meta_that_is_not_an_object_is_refused(folder, content):
    with open(os.path.join(folder, "meta.json"), "wb") as file:
        file.write(content)
    with pytest.raises(ValueError, match=r"meta\.json is damaged"):
        read_meta(folder)


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_resident_memory_stays_flat_over_a_large_file(tmp_path):
    """Mapped files count as resident: a run over large data then looks as if it leaked."""
    folder = write_token_folder(tmp_path / "tok", [range(10)])
    num_tokens = 128 * 2**20
    os.truncate(os.path.join(folder, "00000.bin"), 2 * num_tokens)  # 256 MiB, sparse
    meta = read_meta(folder)
    meta["shards"][0] |= {
        "tokens": num_tokens,
        "train": [0, num_tokens],
        "val": [num_tokens, num_tokens],
    }
    write_meta(folder, meta)
    windows = TokenDataset(folder, "train", 2**16)
    windows[0]
    before = resident_bytes()
    assert sum(len(window) - 1 for window in windows) > 0.99 * num_tokens
    assert resident_bytes() - before < 32 * 2**20


def test_pretokenized_stories_begin_with_bos_each(token_folder, tokenizer, stories):
    meta = read_meta(token_folder)
    assert meta["tokenizer_hash"] == tokenizer.hash and meta["vocab_size"] == 512
    shards = [
        np.fromfile(os.path.join(token_folder, shard["file"]), meta["dtype"])
        for shard in meta["shards"]
    ]
    assert all(shard[0] == tokenizer.bos_id for shard in shards)
    assert sum(int((shard == tokenizer.bos_id).sum()) for shard in shards) == len(stories)
