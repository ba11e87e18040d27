"""The output folder of a run: made ready before training, completed after it."""

import contextlib
import dataclasses
import glob
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from checkpoints.latest import (
    BEST_NAMES,
    LATEST_NAMES,
    numbered_checkpoints,
    read_step,
    step_of,
    step_path,
)
from checkpoints.links import link_checkpoint, remove_checkpoint
from formats import hugging_face, llama2c, meta
from formats.writer import export_problem
from runtime.atomic_files import run_lock
from runtime.untrusted import clip
from training.parallel import is_sharded
from training.resume import StartPoint, no_checkpoint_error
from training.state import TrainingRun

# The names of the files that a run writes.
RUN_FILE_PATTERN = (
    r"(ckpt\w*|best(_\d+)*)\.(pt|dcp)|model(_earlier)?(_\d+)*\.bin|loss\.png|metrics\.jsonl"
    r"|tokenizer(_config)?\.\w+"
)
UNFINISHED = ".partial"  # the suffix of an archive to which files are still being moved


@contextlib.contextmanager
def lock_out_dir(config: Any) -> Iterator[None]:
    """Lock and repair the output folder, in the process that writes to it, during the block.

    Raises ValueError if another process holds the lock, if there is nothing to resume, or if a new
    run would write to the folder of a pretrained model."""
    is_main = os.environ.get("RANK", "0") == "0"
    if not is_main or config.eval_only or config.debug_step is not None:
        yield
        return
    if config.init_from == "resume" and not os.path.isdir(config.out_dir):
        raise no_checkpoint_error(config.out_dir)  # run_lock would make the folder
    if not may_resume(config):
        check_not_pretrained(config.out_dir)
    with run_lock(config.out_dir):
        repair_out_dir(config.out_dir)
        yield


def may_resume(config: Any) -> bool:
    """Whether the run continues the one in its output folder, if its checkpoints are intact."""
    if config.init_from != "auto":
        return config.init_from == "resume"
    names = [os.path.basename(path) for path in run_file_paths(config.out_dir)]
    return any(name.endswith((".pt", ".dcp")) for name in names)


def check_not_pretrained(out_dir: str) -> None:
    """Raise ValueError if a folder is that of a model, whose tokenizer a run would overwrite."""
    for module, name in ((hugging_face, "config.json"), (meta, "params.json")):
        if module.matches(out_dir):
            raise ValueError(
                f"--out_dir={out_dir}: this is the folder of a pretrained model (it has {name}), "
                "and a run overwrites the tokenizer in its folder; give another --out_dir"
            )


def prepare_out_dir(run: TrainingRun, start: StartPoint) -> None:
    """Make the output folder ready for a run (main process only). Raises OSError.

    A new run moves the files of an earlier one to a subfolder. A resumed run gives its checkpoint
    the names that later saves expect."""
    config = run.config
    if config.wandb_log:
        start_wandb(config)
    if config.init_from != "resume":
        archive_previous_run(config.out_dir, run.checkpoints.run_files)
    if start.path:
        adopt_checkpoint(config.out_dir, start, run.state.iter_num)
    run.metrics.open(run.state.iter_num)
    run.checkpoints.write_run_files()
    if is_sharded(run.model):
        best = run.path("best.dcp")
        print(f"checkpoints are sharded; export one with: python export.py model.bin --from={best}")
    elif problem := export_problem(llama2c, run.model.args, run.metadata, run.tokenizer):
        print(f"no model.bin is written: {problem}")


def start_wandb(config: Any) -> None:
    """Begin a run of Weights & Biases. Raises ValueError if that fails, as without a key."""
    try:
        import wandb

        wandb.init(
            project=config.wandb_project,
            name=config.wandb_run_name or None,
            config=dataclasses.asdict(config),
        )
    except Exception as error:  # wandb raises errors of many types
        reason = clip((str(error).splitlines() or [type(error).__name__])[0], 200)
        raise ValueError(
            f"--wandb_log=True: wandb cannot start ({reason}); run wandb login, or set "
            "WANDB_MODE=offline in the environment, or leave the option out"
        ) from error


def repair_out_dir(out_dir: str) -> None:
    """Complete or undo what a killed process began in the output folder. Raises OSError.

    The caller holds the folder's lock, and looks for checkpoints afterwards."""
    remove_partial_files(out_dir)
    for name in sorted(os.listdir(out_dir)):
        if re.fullmatch(rf"previous\d+{UNFINISHED}", name):
            move_run_files(out_dir, os.path.join(out_dir, name))


def archive_previous_run(out_dir: str, run_files: Mapping[str, bytes]) -> None:
    """Move the files of an earlier run to OUT_DIR/previousN, so that nothing overwrites them.

    run_files: name -> content of what the new run writes first. A file of another content is also
    a reason to move all of them."""
    names = list(map(os.path.basename, run_file_paths(out_dir)))
    has_model = any(name.endswith((".pt", ".dcp")) or name == "model.bin" for name in names)
    if has_model or any(
        name in names and not has_content(os.path.join(out_dir, name), content)
        for name, content in run_files.items()
    ):
        unfinished = f"{unused_archive(out_dir)}{UNFINISHED}"
        os.mkdir(unfinished)
        move_run_files(out_dir, unfinished)


