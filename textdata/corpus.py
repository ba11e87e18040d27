"""
Stream documents from text files. Memory does not grow with the size of the file.

.txt    documents separated by blank lines, or by a given separator
.jsonl  one JSON object per line, with the text under "story" or "text"
.json   an array of such objects, as in TinyStories
"""

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TextIO

SUFFIXES = (".txt", ".json", ".jsonl")
BLOCK_SIZE = 2**20  # characters read at a time
MAX_CHUNK = 2**22  # characters; a longer document is split at a space, to bound memory
MAX_RECORD = 2**26  # characters; a longer JSON record is treated as damaged
NUM_EXAMPLES = 3  # paths shown for each reason that files are left out
JSON_SEPARATOR = re.compile(r"\s*,?\s*")
DECODER = json.JSONDecoder()


class DocumentChunk(NamedTuple):
    """A document, or one part of a very long document."""

    text: str
    starts_document: bool


class SkippedFile(NamedTuple):
    """A file or folder that is left out."""

    path: str
    reason: str


@dataclass
class CorpusReport:
    """What was read, and what was left out. find_files adds the files that it leaves out;
    read_documents counts what it reads."""

    num_files: int = 0  # read to their end
    num_documents: int = 0
    num_empty: int = 0  # records and rows whose text is empty or missing
    num_with_marker: int = 0  # documents with U+2581, which SentencePiece encodes as a space
    skipped: list[SkippedFile] = field(default_factory=list)


def add_reports(reports: Iterable[CorpusReport]) -> CorpusReport:
    """The sum of the reports."""
    total = CorpusReport()
    for report in reports:
        total.num_files += report.num_files
        total.num_documents += report.num_documents
        total.num_empty += report.num_empty
        total.num_with_marker += report.num_with_marker
        total.skipped += report.skipped
    return total


def format_report(report: CorpusReport) -> str:
    """The report as lines of text: files and documents read, then what was left out and why."""
    lines = [f"read {report.num_files:,} file(s) with {report.num_documents:,} document(s)"]
    if report.num_empty:
        lines.append(f"left out {report.num_empty:,} record(s) without text")
    if report.num_with_marker:
        lines.append(
            f"{report.num_with_marker:,} document(s) contain U+2581 (▁): "
            "a SentencePiece vocabulary encodes it as a space"
        )
    for reason in dict.fromkeys(skipped.reason for skipped in report.skipped):
        paths = [skipped.path for skipped in report.skipped if skipped.reason == reason]
        more = ", ..." if len(paths) > NUM_EXAMPLES else ""
        lines.append(
            f"left out {len(paths):,} of the input, {reason}: "
            f"{', '.join(paths[:NUM_EXAMPLES])}{more}"
        )
    return "\n".join(lines)


def find_files(path: str, text_field: str = "", report: CorpusReport | None = None) -> list[str]:
    """The file itself, or all text files below the folder, sorted. Raises ValueError if there is
    none."""
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
    path: str,
    separator: str = "",
    progress: Callable[[int], None] = lambda num_bytes: None,
    text_field: str = "",
    report: CorpusReport | None = None,
) -> Iterator[DocumentChunk]:
    """Yield the documents of the file without surrounding whitespace; skip the empty ones.

    Args:
        path: a .txt, .json or .jsonl file.
        separator: the text between the documents of a .txt file; blank lines if empty.
        progress: called with the number of bytes read so far.

    Raises ValueError with the path if the file is not UTF-8 text or not such JSON.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            blocks = read_blocks(file, progress)
            chunks = read_text(blocks, separator) if path.endswith(".txt") else read_json(blocks)
            stripped = (chunk._replace(text=chunk.text.strip()) for chunk in chunks)
            yield from (chunk for chunk in stripped if chunk.text)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text ({error.reason}); convert it, for example with iconv"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_blocks(file: TextIO, progress: Callable[[int], None]) -> Iterator[str]:
    """Yield the text of the file in blocks, and report the bytes read after each."""
    while True:
        block = file.read(BLOCK_SIZE)
        progress(file.buffer.tell())
        if not block:
            return
        yield block


def read_text(blocks: Iterable[str], separator: str) -> Iterator[DocumentChunk]:
    """Yield the documents of a .txt file; very long ones in chunks."""
    boundary = re.compile(re.escape(separator) if separator else r"\n[ \t]*\n\s*")
    rest = ""
    starts_document = True
    for block in blocks:
        # The last document may continue in the next block, and so may a separator at its end.
        *documents, rest = boundary.split(rest + block)
        for text in documents:
            yield DocumentChunk(text, starts_document)
            starts_document = True
        while len(rest) > MAX_CHUNK:
            # SentencePiece puts a space before each text, which replaces the space removed here.
            cut = rest.rfind(" ", 1, MAX_CHUNK)
            cut = cut if cut > 0 else MAX_CHUNK
            yield DocumentChunk(rest[:cut], starts_document)
            rest = rest[cut:]
            starts_document = False
    yield DocumentChunk(rest, starts_document)


def read_json(blocks: Iterable[str]) -> Iterator[DocumentChunk]:
    """Yield the texts of a .json or .jsonl file. A record is decoded as soon as it is complete."""
    text = ""
    is_array = None  # unknown until the first character that is not whitespace
    num_records = 0
    for block in itertools.chain(blocks, [""]):  # the empty block marks the end of the file
        text += block
        if is_array is None and (stripped := text.lstrip()):
            is_array = stripped[0] == "["
            text = stripped.removeprefix("[")
        position = skip_separator(text, 0)
        while position < len(text):
            if is_array and text[position] == "]":
                return
            can_continue = block != "" and len(text) - position < MAX_RECORD
            decoded = decode_record(text, position, num_records + 1, can_continue)
            if decoded is None:
                break
            num_records += 1
            yield DocumentChunk(record_text(decoded.record, num_records), True)
            position = skip_separator(text, decoded.end)
        text = text[position:]
    if is_array:
        raise ValueError(f"the file is cut off after record {num_records}")


def skip_separator(text: str, position: int) -> int:
    """The position after whitespace and at most one comma."""
    match = JSON_SEPARATOR.match(text, position)
    assert match is not None, "the pattern matches the empty string"
    return match.end()


class DecodedRecord(NamedTuple):
    """A JSON value, and the position after it."""

    record: object
    end: int


def decode_record(
    text: str, position: int, number: int, can_continue: bool
) -> DecodedRecord | None:
    """Decode the JSON value at the position, or return None if it can continue in the next block.
    Raises ValueError with its number if it cannot."""
    try:
        return DecodedRecord(*DECODER.raw_decode(text, position))
    except json.JSONDecodeError as error:
        if can_continue:
            return None
        raise ValueError(f"record {number} is not whole JSON: {error.msg}") from None


def record_text(record: object, number: int) -> str:
    """The text of a JSON record. Raises ValueError with the record's number if it has none."""
    text = record.get("story", record.get("text")) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'record {number} has no text under "story" or "text"')
    return text.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair becomes "?"
