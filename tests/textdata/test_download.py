import gzip
import io
import os
import random
import re
import shutil
import socket
import tarfile
import tracemalloc

import pytest
import requests

from textdata import download as module
from textdata.download import download, unpack

MIB = 2**20
CONTENT = bytes(range(256)) * (5 * MIB // 256)
OTHER = CONTENT[::-1] + b"other"


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0)


@pytest.fixture
def target(tmp_path) -> str:
    return str(tmp_path / "archive.tar.gz")


@pytest.fixture
def give_up_after(server, target):
    """give_up_after(etag) leaves the files of an interrupted download: the first megabytes of
    CONTENT, with that tag."""

    def leave(etag: str | None = '"one"'):
        server.content["file"] = CONTENT
        server.etag = etag
        server.cuts = [3 * MIB + 5]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "ATTEMPTS", 1)
            with pytest.raises(ConnectionError):
                download(server.url("file"), target)
        assert 0 < os.path.getsize(f"{target}.partial") <= 3 * MIB + 5
        assert not os.path.exists(target)
        server.requests.clear()

    return leave


def content_of(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def files_beside(path: str) -> list[str]:
    return sorted(os.listdir(os.path.dirname(path)))


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**21 + 1])
def test_a_download_leaves_only_the_file(server, target, size):
    server.content["file"] = (CONTENT * 3)[:size]
    download(server.url("file"), target)
    assert content_of(target) == server.content["file"] and files_beside(target) == [
        "archive.tar.gz"
    ]


def test_a_cut_connection_resumes_where_it_stopped(server, target):
    server.content["file"] = CONTENT
    server.cuts = [3 * MIB + 5, MIB + 5]
    download(server.url("file"), target)
    assert content_of(target) == CONTENT
    first, second, third = server.requests
    assert "Range" not in first and "If-Range" not in first
    begins = [
        int(request["Range"].removeprefix("bytes=").removesuffix("-"))
        for request in (second, third)
    ]
    assert 2 * MIB < begins[0] < begins[1]
    assert second["If-Range"] == third["If-Range"] == '"one"'
    assert files_beside(target) == ["archive.tar.gz"]


def test_a_later_run_resumes_an_earlier_download(server, target, give_up_after):
    give_up_after()
    have = os.path.getsize(f"{target}.partial")
    download(server.url("file"), target)
    assert content_of(target) == CONTENT
    assert [request["Range"] for request in server.requests] == [f"bytes={have}-"]


@pytest.mark.parametrize("before", ['"one"', 'W/"one"', None])
@pytest.mark.parametrize("now", ['"two"', 'W/"two"', None])
def test_changed_content_is_downloaded_from_the_start(server, target, give_up_after, before, now):
    """Two contents must not be joined. Many servers ignore an empty If-Range, and a weak tag is not
    valid there (RFC 9110, 13.1.5)."""
    give_up_after(before)
    server.content["file"] = OTHER
    server.etag = now
    download(server.url("file"), target)
    assert content_of(target) == OTHER
    assert not any((request["If-Range"] or "").startswith("W/") for request in server.requests)


def test_a_server_that_ignores_ranges_restarts_the_download(server, target, give_up_after):
    give_up_after()
    server.knows_ranges = False
    download(server.url("file"), target)
    assert content_of(target) == CONTENT


def test_a_complete_partial_file_is_only_renamed(server, target, give_up_after):
    give_up_after()
    with open(f"{target}.partial", "wb") as file:
        file.write(CONTENT)
    download(server.url("file"), target)
    assert content_of(target) == CONTENT and files_beside(target) == ["archive.tar.gz"]
    assert len(server.requests) == 1


def test_a_partial_file_that_is_too_long_is_downloaded_again(server, target, give_up_after):
    give_up_after()
    with open(f"{target}.partial", "wb") as file:
        file.write(CONTENT + b"too much")
    download(server.url("file"), target)
    assert content_of(target) == CONTENT


