"""
Documents from text files, read as a stream: memory does not grow with the file.

.txt   documents separated by blank lines, or by a separator of your own
.jsonl one JSON object a line     } with the text under "story" or "text"
.json  one array of such objects, as TinyStories has them
"""

import json
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

SUFFIXES = (".txt", ".json", ".jsonl")
BLOCK = 2**20  # characters read at a time
LONGEST_PIECE = 2**22  # characters; a longer document is cut at a space, to bound memory
LONGEST_RECORD = 2**26  # characters; a longer JSON record is taken for damage


class DocumentChunk(NamedTuple):
    """A document, or one part of a very long one."""

    text: str
    starts_document: bool


def find_files(path: str) -> list[str]:
    """The file itself, or all text files below the folder, sorted. Raises ValueError for none."""
    if os.path.isfile(path):
        if not path.endswith(SUFFIXES):
            raise ValueError(
                f"{path}: give a file that ends in {', '.join(SUFFIXES)}, or a folder of them"
            )
        return [path]
    if not os.path.isdir(path):
        raise ValueError(f"{path}: there is no such file or folder")
    files = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    files = sorted(f for f in files if f.endswith(SUFFIXES) and os.path.basename(f) != "meta.json")
    if not files:
        raise ValueError(f"{path}: no file here ends in {', '.join(SUFFIXES)}")
    return files


def read_documents(
    path: str, separator: str = "", progress=lambda position: None
) -> Iterator[DocumentChunk]:
    """Yield the file's documents, stripped of space around them, the empty ones left out.

    progress is called with the bytes read so far. Raises ValueError, naming the file, for what
    is not UTF-8 text or not such JSON."""
    reader = read_text if path.endswith(".txt") else read_json
    try:
        with open(path, encoding="utf-8-sig") as file:

            def read_block():
                block = file.read(BLOCK)
                progress(file.buffer.tell())
                return block

            for piece in reader(read_block, separator):
                if text := piece.text.strip():
                    yield DocumentChunk(text, piece.starts_document)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text ({error.reason}); convert it, with iconv say"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_text(read_block, separator: str) -> Iterator[DocumentChunk]:
    boundary = re.compile(re.escape(separator) if separator else r"\n[ \t]*\n\s*")
    rest, starts_document = "", True
    while block := read_block():
        # The last document may go on in the next block, and a separator may be cut by its end.
        *documents, rest = boundary.split(rest + block)
        for text in documents:
            yield DocumentChunk(text, starts_document)
            starts_document = True
        while len(rest) > LONGEST_PIECE:
            # SentencePiece puts a space before each text: it stands for the one we cut at.
            cut = rest.rfind(" ", 1, LONGEST_PIECE)
            cut = cut if cut > 0 else LONGEST_PIECE
            yield DocumentChunk(rest[:cut], starts_document)
            rest, starts_document = rest[cut:], False
    yield DocumentChunk(rest, starts_document)


def read_json(read_block, separator: str) -> Iterator[DocumentChunk]:
    """Objects of an array, or one after the other; each is decoded as soon as it is whole."""
    decode, text, at, number = json.JSONDecoder().raw_decode, "", 0, 0
    between = re.compile(r"\s*,?\s*")
    is_array = None
    while True:
        block = read_block()
        text, at = text[at:] + block, 0
        if is_array is None and (start := text.lstrip()):
            is_array, text = start[0] == "[", start.removeprefix("[")
        while (at := between.match(text, at).end()) < len(text):
            if text[at] == "]" and is_array:
                return
            try:
                record, end = decode(text, at)
            except json.JSONDecodeError as error:
                if block and len(text) - at < LONGEST_RECORD:
                    break  # not whole yet
                raise ValueError(f"record {number + 1} is not whole JSON: {error.msg}") from None
            yield DocumentChunk(record_text(record, number + 1), True)
            at, number = end, number + 1
        if not block:
            if is_array:
                raise ValueError(f"the file is cut off after record {number}")
            return


def record_text(record, number: int) -> str:
    text = record.get("story", record.get("text")) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'record {number} has no text under "story" or "text"')
    return text.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair becomes "?"
