import json
import tracemalloc

import pytest

from textdata import json_records, text_files
from textdata.corpus import read_documents

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
    monkeypatch.setattr(text_files, "BLOCK_SIZE", block_size)
    assert texts_of(name, LAYOUTS[name]) == STORIES


def large_records(monkeypatch):
    """Read every record as one that is too large to decode as a whole."""
    monkeypatch.setattr(json_records, "MAX_DECODED", 0)
    monkeypatch.setattr(
        json_records.DECODER, "raw_decode", lambda text, position: raise_recursion_error()
    )


def raise_recursion_error():
    raise RecursionError


@pytest.fixture(params=["whole", "in pieces"])
def any_size(request, monkeypatch):
    """Records are decoded as a whole, or read in pieces."""
    if request.param == "in pieces":
        large_records(monkeypatch)


@pytest.mark.parametrize(
    "record, text",
    [
        ({"text": "T"}, "T"),
        ({"story": "T"}, "T"),
        ({"story": "", "text": "T"}, "T"),
        ({"text": "T", "story": " \n"}, "T"),
        ({"story": None, "text": "T"}, "T"),
        ({"story": 5, "text": "T"}, "T"),
        ({"text": "T", "story": {"text": "no"}}, "T"),
        ({"text": None}, None),
        ({"story": ""}, None),
    ],
)
def test_the_field_that_has_text_is_read(texts_of, any_size, record, text):
    """Under "story", an empty text lost the text under "text", and null was refused."""
    assert texts_of("a.jsonl", json.dumps(record)) == ([text] if text else [])


@pytest.mark.parametrize("record", [{"story": "A title", "text": "T"}, {"text": "T", "story": "U"}])
def test_two_fields_with_text_need_text_field(texts_of, any_size, record):
    """A title under "story" won over the text under "text"."""
    content = json.dumps({"text": "one"}) + json.dumps(record)
    with pytest.raises(ValueError, match=r"record 2 has text under .* --text_field=text or --text"):
        texts_of("a.jsonl", content)
    texts = texts_of("a.json", f"[{json.dumps(record)}]", text_field="story")
    assert texts == [record["story"]]


def test_text_field_names_any_field(texts_of, any_size):
    content = '{"text": "no", "content": "one"}{"story": 5, "content": "two"}'
    assert texts_of("a.jsonl", content, text_field="content") == ["one", "two"]


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
    monkeypatch.setattr(text_files, "BLOCK_SIZE", 100)
    monkeypatch.setattr(json_records, "MAX_DECODED", 1000)
    read = []
    with pytest.raises(ValueError, match="record 1 is not whole JSON"):
        texts_of("a.json", '[{"story" ' + "x" * 100_000, progress=read.append)
    assert max(read) < 20_000  # bytes: the decoder reads ahead of the characters asked for


@pytest.mark.parametrize(
    "record, reason",
    [
        ('"a string"', "is a string, not an object with text"),
        ("5", "is a number, not an object"),
        ("null", "is null, not an object"),
        ("[]", "is a list, not an object"),
        ("{}", 'has no field "text" or "story"'),
        ('{"a": 1, "b": 2}', "has no field \"text\" or \"story\" but 'a', 'b'; name the field"),
        ('{"story": 5}', 'has a number under "story", not text'),
        ('{"text": ["x"]}', 'has a list under "text", not text'),
        ('{"text": true}', 'has true or false under "text", not text'),
        ('{"text": NaN}', 'has a number under "text", not text'),
    ],
)
def test_a_record_without_text_is_refused_with_the_reason(texts_of, record, reason):
    with pytest.raises(ValueError, match=rf"a\.json: record 2 {reason}"):
        texts_of("a.json", f'[{{"story": "one"}}, {record}]')


@pytest.mark.parametrize("record", ["{}", '{"a": 1, "b": 2}', '{"text": ["x"]}', '{"text": NaN}'])
def test_a_large_record_without_text_is_refused(texts_of, monkeypatch, record):
    large_records(monkeypatch)
    with pytest.raises(ValueError, match=r"a\.json: record 1 has (no field|a (list|number) under)"):
        texts_of("a.json", record)


