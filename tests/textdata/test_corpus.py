import gzip
import json
import re
import tracemalloc

import pytest

from tests.textdata.helpers import joined_documents, run_stage
from textdata import corpus, text_files
from textdata.corpus import CorpusReport, DocumentChunk, format_report, read_documents
from textdata.input_files import find_files


@pytest.mark.parametrize(
    "content, documents",
    [
        ("", []),
        ("\n \n\t\n", []),
        ("one", ["one"]),
        ("one\ntwo", ["one\ntwo"]),
        ("one\n\ntwo\n", ["one", "two"]),
        ("\n\n one \n\n\n\n two \n\n", ["one", "two"]),
        ("one\n \t \ntwo\n  \n\n  three\n four", ["one", "two", "three\n four"]),
        ("one\r\ntwo\r\n\r\nthree\r\n", ["one\ntwo", "three"]),
        ("\ufeffone\n\ntwo", ["one", "two"]),
        ("naïve\n\n日本語 🦙\n\n\u2028x", ["naïve", "日本語 🦙", "x"]),
    ],
)
def test_txt_documents_are_separated_by_blank_lines(texts_of, content, documents):
    assert texts_of("a.txt", content) == documents


@pytest.mark.parametrize(
    "separator, content, documents",
    [
        (
            "<|endoftext|>",
            "one\n\nstill one<|endoftext|>\ntwo<|endoftext|>",
            ["one\n\nstill one", "two"],
        ),
        ("\n", "one\ntwo\n\n three", ["one", "two", "three"]),
        (".*", "a.*b.c*", ["a", "b.c*"]),
        ("\n\n\n", "one\n\npart\n\n\ntwo", ["one\n\npart", "two"]),
        ("\n---\n", "one\r\n---\r\ntwo", ["one", "two"]),
    ],
)
def test_a_separator_is_taken_literally(texts_of, separator, content, documents):
    assert texts_of("a.txt", content, separator=separator) == documents


@pytest.mark.parametrize("block_size", [1, 5, 2**20])
@pytest.mark.parametrize(
    "content, documents",
    [
        ("one\n\nstill one\n<|endoftext|>\ntwo\n", ["one\n\nstill one", "two"]),
        ("one<|endoftext|>two\n\nstill two<|endoftext|>", ["one", "two\n\nstill two"]),
        ("one\n\n" * 50 + "<|endoftext|>two", ["one\n\n" * 49 + "one", "two"]),
        ("<|endoftext|>one<|endoftext|><|endoftext|>", ["one"]),
        ("one <|endoftext|\n\ntwo", ["one <|endoftext|", "two"]),
    ],
)
def test_endoftext_separates_documents(texts_of, monkeypatch, content, documents, block_size):
    """TinyStories' .txt files became as many documents as paragraphs."""
    monkeypatch.setattr(text_files, "BLOCK_SIZE", block_size)
    assert texts_of("a.txt", content) == documents


@pytest.mark.parametrize("block_size", [1, 5, 2**20])
@pytest.mark.parametrize(
    "mention",
    [
        "GPT-2 ends a text with <|endoftext|>, its only special token.",
        "Write <|endoftext|>.",
        "`<|endoftext|>` and <|endoftext|>, or\n <|endoftext|> too",
        "print('<|endoftext|>')",
    ],
)
def test_endoftext_within_a_line_is_text(texts_of, monkeypatch, mention, block_size):
    """One mention in a sentence made two documents of a file of 1,001."""
    monkeypatch.setattr(text_files, "BLOCK_SIZE", block_size)
    documents = [f"Document {number}." for number in range(20)] + [mention, "The last."]
    report = CorpusReport()
    assert texts_of("a.txt", "\n\n".join(documents), report=report) == documents
    assert format_report(report).splitlines() == [
        "read 22 document(s) in 1 file(s)",
        "1 file(s) have <|endoftext|> only within lines and are not split there; "
        "if it separates documents, give --separator='<|endoftext|>'",
    ]


@pytest.mark.parametrize(
    "content", ["one\n<|endoftext|>\ntwo", "one<|endoftext|> \ntwo", "one\n<|endoftext|>two"]
)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_files_split_at_endoftext_are_counted(texts_of, name, content):
    """Nothing said that a file was split at <|endoftext|> instead of blank lines."""
    report = CorpusReport()
    data = gzip.compress(content.encode()) if name.endswith(".gz") else content
    assert texts_of(name, data, report=report) == ["one", "two"]
    total = CorpusReport()
    total.add(report)
    assert format_report(total).splitlines()[1:] == ["1 file(s) split at <|endoftext|>"]
    report = CorpusReport()
    texts_of("b.txt", "one\n\ntwo", report=report)
    assert "endoftext" not in format_report(report)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.csv", "a.parquet"])
