"""
Files and folders that appear under their name only when they are complete, and a lock for folders.
"""

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import BinaryIO, NamedTuple

try:
    import fcntl
except ImportError:  # on Windows, run_lock does not notice a second run
    fcntl = None  # type: ignore[assignment]


class AtomicFile:
    """A binary file to write in a with block.

    The data goes to a temporary file, which is flushed to disk and renamed to path. path holds the
    old content or all of the new. A failure leaves no temporary file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.partial = f"{path}.{os.getpid()}.partial"

    def __enter__(self) -> BinaryIO:
        self.file = open(self.partial, "wb")
        return self.file

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            with self.file:
                if error_type is None:
                    self.file.flush()
                    os.fsync(self.file.fileno())
            if error_type is None:
                os.replace(self.partial, self.path)
                sync_folder(os.path.dirname(self.path) or ".")
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.partial)


def sync_folder(folder: str) -> None:
    """Flush a folder to disk, so that a rename in it survives a power cut, where supported."""
    with contextlib.suppress(OSError):  # Windows cannot open folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_file(path: str) -> None:
    """Flush a file's content to disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_atomically(path: str, content: bytes) -> None:
    """Write a whole file through AtomicFile."""
    with AtomicFile(path) as file:
        file.write(content)


@contextlib.contextmanager
def run_lock(folder: str) -> Iterator[None]:
    """Create the folder and lock it while the block runs. Raises ValueError if another process
    holds the lock or the lock is not a file, and OSError if the folder cannot be written."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, ".lock")
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for a reader
        raise ValueError(f"{path}: is not a file; remove it")
    with open(path, "a") as lock:
        if fcntl is not None:
            try:  # the system releases the lock when the process ends
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"{folder}: another process is writing here; wait for it or choose another"
                ) from None
        yield


class AtomicFolder:
    """A folder of files to write in a with block, through the path that the block receives.

    The files go to a temporary folder, which is renamed to path. An existing folder is replaced if
    may_replace(name) is true for every name in it. Otherwise ValueError is raised."""

    def __init__(self, path: str, may_replace: Callable[[str], bool]) -> None:
        self.path = os.path.abspath(path)
        self.partial = f"{self.path}.{os.getpid()}.partial"
        self.may_replace = may_replace

    def __enter__(self) -> str:
        if os.path.lexists(self.path) and not os.path.isdir(self.path):
            raise ValueError(f"{self.path}: is a file; name a folder")
        if os.path.islink(self.path):
            raise ValueError(f"{self.path}: is a link; name the folder itself")
        if os.path.isdir(self.path) and os.path.samefile(self.path, os.getcwd()):
            raise ValueError(f"{self.path}: is the current folder; name another")
        self.check_replaceable()
        os.makedirs(self.partial)
        return self.partial

    def check_replaceable(self) -> None:
        """Raise ValueError if the existing folder holds anything that may not be replaced."""
        for name in sorted(os.listdir(self.path)) if os.path.isdir(self.path) else ():
            if not (self.may_replace(name) and os.path.isfile(os.path.join(self.path, name))):
                raise ValueError(
                    f"{self.path}: holds other things ({name}); name a new or an empty folder"
                )

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        old = f"{self.partial}.old"
        try:
            if error_type is None:
                self._commit(old)
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)
            if os.path.isdir(self.path):
                shutil.rmtree(old, ignore_errors=True)
            elif os.path.isdir(old):
                os.rename(old, self.path)

    def _commit(self, old: str) -> None:
        """Flush the files and swap the folders; the previous folder is moved to old."""
        for name in os.listdir(self.partial):
            sync_file(os.path.join(self.partial, name))
        sync_folder(self.partial)
        self.check_replaceable()  # again, because writing may have taken long
        if os.path.isdir(self.path):
            os.rename(self.path, old)
        os.rename(self.partial, self.path)
        sync_folder(os.path.dirname(self.path))


class FileFingerprint(NamedTuple):
    """Identifies one version of a file without reading it."""

    device: int
    inode: int
    size: int  # bytes
    mtime_ns: int


class FileSource:
    """A file that is read lazily. Opening it fails if it was changed or replaced in the meantime,
    so that tensors never come from two versions of a file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fingerprint = self.fingerprint_of(os.stat(path))

    @staticmethod
    def fingerprint_of(status: os.stat_result) -> FileFingerprint:
        """The fingerprint in the result of os.stat or os.fstat."""
        return FileFingerprint(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def open(self, offset: int = 0) -> io.FileIO:
        """Open the file for reading at offset. Raises ValueError if it was changed or replaced."""
        file = open(self.path, "rb", buffering=0)
        if self.fingerprint_of(os.fstat(file.fileno())) != self.fingerprint:
            file.close()
            raise ValueError(f"{self.path}: it was changed while it was read; run again")
        file.seek(offset)
        return file
