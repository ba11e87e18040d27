"""
Read text files in blocks: UTF-8, with \\n for each line end, compressed with gzip or not.
"""

import codecs
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

FORMATS = (".txt", ".json", ".jsonl", ".ndjson", ".csv", ".parquet")
BLOCK_SIZE = 2**20  # bytes read at a time
# Parts of the first bytes that are zero. UTF-8 text has hardly any. Half the bytes of Latin letters
# in UTF-16 are zero, fewer in other scripts; a file with more zeros than that is binary.
MAX_ZEROS_IN_UTF_8 = 0.25
MAX_ZEROS_IN_UTF_16 = 0.75

# The first bytes of files that are not text, and what to do with such a file.
SIGNATURES = {
    b"\x1f\x8b": "a gzip file; add .gz to its name",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x28\xb5\x2f\xfd": "a Zstandard file; unpack it",
    b"BZh": "a bzip2 file; unpack it",
    b"\xfd7zXZ\x00": "an xz file; unpack it",
    b"PAR1": "a Parquet file; let its name end in .parquet",
    codecs.BOM_UTF32_LE: "UTF-32; convert it with iconv -f UTF-32 -t UTF-8",
    codecs.BOM_UTF32_BE: "UTF-32; convert it with iconv -f UTF-32 -t UTF-8",
    codecs.BOM_UTF16_LE: "UTF-16; convert it with iconv -f UTF-16 -t UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16; convert it with iconv -f UTF-16 -t UTF-8",
}


def file_format(path: str) -> str:
    """The format that the name of the file ends in, in lower case and without .gz, or "" if it is
    not one of FORMATS."""
    name = os.path.basename(path)
    suffix = os.path.splitext(without_gz(name))[1].lower()
    is_readable = suffix in FORMATS and not (suffix == ".parquet" and is_gzip(name))
    return suffix if is_readable else ""


def is_gzip(path: str) -> bool:
    """Whether the name of the file ends in .gz, in small or capital letters."""
    return path.lower().endswith(".gz")


def without_gz(path: str) -> str:
    """The path without .gz at its end."""
    return path[: -len(".gz")] if is_gzip(path) else path


def read_blocks(
    path: str, progress: Callable[[int], None] = lambda num_bytes: None
) -> Iterator[str]:
    """Yield the text of the file in blocks, and report the bytes of the file read after each.

    Raises ValueError if it is not UTF-8 text, or is a damaged gzip file.
    """
    with open(path, "rb") as file:
        stream = gzip.GzipFile(fileobj=file) if is_gzip(path) else file
        try:
            yield from decode_blocks(stream, lambda: progress(file.tell()))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"not a whole gzip file: {error}") from error


def decode_blocks(stream: BinaryIO | gzip.GzipFile, on_block: Callable[[], None]) -> Iterator[str]:
    """Yield the text of the stream in blocks, without a byte order mark."""
    decoder = io.IncrementalNewlineDecoder(
        codecs.getincrementaldecoder("utf-8-sig")(), translate=True
    )
    head = b""
    num_bytes = 0
    num_lines = 0
    while True:
        block = stream.read(BLOCK_SIZE)
        on_block()
        if not num_bytes:
            head = block[:1024]
            check_head(head)
        num_bytes += len(block)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            position = num_bytes - len(error.object) + error.start
            line = num_lines + error.object[: error.start].count(b"\n") + 1
            raise ValueError(describe_decoding_error(head, error, position, line)) from error
        num_lines += text.count("\n")
        if text:
            yield text
        if not block:
            return


def check_head(head: bytes) -> None:
    """Raise ValueError if the first bytes of a file are those of UTF-16 or of a binary file."""
    if head.count(0) <= MAX_ZEROS_IN_UTF_8 * len(head):
        return
    signature = find_signature(head)
    if not signature and head.count(0) < MAX_ZEROS_IN_UTF_16 * len(head):
        name = "UTF-16LE" if head[1::2].count(0) > head[::2].count(0) else "UTF-16BE"
        signature = f"{name} without a byte order mark; convert it with iconv -f {name} -t UTF-8"
    raise ValueError(f"not UTF-8 text but {signature or 'a binary file'}")


def find_signature(head: bytes) -> str:
    """What the first bytes of a file say that it is, or "" if they are not known."""
    return next((text for start, text in SIGNATURES.items() if head.startswith(start)), "")


def describe_decoding_error(
    head: bytes, error: UnicodeDecodeError, position: int, line: int
) -> str:
    """Why the file is not UTF-8, and what to do.

    Args:
        head: the first bytes of the file.
        error: the error of the decoder.
        position: of the byte that is wrong, in the file.
        line: the line of that byte.
    """
    if signature := find_signature(head):
        return f"not UTF-8 text but {signature}"
    if error.reason == "unexpected end of data":
        return f"not UTF-8 text: the file ends within a character, in line {line:,}"
    byte = error.object[error.start]
    return (
        f"not UTF-8 text: byte 0x{byte:02x} at position {position:,}, in line {line:,} "
        f"({error.reason}); if the file is Latin-1, convert it with iconv -f LATIN1 -t UTF-8"
    )
