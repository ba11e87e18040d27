import json
import os
import shutil

import numpy as np
import pytest

import tinystories
from tests.textdata.helpers import (
    VOCAB_SIZE,
    decode_documents,
    read_folder,
    read_shards,
    run_stage,
    write_stories,
)
from textdata import shard_jobs
from textdata.shard_jobs import pack_files
from textdata.token_shards import TokenDataset, read_meta, write_meta


@pytest.fixture(autouse=True)
def work_in_tmp_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def write_sizes(folder, sizes: list[int]) -> list[str]:
    """Write files of these sizes in bytes; returns their paths."""
    folder.mkdir()
    for number, size in enumerate(sizes):
        (folder / f"{number}.txt").write_text("x" * size)
    return [str(path) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize(
    "sizes, packs",
    [
        ([1], [1]),
        ([0, 0, 0], [3]),
        ([100, 100, 100], [1, 1, 1]),
        ([60, 30, 9, 60, 30, 9, 1], [4, 3]),
        ([99, 500, 1, 500], [2, 2]),
        ([30] * 10, [4, 4, 2]),
    ],
)
def test_consecutive_files_are_packed_until_the_size(tmp_path, monkeypatch, sizes, packs):
    monkeypatch.setattr(shard_jobs, "PACK_SIZE", 100)
    files = write_sizes(tmp_path / "in", sizes)
    groups = [group for group, _ in pack_files(files, [0.1] * len(files))]
    assert list(map(len, groups)) == packs
    assert [source.path for group in groups for source in group] == files


def test_only_files_with_one_fraction_are_packed_together(tmp_path):
    """TinyStories' first file validates and no other."""
    files = write_sizes(tmp_path / "in", [1, 1, 1])
    groups = list(pack_files(files, [1.0, 0.0, 0.0]))
    assert [(len(group), fraction) for group, fraction in groups] == [(1, 1.0), (2, 0.0)]


@pytest.fixture
def many_files(tmp_path, stories) -> str:
    """A folder of 300 files with a text each."""
    (tmp_path / "many").mkdir()
    for number, text in enumerate(stories):
        (tmp_path / "many" / f"{number:03d}.txt").write_text(text.replace("\n\n", "\n"))
    return "many"


@pytest.fixture
def many_options(many_files, tokenizer_path):
    return (
        f"--input={many_files}",
        "--data_dir=out",
        f"--tokenizer={tokenizer_path}",
        f"--vocab_size={VOCAB_SIZE}",
    )


@pytest.mark.parametrize("pack_size, num_shards", [(1, 300), (50_000, 5), (2**22, 1)])
def test_packing_changes_no_token(
    many_options, monkeypatch, stories, tokenizer, pack_size, num_shards
):
    monkeypatch.setattr(shard_jobs, "PACK_SIZE", pack_size)
    output = run_stage("pretokenize", *many_options)
    shards = read_shards("out/tok512")
    assert abs(len(shards) - num_shards) <= 1
    tokens = np.concatenate(shards)
    assert decode_documents(tokens, tokenizer) == [text.replace("\n\n", "\n") for text in stories]
    assert "read 300 document(s) in 300 file(s)" in output


def test_training_reads_small_files(many_options):
    """Each file of less than a window was a shard, and no window was left to train on."""
    run_stage("pretokenize", *many_options)
    windows = TokenDataset("out/tok512", "train", 512)
    assert windows.unused < 0.02


def test_meta_is_written_twice_for_any_number_of_files(many_options, monkeypatch):
    """It was written after every file, so that the time grew with the square of the files."""
    monkeypatch.setattr(shard_jobs, "PACK_SIZE", 1000)
    written = []
    monkeypatch.setattr(
        "textdata.pretokenize.write_meta",
        lambda folder, meta: (written.append(len(meta["shards"])), write_meta(folder, meta)),
    )
    run_stage("pretokenize", *many_options)
    assert len(written) == 2 and written[1] > 100


def test_a_changed_file_tokenizes_its_shard_alone(many_options, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_jobs, "PACK_SIZE", 50_000)
    run_stage("pretokenize", *many_options)
    before = {path.name: path.stat().st_ino for path in (tmp_path / "out/tok512").glob("*.bin")}
    path = tmp_path / "many" / "150.txt"
    path.write_text(path.read_text()[:-1] + "!")
    assert "shard(s) unchanged" in run_stage("pretokenize", *many_options)
    after = {path.name: path.stat().st_ino for path in (tmp_path / "out/tok512").glob("*.bin")}
    assert before.keys() == after.keys()
    assert len(before.items() - after.items()) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "000.txt").unlink(),
        lambda folder: (folder / "150a.txt").write_text("A file between others."),
        lambda folder: [(folder / f"{number}.txt").unlink() for number in range(100, 300)],
        lambda folder: (folder / "299.txt").rename(folder / "0.txt"),
    ],
    ids=["first removed", "one added", "most removed", "one renamed"],
)
@pytest.mark.parametrize("pack_size", [50_000, 2**22])
def test_an_updated_folder_equals_a_new_one(many_options, tmp_path, monkeypatch, change, pack_size):
    monkeypatch.setattr(shard_jobs, "PACK_SIZE", pack_size)
    run_stage("pretokenize", *many_options)
    change(tmp_path / "many")
    run_stage("pretokenize", *many_options)
    updated = read_folder(tmp_path / "out" / "tok512")
    shutil.rmtree("out")
    run_stage("pretokenize", *many_options)
    assert updated == read_folder(tmp_path / "out" / "tok512")


