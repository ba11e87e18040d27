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

from checkpoint import load_checkpoint

RETRY_SECONDS = 30.0  # after a write that failed


def snapshot(value, copies: dict | None = None):
    """A copy on the CPU of what is to be written, so that training may go on meanwhile. Tensors that
    are one, as a tied classifier and its embedding, stay one."""
    copies = {} if copies is None else copies
    if isinstance(value, torch.Tensor):
        key = value.data_ptr(), value.dtype, value.shape, value.stride()
        if value.numel() == 0 or key not in copies:
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]
    if isinstance(value, dict):
        return {key: snapshot(item, copies) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(item, copies) for item in value)
    return value


class Keeper:
    """Writes files one after another, in a thread. What cannot be written, for want of space, of
    permission or of the folder, is tried again later and does not stop the run."""

    def __init__(self):
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
        try:
            for path, write in list(self.pending.items()):
                os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
                write()
                del self.pending[path]
        except OSError as error:
            self.failure = error
            if not was_failing:
                self.untold.append(f"{in_words(error)}; the run goes on, and tries to save again")
        except Exception as error:
            self.error = error
        else:
            if was_failing:
                self.untold.append("saving works again")
        self.tried_at = time.monotonic()

    def wait(self):
        """Until what is being written is written or has failed. Raises what is no failure of the disk."""
        if self.thread:
            self.thread.join()
            self.thread = None
        if self.error:
            self.pending.clear()
            raise self.error

    def news(self) -> list[str]:
        """What went wrong since this was last asked; starts another try when it is time. Raises as wait."""
        if not (self.thread and self.thread.is_alive()):
            self.wait()
            if self.failure and time.monotonic() - self.tried_at > RETRY_SECONDS:
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
            raise ValueError(f"{in_words(self.failure)}; not written: {', '.join(self.pending)}") from self.failure


def in_words(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


def step_of_copy(path: str) -> int:
    return int(re.search(r"(\d+)\.pt$", path)[1])


def numbered_copies(out_dir: str) -> list[str]:
    """The older checkpoints, the newest first."""
    found = glob.glob(os.path.join(glob.escape(out_dir), "ckpt_*.pt"))
    found = [path for path in found if re.fullmatch(r"ckpt_\d+\.pt", os.path.basename(path))]
    return sorted(found, key=step_of_copy, reverse=True)


def put_older_aside(path: str, older_step: int, step: int, count: int):
    """Before a checkpoint of this step is written to path: give the one that is there, of older_step,
    a name with its number. Of these numbered ones the last count before step stay."""
    out_dir = os.path.dirname(path)
    if count and older_step < step and os.path.exists(path):
        copy = os.path.join(out_dir, f"ckpt_{older_step:06d}.pt")
        with contextlib.suppress(FileNotFoundError):
            os.remove(copy)
        try:
            os.link(path, copy)  # the newest never is without its name
        except OSError:  # a file system without links
            shutil.copyfile(path, copy)
    for old in [copy for copy in numbered_copies(out_dir) if step_of_copy(copy) < step][count:]:
        os.remove(old)


def newest_checkpoint(out_dir: str, say: Callable[[str], None] = print) -> tuple[str, dict] | None:
    """The path and the content of the newest checkpoint that is whole; where that is not ckpt.pt, say so.
    None if there is none at all; raises ValueError, of the newest, if all are damaged."""
    newest, problems = os.path.join(out_dir, "ckpt.pt"), []
    for path in (newest, *numbered_copies(out_dir), os.path.join(out_dir, "best.pt")):
        if not os.path.exists(path):
            continue
        try:
            checkpoint = load_checkpoint(path)
        except ValueError as error:
            problems.append(error)
            continue
        if path != newest:
            reason = f"{problems[0]}" if problems else f"{newest} is not there"
            say(f"warning: {reason}; going on from {path}, which is of step {checkpoint['iter_num']}")
        return path, checkpoint
    if problems:
        raise problems[0]
    return None