@pytest.mark.parametrize("statuses", [[503], [503, 502, 500, 504]])
def test_server_errors_are_retried(server, target, statuses):
    server.content["file"] = CONTENT
    server.statuses = statuses
    download(server.url("file"), target)
    assert content_of(target) == CONTENT


def test_persistent_server_errors_give_up_with_the_reason(server, target):
    server.content["file"] = CONTENT
    server.statuses = [503] * 100
    with pytest.raises(ConnectionError, match=r"gave up on http\S+/file after 5 attempts: 503 "):
        download(server.url("file"), target)
    assert len(server.requests) == 5 and not os.path.exists(target)


@pytest.mark.parametrize("status", [404, 403, 410])
def test_client_errors_are_not_retried(server, target, status):
    server.statuses = [status]
    with pytest.raises(requests.HTTPError, match=str(status)):
        download(server.url("file"), target)
    assert len(server.requests) == 1 and not os.path.exists(target)


@pytest.mark.parametrize("length", ["abc", "-5", "1e3", "9" * 30, "5, 6"])
def test_a_senseless_content_length_is_refused_at_once(server, target, length):
    """ "abc" ended in a traceback of int()."""
    server.content["file"] = CONTENT[:5000]
    server.headers = {"Content-Length": length}
    with pytest.raises((requests.RequestException, ConnectionError), match="Content-Length"):
        download(server.url("file"), target)
    assert not os.path.exists(target)


def test_status_416_without_a_range_is_a_refusal(server, target):
    """It ended in a FileNotFoundError for the partial file."""
    server.statuses = [416]
    with pytest.raises(requests.HTTPError, match="416"):
        download(server.url("file"), target)
    assert len(server.requests) == 1 and files_beside(target) == []


def test_a_part_from_elsewhere_is_not_appended(server, target, give_up_after):
    give_up_after()
    server.headers = {"Content-Range": f"bytes 7-{len(CONTENT) - 1}/{len(CONTENT)}"}
    with pytest.raises(requests.RequestException, match=r"bytes 7-.* instead of the bytes from"):
        download(server.url("file"), target)
    assert not os.path.exists(target)


def test_a_body_shorter_than_content_length_gives_up(server, target):
    server.content["file"] = CONTENT
    server.extra_length = 5
    server.knows_ranges = False
    with pytest.raises(ConnectionError, match="after 5 attempts"):
        download(server.url("file"), target)
    assert not os.path.exists(target)


def test_an_unreachable_server_gives_up_with_a_plain_reason(target):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # not listening
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/file"
        with pytest.raises(
            ConnectionError, match=rf"{re.escape(url)} after 5 attempts: .*[Cc]onnection refused$"
        ):
            download(url, target)
    assert files_beside(target) == []


def test_the_old_file_stays_until_the_new_one_is_complete(server, target):
    with open(target, "wb") as file:
        file.write(b"old")
    server.content["file"] = CONTENT
    server.statuses = [503] * 5
    with pytest.raises(ConnectionError):
        download(server.url("file"), target)
    assert content_of(target) == b"old"


def member(name: str, content: bytes = b"x", **attributes) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info, io.BytesIO(content)


@pytest.fixture
def pack(tmp_path):
    """pack(members) writes a .tar.gz; returns its path."""

    def write(members) -> str:
        path = str(tmp_path / "packed")
        with tarfile.open(path, "w:gz") as tar:
            for info, content in members:
                tar.addfile(info, content)
        return path

    return write


def test_an_archive_is_unpacked_into_a_new_folder(pack, tmp_path):
    members = [
        member("data00.json", b"[]"),
        member("./data01.json", CONTENT),
        member("deep/er/a.txt"),
    ]
    unpack(pack(members), str(tmp_path / "folder"))
    assert (tmp_path / "folder" / "data00.json").read_bytes() == b"[]"
    assert (tmp_path / "folder" / "data01.json").read_bytes() == CONTENT
    assert (tmp_path / "folder" / "deep" / "er" / "a.txt").read_bytes() == b"x"
    assert sorted(os.listdir(tmp_path)) == ["folder", "packed"]


def symlink(name: str, target: str, member_type: bytes = tarfile.SYMTYPE):
    return member(name, b"", type=member_type, linkname=target)


