"""The names of a run's checkpoints in its output folder, and how the latest one is found.

    ckpt_000200.pt   the checkpoint of step 200; an older one if ckpt.pt is of a later step
    ckpt.pt          the latest one: a hard link to its ckpt_STEP.pt
    best.pt          the one with the lowest validation loss

A sharded checkpoint is a folder with the suffix .dcp instead of .pt.
"""

import glob
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from checkpoints.file import (
    UNREADABLE,
    as_value_error,
    is_sharded_checkpoint,
    load_checkpoint,
    read_hashed,
)
from checkpoints.safe_load import safe_load

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


def latest_path(out_dir: str) -> str:
    """The path of the latest checkpoint, or where it would be.

    Where a file and a folder have that name, it is the one of the higher step. A damaged one
    counts as the highest, so that its damage is reported and not passed over."""
    paths = [os.path.join(out_dir, name) for name in LATEST_NAMES]
    existing = [path for path in paths if os.path.lexists(path)]
    if len(existing) < 2:
        return (existing or paths)[0]
    steps = [read_step(path) for path in existing]
    ranks = [step if step >= 0 else math.inf for step in steps]
    return existing[ranks.index(max(ranks))]


def open_checkpoint(path: str) -> dict:
    """Load a checkpoint file, or open a sharded one (see sharded.open_sharded)."""
    if is_sharded_checkpoint(path):
        from checkpoints.sharded import open_sharded

        return open_sharded(path)
    return load_checkpoint(path)


def read_step(path: str) -> int:
    """The step that a checkpoint holds, read without its tensors; -1 if it is damaged or missing.

    Raises OSError for a transient error of the system."""
    file = os.path.join(path, "run.pt") if os.path.isdir(path) else path
    try:
        content = safe_load(file, "meta")
        return int(content["iter_num"])
    except UNREADABLE as error:
        raise_transient(file, error)
        return -1


def raise_transient(path: str, error: BaseException) -> None:
    """Raise an error that says nothing about the content of the file, with its path."""
    reason = as_value_error(path, error)
    if not isinstance(reason, ValueError):
        raise reason from error


class BestRecord(NamedTuple):
    """What a checkpoint records of the lowest validation loss of its run."""

    loss: float  # nats per token
    eval_hash: str  # of the windows that it was measured on; "" in older checkpoints
    config: dict  # the options of the run
    step: int | None  # of the best model; None if it is not known


def read_best_record(path: str) -> BestRecord | None:
    """The record in a checkpoint, whose hash is verified; None if it is damaged.

    The tensors are mapped, not loaded. Raises OSError for a transient error of the system: then
    the file may be good."""
    try:
        content = open_checkpoint(path) if os.path.isdir(path) else read_hashed(path, mmap=True)
        return BestRecord(
            float(content.get("best_val_loss", math.inf)),
            str(content.get("eval_hash", "")),
            dict(content.get("config", {})),
            int(content["iter_num"]),
        )
    except UNREADABLE as error:
        raise_transient(path, error)
        return None


def load_latest(out_dir: str, log: Callable[[str], None] = print) -> LatestCheckpoint | None:
    """Load the latest checkpoint; if it is damaged or missing, the intact one of the highest step.

    Warns through log where it is not the latest. Returns None if there is no checkpoint at all.
    Raises the ValueError of the latest one if all are damaged."""
    latest = latest_path(out_dir)
    errors: dict[str, ValueError] = {}
    for path in candidate_paths(out_dir, latest):
        try:
            checkpoint = open_checkpoint(path)
        except ValueError as error:
            errors[path] = error
            continue
        if path != latest:
            reason = str(next(iter(errors.values()), f"{latest} is missing"))
            log(f"warning: {reason}; using {path}, of step {checkpoint['iter_num']}")
        return LatestCheckpoint(path, checkpoint, list(errors))
    if errors:
        raise next(iter(errors.values()))
    return None


def candidate_paths(out_dir: str, latest: str) -> Iterator[str]:
    """Yield the path of the latest checkpoint, then of the others, the highest step first.

    The step is the one in the file: a numbered checkpoint that was overwritten in place has
    another than its name. The files of the others are opened only if the latest is not enough."""
    if os.path.lexists(latest):
        yield latest
    named = [os.path.join(out_dir, name) for name in (*LATEST_NAMES, *BEST_NAMES)]
    paths = numbered_checkpoints(out_dir) + [path for path in named if os.path.exists(path)]
    yield from sorted((path for path in paths if path != latest), key=read_step, reverse=True)
