"""
Downloads that resume after an interruption, and archives unpacked without trusting them.
"""

import contextlib
import gzip
import os
import shutil
import tarfile
import time
import zlib

import requests
from tqdm import tqdm

ATTEMPTS = 5
TIMEOUT = 30  # seconds without a byte
PAUSE = 0.5  # seconds before the second attempt; doubled each time


def download(url: str, path: str) -> None:
    """Fetch url to path, and resume an earlier download. Raises requests.HTTPError if the server
    refuses (status 4xx), ConnectionError if it cannot be reached or its answers are too short."""
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
    Raises requests.HTTPError for a status below 500, which another attempt would not change."""
    try:
        if fetch(url, partial, tag_path):
            return None
    except requests.HTTPError as error:
        if error.response.status_code < 500:
            raise
        return plain_reason(error)
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
        if response.status_code == 416:  # no bytes after the first have
            size = response.headers.get("Content-Range", "").rpartition("/")[2]
            if size == str(have):
                return True
            os.remove(partial)
            return False
        response.raise_for_status()
        offset = have if response.status_code == 206 else 0
        total = None
        if "Content-Length" in response.headers:
            total = offset + int(response.headers["Content-Length"])
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

    Members that would write outside of it are refused (tarfile's data filter). Raises
    tarfile.TarError if the archive is damaged or truncated, OSError if writing fails.
    """
    partial = f"{folder}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        extract(archive, partial)
        os.replace(partial, folder)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise tarfile.ReadError(str(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def extract(archive: str, folder: str) -> None:
    """Extract all members of a .tar.gz file, and read it to the end."""
    bar = tqdm(
        disable=None,
        total=os.path.getsize(archive),
        unit="B",
        unit_scale=True,
        desc="unpacking",
    )
    with bar, open(archive, "rb") as file, tarfile.open(fileobj=file, mode="r:gz") as tar:
        for member in tar:
            tar.extract(member, folder, filter="data")
            bar.update(file.tell() - bar.n)
        assert tar.fileobj is not None, "an open archive has a file"
        while tar.fileobj.read(2**20):  # the checksum is at the end
            pass
