import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import tinystories
from tests.processes import ROOT
from tests.textdata.helpers import (
    VOCAB_SIZE,
    decode_documents,
    error_lines,
    fill_to_pack_size,
    read_folder,
    read_shards,
    run_stage,
    tinystories_shards,
    write_stories,
)
from textdata import download
from textdata.tokenizer import load_tokenizer
from tinystories import ARCHIVE, DATASET, main

SMALL_MODEL = (
    "--dim=32",
    "--n_layers=1",
    "--n_heads=2",
    "--batch_size=2",
    "--max_seq_len=32",
    "--device=cpu",
)
SHORT_RUN = (
    "--max_iters=2",
    "--eval_iters=2",
    "--gradient_accumulation_steps=1",
    "--compile=False",
)


@pytest.fixture(autouse=True)
def work_in_tmp_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def story_shards(stories) -> dict[str, bytes]:
    return tinystories_shards(stories)


def packed(members: dict[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return archive.getvalue()


def test_download_unpacks_the_archive_once(run_script, server, story_shards, tmp_path):
    server.content[ARCHIVE] = packed(story_shards)
    server.statuses = [503]
    server.cuts = [100]
    options = "--data_dir=data", f"--url={server.url(ARCHIVE)}"
    result = run_script("tinystories.py", "download", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert read_folder(tmp_path / "data" / DATASET) == story_shards
    assert sorted(os.listdir("data")) == [".lock", DATASET, ARCHIVE]
    asked = len(server.requests)
    assert asked == 3 and "exists already" in run_stage("download", *options)
    shutil.rmtree(tmp_path / "data" / DATASET)
    run_stage("download", *options)
    assert (
        len(server.requests) == asked and read_folder(tmp_path / "data" / DATASET) == story_shards
    )


def test_a_failed_download_names_the_alternative(run_script, server, tmp_path):
    url = server.url(ARCHIVE)
    result = run_script(
        "tinystories.py", "download", "--data_dir=data", f"--url={url}", cwd=tmp_path
    )
    (line,) = error_lines(result)
    assert result.returncode == 1
    assert (
        line.startswith(f"tinystories.py: cannot download {url} (404 ")
        and "tinystories.py synthesize" in line
    )
    assert os.listdir(tmp_path / "data") == [".lock"]


def test_a_download_that_gave_up_can_be_resumed(server, story_shards, monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0)
    server.content[ARCHIVE] = packed(story_shards)
    server.statuses = [503] * 5
    with pytest.raises(
        ValueError, match=rf"cannot download {server.url(ARCHIVE)} .* after 5 attempts"
    ):
        run_stage("download", f"--url={server.url(ARCHIVE)}")
    assert DATASET not in os.listdir("data") and ARCHIVE not in os.listdir("data")
    run_stage("download", f"--url={server.url(ARCHIVE)}")
    assert sorted(os.listdir(f"data/{DATASET}")) == sorted(story_shards)


@pytest.mark.parametrize("damage", ["cut", "flipped", "not an archive", "evil"])
def test_a_damaged_archive_leaves_no_folder(server, story_shards, tmp_path, damage):
    content = packed(story_shards)
    server.content[ARCHIVE] = {
        "cut": content[:-20],
        "flipped": content[:-7] + bytes([content[-7] ^ 1]) + content[-6:],  # in the checksum
        "not an archive": b"<html>Please log in</html>",
        "evil": packed(story_shards | {"../evil.json": b"[]"}),
    }[damage]
    with pytest.raises(
        ValueError, match=rf"{ARCHIVE} does not unpack \(.+\); delete it and download again"
    ):
        run_stage("download", f"--url={server.url(ARCHIVE)}")
    assert sorted(os.listdir("data")) == [".lock", ARCHIVE]
    assert not (tmp_path / "evil.json").exists()


def test_synthesized_stories_are_the_same_for_the_same_seed(run_script, tmp_path):
    result = run_script(
        "tinystories.py", "synthesize", "--num_stories=200", "--data_dir=one", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "next: python tinystories.py pretokenize --input=one" in result.stdout
    run_stage("synthesize", "--num_stories=200", "--data_dir=two")
    run_stage("synthesize", "--num_stories=200", "--data_dir=three", "--seed=1")
    one, two, three = (read_folder(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two and set(one) == set(three) and one != three


def test_synthesized_stories_are_marked_synthetic(tmp_path):
    run_stage("synthesize", "--num_stories=50")
    records = json.loads((tmp_path / "data" / "synthetic" / "synthetic00.json").read_text())
    assert len(records) == 50
    assert all(
        set(record) == {"story", "source"} and "synthetic" in record["source"] for record in records
    )


def test_every_synthetic_shard_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(tinystories, "STORIES_PER_SHARD", 100)
    run_stage("synthesize", "--num_stories=250", "--data_dir=some")
    shards = [
        json.loads((tmp_path / "some" / f"synthetic{n:02d}.json").read_text()) for n in range(3)
    ]
    assert [len(shard) for shard in shards] == [100, 100, 50]
    assert len({record["story"] for shard in shards for record in shard}) == 250


def test_a_smaller_set_removes_the_shards_of_a_larger_one(tmp_path, monkeypatch):
    """Else a small run after a large one is pretokenized as the large one."""
    monkeypatch.setattr(tinystories, "STORIES_PER_SHARD", 100)
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "other.json").write_text("[]")
    run_stage("synthesize", "--num_stories=250", "--data_dir=some")
    run_stage("synthesize", "--num_stories=100", "--data_dir=some")
    assert {name for name in os.listdir("some") if name.endswith(".json")} == {
        "synthetic00.json",
        "other.json",
    }


def test_the_printed_command_trains_on_the_tokens(run_script, tmp_path, stories):
    (tmp_path / "my.book.txt").write_text("\n\n".join(stories), encoding="utf-8")
    options = "--input=my.book.txt", f"--vocab_size={VOCAB_SIZE}"
    result = run_script("tinystories.py", "pretokenize", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "data" / "my.book" / "tok512" / "meta.json").exists()
    command = shlex.split(result.stdout.splitlines()[-1])
    assert command[:3] == ["next:", "python", "train.py"]
    result = run_script("train.py", *command[3:], *SMALL_MODEL, *SHORT_RUN, cwd=tmp_path)
    assert result.returncode == 0 and "step 2: " in result.stdout, result.stderr


@pytest.mark.parametrize("name", ["A.TXT.GZ", "A.txt.Gz", "A.txt.gz", "A.TXT", "A.json"])
def test_the_data_folder_has_the_name_without_suffixes(name):
    """A.TXT.GZ was tokenized to data/A.TXT."""
    Path(name).write_bytes(b"")
    assert tinystories.default_data_dir(name) == os.path.join("data", "A")


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (
            [],
            r"data/TinyStories_all_data does not exist: run python tinystories\.py download",
        ),
        (["--input=missing.txt"], r"missing\.txt: there is no such file or folder"),
        (["--input=book.pdf"], r"book\.pdf: give a file that ends in \.txt, \.json, \.jsonl"),
        (["--input=empty"], r"empty: no file here ends in \.txt, \.json, \.jsonl"),
        (["--input=blank.txt"], r"--vocab_size=4096: there is no text to learn from"),
        (["--input=latin.txt"], r"latin\.txt: not UTF-8 text"),
        (
            ["--input=blank.txt", "--tokenizer=book.pdf"],
            r"book\.pdf: neither a SentencePiece model",
        ),
    ],
)
def test_unreadable_input_is_refused_with_its_name(tmp_path, arguments, reason):
    (tmp_path / "empty").mkdir()
    (tmp_path / "book.pdf").write_bytes(b"%PDF-1.7")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=reason):
        run_stage("pretokenize", *arguments)


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (
            ["pretoken"],
            ": pretoken: the stage must come first and be one of download, synthesize, train_vocab",
        ),
        (["--num_workers=2", "pretokenize"], ": --num_workers=2: the stage must come first"),
        (["synthesize", "--num_stories=0"], " synthesize: --num_stories=0: must be at least 1"),
        (
            ["train_vocab", "--vocab_size=259"],
            " train_vocab: --vocab_size=259: must be at least 260",
        ),
        (
            ["pretokenize", "--val_fraction=0"],
            " pretokenize: --val_fraction=0.0: must be above 0 and below 1",
        ),
        (
            ["pretokenize", "--val_fraction=1"],
            " pretokenize: --val_fraction=1.0: must be above 0 and below 1",
        ),
        (["pretokenize", "--num_workers=-1"], " pretokenize: --num_workers=-1: must be 0 or more"),
        (
            ["pretokenize", "--vocab_source=llama2"],
            " pretokenize: --vocab_source=llama2: say where Llama 2's",
        ),
    ],
)
def test_a_wrong_option_is_refused_with_status_2(monkeypatch, capsys, arguments, problem):
    monkeypatch.setattr("sys.argv", ["tinystories.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith(f"tinystories.py{problem}")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_the_stages(monkeypatch, capsys, arguments):
    monkeypatch.setattr("sys.argv", ["tinystories.py", *arguments])
    main()
    out = capsys.readouterr().out
    assert all(f"python tinystories.py {stage}" in out for stage in tinystories.STAGES)


@pytest.mark.slow
def test_torchrun_processes_write_the_same_tokens(tmp_path, stories, tokenizer_path):
    text_folder = tmp_path / "stories"
    for number in range(5):
        write_stories(text_folder / f"data{number:02d}.json", stories[number::5])
    fill_to_pack_size(text_folder)
    script = [
        str(ROOT / "tinystories.py"),
        "pretokenize",
        f"--input={text_folder}",
        f"--tokenizer={tokenizer_path}",
    ]
    script += [f"--vocab_size={VOCAB_SIZE}", "--num_workers=1"]
    folders = []
    for name, start in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]),
    ):
        command = [sys.executable, *start, *script, f"--data_dir={tmp_path / name}"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0 and result.stdout.count("5 shard(s)") == 1, result.stderr
        folder = tmp_path / name / f"tok{VOCAB_SIZE}"
        folders.append(read_folder(folder))
    assert len(folders[0]) == 2 * 5 + len(["meta.json", "tokenizer.model", ".lock"])
    assert folders[0] == folders[1]


def test_text_field_reaches_vocabulary_and_tokens(tmp_path, monkeypatch, tokenizer):
    """A title under "story" won over the text, and no option could name the field."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"story": "Title", "text": "Body one two three"}\n' * 300)
    options = ("--input=a.jsonl", "--data_dir=out", "--vocab_size=272")
    with pytest.raises(ValueError, match=r"a\.jsonl: record 1 has text under 'text' and under"):
        run_stage("pretokenize", *options)
    output = run_stage("pretokenize", *options, "--text_field=text")
    assert "read 300 document(s) in 1 file(s)" in output
    (tokens,) = read_shards("out/tok272")
    vocabulary = load_tokenizer("out/tok272/tokenizer.model")
    assert decode_documents(tokens, vocabulary) == ["Body one two three"] * 300
    output = run_stage("pretokenize", *options, "--text_field=story")
    assert "unchanged" not in output
    (tokens,) = read_shards("out/tok272")
    assert decode_documents(tokens, vocabulary) == ["Title"] * 300


def test_tokens_in_the_input_folder_are_no_text(tmp_path, monkeypatch):
    """part1.json and meta.json were read as text when data_dir was the input folder."""
    monkeypatch.chdir(tmp_path)
    run_stage("synthesize", "--num_stories=300", "--data_dir=data/in")
    options = ("--input=data/in", "--data_dir=data/in", "--vocab_size=320")
    run_stage("pretokenize", *options)
    Path("data/in/tok320/part1.json").write_text('{"dtype": "<u2", "shards": []}')
    Path("data/in/metrics.jsonl").write_text('{"iter": 1, "loss": 5.0}\n')
    output = run_stage("pretokenize", *options)
    assert "1 of 1 shard(s) unchanged" in output and "read 300 document(s) in 1 file(s)" in output
    reason = r'left out \d \(no record with a field "text" or "story"\): .*metrics\.jsonl'
    assert re.search(reason, output)
