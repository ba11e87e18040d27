"""Second names for checkpoints: hard links, or copies where the file system has none."""

import contextlib
import os
import shutil

from runtime.atomic_files import AtomicFile, AtomicFolder


def remove_checkpoint(path: str) -> None:
    """Remove a checkpoint file or folder, if it exists. Raises OSError."""
    if os.path.isdir(path) and ".dcp" in os.path.basename(path):
        doomed = path
        if not path.endswith((".partial", ".old")):  # a part of a folder must not pass for a whole
            doomed = f"{path}.{os.getpid()}.partial"
            os.rename(path, doomed)
        shutil.rmtree(doomed)
        return
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def same_checkpoint(a: str, b: str) -> bool:
    """Whether two paths exist and name the same checkpoint, as hard links do."""
    files = [os.path.join(path, "run.pt") if os.path.isdir(path) else path for path in (a, b)]
    return all(map(os.path.exists, files)) and os.path.samefile(*files)


def link_or_copy(source: str, target: str) -> None:
    """Make target a hard link to a file, or a copy where the file system has no links.

    target must not exist. Raises OSError."""
    try:
        os.link(source, target)
    except OSError:
        copy_file(source, target)


def copy_file(source: str, target: str) -> None:
    """Copy a file, atomically. Raises OSError."""
    with open(source, "rb") as content, AtomicFile(target) as file:
        shutil.copyfileobj(content, file)


def link_checkpoint(source: str, target: str) -> None:
    """Make target, atomically, the same checkpoint as source; another target is replaced.

    Files are hard links, or copies where the file system has no links. Raises OSError, and
    ValueError where a folder target holds other things."""
    if same_checkpoint(source, target):
        return
    if os.path.isdir(source):
        with AtomicFolder(target, may_replace=lambda name: True) as folder:
            for name in os.listdir(source):
                link_or_copy(os.path.join(source, name), os.path.join(folder, name))
        return
    temporary = f"{target}.{os.getpid()}.partial"
    with contextlib.suppress(FileNotFoundError):
        os.remove(temporary)
    try:
        os.link(source, temporary)
    except OSError:
        copy_file(source, target)
        return
    os.replace(temporary, target)
