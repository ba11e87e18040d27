import gzip
import json
import os
import re
from pathlib import Path

import pytest

from textdata import input_files
from textdata.corpus import CorpusReport
from textdata.input_files import find_files


def write_files(folder: Path, *names: str) -> None:
    """Write text files with these names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def find(folder: Path, **options) -> tuple[list[str], dict[str, str]]:
    """The names of the files that are read, and the reasons by the names of the others."""
    report = CorpusReport()
    files = find_files(str(folder), report=report, **options)
    return (
        [os.path.relpath(file, folder) for file in files],
        {os.path.relpath(path, folder): reason for path, reason in report.skipped},
    )


def test_all_text_files_below_a_folder_are_found_in_order(tmp_path):
    write_files(tmp_path, "b.txt", "deep/d.txt", "notes.md", "tok512.bin", "A.TXT")
    (tmp_path / "a.json").write_text('[{"text": "x"}]')
    (tmp_path / "deep" / "er").mkdir()
    (tmp_path / "deep" / "er" / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}'))
    files, skipped = find(tmp_path)
    assert files == ["A.TXT", "a.json", "b.txt", "deep/d.txt", "deep/er/c.jsonl.gz"]
    assert skipped.keys() == {"notes.md", "tok512.bin"}
    assert find_files(str(tmp_path / "b.txt")) == [str(tmp_path / "b.txt")]


def test_hidden_files_and_folders_are_left_out(tmp_path):
    """.git, .ipynb_checkpoints, __MACOSX and ._a.txt were read."""
    hidden = [".git/x.txt", "a/.ipynb_checkpoints/x.txt", "__MACOSX/x.txt", "a/._x.txt"]
    write_files(tmp_path, "a/x.txt", *hidden)
    files, skipped = find(tmp_path)
    assert files == ["a/x.txt"]
    assert skipped == dict.fromkeys(
        [".git", "a/.ipynb_checkpoints", "__MACOSX", "a/._x.txt"], "hidden"
    )
    assert find(tmp_path / ".git")[0] == ["x.txt"]  # named by the user


READ_ALREADY = "a link to a folder that is read already"
CONTAINS_INPUT = "a link to a folder that contains the input"


def test_links_are_read_once(tmp_path):
    """Linked folders were left out silently, and ../c.txt was said to be read."""
    folder = tmp_path / "in"
    write_files(folder, "a.txt", "sub/b.txt")
    write_files(tmp_path / "elsewhere", "c.txt", "d.txt")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(tmp_path / "elsewhere")
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "sub" / "up").symlink_to(tmp_path)
    (folder / "top").symlink_to("/")
    (folder / "same.txt").symlink_to(folder / "a.txt")
    (folder / "other.txt").symlink_to(tmp_path / "elsewhere" / "none.txt")
    files, skipped = find(folder)
    assert files == ["a.txt", "again/c.txt", "again/d.txt", "sub/b.txt"]
    assert skipped == {
        "linked": READ_ALREADY,
        "sub/loop": READ_ALREADY,
        "sub/up": CONTAINS_INPUT,
        "top": CONTAINS_INPUT,
        "same.txt": "a link to a file that is read already",
        "other.txt": "a link that leads nowhere: No such file or directory",
    }


@pytest.mark.parametrize("link", ["0link", "zlink", "a/0link", "a/zlink"])
@pytest.mark.parametrize("target", ["a/b", "c"])
def test_a_real_folder_is_read_before_links_to_it(tmp_path, link, target):
    """A link whose name sorted first was read, and the real folder was called a link."""
    write_files(tmp_path, "a/b/x.txt", "c/y.txt")
    (tmp_path / link).symlink_to(tmp_path / target)
    files, skipped = find(tmp_path)
    assert files == ["a/b/x.txt", "c/y.txt"] and skipped == {link: READ_ALREADY}


def test_linked_folders_may_contain_each_other(tmp_path):
    folder = tmp_path / "in"
    write_files(tmp_path / "out", "x.txt", "deep/y.txt", "deep/er/z.txt")
    folder.mkdir()
    (folder / "0er").symlink_to(tmp_path / "out" / "deep" / "er")
    (folder / "1deep").symlink_to(tmp_path / "out" / "deep")
    (folder / "2out").symlink_to(tmp_path / "out")
    files, skipped = find(folder)
    assert files == ["2out/deep/er/z.txt", "2out/deep/y.txt", "2out/x.txt"]
    assert skipped == {"0er": READ_ALREADY, "1deep": READ_ALREADY}
    (folder / "2out").unlink()
    (tmp_path / "out" / "deep" / "up").symlink_to(tmp_path / "out")
    files, skipped = find(folder)
    assert files == ["1deep/er/z.txt", "1deep/up/x.txt", "1deep/y.txt"]
    assert skipped["1deep/up/deep"] == "a folder that is read already, by a link"


def test_a_link_to_a_file_without_format_is_read(tmp_path):
    """It was left out as read already, as all files of a Hugging Face cache."""
    write_files(tmp_path, "blobs/1f2e", "blobs/3d4c")
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "a.txt").symlink_to("../blobs/1f2e")
    (tmp_path / "snapshots" / "b.txt").symlink_to("../blobs/3d4c")
    files, skipped = find(tmp_path)
    assert files == ["snapshots/a.txt", "snapshots/b.txt"]
    assert skipped.keys() == {"blobs/1f2e", "blobs/3d4c"}


def test_a_given_link_and_the_root_are_walked(tmp_path, monkeypatch):
    write_files(tmp_path / "in", "a.txt")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    assert find(tmp_path / "link") == (["a.txt"], {})
    monkeypatch.setattr(os, "walk", lambda top, onerror: iter([(top, [], ["a.txt"])]))
    assert list(input_files.walk("/", [])) == ["/a.txt"]


def test_pipes_are_left_out(tmp_path):
    write_files(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "b.txt")
    files, skipped = find(tmp_path)
    assert files == ["a.txt"] and skipped == {"b.txt": "a device, socket or pipe"}
    with pytest.raises(ValueError, match=r"b\.txt: not a file or folder"):
        find_files(str(tmp_path / "b.txt"))


def test_json_without_a_text_field_is_left_out(tmp_path):
    """cria took part1.json, metrics.jsonl and config.json for text, and skipped any meta.json."""
    contents = {
        "tok400/part1.json": {"dtype": "<u2", "shards": []},
        "tok400/meta.json": {"vocab_size": 400, "shards": []},
        "out/metrics.jsonl": {"iter": 1, "loss": 2.5},
        "out/config.json": {"architectures": ["LlamaForCausalLM"], "vocab_size": 400},
        "dataset_infos.json": {"default": {"features": {"text": {"dtype": "string"}}}},
        "labels.json": ["a", "b"],
        "meta.json": {"text": "one"},
        "null.jsonl": {"text": None},
    }
    for name, content in contents.items():
        write_files(tmp_path, name)
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "labels.csv").write_text("id,label\n1,one\n")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "damaged.json").write_text("{")
    (tmp_path / "late.jsonl").write_text('{"id": 5}\n{"text": "two"}\n')
    files, skipped = find(tmp_path)
    assert files == ["damaged.json", "empty.json", "late.jsonl", "meta.json", "null.jsonl"]
    assert set(skipped.values()) == {'no record with a field "text" or "story"'}
    files, skipped = find(tmp_path, text_field="loss")
    assert "out/metrics.jsonl" in files and "meta.json" in skipped


@pytest.mark.parametrize(
    "num_records, reason",
    [
        (99, 'no record with a field "text" or "story"'),
        (100, 'no record with a field "text" or "story"'),
        (101, 'none of the first 100 records has a field "text" or "story"'),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_late_text_is_left_out_with_a_true_reason(tmp_path, name, num_records, reason):
    """The reason said that no record has the field, although only 100 were read."""
    line = "1\n" if name == "a.csv" else '{"id": 1}\n'
    content = "id\n" * (name == "a.csv") + line * num_records
    if num_records == 101 and name != "a.csv":
        content += '{"text": "late"}\n'
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    write_files(tmp_path, "b.txt")
    assert find(tmp_path) == (["b.txt"], {name: reason})


def test_text_field_finds_its_column_beside_text(tmp_path):
    """A Parquet file with a column "text", too, was left out."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a"], "body": ["b"]}), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("text,body\na,b\n")
    assert find(tmp_path, text_field="body") == (["a.parquet", "b.csv"], {})


