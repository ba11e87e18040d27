import itertools
import json
import os
import shutil

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

import tinystories
from runtime.distributed import DistContext
from tests.textdata.helpers import (
    VOCAB_SIZE,
    decode_documents,
    fill_to_pack_size,
    read_folder,
    read_shards,
    run_stage,
    tinystories_shards,
    write_stories,
)
from textdata import corpus, shard_jobs, text_files
from textdata import pretokenize as pretokenize_module
from textdata.token_shards import read_meta
from textdata.tokenizer import load_tokenizer
from tinystories import DATASET


@pytest.fixture(autouse=True)
def work_in_tmp_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def one_shard_for_each_file(monkeypatch):
    monkeypatch.setattr(shard_jobs, "PACK_SIZE", 1)


@pytest.fixture
def story_shards(stories) -> dict[str, bytes]:
    return tinystories_shards(stories)


def versions_of(folder) -> dict[str, int]:
    """The inode of each shard, which changes when the shard is written again."""
    return {
        name: (folder / name).stat().st_ino
        for name in sorted(os.listdir(folder))
        if name.endswith(".bin")
    }


def test_shards_hold_every_document_after_its_bos(options, text_folder, tokenizer, stories):
    run_stage("pretokenize", *options)
    first, second, third = read_shards("out/tok512")
    assert decode_documents(first, tokenizer) == [
        story.replace("\n\n", "\n") for story in stories[:100]
    ]
    assert decode_documents(second, tokenizer) == stories[100:200]
    assert decode_documents(third, tokenizer) == stories[200:]


def test_meta_describes_the_tokens(options, tokenizer):
    run_stage("pretokenize", *options)
    meta = read_meta("out/tok512")
    shards = read_shards("out/tok512")
    assert meta["vocab_source"] == "custom"
    assert meta["vocab_size"] == VOCAB_SIZE
    assert meta["dtype"] == "<u2"
    assert meta["tokenizer_hash"] == tokenizer.hash
    assert load_tokenizer("out/tok512/tokenizer.model").hash == tokenizer.hash
    assert sum(meta["tokens"].values()) == sum(map(len, shards))
    assert [shard["file"] for shard in meta["shards"]] == ["00000.bin", "00001.bin", "00002.bin"]
    assert (meta["files"], meta["documents"]) == (3, 300)


@pytest.mark.parametrize("characters", [1, 300, 2**20])
def test_the_batch_size_makes_no_difference(options, tmp_path, monkeypatch, characters):
    run_stage("pretokenize", *options)
    expected = [tokens.tolist() for tokens in read_shards("out/tok512")]
    shutil.rmtree("out")
    monkeypatch.setattr(pretokenize_module, "BATCH_CHARACTERS", characters)
    run_stage("pretokenize", *options)
    assert [tokens.tolist() for tokens in read_shards("out/tok512")] == expected


