import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

import tinystories
from runtime.atomic_files import run_lock
from tests.helpers import VOCAB_SIZE, write_tinystories_shard
from tests.processes import ROOT
from textdata import corpus, download
from textdata import pretokenize as pretokenize_module
from textdata.token_shards import read_meta
from textdata.tokenizer import load_tokenizer
from tinystories import ARCHIVE, STORIES, main

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


@pytest.fixture
def stage(monkeypatch, tmp_path, capsys):
    """stage("pretokenize", ...) is the command in this process, from tmp_path, with one worker;
    returns what it printed. Its mistakes are raised."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *args) -> str:
        one_worker = ["--num_workers=1"] if name == "pretokenize" else []
        monkeypatch.setattr("sys.argv", ["tinystories.py", name, *one_worker, *map(str, args)])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def texts(tmp_path, stories):
    """Three files of stories in a folder: a.txt, b.json and c.jsonl."""
    folder = tmp_path / "texts"
    write_tinystories_shard(folder / "b.json", stories[100:200])
    (folder / "a.txt").write_text(
        "\n\n\n".join(story.replace("\n\n", "\n") for story in stories[:100])
    )
    (folder / "c.jsonl").write_text(
        "".join(json.dumps({"text": story}) + "\n" for story in stories[200:])
    )
    return folder


@pytest.fixture
def own(texts, tokenizer_path):
    """The options that make tokens in tok512 of the folder out from these files."""
    return (
        f"--input={texts}",
        "--data_dir=out",
        f"--tokenizer={tokenizer_path}",
        f"--vocab_size={VOCAB_SIZE}",
    )


def tokens_of(folder) -> list[np.ndarray]:
    """The tokens of every shard, which must be exactly the files that meta.json names."""
    meta = read_meta(str(folder))
    assert {shard["file"] for shard in meta["shards"]} == {
        name for name in os.listdir(folder) if name.endswith(".bin")
    }
    shards = [
        np.fromfile(os.path.join(folder, shard["file"]), meta["dtype"]) for shard in meta["shards"]
    ]
    assert [len(tokens) for tokens in shards] == [shard["tokens"] for shard in meta["shards"]]
    return shards


def documents_of(tokens: np.ndarray, tokenizer) -> list[str]:
    begins = np.flatnonzero(tokens == tokenizer.bos_id).tolist()
    assert begins[:1] == [0]
    ends = [*begins[1:], len(tokens)]
    return [
        tokenizer.decode(tokens[begin:end].tolist())
        for begin, end in zip(begins, ends, strict=True)
    ]


def content_of(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def versions_of(folder) -> dict[str, int]:
    """Which file is behind each shard's name: a shard written anew is another."""
    return {
        name: (folder / name).stat().st_ino
        for name in sorted(os.listdir(folder))
        if name.endswith(".bin")
    }


def lines_of(result) -> list[str]:
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()


# download


