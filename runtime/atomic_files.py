"""
Files that appear under their name only when they are whole, and folders with one writer.
"""

import contextlib
import os
import shutil
from collections.abc import Callable

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed there
    fcntl = None


class AtomicFile:
    """A binary file to write in a with block: it is written beside, flushed to the disk and then
    renamed, so that path holds the old content or all of the new, and a failure leaves nothing."""

    def __init__(self, path: str):
        self.path = path
        self.partial = f"{path}.{os.getpid()}.partial"

    def __enter__(self):
        self.file = open(self.partial, "wb")
        return self.file

    def __exit__(self, error_type, error, traceback):
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


def sync_folder(folder: str):
    """Make a renaming last through a power cut, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: str, content: bytes):
    with AtomicFile(path) as file:
        file.write(content)


@contextlib.contextmanager
def run_lock(folder: str):
    """Make the folder and keep other writers out of it as long as the block runs. Raises
    ValueError where another process has it, OSError where it cannot be written."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, ".lock")
    with open(path, "a") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(
                    lock, fcntl.LOCK_EX | fcntl.LOCK_NB
                )  # the system frees it with the process
            except BlockingIOError:
                raise ValueError(
                    f"{folder}: another process is writing here; wait for it or choose another"
                ) from None
        yield


class AtomicFolder:
    """A folder to fill in a with block, through the path that it gives: it is written beside and
    then renamed. An older folder of that name gives way if may_replace agrees to every name in it;
    else ValueError is raised."""

    def __init__(self, path: str, may_replace: Callable[[str], bool]):
        self.path = os.path.abspath(path)
        self.partial = f"{self.path}.{os.getpid()}.partial"
        self.may_replace = may_replace

    def __enter__(self) -> str:
        if os.path.lexists(self.path) and not os.path.isdir(self.path):
            raise ValueError(f"{self.path}: is a file; name a folder")
        if os.path.islink(self.path):
            raise ValueError(f"{self.path}: is a link; name the folder itself")
        if os.path.isdir(self.path) and os.path.samefile(self.path, os.getcwd()):
            raise ValueError(f"{self.path}: is the folder you are in; name another")
        self.check_replaceable()
        os.makedirs(self.partial)
        return self.partial

    def check_replaceable(self):
        for name in sorted(os.listdir(self.path)) if os.path.isdir(self.path) else ():
            if not (self.may_replace(name) and os.path.isfile(os.path.join(self.path, name))):
                raise ValueError(
                    f"{self.path}: holds other things ({name}); name a new or an empty folder"
                )

    def __exit__(self, error_type, error, traceback):
        old = f"{self.partial}.old"
        try:
            if error_type is None:
                for name in os.listdir(self.partial):
                    sync_file(os.path.join(self.partial, name))
                sync_folder(self.partial)
                self.check_replaceable()  # again: writing may have taken long
                if os.path.isdir(self.path):
                    os.rename(self.path, old)
                os.rename(self.partial, self.path)
                sync_folder(os.path.dirname(self.path))
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)
            if os.path.isdir(self.path):
                shutil.rmtree(old, ignore_errors=True)
            elif os.path.isdir(old):
                os.rename(old, self.path)


def sync_file(path: str):
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


class FileSource:
    """A file whose tensors are read later: it must still be the file that it was, so that no model
    is made of the halves of two."""

    def __init__(self, path: str):
        self.path, self.stamp = path, self.stamp_of(os.stat(path))

    @staticmethod
    def stamp_of(status: os.stat_result) -> tuple:
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def open(self, offset: int = 0):
        """The open file at offset. Raises ValueError where it was changed or replaced."""
        file = open(self.path, "rb", buffering=0)
        if self.stamp_of(os.fstat(file.fileno())) != self.stamp:
            file.close()
            raise ValueError(f"{self.path}: it was changed while it was read; run again")
        file.seek(offset)
        return file
