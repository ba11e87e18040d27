"""
Files that appear under their name only when they are whole, and folders with one writer.
"""

import contextlib
import os

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
def only_writer(folder: str):
    """Make the folder and keep other writers out of it as long as the block runs. Raises
    ValueError where another process has it, OSError where it cannot be written."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, ".lock")
    with open(path, "a") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it with the process
            except BlockingIOError:
                raise ValueError(f"{folder}: another process is writing here; wait for it or choose another") from None
        yield