def test_a_split_document_has_one_bos_and_the_same_tokens(tmp_path, monkeypatch, tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    long = " ".join(["Tom saw a big red ball and was happy."] * 100)
    (tmp_path / "long.txt").write_text(f"{long}\n\nThe end.")
    monkeypatch.setattr(text_files, "BLOCK_SIZE", 100)
    monkeypatch.setattr(corpus, "MAX_CHUNK", 500)
    run_stage(
        "pretokenize",
        "--input=long.txt",
        f"--tokenizer={tokenizer_path}",
        f"--vocab_size={VOCAB_SIZE}",
    )
    (tokens,) = read_shards("data/long/tok512")
    assert tokens.tolist() == tokenizer.encode(long, bos=True) + tokenizer.encode(
        "The end.", bos=True
    )


def test_every_file_ends_with_whole_documents_for_validation(options):
    run_stage("pretokenize", *options, "--val_fraction=0.2")
    meta = read_meta("out/tok512")
    for shard, tokens in zip(meta["shards"], read_shards("out/tok512"), strict=True):
        cut = shard["val"][0]
        assert shard["train"] == [0, cut] and shard["val"] == [cut, len(tokens)]
        assert tokens[cut] == 1 and 0.7 < cut / len(tokens) < 0.85


def test_the_first_shard_of_tinystories_validates(story_shards, tmp_path, tokenizer_path):
    (tmp_path / "data" / DATASET).mkdir(parents=True)
    for name, content in story_shards.items():
        (tmp_path / "data" / DATASET / name).write_bytes(content)
    run_stage("pretokenize", f"--tokenizer={tokenizer_path}", f"--vocab_size={VOCAB_SIZE}")
    first, *others = read_meta("data/tok512")["shards"]
    assert first["train"] == [0, 0] and first["val"] == [0, first["tokens"]]
    assert len(others) == 2 and all(shard["train"] == [0, shard["tokens"]] for shard in others)


def test_a_single_shard_of_tinystories_trains_and_validates(story_shards, tmp_path, tokenizer_path):
    (tmp_path / "data" / DATASET).mkdir(parents=True)
    (tmp_path / "data" / DATASET / "data00.json").write_bytes(story_shards["data00.json"])
    run_stage("pretokenize", f"--tokenizer={tokenizer_path}", f"--vocab_size={VOCAB_SIZE}")
    (shard,) = read_meta("data/tok512")["shards"]
    assert 0 < shard["val"][0] < shard["tokens"]
    assert 0.9 < shard["val"][0] / shard["tokens"] < 1


def test_the_separator_may_be_a_line_break(tmp_path, tokenizer, tokenizer_path):
    (tmp_path / "lines.txt").write_text("One.\nTwo.\n\nThree.\n")
    options = "--input=lines.txt", f"--tokenizer={tokenizer_path}", f"--vocab_size={VOCAB_SIZE}"
    run_stage("pretokenize", *options, r"--separator=\n")
    (tokens,) = read_shards("data/lines/tok512")
    assert decode_documents(tokens, tokenizer) == ["One.", "Two.", "Three."]
    run_stage("pretokenize", *options)
    (tokens,) = read_shards("data/lines/tok512")
    assert decode_documents(tokens, tokenizer) == ["One.\nTwo.", "Three."]


def test_the_vocabulary_of_llama_2_has_its_folder(
    run_script, tmp_path, text_folder, tokenizer_path
):
    source = "--vocab_source=llama2"
    options = source, f"--tokenizer={tokenizer_path}", f"--input={text_folder}", "--num_workers=1"
    result = run_script("tinystories.py", "pretokenize", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    meta = read_meta(str(tmp_path / "data" / "texts" / "llama2"))
    assert (meta["vocab_source"], meta["vocab_size"]) == ("llama2", VOCAB_SIZE)
    assert (
        f"--data_dir=data/texts {source} --vocab_size={VOCAB_SIZE}"
        in result.stdout.splitlines()[-1]
    )


def test_the_real_llama_2_vocabulary_equals_sentencepiece(shared, tmp_path, stories):
    path = shared("models/llama2_tokenizer.model")
    write_stories(tmp_path / "some.json", stories[:20])
    run_stage("pretokenize", "--vocab_source=llama2", f"--tokenizer={path}", "--input=some.json")
    (tokens,) = read_shards("data/some/llama2")
    encoded = sentencepiece.SentencePieceProcessor(model_file=path).encode(
        stories[:20], add_bos=True
    )
    assert tokens.tolist() == list(itertools.chain(*encoded))


def test_real_tinystories_are_tokenized_without_loss(shared, tmp_path, tokenizer_path, tokenizer):
    source = shared("data/TinyStories_all_data/data00.json")
    with open(source, encoding="utf-8") as file:
        stories = [record["story"].strip() for record in json.load(file)]
    run_stage(
        "pretokenize",
        f"--input={source}",
        f"--tokenizer={tokenizer_path}",
        f"--vocab_size={VOCAB_SIZE}",
    )
    (tokens,) = read_shards("data/data00/tok512")
    assert decode_documents(tokens, tokenizer) == stories


def test_token_ids_above_65535_take_four_bytes(tmp_path, tokenizer):
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.content)
    for number in range(len(model.pieces), 70_000):
        model.pieces.add(piece="zq" if number == 69_999 else f"<{number}>", score=-float(number))
    (tmp_path / "large.model").write_bytes(model.SerializeToString())
    (tmp_path / "in.txt").write_text("a zq\n\nand zq zq")
    run_stage("pretokenize", "--input=in.txt", "--tokenizer=large.model", "--vocab_size=70000")
    (tokens,) = read_shards("data/in/tok70000")
    assert read_meta("data/in/tok70000")["dtype"] == "<u4"
    assert os.path.getsize("data/in/tok70000/00000.bin") % 4 == 0
    assert (tokens == 69_999).sum() == 3
    assert decode_documents(tokens, load_tokenizer("large.model")) == ["a zq", "and zq zq"]


def test_finished_files_are_not_tokenized_again(options, tmp_path):
    folder = tmp_path / "out" / "tok512"
    assert "unchanged" not in run_stage("pretokenize", *options)
    before = read_folder(folder)
    versions = versions_of(folder)
    assert "3 of 3 shard(s) unchanged" in run_stage("pretokenize", *options)
    assert read_folder(folder) == before and versions_of(folder) == versions


def test_only_a_changed_file_is_tokenized_again(options, text_folder, tmp_path, tokenizer):
    folder = tmp_path / "out" / "tok512"
    run_stage("pretokenize", *options)
    versions = versions_of(folder)
    write_stories(text_folder / "b.json", ["A new story.", "And another."])
    assert "2 of 3 shard(s) unchanged" in run_stage("pretokenize", *options)
    assert decode_documents(read_shards(folder)[1], tokenizer) == ["A new story.", "And another."]
    changed = {name for name, version in versions_of(folder).items() if version != versions[name]}
    assert changed == {"00001.bin"}


@pytest.mark.parametrize(
    "change",
    [
        lambda text_folder: (text_folder / "a.txt").unlink(),
        lambda text_folder: (text_folder / "a0.txt").write_text("A file between others."),
        lambda text_folder: (text_folder / "c.jsonl").rename(text_folder / "0.jsonl"),
        lambda text_folder: (text_folder / "b.json").write_text("[]"),
    ],
    ids=["one removed", "one added", "one renamed", "one emptied"],
)
def test_an_updated_folder_equals_a_new_one(options, text_folder, tmp_path, change):
    run_stage("pretokenize", *options)
    change(text_folder)
    run_stage("pretokenize", *options)
    updated = read_folder(tmp_path / "out" / "tok512")
    shutil.rmtree("out")
    run_stage("pretokenize", *options)
    assert updated == read_folder(tmp_path / "out" / "tok512")


@pytest.mark.parametrize("option", ["--val_fraction=0.3", "--separator=.", "--tokenizer"])
def test_changed_options_tokenize_everything_again(options, option, stories, tmp_path):
    run_stage("pretokenize", *options)
    if option == "--tokenizer":
        write_stories(tmp_path / "other" / "a.json", stories[:150])
        run_stage("train_vocab", "--input=other", "--data_dir=other", f"--vocab_size={VOCAB_SIZE}")
        option = "--tokenizer=other/tok512.model"
    assert "unchanged" not in run_stage("pretokenize", *options, option)
    updated = read_folder(tmp_path / "out" / "tok512")
    shutil.rmtree("out")
    run_stage("pretokenize", *options, option)
    assert updated == read_folder(tmp_path / "out" / "tok512")


def test_a_damaged_shard_is_tokenized_again(options, tmp_path):
    folder = tmp_path / "out" / "tok512"
    run_stage("pretokenize", *options)
    before = read_folder(folder)
    os.truncate(folder / "00001.bin", 100)
    (folder / "00002.bin").unlink()
    (folder / "00000.bin.123.partial").write_text("of an interrupted run")
    assert "1 of 3 shard(s) unchanged" in run_stage("pretokenize", *options)
    assert read_folder(folder) == before


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "5", '{"job": 5}', '{"job": {"sources": [5]}}', "[" * 100_000],
)
def test_a_damaged_record_tokenizes_its_shard_again(options, tmp_path, content):
    folder = tmp_path / "out" / "tok512"
    run_stage("pretokenize", *options)
    before = read_folder(folder)
    (folder / "00001.record").write_text(content)
    assert "2 of 3 shard(s) unchanged" in run_stage("pretokenize", *options)
    assert read_folder(folder) == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"shards": [{}]}', '{"shards": 5}'])