@pytest.mark.parametrize("in_folder", [True, False])
def test_a_pointer_of_git_lfs_is_no_text(tmp_path, name, in_folder):
    """a.txt was tokenized, a.jsonl was called damaged, and a.csv was left out."""
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    (tmp_path / name).write_text(pointer)
    (tmp_path / "b.txt").write_text("text")
    reason = rf"^{re.escape(str(tmp_path / name))}: only a pointer of Git LFS.*run git lfs pull"
    with pytest.raises(ValueError, match=reason):
        find_files(str(tmp_path if in_folder else tmp_path / name))
    with pytest.raises(ValueError, match=reason):
        list(read_documents(str(tmp_path / name)))


def test_a_separator_replaces_endoftext(texts_of):
    assert texts_of("a.txt", "a<|endoftext|>b---c", separator="---") == ["a<|endoftext|>b", "c"]


@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 17])
@pytest.mark.parametrize("separator", ["", "<|endoftext|>", "\n\n\n"])
def test_txt_block_boundaries_make_no_difference(texts_of, monkeypatch, separator, block_size):
    parts = [
        "one two",
        "naïve 日本語 🦙",
        "three\nfour",
        "x",
        "a longer one, with more words than a block holds",
    ]
    content = "\r\n" + (separator or "\n \n\n").join(parts).replace("\n", "\r\n") + "\n\n \n"
    monkeypatch.setattr(text_files, "BLOCK_SIZE", block_size)
    assert texts_of("a.txt", content, separator=separator) == parts


def test_a_long_document_is_split_at_spaces_into_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "BLOCK_SIZE", 64)
    monkeypatch.setattr(corpus, "MAX_CHUNK", 200)
    long = " ".join(f"word{i}" for i in range(500))
    path = tmp_path / "a.txt"
    path.write_text(f"first\n\n{long}\n\nlast")
    first, *chunks, last = read_documents(str(path))
    assert first == DocumentChunk("first", True) and last == DocumentChunk("last", True)
    assert [chunk.starts_document for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert "".join(chunk.text for chunk in chunks) == long
    assert all(chunk.text.startswith(" word") for chunk in chunks[1:])
    assert len(chunks) > 10 and max(len(chunk.text) for chunk in chunks) <= 200 + 64


def test_a_long_document_without_spaces_is_split_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "BLOCK_SIZE", 64)
    monkeypatch.setattr(corpus, "MAX_CHUNK", 200)
    long = "日本" * 1000
    path = tmp_path / "a.txt"
    path.write_text(long, encoding="utf-8")
    assert "".join(chunk.text for chunk in read_documents(str(path))) == long


LONG_DOCUMENTS = {
    "line breaks": "one two\nthree\n" * 300,
    "indented": "if x:\n    y  =  1\n\tz\n" * 200,
    "spaces at every cut": "a" * 150 + " " * 100 + "b" * 150 + " \n" + " " * 120 + "c" * 300,
    "no spaces": "word\n" * 500,
    "leading whitespace": " " * 700 + "x " * 300,
    "trailing whitespace": "x " * 300 + "\n" + " " * 150,
}


@pytest.mark.parametrize("block_size", [1, 7, 64, 5000])
@pytest.mark.parametrize("name", LONG_DOCUMENTS)
def test_a_split_document_keeps_its_whitespace(tmp_path, monkeypatch, name, block_size):
    """A space or a line break was removed wherever a long document was split."""
    monkeypatch.setattr(text_files, "BLOCK_SIZE", block_size)
    monkeypatch.setattr(corpus, "MAX_CHUNK", 200)
    path = tmp_path / "a.txt"
    path.write_text(f"first\n\n{LONG_DOCUMENTS[name]}\n\nlast")
    first, *chunks, last = read_documents(str(path))
    assert first == DocumentChunk("first", True) and last == DocumentChunk("last", True)
    assert "".join(chunk.text for chunk in chunks) == LONG_DOCUMENTS[name].strip()
    assert [chunk.starts_document for chunk in chunks] == [True] + [False] * (len(chunks) - 1)


@pytest.mark.parametrize("separator", ["", " --- ", "\n<end of text>\n"])
@pytest.mark.parametrize("offset", range(12))
def test_a_separator_is_found_where_a_chunk_ends(tmp_path, monkeypatch, separator, offset):
    monkeypatch.setattr(text_files, "BLOCK_SIZE", 16)
    monkeypatch.setattr(corpus, "MAX_CHUNK", 100)
    documents = ["a bc " * 18 + "d" * offset, "e" * 99 + "f" * offset, "the end"]
    path = tmp_path / "a.txt"
    path.write_text((separator or "\n  \n").join(documents))
    report = CorpusReport()
    text = "".join(
        "|" * chunk.starts_document + chunk.text
        for chunk in read_documents(str(path), separator, report=report)
    )
    assert text == "|" + "|".join(document.strip() for document in documents)
    assert (report.num_files, report.num_documents) == (1, 3)