def has_content(path: str, content: bytes) -> bool:
    """Whether a file has this content. Raises OSError."""
    if os.path.getsize(path) != len(content):
        return False
    with open(path, "rb") as file:
        return file.read() == content


def move_run_files(out_dir: str, unfinished: str) -> None:
    """Move the files of a run to a folder, which gets its final name after the last of them.

    If the process is killed, the next one that locks the output folder moves the rest. A file of a
    name that is already in the folder belongs to a later run: then all files stay."""
    moves = {
        path: os.path.join(unfinished, os.path.basename(path)) for path in run_file_paths(out_dir)
    }
    is_later_run = any(map(os.path.lexists, moves.values()))
    folder = unfinished.removesuffix(UNFINISHED)
    if not is_later_run:
        for path, target in moves.items():
            os.rename(path, target)
    os.rename(unfinished, folder)
    if is_later_run:
        print(f"{folder} holds files of an earlier run; those of a later run stay in {out_dir}")
    else:
        print(f"moved the earlier run in {out_dir} to {folder}")


def run_file_paths(out_dir: str) -> list[str]:
    """The paths of all files in a folder that have names of a run's files, damaged ones too."""
    pattern = re.compile(rf"{RUN_FILE_PATTERN}|(ckpt\w*|best)\.damaged(\.dcp)?")
    paths = glob.glob(os.path.join(glob.escape(out_dir), "*"))
    return [path for path in paths if pattern.fullmatch(os.path.basename(path))]


def unused_archive(out_dir: str) -> str:
    """The first of the paths OUT_DIR/previous1, previous2, ... that does not exist."""
    paths = (os.path.join(out_dir, f"previous{number}") for number in itertools.count(1))
    return next(path for path in paths if not os.path.exists(path))


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

    Damaged ones are renamed, for example to ckpt.damaged; ones of later steps move to
    OUT_DIR/previousN."""
    for path in start.damaged:
        quarantine_checkpoint(path)
    latest = os.path.join(out_dir, "ckpt.dcp" if os.path.isdir(start.path) else "ckpt.pt")
    for name in LATEST_NAMES:
        path = os.path.join(out_dir, name)
        if path != latest and os.path.exists(path):
            number_other_form(path)
    for path in (step_path(latest, step), latest):
        link_checkpoint(start.path, path)
    archive_later_checkpoints(out_dir, step)


def number_other_form(path: str) -> None:
    """Leave a latest checkpoint of the other form, file or folder, its numbered name only."""
    step = read_step(path)
    if step < 0:
        quarantine_checkpoint(path)
        return
    link_checkpoint(path, step_path(path, step))
    remove_checkpoint(path)


def quarantine_checkpoint(path: str) -> None:
    """Rename a damaged checkpoint: ckpt.pt to ckpt.damaged, ckpt.dcp to ckpt.damaged.dcp."""
    if not os.path.lexists(path):
        return
    stem, suffix = os.path.splitext(path)
    damaged = f"{stem}.damaged{suffix if os.path.isdir(path) else ''}"
    remove_checkpoint(damaged)
    os.rename(path, damaged)


def archive_later_checkpoints(out_dir: str, step: int) -> None:
    """Move checkpoints of later steps away: a resumed run computes these steps anew.

    There are some after a return to an older step; then a best model of a later step goes too."""
    later = [path for path in numbered_checkpoints(out_dir) if step_of(path) > step]
    if not later:
        return
    best = [os.path.join(out_dir, name) for name in BEST_NAMES]
    later_best = [path for path in best if os.path.exists(path) and read_step(path) > step]
    model_bin = os.path.join(out_dir, "model.bin")
    if later_best and os.path.exists(model_bin):
        later_best.append(model_bin)
    folder = unused_archive(out_dir)
    os.mkdir(folder)
    for path in later_best + later:  # if it is killed, the next start finds some of later
        os.rename(path, os.path.join(folder, os.path.basename(path)))
    print(f"moved {len(later)} checkpoint(s) of steps after {step} to {folder}")


def finish_saving(run: TrainingRun) -> None:
    """Wait until everything is written. Raises ValueError if something cannot be written.

    Then the other processes end as well, with status 1."""
    error: ValueError | None = None
    try:
        run.checkpoints.flush()
    except ValueError as failure:
        error = failure
    run.metrics.flush()
    if not run.dist_ctx.any_rank(error is not None):
        return
    if not run.dist_ctx.is_main:
        raise SystemExit(1)
    step = run.checkpoints.last_saved_step
    latest = "no checkpoint" if step is None else f"the latest checkpoint is of step {step}"
    raise ValueError(f"{error}; {latest}") from error


def plot_loss(run: TrainingRun) -> None:
    """Draw loss.png on the main process; a full disk costs the plot, not the run."""
    if run.dist_ctx.is_main:
        with contextlib.suppress(OSError):
            run.metrics.plot_loss()