@pytest.mark.parametrize(
    "name, content, documents",
    [
        ("two arrays", '[{"text": "1"}, {"text": "2"}][{"text": "3"}]', ["1", "2", "3"]),
        ("an empty one", '[]\n[{"text": "1"}]\n[ ]', ["1"]),
        ("lines after an array", '[{"text": "1"}]\n{"text": "2"}\n', ["1", "2"]),
        ("an array after lines", '{"text": "1"}\n[{"text": "2"}]\n', ["1", "2"]),
        ("a comma between", '[{"text": "1"}],\n[{"text": "2"}]', ["1", "2"]),
    ],
)
@pytest.mark.parametrize("block_size", [1, 7, 2**20])
def test_joined_arrays_are_all_read(texts_of, monkeypatch, name, content, documents, block_size):
    """cat data00.json data01.json > all.json silently kept the first array only."""
    monkeypatch.setattr(text_files, "BLOCK_SIZE", block_size)
    assert texts_of("all.json", content) == documents


@pytest.mark.parametrize("rest", ["]", "}", "x", '{"text": "2"', "[", '[{"text": "2"}'])
def test_what_follows_an_array_must_be_json(texts_of, rest):
    """The text after the array's ] was ignored."""
    with pytest.raises(ValueError, match=r"record 2 is not whole JSON|the file is cut off after"):
        texts_of("a.json", f'[{{"text": "1"}}]\n{rest}')


@pytest.mark.parametrize(
    "nested",
    ["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000],
    ids=["lists", "objects"],
)
def test_deeply_nested_records_are_read(texts_of, nested):
    """Deep nesting ended in a RecursionError."""
    content = f'{{"text": "1"}}\n{{"meta": {nested}, "text": "2"}}\n{{"text": "3"}}'
    assert texts_of("a.jsonl", content) == ["1", "2", "3"]


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, '{"text": "1"}' + "[" * 9999]
)
def test_endless_nesting_is_refused(texts_of, content):
    with pytest.raises(ValueError, match=r"record \d is not (whole JSON|an object with text)"):
        texts_of("a.jsonl", content)


def test_a_number_of_many_digits_is_skipped(texts_of):
    """Python refuses to convert such a number to an int."""
    assert texts_of("a.jsonl", f'{{"id": {"9" * 5000}, "text": "1"}}') == ["1"]


@pytest.mark.parametrize("block_size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("name", LAYOUTS)
def test_large_records_are_read_in_pieces(texts_of, monkeypatch, name, block_size):
    monkeypatch.setattr(text_files, "BLOCK_SIZE", block_size)
    large_records(monkeypatch)
    assert texts_of(name, LAYOUTS[name]) == STORIES


@pytest.mark.parametrize("block_size", [1, 5, 6, 7, 11, 12, 13, 1000])
def test_escapes_are_decoded_across_blocks(texts_of, monkeypatch, block_size):
    monkeypatch.setattr(text_files, "BLOCK_SIZE", block_size)
    large_records(monkeypatch)
    texts = [
        "🦙" * 9,
        'a\\"b\\\\',
        "\n\ttab\rx",
        "\\u12",
        "é\u2028",
        "a\ud83db",
        "\udd99",
        "\ud83d",
    ]
    records = [{"\\": "x", "text": f"<{text}>"} for text in texts]
    expected = [f"<{text}>".encode("utf-8", "replace").decode() for text in texts]
    assert texts_of("a.json", json.dumps(records)) == expected


@pytest.mark.parametrize(
    "record",
    [
        '{"text": "a line\nbreak"}',
        '{"text": "\\x"}',
        '{"text": "\\u12g4"}',
        '{"text": "cut off',
        '{"text": "one" "id": 5}',
        '{"text" "one"}',
        '{"text": }',
        '{"text": "one", 5: 6}',
        '{"text": "one", "id": [1, 2}',
        '{"text": "one"',
        '{"text": "one", "id": ?}',
        "{",
        '{"' + "x" * 70_000 + '": 1}',
    ],
)
def test_a_damaged_large_record_is_refused(texts_of, monkeypatch, record):
    large_records(monkeypatch)
    with pytest.raises(ValueError, match=r"a\.jsonl: record 2 is not whole JSON"):
        texts_of("a.jsonl", f'{{"text": "first"}}\n{record}')


@pytest.mark.parametrize("extra", ["", "🦙"])
def test_memory_does_not_grow_with_a_record(tmp_path, extra):
    """A record of 58 MB took 2.2 GB; one of 210 MB was "not whole JSON"."""
    size = 30_000_000
    path = tmp_path / "a.jsonl"
    words = "All work and no play. " * (size // 22) + extra
    path.write_text(json.dumps({"id": list(range(1000)), "text": words}, ensure_ascii=False))
    tracemalloc.start()
    try:
        characters = sum(len(chunk.text) for chunk in read_documents(str(path)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert characters == len(words.rstrip())
    assert peak < 60_000_000