EVIL = {
    "a path upwards": [member("../outside")],
    "a path upwards in the middle": [member("deep/../../outside")],
    "a symlink upwards": [symlink("link", "../outside")],
    "an absolute symlink": [symlink("link", "/etc/passwd")],
    "a file through a symlink": [symlink("link", ".."), member("link/outside")],
    "a symlink through a symlink": [
        symlink("a", "."),
        symlink("a/b", "../.."),
        member("a/b/outside"),
    ],
    "a hard link upwards": [symlink("link", "../packed", tarfile.LNKTYPE)],
    "a device": [symlink("null", "", tarfile.CHRTYPE)],
    "a pipe": [symlink("pipe", "", tarfile.FIFOTYPE)],
    "a symlink inside": [symlink("link", "data00.json")],
    "a hard link inside": [symlink("link", "data00.json", tarfile.LNKTYPE)],
    "a sparse file": [symlink("sparse", "", tarfile.GNUTYPE_SPARSE)],
    "a type of the future": [symlink("new", "", b"Z")],
    "deep folders": [member("a/" * 30_000 + "b")],
    "a name with a NUL": [member("a", pax_headers={"path": "a\0b"})],
    "a time that is no number": [member("a", pax_headers={"mtime": "nan"})],
}


def long_link_chain() -> list:
    """Links whose resolved path is longer than PATH_MAX, so that os.path.realpath gives up and
    the data filter of Python 3.11.7 lets a file through (CVE-2025-4517)."""
    folder = "d" * 247
    members, path = [], ""
    for name in "abcdefghijklmnop":
        members.append(member(path + folder, b"", type=tarfile.DIRTYPE))
        members.append(symlink(path + name, folder))
        path += f"{name}/"
    members.append(symlink(f"{path}{'l' * 254}", "../" * 16))
    members.append(symlink("escape", f"{path}{'l' * 254}/../../../outside"))
    members.append(member("escape/written"))
    return members


EVIL["a chain of links longer than PATH_MAX"] = long_link_chain()


@pytest.mark.parametrize("attack", EVIL)
def test_an_archive_that_writes_outside_its_folder_is_refused(pack, tmp_path, attack):
    with pytest.raises(tarfile.TarError):
        unpack(pack([member("data00.json"), *EVIL[attack]]), str(tmp_path / "deep" / "folder"))
    left = [name for _, folders, files in os.walk(tmp_path) for name in folders + files]
    assert sorted(left) == ["packed"] or sorted(left) == ["deep", "packed"]


@pytest.mark.parametrize("members", [[], [member("empty", b"", type=tarfile.DIRTYPE)]])
def test_an_archive_without_files_is_refused(pack, tmp_path, members):
    """An empty archive ended in a FileNotFoundError for the folder."""
    with pytest.raises(tarfile.ReadError, match="it holds no files"):
        unpack(pack(members), str(tmp_path / "folder"))
    assert os.listdir(tmp_path) == ["packed"]


