"""The names of a run's checkpoints in its output folder, and how the latest one is found.

    ckpt_000200.pt   the checkpoint of step 200; an older one if ckpt.pt is of a later step
    ckpt.pt          the latest one: a hard link to its ckpt_STEP.pt
    best.pt          the one with the lowest validation loss

A sharded checkpoint is a folder with the suffix .dcp instead of .pt.
"""

import contextlib
import glob
import os
import re
import shutil
from collections.abc import Callable
from typing import NamedTuple

from checkpoints.file import is_sharded_checkpoint, load_checkpoint
from runtime.atomic_files import AtomicFile, AtomicFolder

LATEST_NAMES = ("ckpt.pt", "ckpt.dcp")
BEST_NAMES = ("best.pt", "best.dcp")


class LatestCheckpoint(NamedTuple):
    """A loaded checkpoint, and the damaged ones that were tried before it."""

    path: str
    checkpoint: dict
    damaged: list[str]


def step_path(path: str, step: int) -> str:
    """The path of a step's checkpoint: OUT_DIR/ckpt.pt -> OUT_DIR/ckpt_000200.pt."""
    stem, suffix = os.path.splitext(path)
    return f"{stem}_{step:06d}{suffix}"


def step_of(path: str) -> int:
    """The step in the name of a numbered checkpoint."""
    match = re.search(r"(\d+)\.\w+$", path)
    assert match, f"{path} has no step in its name"
    return int(match[1])


def numbered_checkpoints(out_dir: str) -> list[str]:
    """The paths of the numbered checkpoints, the latest step first."""
    paths = glob.glob(os.path.join(glob.escape(out_dir), "ckpt_*"))
    paths = [path for path in paths if re.fullmatch(r"ckpt_\d+\.(pt|dcp)", os.path.basename(path))]
    paths = [path for path in paths if os.path.isdir(path) == path.endswith(".dcp")]
    return sorted(paths, key=step_of, reverse=True)


def checkpoint_mtime(path: str) -> float:
    """When a checkpoint was written, in seconds since the epoch; 0 for an incomplete one."""
    with contextlib.suppress(OSError):
        return os.path.getmtime(os.path.join(path, "run.pt") if os.path.isdir(path) else path)
    return 0.0


def latest_path(out_dir: str) -> str:
    """The path of the latest checkpoint, or where it would be."""
    paths = [os.path.join(out_dir, name) for name in LATEST_NAMES]
    return max(filter(os.path.lexists, paths), key=checkpoint_mtime, default=paths[0])


def open_checkpoint(path: str) -> dict:
    """Load a checkpoint file, or open a sharded one (see sharded.open_sharded)."""
    if is_sharded_checkpoint(path):
        from checkpoints.sharded import open_sharded

        return open_sharded(path)
    return load_checkpoint(path)


def load_latest(out_dir: str, log: Callable[[str], None] = print) -> LatestCheckpoint | None:
    """Load the latest checkpoint; if it is damaged or missing, the one of the highest step.

    Warns through log where it is not the latest. Returns None if there is no checkpoint at all.
    Raises the ValueError of the latest one if all are damaged."""
    latest = latest_path(out_dir)
    errors: dict[str, ValueError] = {}
    if os.path.lexists(latest):
        checkpoint = try_open(latest, errors)
        if checkpoint is not None:
            return LatestCheckpoint(latest, checkpoint, [])
    found = find_fallback(out_dir, latest, errors)
    if found is not None:
        reason = str(next(iter(errors.values()), f"{latest} is missing"))
        log(f"warning: {reason}; using {found.path}, of step {found.checkpoint['iter_num']}")
        return found
    if errors:
        raise next(iter(errors.values()))
    return None


def try_open(path: str, errors: dict[str, ValueError]) -> dict | None:
    """Open a checkpoint, or record why it cannot be opened."""
    try:
        return open_checkpoint(path)
    except ValueError as error:
        errors[path] = error
        return None


def find_fallback(
    out_dir: str, latest: str, errors: dict[str, ValueError]
) -> LatestCheckpoint | None:
    """The intact checkpoint of the highest step, other than latest."""
    others = [os.path.join(out_dir, name) for name in (*LATEST_NAMES, *BEST_NAMES)]
    candidates = [path for path in others if path != latest and os.path.exists(path)]
    for path in numbered_checkpoints(out_dir):
        checkpoint = try_open(path, errors)
        if checkpoint is not None:
            found = LatestCheckpoint(path, checkpoint, [])
            break
    else:
        found = None
    for path in candidates:
        checkpoint = try_open(path, errors)
        is_later = found is None or (
            checkpoint is not None and checkpoint["iter_num"] > found.checkpoint["iter_num"]
        )
        if checkpoint is not None and is_later:
            found = LatestCheckpoint(path, checkpoint, [])
    return found._replace(damaged=list(errors)) if found else None


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


def link_or_copy(source: str, target: str) -> None:
    """Make target a hard link to a file, or a copy where the file system has no links.

    target must not exist. Raises OSError."""
    try:
        os.link(source, target)
    except OSError:
        with open(source, "rb") as content, AtomicFile(target) as file:
            shutil.copyfileobj(content, file)


def link_checkpoint(source: str, target: str) -> None:
    """Make target, atomically, the same checkpoint as source; an older target is replaced.

    Files are hard links, or copies where the file system has no links. Raises OSError, and
    ValueError where a folder target holds other things."""
    if os.path.isdir(source):
        with AtomicFolder(target, may_replace=lambda name: True) as folder:
            for name in os.listdir(source):
                link_or_copy(os.path.join(source, name), os.path.join(folder, name))
        return
    temporary = f"{target}.{os.getpid()}.partial"
    with contextlib.suppress(FileNotFoundError):
        os.remove(temporary)
    link_or_copy(source, temporary)
    try:
        os.replace(temporary, target)
    finally:
        # A rename between two links to one file does nothing, and leaves both (POSIX).
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
