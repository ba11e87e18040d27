import gzip
import re

import pytest

from textdata import text_files


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl", "a.csv"])
@pytest.mark.parametrize(
    "content, reason",
    [
        ('[{"story": "é"}]'.encode("latin-1"), "byte 0xe9 at position 12, in line 1"),
        ("text\n".encode("utf-16"), "UTF-16; convert it with iconv -f UTF-16 -t UTF-8"),
        ("text\n".encode("utf-32"), "UTF-32; convert it with iconv -f UTF-32 -t UTF-8"),
        ("text\n".encode("utf-16-le"), "UTF-16LE without a byte order mark; convert it with iconv"),
        ("text\n".encode("utf-16-be"), "UTF-16BE without a byte order mark; convert it with iconv"),
        (b"text\0\0\0\0\0\0", "UTF-16"),
        (bytes(1000), "a binary file"),
        (gzip.compress(b"text"), r"a gzip file; add \.gz to its name"),
        (b"PK\x03\x04\x14\0\0\0\x08\0\xff\xff", "a zip archive; unpack it"),
        (b"PAR1\x15\x04\x15\xff", r"a Parquet file; let its name end in \.parquet"),
        ("é".encode()[:1], "the file ends within a character, in line 1"),
    ],
    ids=repr,
)
def test_other_encodings_are_refused_by_name(texts_of, name, content, reason):
    """UTF-16 without a byte order mark was read as text with zeros."""
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: not UTF-8 text.*{reason}"):
        texts_of(name, content)


@pytest.mark.parametrize("block_size", [1, 7, 2**20])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_late_latin_1_byte_is_located(texts_of, monkeypatch, block_size, mark):
    """The message gave no position, so that a byte far into a file was not found."""
    monkeypatch.setattr(text_files, "BLOCK_SIZE", block_size)
    content = mark + "naïve\n".encode() * 50 + b"caf\xe9\n"
    match = f"byte 0xe9 at position {len(content) - 2}, in line 51 .* iconv -f LATIN1 -t UTF-8"
    with pytest.raises(ValueError, match=match):
        texts_of("a.txt", content)


def test_a_zero_byte_in_a_text_is_kept(texts_of):
    assert texts_of("a.txt", "one \0 two") == ["one \0 two"]


@pytest.mark.parametrize("name", ["a.txt.gz", "A.TXT.GZ"])
def test_gzip_is_unpacked(texts_of, name):
    parts = gzip.compress("naïve\r\n\r\n".encode()) + gzip.compress(b"two")
    assert texts_of(name, parts) == ["naïve", "two"]


def test_records_are_read_from_gzip(texts_of):
    assert texts_of("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 3)) == ["one"] * 3
    assert texts_of("a.csv.gz", gzip.compress(b"text\none\n")) == ["one"]


@pytest.mark.parametrize("damage", ["cut off", "wrong byte", "not gzip", "rest"])
def test_damaged_gzip_is_refused(texts_of, damage):
    content = bytearray(gzip.compress(bytes(range(32, 127)) * 9))
    if damage == "cut off":
        del content[-9:]
    elif damage == "wrong byte":
        content[-8] ^= 1  # of the checksum
    elif damage == "not gzip":
        content = bytearray(b"text")
    else:
        content += b"rest"
    with pytest.raises(ValueError, match=r"a\.txt\.gz: not a whole gzip file: "):
        texts_of("a.txt.gz", bytes(content))


def test_progress_of_gzip_counts_bytes_of_the_file(texts_of):
    content = gzip.compress(b"text " * 100_000)
    positions = []
    texts_of("a.txt.gz", content, progress=positions.append)
    assert positions == sorted(positions) and positions[-1] == len(content)