def test_an_unchanged_corpus_has_the_same_closing_lines(many_options):
    first = run_stage("pretokenize", *many_options).splitlines()[-3:]
    second = run_stage("pretokenize", *many_options).splitlines()
    assert second[-3:] == first and "1 of 1 shard(s) unchanged" in second[-4]


def fail_after_the_shard(job, entry, num_bytes, report):
    """Stop before the record of the finished shard is written."""
    if entry is not None:
        raise ZeroDivisionError
    return shard_jobs.ShardRecord(job, entry, num_bytes, report)


@pytest.mark.parametrize(
    "function, fails",
    [
        ("write_batch", lambda *args: 1 / 0),
        ("train_val_cut", lambda *args: 1 / 0),
        ("ShardRecord", fail_after_the_shard),
    ],
    ids=["before the shard", "after the shard", "before the record"],
)
def test_a_crash_between_shard_and_record_is_noticed(
    many_options, tmp_path, monkeypatch, function, fails
):
    """With the tokens of the new text and the record of the old one, a restored file was stale."""
    folder = tmp_path / "out" / "tok512"
    run_stage("pretokenize", *many_options)
    expected = read_folder(folder)
    paths = [tmp_path / "many" / "150.txt", tmp_path / "many" / "151.txt"]
    contents = [(path.read_text(), path.stat()) for path in paths]
    for path, (text, _) in zip(paths, reversed(contents), strict=True):
        path.write_text(text)  # another order of the same texts: a shard of the same size
    monkeypatch.setattr(f"textdata.pretokenize.{function}", fails)
    with pytest.raises(ZeroDivisionError):
        run_stage("pretokenize", *many_options)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    for path, (text, status) in zip(paths, contents, strict=True):
        path.write_text(text)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    run_stage("pretokenize", *many_options)
    assert read_folder(folder) == expected


# What a stage removes


FOREIGN_FILES = (
    "model.bin",
    "tokenizer.bin",
    "ckpt.pt.123.partial",
    "model.bin.77.partial",
    "data00.bin",
    "part1.json",
    "00007.bin",
    "notes.record",
)


def test_files_of_others_in_the_folder_stay(many_options, tmp_path):
    """A run whose out_dir is the folder of tokens lost its model.bin and tokenizer.bin."""
    folder = tmp_path / "out" / "tok512"
    folder.mkdir(parents=True)
    for name in FOREIGN_FILES:
        (folder / name).write_text("of another program")
    run_stage("pretokenize", *many_options)
    for path in sorted((tmp_path / "many").iterdir())[100:]:
        path.unlink()
    run_stage("pretokenize", *many_options)
    assert all((folder / name).read_text() == "of another program" for name in FOREIGN_FILES)


def test_shards_of_removed_files_are_removed(many_options, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_jobs, "PACK_SIZE", 50_000)
    folder = tmp_path / "out" / "tok512"
    run_stage("pretokenize", *many_options)
    (folder / "00000.bin.123.partial").write_text("of a killed run")
    for path in sorted((tmp_path / "many").iterdir())[100:]:
        path.unlink()
    run_stage("pretokenize", *many_options)
    assert sorted(os.listdir(folder)) == sorted(
        [".lock", "meta.json", "tokenizer.model"]
        + [f"0000{number}.{suffix}" for number in range(2) for suffix in ("bin", "record")]
    )


def test_a_record_names_no_file_outside_of_the_folder(many_options, tmp_path):
    folder = tmp_path / "out" / "tok512"
    run_stage("pretokenize", *many_options)
    (tmp_path / "00009.bin").write_text("precious")
    record = json.loads((folder / "00000.record").read_text())
    record["job"]["file"] = "../../00009.bin"
    (folder / "00009.record").write_text(json.dumps(record))
    run_stage("pretokenize", *many_options)
    assert (tmp_path / "00009.bin").read_text() == "precious"


def old_folder(folder, source: str, tokens: np.ndarray, tokenizer_hash: str) -> None:
    """Write a folder as earlier versions of cria did: one shard a file, no records."""
    folder.mkdir(parents=True)
    entries = []
    for number in range(3):
        name = f"{number:05d}.bin"
        tokens.astype("<u2").tofile(folder / name)
        job = {"source": f"{source}/{number:03d}.txt", "file": name, "separator": ""}
        size = len(tokens)
        entry = {"file": name, "tokens": size, "train": [0, size - 50], "val": [size - 50, size]}
        entries.append(entry | {"job": job})
    meta = {"vocab_source": "custom", "vocab_size": VOCAB_SIZE, "dtype": "<u2"}
    meta |= {"tokenizer_hash": tokenizer_hash, "complete": True, "shards": entries}
    write_meta(str(folder), meta)


