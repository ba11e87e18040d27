"""The output folders of the fault injection: damaged on purpose, and compared before and after."""

import math
import os
import random
import shutil
from pathlib import Path
from typing import NamedTuple

from checkpoints.latest import (
    latest_path,
    load_latest,
    numbered_checkpoints,
    open_checkpoint,
    read_best_record,
)
from checkpoints.links import remove_checkpoint, same_checkpoint


def damage_folder(out_dir: Path, fault: str, rng: random.Random) -> None:
    """Do to the files of an ended attempt what belongs to the fault."""
    newest = Path(latest_path(str(out_dir)))
    if not newest.exists():
        return
    if fault == "cut checkpoint":
        cut_checkpoint(newest, rng)
    elif fault == "deleted checkpoint":
        same = [p for p in numbered_checkpoints(str(out_dir)) if same_checkpoint(p, str(newest))]
        for path in [*same, str(newest)]:
            remove_checkpoint(path)
    elif fault == "copied folder":
        copy_without_times(out_dir, rng)


def copy_without_times(out_dir: Path, rng: random.Random) -> None:
    """Replace a folder by a copy: no links, and modification times that say nothing."""
    copy = Path(f"{out_dir}.copy")
    shutil.copytree(out_dir, copy, copy_function=shutil.copyfile)
    for path in sorted(copy.rglob("*")):
        seconds = rng.uniform(1e9, 1.5e9)
        os.utime(path, (seconds, seconds))
    shutil.rmtree(out_dir)
    copy.rename(out_dir)


def cut_checkpoint(path: Path, rng: random.Random) -> None:
    """Cut a third of a checkpoint file, or of one file of a sharded checkpoint, in place.

    The numbered checkpoint of the same step is a hard link and loses it, too."""
    part = rng.choice(sorted(path.iterdir())) if path.is_dir() else path
    os.truncate(part, part.stat().st_size * 2 // 3)


def newest_step(out_dir: Path) -> int:
    """The step of the newest checkpoint, or -1."""
    try:
        newest = load_latest(str(out_dir), lambda text: None)
    except ValueError:
        return -1
    return newest[1]["iter_num"] if newest else -1


class FolderState(NamedTuple):
    """What a run may not lose."""

    newest_step: int
    best_losses: dict[str, float]  # hash of the evaluated windows -> lowest loss of an intact file
    archived: set[str]  # intact checkpoints that a resumed run moved away as of later steps


def folder_state(out_dir: Path) -> FolderState:
    """The newest checkpoint and the best models in an output folder, archived ones included."""
    best_losses: dict[str, float] = {}
    for path in [*out_dir.glob("best*"), *out_dir.glob("previous*/best*")]:
        record = read_best_record(str(path)) if path.suffix in (".pt", ".dcp") else None
        if record:
            loss = min(record.loss, best_losses.get(record.eval_hash, math.inf))
            best_losses[record.eval_hash] = loss
    archived = {str(path) for path in out_dir.glob("previous*/ckpt*") if is_intact(path)}
    return FolderState(newest_step(out_dir), best_losses, archived)


def is_intact(path: Path) -> bool:
    """Whether a checkpoint can be loaded."""
    try:
        open_checkpoint(str(path))
    except ValueError:
        return False
    return True


def describe_loss(before: FolderState, after: FolderState) -> str:
    """What an attempt lost, or ''."""
    if after.newest_step < before.newest_step:
        return f"lost checkpoint {before.newest_step}, has {after.newest_step}"
    if moved := after.archived - before.archived:
        return f"resumed from an older checkpoint than {min(moved)}"
    for eval_hash, loss in before.best_losses.items():
        if after.best_losses.get(eval_hash, math.inf) > loss:
            return f"lost the best model of loss {loss}"
    return ""
