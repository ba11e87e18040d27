"""
Stream documents from text files. Memory does not grow with the size of the file.

.txt      documents separated by <|endoftext|> if it begins or ends a line, else by blank lines, or
          by a given separator
.jsonl    JSON objects with the text in one field; .ndjson is the same
.json     arrays of such objects, as in TinyStories, or such objects
.csv      a header, then rows with the text in one column
.parquet  rows with the text in one column; needs pyarrow

All but .parquet may be compressed with gzip: .txt.gz.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from runtime.lfs import require_content
from textdata.json_records import read_json
from textdata.records import iter_record_text
from textdata.table_records import read_csv, read_parquet
from textdata.text_files import file_format, read_blocks

MAX_CHUNK = 2**22  # characters; a longer document is split, to bound memory
BLANK_LINES = re.compile(r"\n[ \t]*\n\s*")
LAST_WORD_END = re.compile(r".*\S(?= \S)", re.DOTALL)
END_OF_TEXT = "<|endoftext|>"  # GPT-2's end of a document, also in TinyStories' .txt files
# A sentence about <|endoftext|> hardly begins or ends a line with it.
END_OF_TEXT_AT_LINE_END = re.compile(r"\n<\|endoftext\|>|<\|endoftext\|>[ \t]?\n")
NUM_EXAMPLES = 3  # paths shown for each reason that files are left out


class DocumentChunk(NamedTuple):
    """A document without surrounding whitespace, or one part of a very long document. The joined
    parts are the document."""

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
    num_split: int = 0  # .txt files split at <|endoftext|>, without --separator
    num_mentions: int = 0  # .txt files with <|endoftext|>, but not split there
    skipped: list[SkippedFile] = field(default_factory=list)

    def add(self, other: "CorpusReport") -> None:
        """Add the counts of another part of the corpus."""
        self.num_files += other.num_files
        self.num_documents += other.num_documents
        self.num_empty += other.num_empty
        self.num_split += other.num_split
        self.num_mentions += other.num_mentions
        self.skipped += other.skipped


def format_report(report: CorpusReport) -> str:
    """The report as lines of text: files and documents read, then what was left out and why."""
    lines = [f"read {report.num_documents:,} document(s) in {report.num_files:,} file(s)"]
    if report.num_split:
        lines.append(f"{report.num_split:,} file(s) split at {END_OF_TEXT}")
    if report.num_mentions:
        lines.append(
            f"{report.num_mentions:,} file(s) have {END_OF_TEXT} only within lines and are not "
            f"split there; if it separates documents, give --separator='{END_OF_TEXT}'"
        )
    if report.num_empty:
        lines.append(f"left out {report.num_empty:,} record(s) without text")
    return "\n".join(lines + format_skipped(report.skipped))


def format_skipped(skipped_files: list[SkippedFile]) -> list[str]:
    """A line for each reason, with the number of files and the first of them."""
    paths_by_reason: dict[str, list[str]] = {}
    for path, reason in skipped_files:
        paths_by_reason.setdefault(reason, []).append(path)
    lines = []
    for reason, paths in paths_by_reason.items():
        examples = ", ".join(paths[:NUM_EXAMPLES]) + (", ..." if paths[NUM_EXAMPLES:] else "")
        lines.append(f"left out {len(paths):,} ({reason}): {examples}")
    return lines


def read_documents(
    path: str,
    separator: str = "",
    progress: Callable[[int], None] = lambda num_bytes: None,
    report: CorpusReport | None = None,
    text_field: str = "",
) -> Iterator[DocumentChunk]:
    """Yield the documents of the file without surrounding whitespace; skip the empty ones.

    Args:
        path: a file in one of the formats above.
        separator: the text between the documents of a .txt file; if empty, <|endoftext|> if it
            begins or ends a line of the file, else blank lines.
        progress: called with the number of bytes read so far.
        report: counts the file and its documents.
        text_field: the field or column with the text; "text" or "story" if empty.

    Raises ValueError with the path if the file is not UTF-8 text, or not such JSON, CSV or Parquet,
    or only a pointer of Git LFS.
    """
    report = CorpusReport() if report is None else report
    require_content(path)
    try:
        if file_format(path) == ".txt":
            separator = separator or choose_separator(path, report)
            chunks = read_text(read_blocks(path, progress), separator)
        else:
            chunks = read_records(path, progress, text_field, report)
        for chunk in chunks:
            report.num_documents += chunk.starts_document
            yield chunk
        report.num_files += 1
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def choose_separator(path: str, report: CorpusReport) -> str:
    """The separator of a .txt file: <|endoftext|> if it begins or ends a line, else "" for blank
    lines. The report counts files that have it. The file is read until then."""
    text = "\n"
    is_mentioned = False
    for block in itertools.chain(read_blocks(path), ["\n"]):
        text += block
        if END_OF_TEXT_AT_LINE_END.search(text):
            report.num_split += 1
            return END_OF_TEXT
        is_mentioned = is_mentioned or END_OF_TEXT in text
        text = text[-len(f"{END_OF_TEXT} ") :]
    report.num_mentions += is_mentioned
    return ""


def read_text(blocks: Iterable[str], separator: str | None) -> Iterator[DocumentChunk]:
    """Yield the documents of a text; very long ones in chunks.

    Args:
        blocks: the text.
        separator: the text between documents; blank lines if empty; None for one document.
    """
    boundary = re.compile(re.escape(separator)) if separator else BLANK_LINES
    # A separator may begin at the end of the text that was read, so a chunk never ends inside a
    # separator.
    max_cut = max(1, MAX_CHUNK - len(separator or ""))
    rest = ""
    starts_document = True
    for block in blocks:
        rest += block
        if separator is not None:
            # The last document may continue in the next block, and so may a separator at its end.
            *documents, rest = boundary.split(rest)
            for text in documents:
                yield from last_chunk(text, starts_document)
                starts_document = True
        while len(rest) > MAX_CHUNK:
            rest = rest.lstrip() if starts_document else rest
            cut = cut_position(rest, max_cut)
            if cut:
                yield DocumentChunk(rest[:cut], starts_document)
                starts_document = False
            rest = rest[cut:]
    yield from last_chunk(rest, starts_document)


def last_chunk(text: str, starts_document: bool) -> Iterator[DocumentChunk]:
    """Yield the document, or its end, without the whitespace around the document."""
    text = text.strip() if starts_document else text.rstrip()
    if text:
        yield DocumentChunk(text, starts_document)


def cut_position(text: str, limit: int) -> int:
    """The best position at which to split a text, at most limit: the last single space between
    words, else the end of the last word, else the limit."""
    if match := LAST_WORD_END.match(text, 0, limit):
        return match.end()
    return len(text[:limit].rstrip()) or min(limit, len(text))


def read_records(
    path: str, progress: Callable[[int], None], text_field: str, report: CorpusReport
) -> Iterator[DocumentChunk]:
    """Yield the texts of a file of records; each is a document."""
    for number, record in enumerate(open_records(path, progress, text_field), 1):
        is_empty = True
        for chunk in read_text(iter_record_text(record, number, text_field), None):
            is_empty = False
            yield chunk
        report.num_empty += is_empty


def open_records(
    path: str, progress: Callable[[int], None] = lambda num_bytes: None, text_field: str = ""
) -> Iterator[object]:
    """The records of a file, for iter_record_text, each to be used before the next one is read."""
    if file_format(path) == ".parquet":
        return read_parquet(path, progress, text_field)
    blocks = read_blocks(path, progress)
    return read_csv(blocks, text_field) if file_format(path) == ".csv" else read_json(blocks)
