import os
import re

import pytest

from tests.textdata.helpers import error_lines, run_stage
from textdata import vocabulary
from textdata.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def work_in_tmp_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_a_vocabulary_is_learned_from_a_folder(text_folder, tmp_path):
    out = run_stage("train_vocab", f"--input={text_folder}", "--data_dir=out", "--vocab_size=400")
    assert "tok400.model" in out
    tokenizer = load_tokenizer("out/tok400.model")
    assert tokenizer.vocab_size == 400
    assert (tmp_path / "out" / "tok400.bin").read_bytes() == tokenizer.to_bin()


def test_a_vocabulary_learns_from_the_beginning_of_every_file(tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "MAX_TRAINING_TEXT", 4000)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("\n\n".join(["alpha"] * 1000 + ["omega"] * 100_000))
    (tmp_path / "in" / "b.txt").write_text("\n\n".join(["beta"] * 1000))
    run_stage("train_vocab", "--input=in", "--data_dir=out", "--vocab_size=270")
    processor = load_tokenizer("out/tok270.model").processor
    characters = {processor.id_to_piece(token) for token in range(259, 270)}
    assert {"p", "b"} <= characters and "g" not in characters


def test_a_small_text_is_refused_without_a_prompt(run_script, tmp_path):
    """llama2.c prints Done, and older versions of SentencePiece ask on standard input."""
    (tmp_path / "small.txt").write_text(
        "Once upon a time there was a baby llama. It ate grass. " * 180
    )  # 10 KB
    result = run_script("tinystories.py", "pretokenize", "--input=small.txt", cwd=tmp_path)
    (line,) = (line for line in error_lines(result) if line.startswith("tinystories.py: "))
    assert result.returncode == 1
    assert re.search(
        r"--vocab_size=4096: the text is too short .* the largest that works is --vocab_size=\d+$",
        line,
    )
    assert (
        "next:" not in result.stdout
        and not (tmp_path / "data" / "small" / "tok4096.model").exists()
    )


def test_a_wrong_vocab_size_is_refused_with_the_right_one(text_folder, tokenizer_path):
    with pytest.raises(
        ValueError, match="has 512 tokens, not --vocab_size=4096; give --vocab_size=512"
    ):
        run_stage("pretokenize", f"--input={text_folder}", f"--tokenizer={tokenizer_path}")


def test_an_existing_vocabulary_is_used(text_folder):
    run_stage("train_vocab", f"--input={text_folder}", "--data_dir=out", "--vocab_size=400")
    version = os.stat("out/tok400.model").st_ino
    run_stage("pretokenize", f"--input={text_folder}", "--data_dir=out", "--vocab_size=400")
    assert os.stat("out/tok400.model").st_ino == version
