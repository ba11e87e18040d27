"""
Git LFS: a repository cloned without it has small text files, pointers, instead of large files.
"""

import os

POINTER_START = b"version https://git-lfs"
MAX_POINTER_SIZE = 1024  # bytes, by the specification of Git LFS


def require_content(path: str) -> None:
    """Raise ValueError if a file is a pointer of Git LFS. A missing file is ignored."""
    if not os.path.isfile(path) or os.path.getsize(path) > MAX_POINTER_SIZE:
        return
    with open(path, "rb") as file:
        is_pointer = file.read(len(POINTER_START)) == POINTER_START
    if is_pointer:
        raise ValueError(
            f"{path}: only a pointer of Git LFS, without the content of the file; "
            "run git lfs pull in its folder, or download the file itself"
        )
