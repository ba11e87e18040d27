"""
Helpers for the tests of text, tokens and tinystories.py.
"""

import contextlib
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tests.helpers import VOCAB_SIZE
from tests.helpers import write_tinystories_shard as write_stories
from textdata.corpus import DocumentChunk
from textdata.shard_jobs import PACK_SIZE
from textdata.token_shards import ShardWriter, read_meta, token_dtype, write_meta
from textdata.tokenizer import Tokenizer
from tinystories import main

__all__ = ["VOCAB_SIZE", "write_stories"]


def run_stage(name: str, *options: object) -> str:
    """Run tinystories.py in this process, pretokenize with one worker by default; returns what it
    printed. Exceptions are raised."""
    one_worker = ["--num_workers=1"] if name == "pretokenize" else []
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main([name, *one_worker, *map(str, options)])
    return output.getvalue()


def joined_documents(chunks: Iterable[DocumentChunk]) -> list[str]:
    """The texts of the documents, each joined from its chunks."""
    documents: list[str] = []
    for chunk in chunks:
        if chunk.starts_document:
            documents.append("")
        documents[-1] += chunk.text
    return documents


def read_shards(folder: Path | str) -> list[np.ndarray]:
    """The tokens of every shard. The folder must hold exactly the shards in meta.json."""
    meta = read_meta(str(folder))
    names = [shard["file"] for shard in meta["shards"]]
    assert set(names) == {name for name in os.listdir(folder) if name.endswith(".bin")}
    shards = [np.fromfile(os.path.join(folder, name), meta["dtype"]) for name in names]
    assert [len(tokens) for tokens in shards] == [shard["tokens"] for shard in meta["shards"]]
    return shards


def decode_documents(tokens: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The text of every document of a shard."""
    begins = np.flatnonzero(tokens == tokenizer.bos_id).tolist()
    assert begins[:1] == [0]
    ends = [*begins[1:], len(tokens)]
    return [
        tokenizer.decode(tokens[begin:end].tolist())
        for begin, end in zip(begins, ends, strict=True)
    ]


def read_folder(folder: Path) -> dict[str, bytes]:
    """The content of every file in the folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fill_to_pack_size(folder: Path) -> None:
    """Append whitespace to every file, so that each becomes a shard."""
    for path in folder.iterdir():
        with open(path, "ab") as file:
            file.write(b"\n" * PACK_SIZE)


def tinystories_shards(stories: list[str]) -> dict[str, bytes]:
    """Three shards in the format of TinyStories, by file name."""
    return {
        f"data{number:02d}.json": json.dumps(
            [{"story": text} for text in stories[number::3]]
        ).encode()
        for number in range(3)
    }


def error_lines(result) -> list[str]:
    """The lines that a command wrote to standard error, which must not have a traceback."""
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()


def write_token_folder(
    folder: Path, shards: list, cuts: list[int] | None = None, vocab_size: int = 1000
) -> str:
    """Write a data set of these shards. The tokens before each cut train; all by default."""
    os.makedirs(folder, exist_ok=True)
    entries = []
    for number, tokens in enumerate(shards):
        name = f"{number:05d}.bin"
        with ShardWriter(os.path.join(folder, name), vocab_size) as writer:
            writer.write(tokens)
        cut = len(tokens) if cuts is None else cuts[number]
        entry = {"file": name, "tokens": len(tokens), "train": [0, cut], "val": [cut, len(tokens)]}
        entries.append(entry)
    meta = {
        "vocab_size": vocab_size,
        "dtype": token_dtype(vocab_size).str,
        "tokenizer_hash": "x",
        "complete": True,
        "shards": entries,
    }
    write_meta(str(folder), meta)
    return str(folder)
