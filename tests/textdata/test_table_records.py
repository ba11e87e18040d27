import csv
import io
import sys
from datetime import date
from decimal import Decimal

import pytest

from textdata import table_records, text_files
from textdata.corpus import read_documents
from textdata.input_files import find_files

TEXTS = ['One "quoted", text.\n\nIts second part', "naïve 日本語 🦙", "last\r\nline", "'", " x "]
STRIPPED = [text.strip().replace("\r\n", "\n") for text in TEXTS]


@pytest.mark.parametrize("block_size", [1, 3, 64, 2**20])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_the_column_of_a_csv_file_is_read(texts_of, monkeypatch, block_size, line_end):
    monkeypatch.setattr(text_files, "BLOCK_SIZE", block_size)
    output = io.StringIO()
    writer = csv.writer(output, lineterminator=line_end)
    writer.writerow(["id", "text", "label"])
    writer.writerows([[number, text, ""] for number, text in enumerate(TEXTS)])
    assert texts_of("a.csv", "\ufeff" + output.getvalue()) == STRIPPED


def test_empty_rows_of_a_csv_file_are_left_out(texts_of):
    assert texts_of("a.csv", 'id,story\n\n1,one\n2,\n3," "\n\n4,four\n') == ["one", "four"]
    assert texts_of("a.csv", "text\n") == texts_of("a.csv", "") == []


def test_text_field_names_a_column(texts_of):
    content = "text,story,body\none,two,three\n"
    assert texts_of("a.csv", content, text_field="body") == ["three"]
    with pytest.raises(ValueError, match=r"a\.csv: record 1 has text under 'text' and under"):
        texts_of("a.csv", content)


@pytest.mark.parametrize(
    "content, reason",
    [
        ("text\none, two\n", "line 2: the row has 2 field.*the header 1; a text with a comma must"),
        ("id,text\n1,one\n2\n", "line 3: the row has 1 field.*the header 2"),
        ("id,body\n1,one\n", "record 1 has no field .text. or .story. but 'id', 'body'; name the"),
        ("one story\n\nanother\n", "record 1 has no field"),
        ('text\n"one\n\ntwo\n', "line 4: not CSV .*a double quote may be missing"),
        ('text\n"one" two\n', "line 2: not CSV"),
    ],
)
def test_what_is_no_csv_is_refused(texts_of, content, reason):
    with pytest.raises(ValueError, match=rf"a\.csv: {reason}"):
        texts_of("a.csv", content)


@pytest.mark.parametrize(
    "header, text_field, reason",
    [
        ("text,text", "", '2 columns have the name "text"; rename all but one'),
        ("story,id,story", "", '2 columns have the name "story"'),
        ("body,body", "body", '2 columns have the name "body"'),
    ],
)
def test_two_columns_of_text_are_refused(texts_of, header, text_field, reason):
    """The last of them was read, and the text of the others was lost."""
    row = header.replace("id", "1")
    with pytest.raises(ValueError, match=rf"a\.csv: {reason}"):
        texts_of("a.csv", f"{header}\n{row}\n", text_field=text_field)


def test_other_columns_may_have_equal_names(texts_of):
    assert texts_of("a.csv", "id,text,,\n1,one,,\n") == ["one"]
    assert texts_of("a.csv", "text,text,body\na,b,c\n", text_field="body") == ["c"]


def test_an_endless_line_of_a_csv_file_is_refused(texts_of, monkeypatch):
    monkeypatch.setattr(text_files, "BLOCK_SIZE", 10)
    monkeypatch.setattr(table_records, "MAX_LINE", 100)
    with pytest.raises(ValueError, match=r"a\.csv: a line is longer than 100 characters"):
        texts_of("a.csv", "text\n" + "x" * 1000)
    with pytest.raises(ValueError, match=r"a\.csv: line \d+: not CSV \(field larger than"):
        texts_of("a.csv", 'text\n"' + "x\n" * 500)


@pytest.fixture
def parquet_file(tmp_path):
    """parquet_file(columns, names) writes a.parquet, with other names, and returns its path."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def write(columns: dict[str, list], names: list[str] | None = None) -> str:
        path = str(tmp_path / "a.parquet")
        table = pyarrow.table(columns).rename_columns(names or list(columns))
        parquet.write_table(table, path, row_group_size=3)
        return path

    return write


def test_the_column_of_a_parquet_file_is_read(parquet_file):
    path = parquet_file({"id": [1, 2, 3, 4, 5], "text": TEXTS})
    positions = []
    texts = [chunk.text for chunk in read_documents(path, progress=positions.append)]
    assert texts == [text.strip() for text in TEXTS]
    assert positions == sorted(positions) and positions[-1] == len(open(path, "rb").read())


def test_null_in_a_parquet_file_is_an_empty_text(parquet_file):
    path = parquet_file({"text": ["one", None, ""], "story": [None, "two", None]})
    assert [chunk.text for chunk in read_documents(path)] == ["one", "two"]


@pytest.mark.parametrize(
    "columns, reason",
    [
        ({"id": [1], "body": ["x"]}, "record 1 has no field .* but 'id', 'body'; name the field"),
        ({"text": [5]}, 'record 1 has a number under "text", not text'),
        ({"text": [b"x"]}, 'record 1 has binary data under "text", not text'),
        ({"text": [{"en": "x"}]}, 'record 1 has an object under "text", not text'),
        ({"text": [date(2024, 1, 1)]}, 'record 1 has a value of type date under "text", not text'),
        ({"text": [Decimal(5)]}, 'record 1 has a value of type Decimal under "text", not text'),
        ({"text": ["x"], "story": ["y"]}, "record 1 has text under 'text' and under 'story'"),
    ],
)
def test_a_parquet_file_without_text_is_refused(parquet_file, columns, reason):
    """Binary data and dates were called an object."""
    with pytest.raises(ValueError, match=rf"a\.parquet: {reason}"):
        list(read_documents(parquet_file(columns)))


def test_a_parquet_file_with_two_text_columns_is_refused(parquet_file):
    """The text of the first column was lost."""
    path = parquet_file({"a": ["x"], "b": ["y"], "c": ["z"]}, ["text", "text", "body"])
    with pytest.raises(ValueError, match=r'a\.parquet: 2 columns have the name "text"'):
        list(read_documents(path))
    assert [chunk.text for chunk in read_documents(path, text_field="body")] == ["z"]


@pytest.mark.parametrize("damage", ["cut off", "zeros", "empty"])
def test_a_damaged_parquet_file_is_refused(parquet_file, damage):
    """The file c.parquet of zeros was left out silently."""
    path = parquet_file({"text": TEXTS})
    with open(path, "rb") as file:
        content = file.read()
    damaged = {"cut off": content[:-9], "zeros": b"PAR1" + bytes(1000) + b"PAR1", "empty": b""}
    with open(path, "wb") as file:
        file.write(damaged[damage])
    with pytest.raises(ValueError, match=r"a\.parquet: not a whole Parquet file: "):
        list(read_documents(path))


def test_parquet_without_pyarrow_is_refused_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for path in (tmp_path, tmp_path / "a.parquet"):
        with pytest.raises(ValueError, match=r"a\.parquet: .* needs pyarrow: pip install pyarrow"):
            find_files(str(path))