def test_an_archive_may_not_unpack_to_much_more(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MIN_LIMIT", 1 << 20)
    for members in ([member("zeros", bytes(2 << 20))], [member(str(n), b"") for n in range(300)]):
        with pytest.raises(tarfile.ReadError, match="it unpacks to more than"):
            unpack(pack(members), str(tmp_path / "folder"))
        assert os.listdir(tmp_path) == ["packed"]


@pytest.mark.parametrize("after", ["zeros", "another archive"])
def test_what_follows_the_end_of_an_archive_is_limited(tmp_path, monkeypatch, after):
    """1.8 MB with 400 MB of zeros after the end of the archive were unpacked to the end."""
    monkeypatch.setattr(module, "MIN_LIMIT", 1 << 20)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        tar.addfile(*member("data00.json"))
    path = str(tmp_path / "packed")
    with gzip.open(path, "wb") as file:
        file.write(content.getvalue())
        file.write(bytes(5 << 20) if after == "zeros" else content.getvalue() * 500)
    with pytest.raises(tarfile.ReadError, match="it unpacks to more than 1 MiB"):
        unpack(path, str(tmp_path / "folder"))
    assert os.listdir(tmp_path) == ["packed"]


def test_the_headers_of_an_archive_are_limited(pack, tmp_path, monkeypatch):
    """The limit counted what members hold, not their headers of up to a megabyte each."""
    monkeypatch.setattr(module, "MIN_LIMIT", 1 << 20)
    members = [member(str(n), b"", pax_headers={"comment": "a" * 300_000}) for n in range(5)]
    with pytest.raises(tarfile.ReadError, match="it unpacks to more than 1 MiB"):
        unpack(pack(members), str(tmp_path / "folder"))


@pytest.mark.parametrize("header_type", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_member_with_many_headers_is_refused(pack, tmp_path, header_type):
    """Headers of headers ended in a RecursionError."""
    headers = [member("header", b"12 path=aaa\n", type=header_type) for _ in range(1500)]
    with pytest.raises(tarfile.ReadError, match="a member in it has too many headers"):
        unpack(pack(headers), str(tmp_path / "folder"))
    assert os.listdir(tmp_path) == ["packed"]


def test_a_long_header_is_not_read_into_memory(tmp_path):
    """A header of zeros, compressed a thousandfold, took all of its size in memory."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 200 << 20
    path = str(tmp_path / "packed")
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        for _ in range(50):
            file.write(bytes(4 << 20))
    tracemalloc.start()
    with pytest.raises(tarfile.ReadError, match="claims to be too long"):
        unpack(path, str(tmp_path / "folder"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20


def test_an_absolute_path_stays_inside_the_folder(pack, tmp_path):
    outside = tmp_path / "outside"
    unpack(pack([member(str(outside))]), str(tmp_path / "folder"))
    assert not outside.exists()
    assert sorted(os.listdir(tmp_path)) == ["folder", "packed"]


def test_setuid_and_write_permissions_are_removed(pack, tmp_path):
    unpack(pack([member("tool", mode=0o6777)]), str(tmp_path / "folder"))
    assert (tmp_path / "folder" / "tool").stat().st_mode & 0o6022 == 0


REFUSALS = (tarfile.TarError, EOFError, OSError)  # the download stage reports them in one sentence


def test_a_truncated_archive_is_refused_wherever_it_ends(pack, tmp_path):
    """tarfile alone takes an archive that is cut within a header as complete."""
    names = [f"data{number:02d}.json" for number in range(3)]
    path = pack([member(name, name.encode() * 100) for name in names])
    whole = content_of(path)
    folder = tmp_path / "folder"
    accepted = []
    for length in range(len(whole)):
        with open(path, "wb") as file:
            file.write(whole[:length])
        try:
            unpack(path, str(folder))
        except REFUSALS:
            assert os.listdir(tmp_path) == ["packed"]
        except Exception as error:
            accepted.append((length, repr(error)))
        else:
            if sorted(os.listdir(folder)) != names:
                accepted.append((length, sorted(os.listdir(folder))))
            shutil.rmtree(folder)
    assert accepted == []


@pytest.mark.parametrize(
    "content", [CONTENT[:5000], random.Random(1).randbytes(5000)], ids=["compressible", "random"]
)
def test_a_damaged_archive_is_refused(pack, tmp_path, content):
    """The checksum of gzip is at the end, which tarfile does not read."""
    path = pack([member(f"{number}.json", content) for number in range(4)])
    whole = content_of(path)
    for position in range(len(whole) // 4, len(whole) - 8, len(whole) // 10):
        with open(path, "wb") as file:
            file.write(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(REFUSALS):
            unpack(path, str(tmp_path / "folder"))
        assert os.listdir(tmp_path) == ["packed"]


def test_files_of_an_interrupted_unpacking_are_removed(pack, tmp_path):
    (tmp_path / "folder.partial").mkdir()
    (tmp_path / "folder.partial" / "stale.json").write_text("x")
    unpack(pack([member("data00.json")]), str(tmp_path / "folder"))
    assert os.listdir(tmp_path / "folder") == ["data00.json"]
