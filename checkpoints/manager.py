"""
The checkpoints of a run: written while it goes on, the older ones kept beside the newest, and the
newest good one found again.
"""

import contextlib
import glob
import os
import re
import shutil
import threading
import time
from collections.abc import Callable

import torch

from checkpoints.file import is_sharded_checkpoint, load_checkpoint
from runtime.atomic_files import AtomicFile
from runtime.distributed import full_tensor

RETRY_SECONDS = 30.0  # after a write that failed
NEWEST = (
    "ckpt.pt",
    "ckpt.dcp",
)  # a file, or a folder of shares (see sharded.py); older ones have a number in the name


def snapshot(value, keeps: bool = True, copies: dict | None = None):
    """A copy on the CPU of what is to be written, so that training may go on meanwhile. A tensor that is
    there twice, as a tied classifier, stays one. All processes must ask where each has a share of the
    tensors; keeps: whether this one wants the copy."""
    copies = {} if copies is None else copies
    if isinstance(value, torch.Tensor):
        if id(value) not in copies:
            full = full_tensor(value.detach())
            copies[id(value)] = full.to("cpu", copy=True) if keeps else None
        return copies[id(value)]
    if isinstance(value, dict):
        return {key: snapshot(item, keeps, copies) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(item, keeps, copies) for item in value)
    return value


class Keeper:
    """Writes files one after another, in a thread. What cannot be written, for want of space, of
    permission or of the folder, is tried again later and does not stop the run."""

    def __init__(self, alone: bool = True):
        """alone: whether no other process takes part in the writing, so that it may be tried again any time."""
        self.alone = alone
        self.pending: dict[str, Callable] = {}  # what is to be written yet: path -> what writes it
        self.thread = None
        self.failure: OSError | None = None  # of the last try
        self.error: Exception | None = None  # one that no other try can mend
        self.tried_at = 0.0
        self.untold: list[str] = []

    def keep(self, writes: dict[str, Callable[[], None]]):
        """Write these; what is still waiting under the same path is out of date. Waits for what is being
        written, and returns when the new ones are begun. Raises what is no failure of the disk."""
        self.wait()
        self.pending |= writes
        self.begin()

    def begin(self):
        self.thread = threading.Thread(target=self.write)
        self.thread.start()

    def write(self):
        was_failing, self.failure = self.failure is not None, None
        for path, write in list(self.pending.items()):
            try:
                if self.alone:
                    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
                write()
                del self.pending[path]
            except OSError as error:  # the others may fare better
                error.__cause__ = None
                self.failure = self.failure or error.with_traceback(
                    None
                )  # which would keep the state in memory
            except Exception as error:
                self.error = error
        if self.failure and not was_failing:
            self.untold.append(
                f"{in_words(self.failure)}; the run goes on, and tries to save again"
            )
        elif was_failing and not self.failure:
            self.untold.append("saving works again")
        self.tried_at = time.monotonic()

    def join(self):
        """Until nothing is being written, however it went."""
        if self.thread:
            self.thread.join()

    def wait(self):
        """Until what is being written is written or has failed. Raises what is no failure of the disk."""
        self.join()
        if self.error:
            self.pending.clear()
            raise self.error

    def news(self) -> list[str]:
        """What went wrong since this was last asked; starts another try when it is time. Raises as wait."""
        if not (self.thread and self.thread.is_alive()):
            self.wait()
            if self.failure and self.alone and time.monotonic() - self.tried_at > RETRY_SECONDS:
                self.begin()
        told, self.untold = self.untold, []
        return told

    def finish(self):
        """Write what is left. Raises ValueError where it cannot be written even now."""
        self.wait()
        if self.failure:
            self.begin()
            self.wait()
        if self.failure:
            raise ValueError(
                f"{in_words(self.failure)}; not written: {', '.join(self.pending)}"
            ) from self.failure


def in_words(error: OSError | ValueError) -> str:
    is_whole = getattr(error, "filename", None) and error.strerror
    return f"{error.filename}: {error.strerror}" if is_whole else str(error)


def step_of_copy(path: str) -> int:
    return int(re.search(r"(\d+)\.\w+$", path)[1])