def test_a_damaged_meta_is_written_again(options, tmp_path, content):
    folder = tmp_path / "out" / "tok512"
    run_stage("pretokenize", *options)
    before = read_folder(folder)
    (folder / "meta.json").write_text(content)
    run_stage("pretokenize", *options)
    assert read_folder(folder) == before


def test_the_number_of_workers_changes_no_byte(run_script, options, text_folder, tmp_path):
    fill_to_pack_size(text_folder)
    result = run_script("tinystories.py", "pretokenize", *options, "--num_workers=2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    parallel = read_folder(tmp_path / "out" / "tok512")
    shutil.rmtree(tmp_path / "out")
    run_stage("pretokenize", *options)
    assert parallel == read_folder(tmp_path / "out" / "tok512")


def test_more_workers_than_files_change_no_byte(options, text_folder, tmp_path):
    for name in ("a.txt", "c.jsonl"):
        (text_folder / name).unlink()
    run_stage("pretokenize", *options)
    alone = read_folder(tmp_path / "out" / "tok512")
    shutil.rmtree(tmp_path / "out")
    run_stage("pretokenize", *options, "--num_workers=8")
    assert alone == read_folder(tmp_path / "out" / "tok512")


def test_ranks_divide_the_files_and_write_the_same_bytes(options, tmp_path, monkeypatch):
    """Rank 1 runs while rank 0 waits before its first file."""
    folder = tmp_path / "out" / "tok512"
    run_stage("pretokenize", *options)
    expected = read_folder(folder)
    shutil.rmtree("out")
    barriers = []

    def run_rank(rank: int) -> str:
        dist_ctx = DistContext(rank, rank, size=2)
        monkeypatch.setattr(tinystories, "init_distributed", lambda *args: (dist_ctx, "cpu"))
        return run_stage("pretokenize", *options)

    def barrier(dist_ctx: DistContext) -> None:
        barriers.append(dist_ctx.rank)
        if barriers == [0, 0]:
            run_rank(1)
            written = {".lock", "00001.bin", "00001.record", "tokenizer.model"}
            assert set(os.listdir(folder)) == written

    monkeypatch.setattr(DistContext, "barrier", barrier)
    assert "3 shard(s)" in run_rank(0)
    assert barriers == [0, 0, 1, 1, 1, 0]
    assert read_folder(folder) == expected