@pytest.mark.parametrize("name", ["lines.txt", "one.txt", "a.json"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    size = 30_000_000
    path = tmp_path / name
    story = "All work and no play makes Jack a dull boy. " * 20
    layouts = {
        "lines.txt": ("", story + "\n\n", ""),
        "one.txt": ("", story, ""),
        "a.json": ("[", json.dumps({"story": story}) + ",", "{}]"),
    }
    begin, record, end = layouts[name]
    with open(path, "w") as file:
        file.write(begin)
        for _ in range(size // len(record)):
            file.write(record)
        file.write(end.replace("{}", '{"story": "last"}'))
    tracemalloc.start()
    try:
        characters = sum(len(chunk.text) for chunk in read_documents(str(path)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert characters > 0.9 * size
    assert peak < 20_000_000


def test_progress_ends_at_the_size_of_the_file(texts_of, monkeypatch):
    monkeypatch.setattr(text_files, "BLOCK_SIZE", 1000)
    content = "naïve text\n\n" * 5000
    positions = []
    texts_of("a.txt", content, progress=positions.append)
    assert positions == sorted(positions) and positions[-1] == len(content.encode())
    assert len(set(positions)) > 3


def test_the_report_counts_files_documents_and_empty_records(tmp_path):
    """The number of documents was never printed, so a mistyped --separator went unnoticed."""
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    (tmp_path / "b.jsonl").write_text('{"text": "four"}\n{"text": null}\n{"text": " "}\n')
    (tmp_path / "c.md").write_text("five")
    report = CorpusReport()
    for file in find_files(str(tmp_path), report=report):
        list(read_documents(file, report=report))
    first, empty, skipped = format_report(report).split("\n")
    assert first == "read 4 document(s) in 2 file(s)"
    assert empty == "left out 2 record(s) without text"
    assert skipped.startswith("left out 1 (the name does not end in .txt") and "c.md" in skipped


def test_a_document_in_chunks_is_counted_once(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MAX_CHUNK", 50)
    (tmp_path / "a.txt").write_text("word " * 100)
    report = CorpusReport()
    list(read_documents(str(tmp_path / "a.txt"), report=report))
    assert report.num_documents == 1


def test_a_separator_without_txt_files_is_refused(tmp_path, monkeypatch):
    """--separator with a .jsonl file was ignored."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    with pytest.raises(ValueError, match=r"--separator=---: .* \.txt files, and a\.jsonl has none"):
        run_stage("pretokenize", "--input=a.jsonl", "--separator=---")


@pytest.mark.parametrize("stage", ["pretokenize", "train_vocab"])
@pytest.mark.parametrize("source", ["a.txt", "b.txt.gz", "texts"])
def test_a_text_field_with_txt_files_only_is_refused(tmp_path, monkeypatch, stage, source):
    """--text_field with a .txt file was ignored."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "texts/a.txt"):
        (tmp_path / name).write_text("one")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"one"))
    (tmp_path / "texts" / "b.jsonl").write_text('{"text": "one"}')
    reason = rf"--text_field=body: .* only \.txt files are read from {re.escape(source)}"
    with pytest.raises(ValueError, match=reason) as error:
        run_stage(stage, f"--input={source}", "--text_field=body")
    left_out = 'left out 1 (no record with a field "body"): texts/b.jsonl'
    assert (left_out in str(error.value)) == (source == "texts")
    assert not (tmp_path / "data").exists()


# The number of documents of each file of ../shared/cases/data.
CASES = {
    "good.txt": 200,
    "d13/repo/data/train.jsonl": 200,
    "d5/blank_lines.jsonl": 200,
    "d5/both.jsonl": 200,
    "d5/both2.jsonl": 200,
    "d5/empty_story.jsonl": 200,
    "d5/mixed_empty.jsonl": 200,
    "d5/mixed_null.jsonl": 200,
    "d5/mixed_ok.jsonl": 200,
    "d5/null.jsonl": 200,
    "d7/eos.txt": 1029,
    "d7/quoted.txt": 1029,
    "d7/v2.txt": 300,
    "d8/b.jsonl.gz": 200,
    "d8/folder/a.txt": 200,
    "d8/folder/d.csv": 50,
    "d9/A.TXT": 200,
    "d9/a.ndjson": 200,
}


@pytest.mark.parametrize("name", CASES)
def test_published_inputs_are_read_whole(shared, name):
    """Each lost text, was left out, or was refused untruthfully."""
    assert len(joined_documents(read_documents(shared(f"cases/data/{name}")))) == CASES[name]


@pytest.mark.parametrize(
    "name, message",
    [
        ("d5/missing.jsonl", 'record 101 has no field "text" or "story" but \'id\'; name the'),
        ("d5/nan.jsonl", 'record 1 has a number under "text", not text'),
        ("d5/title_and_text.jsonl", "record 1 has text under 'text' and under 'story'; choose"),
        ("d5/truncated_last.jsonl", "record 200 is not whole JSON: Unterminated string"),
        ("d8/liar.txt", r"not UTF-8 text but a gzip file; add \.gz to its name"),
    ],
)
def test_published_inputs_are_refused_truthfully(shared, name, message):
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        list(read_documents(shared(f"cases/data/{name}")))