def numbered_checkpoints(out_dir: str) -> list[str]:
    """The older checkpoints, the newest first."""
    found = glob.glob(os.path.join(glob.escape(out_dir), "ckpt_*"))
    found = [path for path in found if re.fullmatch(r"ckpt_\d+\.(pt|dcp)", os.path.basename(path))]
    found = [path for path in found if os.path.isdir(path) == path.endswith(".dcp")]
    return sorted(found, key=step_of_copy, reverse=True)


def remove(path: str):
    """A file or a folder of shares, if it is there."""
    if os.path.isdir(path) and ".dcp" in os.path.basename(path):
        going = path if path.endswith((".partial", ".old")) else f"{path}.{os.getpid()}.partial"
        os.rename(path, going)  # so that a part of it is not taken for a checkpoint
        return shutil.rmtree(going)
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def link_or_copy(source: str, target: str):
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        with open(source, "rb") as content, AtomicFile(target) as file:
            shutil.copyfileobj(content, file)


def put_older_aside(out_dir: str, older_step: int, writing: str, step: int, keeps: bool):
    """Before a checkpoint of this step takes the name that is written: give the one that is there, of
    older_step, a name with its number. A file, which is written over, keeps its own name too, so that the
    newest never is without; it needs no other where no older ones are kept."""
    for name in NEWEST:
        path = os.path.join(out_dir, name)
        if not os.path.exists(path):
            continue
        if name != writing or os.path.isdir(path):
            give_number(path, older_step)
        elif keeps and older_step < step:
            remove(numbered(path, older_step))
            link_or_copy(path, numbered(path, older_step))


def numbered(path: str, step: int) -> str:
    return f"_{step:06d}".join(os.path.splitext(path))


def give_number(path: str, step: int):
    remove(numbered(path, step))
    os.rename(path, numbered(path, step))


def remove_oldest(out_dir: str, step: int, count: int):
    """Of the numbered checkpoints before this step, leave the last count, and those that cannot be removed."""
    for old in [copy for copy in numbered_checkpoints(out_dir) if step_of_copy(copy) < step][
        count:
    ]:
        with contextlib.suppress(OSError):
            remove(old)


def checkpoint_mtime(path: str) -> float:
    """When a checkpoint was finished; 0 for what is not whole."""
    with contextlib.suppress(OSError):
        return os.path.getmtime(os.path.join(path, "run.pt") if os.path.isdir(path) else path)
    return 0.0


def latest_path(out_dir: str) -> str:
    """Where the newest checkpoint is, or would be."""
    paths = [os.path.join(out_dir, name) for name in NEWEST]
    return max(filter(os.path.lexists, paths), key=checkpoint_mtime, default=paths[0])


def open_checkpoint(path: str) -> dict:
    """load_checkpoint; of shares what sharded.open_sharded gives."""
    if is_sharded_checkpoint(path):
        from checkpoints.sharded import open_sharded

        return open_sharded(path)
    return load_checkpoint(path)


def load_latest(out_dir: str, say: Callable[[str], None] = print) -> tuple[str, dict] | None:
    """The path and the content (see open_checkpoint) of the newest or, with a word on it, where that is
    damaged or gone, of the whole checkpoint that was written last. None if there is none at all; raises
    ValueError, of the first, if all are damaged."""
    newest, problems = latest_path(out_dir), []
    others = [
        *numbered_checkpoints(out_dir),
        *(os.path.join(out_dir, name) for name in (*NEWEST, "best.pt", "best.dcp")),
    ]
    others = [path for path in others if path != newest and os.path.exists(path)]
    others.sort(key=checkpoint_mtime, reverse=True)
    for path in [newest] * os.path.lexists(newest) + others:
        try:
            checkpoint = open_checkpoint(path)
        except ValueError as error:
            problems.append(error)
            continue
        if path != newest:
            reason = f"{problems[0]}" if problems else f"{newest} is not there"
            say(
                f"warning: {reason}; going on from {path}, which is of step {checkpoint['iter_num']}"
            )
        return path, checkpoint
    if problems:
        raise problems[0]
    return None