def test_a_large_file_without_text_is_left_out(tmp_path):
    """tokenizer.json is one large object."""
    vocab = {f"token{number}": number for number in range(250_000)}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "vocab": vocab}))
    write_files(tmp_path, "a.txt")
    assert find(tmp_path)[0] == ["a.txt"]


@pytest.mark.parametrize(
    "name, reason",
    [
        ("missing.txt", "there is no such file or folder"),
        ("notes.md", r"give a file that ends in \.txt, \.json, \.jsonl, .* or a folder of them"),
        ("notes", r"give a file that ends in \.txt"),
        ("a.parquet.gz", r"give a file that ends in \.txt"),
        ("a.gz", r"give a file that ends in \.txt"),
        ("empty", r"no file here ends in \.txt, \.json, \.jsonl, .* and has text$"),
        ("hidden", r"no file here .*; left out 1 \(hidden\): .*/hidden/\.a\.txt$"),
    ],
)
def test_a_path_without_text_is_refused_with_its_name(tmp_path, name, reason):
    write_files(tmp_path, "notes.md", "notes", "a.parquet.gz", "a.gz", "hidden/.a.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / name))}: {reason}"):
        find_files(str(tmp_path / name))


@pytest.mark.parametrize(
    "name, files, num_skipped",
    [
        ("d13/repo", ["data/train.jsonl", "requirements.txt"], 2),
        ("d8/only", ["b.jsonl.gz"], 0),
        ("d8/folder", ["a.txt", "b.jsonl.gz", "c.parquet", "d.csv"], 1),
        ("d9/folder", ["A.TXT", "b.txt"], 0),
        ("d9/only", ["A.TXT"], 0),
        ("d9", ["A.TXT", "a.ndjson", "folder/A.TXT", "folder/b.txt", "only/A.TXT"], 2),
    ],
)
def test_published_folders_are_read_whole(shared, name, files, num_skipped):
    """Files in capital letters or with gzip, and .csv files, were left out silently."""
    if "c.parquet" in files:
        pytest.importorskip("pyarrow")
    found, skipped = find(Path(shared(f"cases/data/{name}")))
    assert found == files and len(skipped) == num_skipped
