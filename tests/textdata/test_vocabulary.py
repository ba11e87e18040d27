import os
import re

import pytest

from tests.textdata.helpers import VOCAB_SIZE, error_lines, run_stage
from textdata import vocabulary
from textdata.tokenizer import SentencePieceTokenizer, load_tokenizer, train_sentencepiece


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


UNREADABLE_TEXTS = {
    "number.jsonl": (b'{"text": "Once."}\n{"text": 5}\n', "number.jsonl: record 2 "),
    "late.txt": (b"Once upon a time. " * 70_000 + b"\xe9", "late.txt: not UTF-8 text"),
    "cut.json": (b'[{"story": "Once."}, {"story": "twi', "cut.json: "),
}


@pytest.mark.parametrize("stage", ["train_vocab", "pretokenize"])
@pytest.mark.parametrize("name", UNREADABLE_TEXTS)
def test_an_error_in_the_text_names_the_file(tmp_path, name, stage):
    """SentencePiece's iterator turned it into "--vocab_size=4096: INTERNAL: ValueError ... At:"."""
    content, sentence = UNREADABLE_TEXTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        run_stage(stage, f"--input={name}", "--data_dir=out")
    assert str(error.value).startswith(sentence)
    assert "vocab_size" not in str(error.value) and "At:" not in str(error.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk gone"), MemoryError()])
def test_exceptions_of_the_texts_are_raised_unchanged(error):
    """Ctrl-C while a vocabulary was learned was a mistake in --vocab_size."""

    def texts():
        yield "Once upon a time there was a llama."
        raise error

    with pytest.raises(type(error)) as raised:
        train_sentencepiece(texts(), 300)
    assert raised.value is error


def test_a_reserved_character_does_not_remove_its_line(stories):
    """SentencePiece leaves out lines with U+2585."""
    marked = [story.replace(".", "\u2585") for story in stories]
    tokenizer = SentencePieceTokenizer(train_sentencepiece(marked, VOCAB_SIZE))
    assert any(piece.text == "▁the" for piece in tokenizer.pieces)
