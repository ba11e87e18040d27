"""
What a run leaves in its folder: checkpoints, the best model, the vocabulary and the figures.
"""

import contextlib
import dataclasses
import glob
import itertools
import os
import re
import sys
from functools import partial

import torch

from checkpoints.file import FORMAT, save_checkpoint, write_model_args
from checkpoints.manager import (
    NEWEST,
    give_number,
    in_words,
    link_or_copy,
    numbered,
    open_checkpoint,
    put_older_aside,
    remove,
    remove_oldest,
    snapshot,
)
from formats import llama2c
from formats.lazy_model import from_state_dict
from runtime.atomic_files import AtomicFolder, sync_folder, write_atomically
from training.metrics import MetricsLogger
from training.parallel import is_sharded
from training.state import Run

# Names of what a run writes.
OURS = r"(ckpt\w*|best)\.(pt|dcp)|model\.bin|loss\.png|metrics\.jsonl|tokenizer\.\w+"


def state_of(run: Run) -> dict:
    """All that the run needs to go on: llama2.c's keys, then ours."""
    weights = run.model.state_dict()
    if run.model.args.tie_embeddings:
        weights["output.weight"] = weights[
            "tok_embeddings.weight"
        ]  # the same object, so that it is copied once
    return {
        "model": weights,
        "optimizer": run.optimizer.state_dict(),
        "model_args": write_model_args(run.model.args),
        "iter_num": run.iter_num,
        "best_val_loss": torch.tensor(run.best_val_loss, dtype=torch.float64),
        "config": dataclasses.asdict(run.config),
        "scaler": run.scaler.state_dict(),
        "position": run.position,
        "late_norms": run.late_norms,
        "tokenizer_hash": run.tokenizer.hash,
        "versions": {
            "format": FORMAT,
            "torch": str(torch.__version__),
            "python": sys.version.split()[0],
        },
    }


def save(run: Run, best: bool = False):
    """Have the state of this step written in the background: as the newest, with older ones beside it where
    they are asked for, and as the best. The main process writes all of it, or each its share."""
    if is_sharded(run.model):
        save_shares(run, best)
    elif run.dist_ctx.is_main:
        save_files(run, best)


def save_files(run: Run, best: bool):
    """As ckpt.pt, and the best as best.pt and, where the format can say the model, model.bin."""
    run.keeper.wait()  # before memory is taken for another copy
    run.keeper.pending.pop(run.path("ckpt.pt"), None)
    state, writes = snapshot(state_of(run)), {}

    def write_newest(step=run.iter_num):
        put_aside(run, "ckpt.pt", step)
        save_checkpoint(run.path("ckpt.pt"), state)
        run.saved_at = step
        remove_oldest(run.config.out_dir, step, run.config.keep_checkpoints)

    if not os.path.exists(run.path("tokenizer.model")):  # the folder was deleted
        best = True  # the newest stands in for the best, which is gone
        run.metrics.mark_missing()
        writes |= tokenizer_writes(run)
    if best:  # before the newest, which knows how good the best is
        writes[run.path("best.pt")] = partial(write_best, run, state)
        if not llama2c.unsupported_reason(run.model.args):
            weights = from_state_dict(run.model.args, state["model"])
            writes[run.path("model.bin")] = lambda: llama2c.write(weights, run.path("model.bin"))
    run.keeper.keep(writes | {run.path("ckpt.pt"): write_newest})


def write_best(run: Run, state: dict):
    save_checkpoint(run.path("best.pt"), state)
    remove(run.path("best.dcp"))


def save_shares(run: Run, best: bool):
    """As the folder ckpt.dcp, and the best as best.dcp, made of the same files; by all processes together."""
    from checkpoints.sharded import cpu_copy, save_sharded, split_sharded, without_tied_head

    run.keeper.wait()
    run.keeper.pending.clear()
    is_gone = run.dist_ctx.any_rank(
        run.dist_ctx.is_main and not os.path.exists(run.path("tokenizer.model"))
    )
    if is_gone and run.dist_ctx.is_main:
        run.metrics.mark_missing()
    run.owes_best |= best or is_gone  # until one is written; a later one then stands in for it
    shares, rest = split_sharded(state_of(run))
    shares = without_tied_head(shares, run.model.args)
    shares = {place: cpu_copy(share, run.saving_mesh) for place, share in shares.items()}
    rest = snapshot(rest)

    def commit(folder: str, step=run.iter_num):  # by the main process
        problem = None
        for write in tokenizer_writes(run).values() if is_gone else ():
            write()
        if run.owes_best:  # before the newest, which knows how good the best is
            try:
                write_best_of_shares(run, folder)
            except (OSError, ValueError) as error:  # by which the newest need not suffer
                problem = OSError(in_words(error))
        put_aside(run, "ckpt.dcp", step)
        os.rename(folder, run.path("ckpt.dcp"))
        run.saved_at = step
        sync_folder(run.config.out_dir)
        with contextlib.suppress(OSError):
            remove(numbered(run.path("ckpt.dcp"), step))  # of the same step, if one was put aside
        remove_oldest(run.config.out_dir, step, run.config.keep_checkpoints)
        if problem:
            raise problem

    def write():
        save_sharded(shares, rest, run.path("ckpt.dcp"), run.saving_mesh, commit)

    run.keeper.keep({run.path("ckpt.dcp"): write})


