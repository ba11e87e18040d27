"""
Learn a vocabulary from text files, and choose the one to tokenize with.
"""

import contextlib
import os
from collections.abc import Iterator

from runtime.atomic_files import write_atomically
from textdata.corpus import read_documents
from textdata.tokenizer import (
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)

MAX_TRAINING_TEXT = 100_000_000  # characters to learn a vocabulary from


def vocabulary_path(data_dir: str, vocab_size: int) -> str:
    """The path of a learned vocabulary: DATA_DIR/tokSIZE.model."""
    return os.path.join(data_dir, f"tok{vocab_size}.model")


def learn_vocabulary(
    files: list[str], data_dir: str, vocab_size: int, separator: str, text_field: str = ""
) -> str:
    """Learn a vocabulary from the beginning of every file and write DATA_DIR/tokSIZE.model and
    .bin; returns the path of the .model file. separator, text_field: as of read_documents."""
    path = vocabulary_path(data_dir, vocab_size)
    print(f"learning {vocab_size} tokens from {len(files)} file(s) ...")
    characters_per_file = MAX_TRAINING_TEXT // len(files)
    texts = (
        text
        for file in files
        for text in head_of_corpus(file, separator, text_field, characters_per_file)
    )
    tokenizer = SentencePieceTokenizer(train_sentencepiece(texts, vocab_size))
    write_atomically(path, tokenizer.content)
    write_atomically(path.removesuffix("model") + "bin", tokenizer.to_bin())
    print(f"wrote {path} and tok{vocab_size}.bin")
    return path


def head_of_corpus(
    file: str, separator: str, text_field: str, num_characters: int
) -> Iterator[str]:
    """Yield the first documents of the file, until they have more than num_characters."""
    for text, _ in read_documents(file, separator, text_field=text_field):
        yield text
        num_characters -= len(text)
        if num_characters < 0:
            return


def find_or_learn_vocabulary(
    files: list[str], data_dir: str, vocab_size: int, separator: str, text_field: str = ""
) -> str:
    """The path of the vocabulary in data_dir; it is learned from the files if it is missing."""
    path = vocabulary_path(data_dir, vocab_size)
    if not os.path.exists(path):
        return learn_vocabulary(files, data_dir, vocab_size, separator, text_field)
    print(f"using the existing vocabulary {path}; delete it to learn it again")
    return path


def install_tokenizer(path: str, folder: str, vocab_size: int | None) -> None:
    """Copy the vocabulary at path to a folder, instead of another one there.

    Raises ValueError if it does not have vocab_size tokens, unless that is None.
    """
    tokenizer = load_tokenizer(path)
    if vocab_size not in (None, tokenizer.vocab_size):
        raise ValueError(
            f"{path} has {tokenizer.vocab_size} tokens, not --vocab_size={vocab_size}; "
            f"give --vocab_size={tokenizer.vocab_size}"
        )
    for name, content in tokenizer.files.items():
        write_atomically(os.path.join(folder, name), content)
    for name in ("tokenizer.model", "tokenizer.json"):  # a tokenizer.bin is the file of a run
        if name not in tokenizer.files:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, name))
