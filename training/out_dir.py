"""The output folder of a run: made ready before training, completed after it."""

import contextlib
import dataclasses
import glob
import itertools
import os
import re

from checkpoints.latest import (
    LATEST_NAMES,
    link_checkpoint,
    numbered_checkpoints,
    open_checkpoint,
    remove_checkpoint,
    step_of,
    step_path,
)
from formats import llama2c
from training.parallel import is_sharded
from training.resume import StartPoint
from training.state import TrainingRun

# The names of the files that a run writes.
RUN_FILE_PATTERN = r"(ckpt\w*|best)\.(pt|dcp)|model\.bin|loss\.png|metrics\.jsonl|tokenizer\.\w+"


def prepare_out_dir(run: TrainingRun, start: StartPoint) -> None:
    """Make the output folder ready for a run (main process only). Raises OSError.

    A new run moves the files of an earlier one to a subfolder. A resumed run removes what a killed
    process left unfinished, and gives its checkpoint the names that later saves expect."""
    config = run.config
    if config.init_from != "resume":
        archive_previous_run(config.out_dir)
    remove_partial_files(config.out_dir)
    if start.path:
        adopt_checkpoint(config.out_dir, start, run.state.iter_num)
    run.metrics.open(run.state.iter_num)
    run.checkpoints.write_run_files()
    if is_sharded(run.model):
        best = run.path("best.dcp")
        print(f"checkpoints are sharded; export one with: python export.py model.bin --from={best}")
    elif reason := llama2c.unsupported_reason(run.model.args):
        print(f"no model.bin is written: {reason}")
    if config.wandb_log:
        import wandb

        wandb.init(
            project=config.wandb_project,
            name=config.wandb_run_name or None,
            config=dataclasses.asdict(config),
        )


def archive_previous_run(out_dir: str) -> None:
    """Move the files of an earlier run to OUT_DIR/previousN, so that nothing overwrites them."""
    pattern = re.compile(rf"{RUN_FILE_PATTERN}|ckpt\.damaged(\.dcp)?")
    paths = glob.glob(os.path.join(glob.escape(out_dir), "*"))
    paths = [path for path in paths if pattern.fullmatch(os.path.basename(path))]
    if not any(path.endswith((".pt", ".dcp")) for path in paths):
        return
    folder = new_archive(out_dir)
    for path in paths:
        os.rename(path, os.path.join(folder, os.path.basename(path)))
    print(f"moved the earlier run in {out_dir} to {folder}")


def new_archive(out_dir: str) -> str:
    """Make the first folder OUT_DIR/previousN that does not exist; returns its path."""
    paths = (os.path.join(out_dir, f"previous{number}") for number in itertools.count(1))
    folder = next(path for path in paths if not os.path.exists(path))
    os.makedirs(folder)
    return folder


def remove_partial_files(out_dir: str) -> None:
    """Remove the unfinished files of a killed run. An interrupted replacement is undone."""
    pattern = re.compile(rf"(?P<final>{RUN_FILE_PATTERN})\.\d+\.partial(?P<old>\.old)?")
    for name in os.listdir(out_dir):
        match = pattern.fullmatch(name)
        if not match:
            continue
        path = os.path.join(out_dir, name)
        final = os.path.join(out_dir, match["final"])
        if match["old"] and not os.path.exists(final):
            os.rename(path, final)  # killed between the two renames of a replacement
        else:
            remove_checkpoint(path)


def adopt_checkpoint(out_dir: str, start: StartPoint, step: int) -> None:
    """Make the checkpoint that a run resumes from the latest one of its folder.

    Damaged ones are renamed to ckpt.damaged, ones of later steps move to OUT_DIR/previousN."""
    for path in reversed(start.damaged):  # the latest last: it is the one to keep
        quarantine_checkpoint(path)
    archive_later_checkpoints(out_dir, step)
    latest = "ckpt.dcp" if os.path.isdir(start.path) else "ckpt.pt"
    for name in LATEST_NAMES:  # an older one in the other form keeps its numbered name only
        path = os.path.join(out_dir, name)
        if name != latest and os.path.exists(path):
            add_numbered_name(path, open_checkpoint(path)["iter_num"])
            remove_checkpoint(path)
    numbered = step_path(os.path.join(out_dir, latest), step)
    if os.path.abspath(start.path) != os.path.abspath(numbered):
        add_numbered_name(start.path, step, numbered)
    if not os.path.exists(os.path.join(out_dir, latest)):
        link_checkpoint(numbered, os.path.join(out_dir, latest))


def add_numbered_name(path: str, step: int, numbered: str = "") -> None:
    """Give a checkpoint a second name with its step, if there is none yet."""
    numbered = numbered or step_path(path, step)
    if not os.path.exists(numbered):
        link_checkpoint(path, numbered)


def quarantine_checkpoint(path: str) -> None:
    """Rename a damaged checkpoint to ckpt.damaged, or ckpt.damaged.dcp."""
    if not os.path.lexists(path):
        return
    suffix = ".dcp" if os.path.isdir(path) else ""
    damaged = os.path.join(os.path.dirname(path), f"ckpt.damaged{suffix}")
    remove_checkpoint(damaged)
    os.rename(path, damaged)


def archive_later_checkpoints(out_dir: str, step: int) -> None:
    """Move numbered checkpoints of later steps away: a resumed run computes these steps anew."""
    later = [path for path in numbered_checkpoints(out_dir) if step_of(path) > step]
    if not later:
        return
    folder = new_archive(out_dir)
    for path in later:
        os.rename(path, os.path.join(folder, os.path.basename(path)))
    print(f"moved {len(later)} checkpoint(s) of steps after {step} to {folder}")


def finish_saving(run: TrainingRun) -> None:
    """Wait until everything is written. Raises ValueError if something cannot be written.

    Then the other processes end as well, with status 1."""
    errors = []
    try:
        run.checkpoints.flush()
    except ValueError as error:
        errors.append(str(error))
    run.metrics.flush()
    if not run.dist_ctx.any_rank(bool(errors)):
        return
    if not run.dist_ctx.is_main:
        raise SystemExit(1)
    step = run.checkpoints.last_saved_step
    latest = "no checkpoint" if step is None else f"the latest checkpoint is of step {step}"
    raise ValueError("; ".join([*errors, latest]))


def plot_loss(run: TrainingRun) -> None:
    """Draw loss.png on the main process; a full disk costs the plot, not the run."""
    if run.dist_ctx.is_main:
        with contextlib.suppress(OSError):
            run.metrics.plot_loss()
