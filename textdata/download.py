"""
Large downloads that can be interrupted, and archives that cannot do harm.
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


def download(url: str, path: str):
    """Fetch url to path, going on where an earlier attempt stopped. Raises ConnectionError when the
    server cannot be reached, refuses, or delivers another number of bytes than it announced."""
    partial, tag_path = f"{path}.partial", f"{path}.partial.etag"
    for attempt in range(1, ATTEMPTS + 1):
        try:
            if fetch(url, partial, tag_path):
                break
        except requests.HTTPError as error:
            if error.response.status_code < 500:  # asking again would not help
                raise
            reason = error
        except requests.RequestException as error:
            reason = error
        else:
            reason = OSError("the connection closed before the end")
        if attempt == ATTEMPTS:
            raise ConnectionError(
                f"gave up on {url} after {ATTEMPTS} attempts: {plain_reason(reason)}"
            )
        tqdm.write(f"{plain_reason(reason)}; trying again ({attempt + 1} of {ATTEMPTS})")
        time.sleep(PAUSE * 2 ** (attempt - 1))
    os.replace(partial, path)
    with contextlib.suppress(FileNotFoundError):
        os.remove(tag_path)


def fetch(url: str, partial: str, tag_path: str) -> bool:
    """One attempt, added to what partial holds; returns whether the file is complete."""
    have = os.path.getsize(partial) if os.path.exists(partial) else 0
    headers = {"Accept-Encoding": "identity"}
    if have and (tag := read_tag(tag_path)):  # only the same content may be continued
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:  # nothing after what we have
            return str(have) == response.headers.get("Content-Range", "").rpartition("/")[
                2
            ] or restart(partial)
        response.raise_for_status()
        have = have if response.status_code == 206 else 0
        total = (
            have + int(response.headers["Content-Length"])
            if "Content-Length" in response.headers
            else None
        )
        tag = response.headers.get("ETag", "W/")
        with open(
            tag_path, "w", encoding="utf-8"
        ) as file:  # a weak tag may not be used with ranges
            file.write(response.headers.get("Last-Modified", "") if tag.startswith("W/") else tag)
        bar = tqdm(
            disable=None,
            total=total,
            initial=have,
            unit="B",
            unit_scale=True,
            desc=os.path.basename(url),
        )
        with open(partial, "ab" if have else "wb") as file, bar:
            for block in response.iter_content(2**16):
                bar.update(file.write(block))
    return total is None or os.path.getsize(partial) == total


def read_tag(path: str) -> str:
    """What the server called the content that was begun, or nothing."""
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8") as file:
        return file.read()


def restart(partial: str) -> bool:
    os.remove(partial)
    return False


def plain_reason(error: Exception) -> str:
    """The last cause in a chain of library errors, without the objects around it."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def unpack(archive: str, folder: str):
    """Unpack a tar file into a new folder, which appears when all of it is there. Members that
    would write elsewhere are refused (the data filter). Raises tarfile.TarError for an archive that
    is damaged or cut, OSError where it cannot be written."""
    partial = f"{folder}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        bar = tqdm(
            disable=None,
            total=os.path.getsize(archive),
            unit="B",
            unit_scale=True,
            desc="unpacking",
        )
        with bar, open(archive, "rb") as file, tarfile.open(fileobj=file, mode="r:gz") as tar:
            for member in tar:
                tar.extract(member, partial, filter="data")
                bar.update(file.tell() - bar.n)
            while tar.fileobj.read(2**20):  # to the end, where the checksum is
                pass
        os.replace(partial, folder)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise tarfile.ReadError(str(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