def write_best_of_shares(run: Run, folder: str):
    with AtomicFolder(run.path("best.dcp"), may_replace=lambda name: True) as best:
        for name in os.listdir(folder):
            link_or_copy(os.path.join(folder, name), os.path.join(best, name))
    run.owes_best = False
    for name in ("best.pt", "model.bin"):  # of a lesser model
        remove(run.path(name))


def put_aside(run: Run, name: str, step: int):
    """Make way for a checkpoint of this step."""
    if run.saved_at is not None:
        put_older_aside(
            run.config.out_dir, run.saved_at, name, step, keeps=run.config.keep_checkpoints > 0
        )


def finish_saving(run: Run):
    """Wait until all is written. Raises ValueError where something cannot be; then the other processes
    end too."""
    problems = []
    for finish in [run.keeper.finish, *([run.metrics.finish] if run.metrics else [])]:
        try:
            finish()
        except ValueError as error:
            problems.append(str(error))
    if not run.dist_ctx.any_rank(bool(problems)):
        return
    if not run.dist_ctx.is_main:
        raise SystemExit(1)
    newest = (
        "no checkpoint"
        if run.saved_at is None
        else f"the newest checkpoint is of step {run.saved_at}"
    )
    raise ValueError("; ".join([*problems, newest]))


def tokenizer_writes(run: Run) -> dict:
    """The vocabulary, beside the model that was trained with it."""
    contents = {"tokenizer.model": run.tokenizer.content}
    with contextlib.suppress(ValueError):  # a vocabulary that tokenizer.bin cannot say
        contents["tokenizer.bin"] = run.tokenizer.to_bin()
    return {
        run.path(name): partial(write_atomically, run.path(name), content)
        for name, content in contents.items()
    }


def set_aside(out_dir: str):
    """Keep what an earlier run left here: a new one may not write over it."""
    found = glob.glob(os.path.join(glob.escape(out_dir), "*"))
    found = [
        path
        for path in found
        if re.fullmatch(rf"{OURS}|ckpt\.damaged(\.dcp)?", os.path.basename(path))
    ]
    if not any(path.endswith((".pt", ".dcp")) for path in found):
        return
    number = next(
        n for n in itertools.count(1) if not os.path.exists(os.path.join(out_dir, f"previous{n}"))
    )
    folder = os.path.join(out_dir, f"previous{number}")
    os.makedirs(folder)
    for path in found:
        os.rename(path, os.path.join(folder, os.path.basename(path)))
    print(f"moved the earlier run in {out_dir} to {folder}")


def take_name_away(path: str):
    """Of what is named as the newest checkpoint, and is damaged or older than another."""
    try:
        give_number(path, open_checkpoint(path)["iter_num"])
    except ValueError:
        damaged = f"{os.path.splitext(path)[0]}.damaged{'.dcp' if os.path.isdir(path) else ''}"
        remove(damaged)
        os.rename(path, damaged)


def open_out_dir(run: Run, resumed_from: str):
    """Make the folder ready for the files of this run, which goes on from that checkpoint, if from any
    (main process only)."""
    config = run.config
    if config.init_from != "resume":
        set_aside(config.out_dir)
    for name in os.listdir(config.out_dir):  # of a run that was killed; others may be at work
        if left := re.fullmatch(rf"(?P<final>{OURS})\.\d+\.partial(?P<old>\.old)?", name):
            if left["old"] and not os.path.exists(run.path(left["final"])):
                os.rename(
                    run.path(name), run.path(left["final"])
                )  # it was to give way, and nothing came
            else:
                remove(run.path(name))
    for path in map(run.path, NEWEST):
        if resumed_from and resumed_from != path and os.path.exists(path):
            take_name_away(path)
    run.metrics = MetricsLogger(config.out_dir, run.iter_num)
    for write in tokenizer_writes(run).values():
        write()
    if is_sharded(run.model):
        best = run.path("best.dcp")
        print(
            f"each process saves its share; join the shares with: python export.py model.bin --from={best}"
        )
    elif refusal := llama2c.unsupported_reason(run.model.args):
        print(f"no model.bin will be written: {refusal}")
    if config.wandb_log:
        import wandb

        wandb.init(
            project=config.wandb_project,
            name=config.wandb_run_name or None,
            config=dataclasses.asdict(config),
        )