def test_a_folder_of_an_earlier_version_still_trains(tmp_path, tokenizer):
    folder = tmp_path / "out" / "tok512"
    old_folder(folder, "anywhere", np.arange(3, 300), tokenizer.hash)
    assert len(TokenDataset(str(folder), "train", 32)) == 3 * (246 // 32)
    assert len(read_meta(str(folder))["shards"]) == 3


def test_a_folder_of_an_earlier_version_is_replaced(many_options, tmp_path, tokenizer):
    folder = tmp_path / "out" / "tok512"
    old_folder(folder, str(tmp_path / "many"), np.arange(3, 300), tokenizer.hash)
    assert "unchanged" not in run_stage("pretokenize", *many_options)
    assert [len(shard) > 300 for shard in read_shards(folder)] == [True]


@pytest.mark.parametrize("version", ["earlier", "this"])
def test_the_tokens_of_another_text_are_not_overwritten(
    many_options, tmp_path, tokenizer, stories, version
):
    folder = tmp_path / "out" / "tok512"
    if version == "this":
        write_stories(tmp_path / "other" / "a.json", stories[:10])
        run_stage("pretokenize", *many_options, "--input=other")
    else:
        old_folder(folder, "/other", np.arange(3, 300), tokenizer.hash)
    before = read_folder(folder)
    write_stories(tmp_path / "new" / "a.json", stories[:150])
    run_stage("train_vocab", "--input=new", "--data_dir=new", f"--vocab_size={VOCAB_SIZE}")
    with pytest.raises(ValueError, match=r"tok512 holds the tokens of another text, .*other/"):
        run_stage("pretokenize", *many_options, "--tokenizer=new/tok512.model")
    assert read_folder(folder) == before | {".lock": b""}


def test_a_renamed_folder_is_the_same_text(many_options, tmp_path):
    """It was refused as another text: only the paths were compared."""
    folder = tmp_path / "out" / "tok512"
    run_stage("pretokenize", *many_options)
    expected = read_shards(folder)
    (tmp_path / "many").rename(tmp_path / "renamed")
    run_stage("pretokenize", *many_options, "--input=renamed")
    assert np.array_equal(read_shards(folder), expected)
    (tmp_path / "many").symlink_to("renamed")
    run_stage("pretokenize", *many_options)
    assert np.array_equal(read_shards(folder), expected)


@pytest.mark.parametrize("change", ["size", "time", "name"])
def test_another_version_in_another_folder_is_another_text(tmp_path, tokenizer_path, change):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = tmp_path / "a" / "x.txt"
    second = tmp_path / "b" / ("y.txt" if change == "name" else "x.txt")
    first.write_text("A text.")
    second.write_text("A text.." if change == "size" else "A text.")
    os.utime(first, ns=(0, 10**18))
    os.utime(second, ns=(0, 10**18 + (change == "time")))
    options = ("--data_dir=out", f"--tokenizer={tokenizer_path}", f"--vocab_size={VOCAB_SIZE}")
    run_stage("pretokenize", "--input=a", *options)
    with pytest.raises(ValueError, match=r"another text, .*x\.txt: delete it or give another"):
        run_stage("pretokenize", "--input=b", *options)


@pytest.mark.parametrize(
    "name, content",
    [("a.txt", ""), ("a.txt", " \n\n\t\n"), ("a.jsonl", '{"text": ""}\n{"text": " "}\n')],
)
def test_no_text_is_refused(tmp_path, tokenizer_path, name, content):
    """It succeeded with 0 tokens and named train.py as the next step."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_text(content)
    options = ("--data_dir=out", f"--tokenizer={tokenizer_path}", f"--vocab_size={VOCAB_SIZE}")
    with pytest.raises(ValueError, match=r"no text to tokenize: 1 file\(s\) .*in/a"):
        run_stage("pretokenize", "--input=in", *options)
    with pytest.raises(ValueError, match="has not finished"):
        read_meta("out/tok512")


def test_synthesize_removes_only_what_it_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(tinystories, "STORIES_PER_SHARD", 20)
    (tmp_path / "some").mkdir()
    others = {"synthetic07.json": "[]", "synthetic1a.json": "{", "synthetic09.json": "mine"}
    for name, content in others.items():
        (tmp_path / "some" / name).write_text(content)
    run_stage("synthesize", "--num_stories=60", "--data_dir=some")
    run_stage("synthesize", "--num_stories=20", "--data_dir=some")
    assert {name for name in os.listdir("some") if name.endswith(".json")} == {
        "synthetic00.json",
        *others,
    }