def packed(members: dict[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return archive.getvalue()


@pytest.fixture
def story_shards(stories) -> dict[str, bytes]:
    """Three shards as TinyStories has them."""
    return {
        f"data{number:02d}.json": json.dumps(
            [{"story": story} for story in stories[number::3]]
        ).encode()
        for number in range(3)
    }


def test_download_unpacks_the_archive_and_then_leaves_it_alone(
    run_script, stage, server, story_shards, tmp_path
):
    server.content[ARCHIVE], server.statuses, server.cuts = packed(story_shards), [503], [100]
    options = "--data_dir=data", f"--url={server.url(ARCHIVE)}"
    result = run_script("tinystories.py", "download", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert content_of(tmp_path / "data" / STORIES) == story_shards
    assert sorted(os.listdir("data")) == [".lock", STORIES, ARCHIVE]
    asked = len(server.requests)
    assert asked == 3 and "is there already" in stage("download", *options)
    shutil.rmtree(tmp_path / "data" / STORIES)
    stage("download", *options)
    assert len(server.requests) == asked and content_of(tmp_path / "data" / STORIES) == story_shards


def test_a_download_that_fails_says_what_to_do_instead(run_script, server, tmp_path):
    url = server.url(ARCHIVE)
    result = run_script(
        "tinystories.py", "download", "--data_dir=data", f"--url={url}", cwd=tmp_path
    )
    (line,) = lines_of(result)
    assert result.returncode == 1
    assert (
        line.startswith(f"tinystories.py: cannot download {url} (404 ")
        and "tinystories.py synthesize" in line
    )
    assert os.listdir(tmp_path / "data") == [".lock"]


def test_a_download_that_is_given_up_keeps_what_it_has(stage, server, story_shards, monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0)
    server.content[ARCHIVE], server.statuses = packed(story_shards), [503] * 5
    with pytest.raises(
        ValueError, match=rf"cannot download {server.url(ARCHIVE)} .* after 5 attempts"
    ):
        stage("download", f"--url={server.url(ARCHIVE)}")
    assert STORIES not in os.listdir("data") and ARCHIVE not in os.listdir("data")
    stage("download", f"--url={server.url(ARCHIVE)}")
    assert sorted(os.listdir(f"data/{STORIES}")) == sorted(story_shards)


@pytest.mark.parametrize("damage", ["cut", "flipped", "not an archive", "evil"])
def test_an_archive_that_does_not_unpack_leaves_no_stories(
    stage, server, story_shards, tmp_path, damage
):
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
        stage("download", f"--url={server.url(ARCHIVE)}")
    assert sorted(os.listdir("data")) == [".lock", ARCHIVE]
    assert not (tmp_path / "evil.json").exists()


# synthesize


def test_synthesized_stories_are_the_same_for_the_same_seed(run_script, stage, tmp_path):
    result = run_script(
        "tinystories.py", "synthesize", "--num_stories=200", "--data_dir=one", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "next: python tinystories.py pretokenize --input=one" in result.stdout
    stage("synthesize", "--num_stories=200", "--data_dir=two")
    stage("synthesize", "--num_stories=200", "--data_dir=three", "--seed=1")
    one, two, three = (content_of(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two and set(one) == set(three) and one != three


def test_synthesized_stories_are_marked_synthetic(stage, tmp_path):
    stage("synthesize", "--num_stories=50")
    records = json.loads((tmp_path / "data" / "synthetic" / "synthetic00.json").read_text())
    assert len(records) == 50
    assert all(
        set(record) == {"story", "source"} and "synthetic" in record["source"] for record in records
    )


def test_every_shard_of_synthesized_stories_is_other(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(tinystories, "STORIES_PER_SHARD", 100)
    stage("synthesize", "--num_stories=250", "--data_dir=some")
    shards = [
        json.loads((tmp_path / "some" / f"synthetic{n:02d}.json").read_text()) for n in range(3)
    ]
    assert [len(shard) for shard in shards] == [100, 100, 50]
    assert len({record["story"] for shard in shards for record in shard}) == 250


def test_fewer_synthesized_stories_than_before_leave_none_of_the_old(stage, tmp_path, monkeypatch):
    """Else a small run after a large one is pretokenized as the large one."""
    monkeypatch.setattr(tinystories, "STORIES_PER_SHARD", 100)
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "mine.json").write_text("[]")
    stage("synthesize", "--num_stories=250", "--data_dir=some")
    stage("synthesize", "--num_stories=100", "--data_dir=some")
    assert {name for name in os.listdir("some") if name.endswith(".json")} == {
        "synthetic00.json",
        "mine.json",
    }


# train_vocab


def test_a_vocabulary_is_learned_from_one_s_own_text(stage, texts, tmp_path):
    out = stage("train_vocab", f"--input={texts}", "--data_dir=out", "--vocab_size=400")
    assert "tok400.model" in out
    tokenizer = load_tokenizer("out/tok400.model")
    assert tokenizer.vocab_size == 400
    assert (tmp_path / "out" / "tok400.bin").read_bytes() == tokenizer.to_bin()


def test_a_vocabulary_learns_from_the_beginning_of_every_file(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(tinystories, "VOCAB_CHARACTERS", 4000)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("\n\n".join(["alpha"] * 1000 + ["omega"] * 100_000))
    (tmp_path / "in" / "b.txt").write_text("\n\n".join(["beta"] * 1000))
    stage("train_vocab", "--input=in", "--data_dir=out", "--vocab_size=270")
    processor = load_tokenizer("out/tok270.model").processor
    characters = {processor.id_to_piece(token) for token in range(259, 270)}
    assert {"p", "b"} <= characters and "g" not in characters


def test_a_small_text_gets_a_clear_message_unattended(run_script, tmp_path):
    """llama2.c prints Done, and older versions of SentencePiece ask on standard input."""
    (tmp_path / "small.txt").write_text(
        "Once upon a time there was a baby llama. It ate grass. " * 180
    )  # 10 KB
    result = run_script("tinystories.py", "pretokenize", "--input=small.txt", cwd=tmp_path)
    (line,) = (line for line in lines_of(result) if line.startswith("tinystories.py: "))
    assert result.returncode == 1
    assert re.search(
        r"--vocab_size=4096: the text is too short .* the largest that works is --vocab_size=\d+$",
        line,
    )
    assert (
        "next:" not in result.stdout
        and not (tmp_path / "data" / "small" / "tok4096.model").exists()
    )


# pretokenize


def test_one_s_own_text_is_trained_on_with_the_commands_that_are_printed(
    run_script, tmp_path, stories
):
    (tmp_path / "my.book.txt").write_text("\n\n".join(stories), encoding="utf-8")
    options = "--input=my.book.txt", f"--vocab_size={VOCAB_SIZE}"
    result = run_script("tinystories.py", "pretokenize", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "data" / "my.book" / "tok512" / "meta.json").exists()
    command = shlex.split(result.stdout.splitlines()[-1])
    assert command[:3] == ["next:", "python", "train.py"]
    result = run_script("train.py", *command[3:], *SMALL_MODEL, *SHORT_RUN, cwd=tmp_path)
    assert result.returncode == 0 and "step 2: " in result.stdout, result.stderr


def test_the_shards_hold_the_documents_each_behind_its_bos(stage, own, texts, tokenizer, stories):
    stage("pretokenize", *own)
    first, second, third = tokens_of("out/tok512")
    assert documents_of(first, tokenizer) == [
        story.replace("\n\n", "\n") for story in stories[:100]
    ]
    assert documents_of(second, tokenizer) == stories[100:200]
    assert documents_of(third, tokenizer) == stories[200:]


def test_meta_says_what_the_tokens_are(stage, own, tokenizer):
    stage("pretokenize", *own)
    meta, shards = read_meta("out/tok512"), tokens_of("out/tok512")
    assert (meta["vocab_source"], meta["vocab_size"], meta["dtype"]) == (
        "custom",
        VOCAB_SIZE,
        "<u2",
    )
    assert (
        meta["tokenizer_hash"]
        == load_tokenizer("out/tok512/tokenizer.model").hash
        == tokenizer.hash
    )
    assert sum(meta["tokens"].values()) == sum(map(len, shards))
    assert [shard["file"] for shard in meta["shards"]] == ["00000.bin", "00001.bin", "00002.bin"]


@pytest.mark.parametrize("characters", [1, 300, 2**20])
def test_how_much_is_tokenized_at_a_time_makes_no_difference(
    stage, own, tmp_path, monkeypatch, characters
):
    stage("pretokenize", *own)
    expected = [tokens.tolist() for tokens in tokens_of("out/tok512")]
    shutil.rmtree("out")
    monkeypatch.setattr(pretokenize_module, "BATCH_CHARACTERS", characters)
    stage("pretokenize", *own)
    assert [tokens.tolist() for tokens in tokens_of("out/tok512")] == expected


def test_a_document_cut_for_its_length_has_one_bos_and_the_same_tokens(
    stage, tmp_path, monkeypatch, tokenizer_path
):
    tokenizer = load_tokenizer(tokenizer_path)
    long = " ".join(["Tom saw a big red ball and was happy."] * 100)
    (tmp_path / "long.txt").write_text(f"{long}\n\nThe end.")
    monkeypatch.setattr(corpus, "BLOCK", 100)
    monkeypatch.setattr(corpus, "LONGEST_PIECE", 500)
    stage(
        "pretokenize",
        "--input=long.txt",
        f"--tokenizer={tokenizer_path}",
        f"--vocab_size={VOCAB_SIZE}",
    )
    (tokens,) = tokens_of("data/long/tok512")
    assert tokens.tolist() == tokenizer.encode(long, bos=True) + tokenizer.encode(
        "The end.", bos=True
    )


def test_every_file_keeps_its_end_for_validation_from_a_document_on(stage, own):
    stage("pretokenize", *own, "--val_fraction=0.2")
    meta = read_meta("out/tok512")
    for shard, tokens in zip(meta["shards"], tokens_of("out/tok512"), strict=True):
        cut = shard["val"][0]
        assert shard["train"] == [0, cut] and shard["val"] == [cut, len(tokens)]
        assert tokens[cut] == 1 and 0.7 < cut / len(tokens) < 0.85


def test_the_first_shard_of_tinystories_validates(stage, story_shards, tmp_path, tokenizer_path):
    (tmp_path / "data" / STORIES).mkdir(parents=True)
    for name, content in story_shards.items():
        (tmp_path / "data" / STORIES / name).write_bytes(content)
    stage("pretokenize", f"--tokenizer={tokenizer_path}", f"--vocab_size={VOCAB_SIZE}")
    first, *others = read_meta("data/tok512")["shards"]
    assert first["job"]["source"].endswith("data00.json")
    assert first["train"] == [0, 0] and first["val"] == [0, first["tokens"]]
    assert len(others) == 2 and all(shard["train"] == [0, shard["tokens"]] for shard in others)


def test_a_single_shard_of_tinystories_trains_and_validates(
    stage, story_shards, tmp_path, tokenizer_path
):
    (tmp_path / "data" / STORIES).mkdir(parents=True)
    (tmp_path / "data" / STORIES / "data00.json").write_bytes(story_shards["data00.json"])
    stage("pretokenize", f"--tokenizer={tokenizer_path}", f"--vocab_size={VOCAB_SIZE}")
    (shard,) = read_meta("data/tok512")["shards"]
    assert 0 < shard["val"][0] < shard["tokens"]
    assert 0.9 < shard["val"][0] / shard["tokens"] < 1


def test_a_separator_of_one_s_own_may_be_a_line_break(stage, tmp_path, tokenizer, tokenizer_path):
    (tmp_path / "lines.txt").write_text("One.\nTwo.\n\nThree.\n")
    options = "--input=lines.txt", f"--tokenizer={tokenizer_path}", f"--vocab_size={VOCAB_SIZE}"
    stage("pretokenize", *options, r"--separator=\n")
    (tokens,) = tokens_of("data/lines/tok512")
    assert documents_of(tokens, tokenizer) == ["One.", "Two.", "Three."]
    stage("pretokenize", *options)
    (tokens,) = tokens_of("data/lines/tok512")
    assert documents_of(tokens, tokenizer) == ["One.\nTwo.", "Three."]


def test_llama_2_s_vocabulary_has_a_folder_of_its_own(run_script, tmp_path, texts, tokenizer_path):
    source = "--vocab_source=llama2"
    options = source, f"--tokenizer={tokenizer_path}", f"--input={texts}", "--num_workers=1"
    result = run_script("tinystories.py", "pretokenize", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    meta = read_meta(str(tmp_path / "data" / "texts" / "llama2"))
    assert (meta["vocab_source"], meta["vocab_size"]) == ("llama2", VOCAB_SIZE)
    assert (
        f"--data_dir=data/texts {source} --vocab_size={VOCAB_SIZE}"
        in result.stdout.splitlines()[-1]
    )


def test_the_real_llama_2_vocabulary_gives_sentencepiece_s_tokens(stage, shared, tmp_path, stories):
    path = shared("models/llama2_tokenizer.model")
    write_tinystories_shard(tmp_path / "some.json", stories[:20])
    stage("pretokenize", "--vocab_source=llama2", f"--tokenizer={path}", "--input=some.json")
    (tokens,) = tokens_of("data/some/llama2")
    encoded = sentencepiece.SentencePieceProcessor(model_file=path).encode(
        stories[:20], add_bos=True
    )
    assert tokens.tolist() == list(itertools.chain(*encoded))


def test_real_tinystories_are_told_in_full(stage, shared, tmp_path, tokenizer_path, tokenizer):
    source = shared("data/TinyStories_all_data/data00.json")
    with open(source, encoding="utf-8") as file:
        told = [record["story"].strip() for record in json.load(file)]
    stage(
        "pretokenize",
        f"--input={source}",
        f"--tokenizer={tokenizer_path}",
        f"--vocab_size={VOCAB_SIZE}",
    )
    (tokens,) = tokens_of("data/data00/tok512")
    assert documents_of(tokens, tokenizer) == told


def test_ids_of_a_vocabulary_above_65536_take_four_bytes(stage, tmp_path, tokenizer):
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.content)
    for number in range(len(model.pieces), 70_000):
        model.pieces.add(piece="zq" if number == 69_999 else f"<{number}>", score=-float(number))
    (tmp_path / "large.model").write_bytes(model.SerializeToString())
    (tmp_path / "in.txt").write_text("a zq\n\nand zq zq")
    stage("pretokenize", "--input=in.txt", "--tokenizer=large.model", "--vocab_size=70000")
    (tokens,) = tokens_of("data/in/tok70000")
    assert (
        read_meta("data/in/tok70000")["dtype"] == "<u4"
        and os.path.getsize("data/in/tok70000/00000.bin") % 4 == 0
    )
    assert (tokens == 69_999).sum() == 3
    assert documents_of(tokens, load_tokenizer("large.model")) == ["a zq", "and zq zq"]


def test_a_vocabulary_of_another_size_is_refused_with_the_right_one(stage, texts, tokenizer_path):
    with pytest.raises(
        ValueError, match="has 512 tokens, not --vocab_size=4096; give --vocab_size=512"
    ):
        stage("pretokenize", f"--input={texts}", f"--tokenizer={tokenizer_path}")


def test_a_vocabulary_that_is_there_is_taken(stage, texts):
    stage("train_vocab", f"--input={texts}", "--data_dir=out", "--vocab_size=400")
    version = os.stat("out/tok400.model").st_ino
    stage("pretokenize", f"--input={texts}", "--data_dir=out", "--vocab_size=400")
    assert os.stat("out/tok400.model").st_ino == version


# pretokenize again


def test_what_is_done_is_not_done_again(stage, own, tmp_path):
    folder = tmp_path / "out" / "tok512"
    assert "unchanged" not in stage("pretokenize", *own)
    before, versions = content_of(folder), versions_of(folder)
    assert "3 of 3 file(s) unchanged" in stage("pretokenize", *own)
    assert content_of(folder) == before and versions_of(folder) == versions


def test_a_file_that_changed_is_done_again_and_no_other(stage, own, texts, tmp_path, tokenizer):
    folder = tmp_path / "out" / "tok512"
    stage("pretokenize", *own)
    versions = versions_of(folder)
    write_tinystories_shard(texts / "b.json", ["A new story.", "And another."])
    assert "2 of 3 file(s) unchanged" in stage("pretokenize", *own)
    assert documents_of(tokens_of(folder)[1], tokenizer) == ["A new story.", "And another."]
    changed = {name for name, version in versions_of(folder).items() if version != versions[name]}
    assert changed == {"00001.bin"}


@pytest.mark.parametrize(
    "change",
    [
        lambda texts: (texts / "a.txt").unlink(),
        lambda texts: (texts / "a0.txt").write_text("A file between others."),
        lambda texts: (texts / "c.jsonl").rename(texts / "0.jsonl"),
        lambda texts: (texts / "b.json").write_text("[]"),
    ],
    ids=["one removed", "one added", "one renamed", "one emptied"],
)
def test_a_folder_brought_up_to_date_equals_a_fresh_one(stage, own, texts, tmp_path, change):
    stage("pretokenize", *own)
    change(texts)
    stage("pretokenize", *own)
    updated = content_of(tmp_path / "out" / "tok512")
    shutil.rmtree("out")
    stage("pretokenize", *own)
    assert updated == content_of(tmp_path / "out" / "tok512")


@pytest.mark.parametrize("option", ["--val_fraction=0.3", "--separator=.", "--tokenizer"])
def test_other_options_do_everything_again(stage, own, option, stories, tmp_path):
    stage("pretokenize", *own)
    if option == "--tokenizer":
        write_tinystories_shard(tmp_path / "other" / "a.json", stories[:150])
        stage("train_vocab", "--input=other", "--data_dir=other", f"--vocab_size={VOCAB_SIZE}")
        option = "--tokenizer=other/tok512.model"
    assert "unchanged" not in stage("pretokenize", *own, option)
    updated = content_of(tmp_path / "out" / "tok512")
    shutil.rmtree("out")
    stage("pretokenize", *own, option)
    assert updated == content_of(tmp_path / "out" / "tok512")


def test_a_damaged_shard_is_done_again(stage, own, tmp_path):
    folder = tmp_path / "out" / "tok512"
    stage("pretokenize", *own)
    before = content_of(folder)
    os.truncate(folder / "00001.bin", 100)
    (folder / "00002.bin").unlink()
    (folder / "00000.bin.123.partial").write_text("of an interrupted run")
    assert "1 of 3 file(s) unchanged" in stage("pretokenize", *own)
    assert content_of(folder) == before


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"dtype": "<u2", "shards": [{}]}', '{"dtype": 5, "shards": []}']
)
def test_a_damaged_meta_does_everything_again(stage, own, tmp_path, content):
    folder = tmp_path / "out" / "tok512"
    stage("pretokenize", *own)
    before = content_of(folder)
    (folder / "meta.json").write_text(content)
    assert "unchanged" not in stage("pretokenize", *own)
    assert content_of(folder) == before


def test_workers_make_no_difference_to_any_byte(run_script, stage, own, tmp_path):
    result = run_script("tinystories.py", "pretokenize", *own, "--num_workers=2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    parallel = content_of(tmp_path / "out" / "tok512")
    shutil.rmtree(tmp_path / "out")
    stage("pretokenize", *own)
    assert parallel == content_of(tmp_path / "out" / "tok512")


def test_more_workers_than_files_make_no_difference_either(stage, own, texts, tmp_path):
    for name in ("a.txt", "c.jsonl"):
        (texts / name).unlink()
    stage("pretokenize", *own)
    alone = content_of(tmp_path / "out" / "tok512")
    shutil.rmtree(tmp_path / "out")
    stage("pretokenize", *own, "--num_workers=8")
    assert alone == content_of(tmp_path / "out" / "tok512")


# what goes wrong


def test_a_failing_worker_ends_the_run_with_the_file_and_training_refuses_the_folder(
    run_script, stage, own, texts, tmp_path
):
    """llama2.c goes on without the shard, and training hangs (karpathy/llama2.c #311, #296)."""
    whole = (texts / "b.json").read_text()
    (texts / "b.json").write_text(whole[: len(whole) // 2])
    result = run_script("tinystories.py", "pretokenize", *own, "--num_workers=2", cwd=tmp_path)
    (line,) = (line for line in lines_of(result) if line.startswith("tinystories.py: "))
    assert result.returncode == 1 and "next:" not in result.stdout
    assert re.search(r"texts/b\.json: record \d+ is not whole JSON", line)
    result = run_script("train.py", "--data_dir=out", f"--vocab_size={VOCAB_SIZE}", cwd=tmp_path)
    (line,) = lines_of(result)
    assert (
        result.returncode == 1
        and "tok512: pretokenizing has not finished; run python tinystories.py" in line
    )
    with pytest.raises(ValueError, match=r"texts/b\.json: record \d+ is not whole JSON"):
        stage("pretokenize", *own)  # in one process
    (texts / "b.json").write_text(whole)
    stage("pretokenize", *own)
    assert len(tokens_of(tmp_path / "out" / "tok512")) == 3


SIGNAL_WHERE_A_FILE_IS_OPENED = """
import os, signal, sys
def hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith("b.json"):
        os.kill(os.getpid(), signal.{signal})
sys.addaudithook(hook)
"""


@pytest.mark.parametrize(
    "signal, num_workers, status, sentence",
    [
        ("SIGKILL", 2, 1, "a worker was killed (out of memory?); try fewer with --num_workers=1"),
        ("SIGINT", 1, 130, "interrupted"),
    ],
)
def test_a_run_that_is_killed_or_interrupted_fails_and_can_go_on(
    run_script, stage, own, tmp_path, signal, num_workers, status, sentence
):
    """The signal comes when the second of three files is opened: in a worker, or in the only process."""
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(SIGNAL_WHERE_A_FILE_IS_OPENED.format(signal=signal))
    options = *own, f"--num_workers={num_workers}"
    result = run_script(
        "tinystories.py", "pretokenize", *options, cwd=tmp_path, env={"PYTHONPATH": str(hooks)}
    )
    assert result.returncode == status
    assert f"tinystories.py: {sentence}" in lines_of(result)
    folder = tmp_path / "out" / "tok512"
    assert "00001.bin" not in os.listdir(folder)
    with pytest.raises(ValueError, match="pretokenizing has not finished"):
        read_meta(str(folder))
    stage("pretokenize", *own)
    assert len(tokens_of(folder)) == 3 and not [
        name for name in os.listdir(folder) if name.endswith(".partial")
    ]


def test_an_interrupted_run_keeps_the_files_it_has_done(stage, own, monkeypatch):
    def interrupted(job, *args):
        if job["source"].endswith("c.jsonl"):
            raise KeyboardInterrupt
        return tokenize_file(job, *args)

    tokenize_file = pretokenize_module.tokenize_file
    monkeypatch.setattr(pretokenize_module, "tokenize_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage("pretokenize", *own)
    monkeypatch.setattr(pretokenize_module, "tokenize_file", tokenize_file)
    assert "2 of 3 file(s) unchanged" in stage("pretokenize", *own)


def test_while_one_run_writes_another_is_refused(stage, own):
    with run_lock("out"), pytest.raises(ValueError, match="out: another process is writing here"):
        stage("pretokenize", *own)
    stage("pretokenize", *own)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (
            [],
            r"data/TinyStories_all_data is not there: run python tinystories\.py download, or synthesize",
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
def test_what_cannot_be_read_is_told_with_its_name(stage, tmp_path, arguments, reason):
    (tmp_path / "empty").mkdir()
    (tmp_path / "book.pdf").write_bytes(b"%PDF-1.7")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=reason):
        stage("pretokenize", *arguments)


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (
            ["pretoken"],
            ": pretoken: the stage must come first and be one of download, synthesize, train_vocab, pretok",
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


def test_processes_of_torchrun_divide_the_files_and_leave_the_same_tokens(
    tmp_path, stories, tokenizer_path
):
    texts = tmp_path / "stories"
    for number in range(5):
        write_tinystories_shard(texts / f"data{number:02d}.json", stories[number::5])
    script = [
        str(ROOT / "tinystories.py"),
        "pretokenize",
        f"--input={texts}",
        f"--tokenizer={tokenizer_path}",
    ]
    script += [f"--vocab_size={VOCAB_SIZE}", "--num_workers=1"]
    found = []
    for name, start in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]),
    ):
        command = [sys.executable, *start, *script, f"--data_dir={tmp_path / name}"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0 and result.stdout.count("5 shard(s)") == 1, result.stderr
        folder = tmp_path / name / f"tok{VOCAB_SIZE}"
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(found[0]) == 5 + len(["meta.json", "tokenizer.model", ".lock"])
    assert found[0] == found[1]
