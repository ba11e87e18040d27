"""
Downloads that resume after an interruption, and archives unpacked without trusting them.
"""

import contextlib
import gzip
import os
import re
import shutil
import tarfile
import time
import zlib

import requests
from tqdm import tqdm

ATTEMPTS = 5
TIMEOUT = 30  # seconds without a byte
PAUSE = 0.5  # seconds before the second attempt; doubled each time
# The limits of an archive. Text is rarely compressed to less than a tenth of its size.
MAX_RATIO = 100  # of the unpacked size to the archive's
MIN_LIMIT = 256 << 20  # bytes that any archive may unpack to
BLOCK_SIZE = 4096  # bytes of a disk that a file or folder takes at least
MAX_NAME_LENGTH = 500  # characters of the path of a member
MAX_READ = 1 << 20  # bytes that tarfile may read at once; it reads files in smaller blocks


def download(url: str, path: str) -> None:
    """Fetch url to path, and resume an earlier download. Raises requests.HTTPError if the server
    refuses (status 4xx), requests.exceptions.InvalidHeader if its headers make no sense,
    ConnectionError if it cannot be reached or its answers are too short."""
    partial = f"{path}.partial"
    tag_path = f"{path}.partial.etag"
    for attempt in range(1, ATTEMPTS + 1):
        reason = try_fetch(url, partial, tag_path)
        if reason is None:
            break
        if attempt == ATTEMPTS:
            raise ConnectionError(f"gave up on {url} after {ATTEMPTS} attempts: {reason}")
        tqdm.write(f"{reason}; trying again ({attempt + 1} of {ATTEMPTS})")
        time.sleep(PAUSE * 2 ** (attempt - 1))
    os.replace(partial, path)
    with contextlib.suppress(FileNotFoundError):
        os.remove(tag_path)


def try_fetch(url: str, partial: str, tag_path: str) -> str | None:
    """One attempt. Returns None if the file is complete, else the reason for another attempt.
    Raises requests.HTTPError for a status below 500, and InvalidHeader for headers without sense:
    another attempt would not change them."""
    try:
        if fetch(url, partial, tag_path):
            return None
    except requests.HTTPError as error:
        if error.response.status_code < 500:
            raise
        return plain_reason(error)
    except requests.exceptions.InvalidHeader:
        raise
    except requests.RequestException as error:
        return plain_reason(error)
    return "the connection closed before the end"


def fetch(url: str, partial: str, tag_path: str) -> bool:
    """Append what the server sends to the file partial; returns whether the file is complete."""
    have = os.path.getsize(partial) if os.path.exists(partial) else 0
    headers = {"Accept-Encoding": "identity"}
    if have and (tag := read_tag(tag_path)):  # only unchanged content may be continued
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416 and "Range" in headers:  # no bytes after the first have
            size = response.headers.get("Content-Range", "").rpartition("/")[2]
            if size == str(have):
                return True
            os.remove(partial)
            return False
        response.raise_for_status()
        offset = have if response.status_code == 206 and "Range" in headers else 0
        check_content_range(response, offset)
        length = content_length(response)
        total = None if length is None else offset + length
        write_tag(tag_path, response)
        bar = tqdm(
            disable=None,
            total=total,
            initial=offset,
            unit="B",
            unit_scale=True,
            desc=os.path.basename(url),
        )
        with open(partial, "ab" if offset else "wb") as file, bar:
            for block in response.iter_content(2**16):
                bar.update(file.write(block))
    return total is None or os.path.getsize(partial) == total


def content_length(response: requests.Response) -> int | None:
    """The number of bytes that a response announces, or None if it announces none. Raises
    requests.exceptions.InvalidHeader for anything but digits."""
    length = response.headers.get("Content-Length")
    if length is None:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", length):
        raise requests.exceptions.InvalidHeader(
            f"the server sends Content-Length: {length[:40]!r}, which is not a number of bytes"
        )
    return int(length)


def check_content_range(response: requests.Response, offset: int) -> None:
    """Raise requests.exceptions.InvalidHeader if a partial response begins elsewhere."""
    found = response.headers.get("Content-Range", "")
    if response.status_code == 206 and not found.startswith(f"bytes {offset}-"):
        raise requests.exceptions.InvalidHeader(
            f"the server sends Content-Range: {found[:40]!r} instead of the bytes from {offset} on"
        )


