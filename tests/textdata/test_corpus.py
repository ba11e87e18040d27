import json
import re
import tracemalloc

import pytest

from textdata import corpus
from textdata.corpus import CorpusReport, DocumentChunk, find_files, read_documents


@pytest.fixture
def texts_of(tmp_path):
    """texts_of("a.txt", content) writes the file and reads its documents."""

    def write_and_read(name: str, content: str | bytes, **options) -> list[str]:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return [chunk.text for chunk in read_documents(str(path), **options)]

    return write_and_read


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


STORIES = [
    'One "quoted" \\ story.\n\nIts second {part}]',
    "naïve 日本語 🦙",
    "[",
    "}",
    "a" * 40,
    "last",
]
RECORDS = [{"story": text, "words": ["x", {"y": None}], "n": -1.5e3} for text in STORIES]
LAYOUTS = {
    "array.json": json.dumps(RECORDS),
    "unicode.json": json.dumps(RECORDS, ensure_ascii=False),
    "indented.json": json.dumps(RECORDS, indent=2),
    "windows.json": "\ufeff\r\n" + json.dumps(RECORDS, indent=1).replace("\n", "\r\n") + "\r\n",
    "tight.json": "[" + ",".join(json.dumps(r, separators=(",", ":")) for r in RECORDS) + "]",
    "lines.jsonl": "".join(json.dumps(r) + "\n" for r in RECORDS),
    "no_last_newline.jsonl": "\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS),
    "blank_lines.jsonl": "\n\n" + "\r\n\r\n".join(json.dumps(r) for r in RECORDS) + "\n\n",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_json_documents_are_the_stories(texts_of, name):
    assert texts_of(name, LAYOUTS[name]) == STORIES


@pytest.mark.parametrize("block_size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("name", LAYOUTS)
def test_json_block_boundaries_make_no_difference(texts_of, monkeypatch, name, block_size):
    monkeypatch.setattr(corpus, "BLOCK_SIZE", block_size)
    assert texts_of(name, LAYOUTS[name]) == STORIES


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
    monkeypatch.setattr(corpus, "BLOCK_SIZE", block_size)
    assert texts_of("a.txt", content, separator=separator) == parts


def test_the_key_may_be_text_instead_of_story(texts_of):
    content = '{"text": "one"}\n{"text": "not this", "story": "two"}\n'
    assert texts_of("a.jsonl", content) == ["one", "two"]


def test_an_empty_json_array_holds_nothing(texts_of):
    assert texts_of("a.json", " [ ] ") == []


def test_half_of_a_surrogate_pair_becomes_a_question_mark(texts_of):
    content = r'[{"story": "a\ud83db"}, {"story": "\ud83e\udd99"}, {"story": "\udd99"}]'
    assert texts_of("a.json", content) == ["a?b", "🦙", "?"]


def test_a_truncated_json_array_is_refused_wherever_it_ends(texts_of):
    whole = json.dumps(RECORDS[:3])
    for length in range(1, len(whole)):
        with pytest.raises(
            ValueError, match=r"a\.json: (the file is cut off|record \d is not whole JSON)"
        ):
            texts_of("a.json", whole[:length])


def test_a_truncated_json_line_is_refused_with_its_number(texts_of):
    with pytest.raises(ValueError, match=r"a\.jsonl: record 2 is not whole JSON"):
        texts_of("a.jsonl", '{"story": "one"}\n{"story": "tw')


@pytest.mark.parametrize(
    "content",
    [
        '[{"story": "one"}, {"story" "two"}]',
        '[{"story": "one"}, nonsense]',
        '[{"story": "one"}, {"story": "a line\nbreak"}]',
    ],
)
def test_damaged_json_is_refused_with_the_number_of_the_record(texts_of, content):
    with pytest.raises(ValueError, match=r"a\.json: record 2 is not whole JSON"):
        texts_of("a.json", content)


def test_damaged_json_is_refused_without_reading_the_whole_file(texts_of, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_SIZE", 100)
    monkeypatch.setattr(corpus, "MAX_RECORD", 1000)
    read = []
    with pytest.raises(ValueError, match="record 1 is not whole JSON"):
        texts_of("a.json", '[{"story" ' + "x" * 100_000, progress=read.append)
    assert max(read) < 20_000  # bytes: the decoder reads ahead of the characters asked for


@pytest.mark.parametrize(
    "record", ['"a story"', "5", "null", "[]", "{}", '{"story": 5}', '{"story": null}']
)
def test_a_record_without_text_is_refused(texts_of, record):
    with pytest.raises(ValueError, match=r'a\.json: record 2 has no text under "story" or "text"'):
        texts_of("a.json", f'[{{"story": "one"}}, {record}]')


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl"])
@pytest.mark.parametrize(
    "content", ["[{}]".encode("utf-16"), b'[{"story": "caf\xe9"}]', "naïve".encode("latin-1")]
)
def test_text_that_is_not_utf8_is_refused_with_its_path(texts_of, name, content):
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: not UTF-8 text"):
        texts_of(name, content)


def test_a_long_document_is_split_at_spaces_into_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_SIZE", 64)
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
    monkeypatch.setattr(corpus, "BLOCK_SIZE", 64)
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
    monkeypatch.setattr(corpus, "BLOCK_SIZE", block_size)
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
    monkeypatch.setattr(corpus, "BLOCK_SIZE", 16)
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
    monkeypatch.setattr(corpus, "BLOCK_SIZE", 1000)
    content = "naïve text\n\n" * 5000
    positions = []
    texts_of("a.txt", content, progress=positions.append)
    assert positions == sorted(positions) and positions[-1] == len(content.encode())
    assert len(set(positions)) > 3


def test_all_text_files_below_a_folder_are_found_in_order(tmp_path):
    for name in (
        "b.txt",
        "a.json",
        "deep/er/c.jsonl",
        "deep/d.txt",
        "notes.md",
        "tok512.bin",
        "tok512/meta.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    names = [path[len(str(tmp_path)) + 1 :] for path in find_files(str(tmp_path))]
    assert names == ["a.json", "b.txt", "deep/d.txt", "deep/er/c.jsonl"]
    assert find_files(str(tmp_path / "b.txt")) == [str(tmp_path / "b.txt")]


@pytest.mark.parametrize(
    "name, reason",
    [
        ("missing.txt", "there is no such file or folder"),
        ("notes.md", r"give a file that ends in \.txt, \.json, \.jsonl, or a folder"),
        ("empty", r"no file here ends in \.txt, \.json, \.jsonl"),
    ],
)
def test_a_path_without_text_is_refused_with_its_name(tmp_path, name, reason):
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / name))}: {reason}"):
        find_files(str(tmp_path / name))