def read_tag(path: str) -> str:
    """The validator of the content that was begun (ETag or Last-Modified), or an empty string."""
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8") as file:
        return file.read()


def write_tag(path: str, response: requests.Response) -> None:
    """Save the response's validator. A weak ETag is not valid for ranges (RFC 9110, 13.1.5)."""
    tag = response.headers.get("ETag", "W/")
    is_weak = tag.startswith("W/")
    with open(path, "w", encoding="utf-8") as file:
        file.write(response.headers.get("Last-Modified", "") if is_weak else tag)


def plain_reason(error: BaseException) -> str:
    """The message of the first cause in a chain of exceptions, without the objects around it."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def unpack(archive: str, folder: str) -> None:
    """Unpack a .tar.gz file into a new folder, which appears only when it is complete.

    Only plain files and folders inside it are accepted. Raises tarfile.TarError if the archive
    holds anything else, is empty, damaged or truncated, or unpacks to far more than its size.
    Raises OSError if writing fails.
    """
    partial = f"{folder}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        extract(archive, partial)
        os.replace(partial, folder)
    except (EOFError, zlib.error, gzip.BadGzipFile, ValueError, ArithmeticError) as error:
        raise tarfile.ReadError(str(error)) from error
    except RecursionError:  # tarfile calls itself for each header that belongs to the next one
        raise tarfile.ReadError("a member in it has too many headers") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class ArchiveStream(gzip.GzipFile):
    """The unpacked bytes of a .tar.gz file. tarfile reads the headers of a member into memory,
    whatever size they claim; here a read of more than MAX_READ bytes is refused."""

    def read(self, size: int | None = -1) -> bytes:
        """The next bytes. Raises tarfile.ReadError for a size above MAX_READ."""
        if size is None or not 0 <= size <= MAX_READ:
            raise tarfile.ReadError("a header in it claims to be too long")
        return super().read(size)


def extract(archive: str, folder: str) -> None:
    """Extract all members of a .tar.gz file, and read it to the end."""
    size = os.path.getsize(archive)
    limit = max(MIN_LIMIT, MAX_RATIO * size)
    num_members = num_files = 0
    bar = tqdm(disable=None, total=size, unit="B", unit_scale=True, desc="unpacking")
    with (
        bar,
        open(archive, "rb") as file,
        ArchiveStream(fileobj=file) as stream,
        tarfile.open(fileobj=stream, mode="r:") as tar,
    ):
        while (member := tar.next()) is not None:
            check_member(member)
            num_files += member.isfile()
            num_members += 1
            check_limit(stream.tell() + member.size + num_members * BLOCK_SIZE, limit)
            tar.extract(member, folder, filter="data")
            tar.members = []  # type: ignore[attr-defined]  # else it remembers every member
            bar.update(file.tell() - bar.n)
        if not num_files:
            raise tarfile.ReadError("it holds no files")
        while stream.read(MAX_READ):  # the checksum is at the end
            check_limit(stream.tell() + num_members * BLOCK_SIZE, limit)


def check_limit(unpacked: int, limit: int) -> None:
    """Raise tarfile.ReadError if the number of unpacked bytes is above the limit."""
    if unpacked > limit:
        raise tarfile.ReadError(f"it unpacks to more than {limit >> 20} MiB")


def check_member(member: tarfile.TarInfo) -> None:
    """Raise tarfile.ReadError unless a member is a plain file or folder with a usable name.

    Links are not needed, and with them a file can be written outside of the folder in spite of
    tarfile's data filter (CVE-2025-4517)."""
    name = repr(member.name[:60])
    if not (member.isfile() or member.isdir()) or member.issparse():
        raise tarfile.ReadError(f"{name} in it is neither a plain file nor a folder")
    if len(member.name) > MAX_NAME_LENGTH:
        raise tarfile.ReadError(f"{name}... in it is a name of {len(member.name)} characters")
    if member.size < 0:
        raise tarfile.ReadError(f"{name} in it has a negative size")
