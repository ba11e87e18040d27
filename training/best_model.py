"""The best model of a run: the lowest validation loss, and the files that hold its model.

A loss is compared only with losses on the same windows. Where a resumed run evaluates on others,
the earlier best model stays beside the new one: best.pt of step 200 as best_000200.pt, model.bin
as model_000200.bin. A model.bin whose step is not known stays as model_earlier.bin.
"""

import dataclasses
import itertools
import math
import os

from checkpoints.latest import BEST_NAMES, BestRecord, latest_path, read_best_record
from checkpoints.links import link_checkpoint, same_checkpoint
from textdata.loader import evaluation_indices
from training.out_dir import quarantine_checkpoint
from training.state import TrainingRun


def restore_best(run: TrainingRun) -> None:
    """Set the best loss to that of the best model in the output folder. All processes call this.

    It is Inf where there is no such model, or where it was evaluated on other windows: then the
    main process keeps it under another name."""
    loss = find_best_loss(run) if run.dist_ctx.is_main else 0.0
    run.state.best_val_loss = run.dist_ctx.all_reduce_sum([loss])[0]


def find_best_loss(run: TrainingRun) -> float:
    """The loss of the best model in the output folder on the run's windows, or Inf."""
    records = best_records(run)
    run.checkpoints.has_best = bool(records)
    others = [path for path, record in records.items() if not is_comparable(run, record)]
    if others:
        kept = [keep_beside(path, records[path].step) for path in others]
        run.log(
            f"the validation windows are not those that chose {', '.join(others)}: the next best "
            f"model replaces it, and it stays as {', '.join(kept)}"
        )
    losses = [record.loss for path, record in records.items() if path not in others]
    return min((loss for loss in losses if not math.isnan(loss)), default=math.inf)


def best_records(run: TrainingRun) -> dict[str, BestRecord]:
    """The best models in the output folder by their paths. Damaged checkpoints are renamed.

    A model.bin records nothing. If it is all that is left of the best model, the latest checkpoint
    records its loss, but not its step. Raises OSError for a transient error of the system."""
    records = {}
    for path in map(run.path, BEST_NAMES):
        if not os.path.lexists(path):
            continue
        record = read_best_record(path)
        if record:
            records[path] = record
        else:
            quarantine_checkpoint(path)
            run.log(f"warning: {path} is damaged: renamed")
    model_bin = run.path("model.bin")
    if not os.path.exists(model_bin):
        return records
    record = next(iter(records.values()), None)
    if record is None:
        latest = read_best_record(latest_path(run.config.out_dir))
        record = latest._replace(step=None) if latest else None
    return records | ({model_bin: record} if record else {})


def is_comparable(run: TrainingRun, record: BestRecord) -> bool:
    """Whether a best loss was measured on the windows of the run's evaluations.

    Older checkpoints have no hash: there the options decide, and those that are missing agree."""
    if record.eval_hash:
        return record.eval_hash == run.eval_hash
    current = dataclasses.asdict(run.config)
    try:
        return eval_options(run, current | record.config) == eval_options(run, current)
    except (TypeError, ValueError):  # an option in the file has another type
        return False


def eval_options(run: TrainingRun, config: dict) -> tuple[str, list[int]]:
    """The data and the windows that these options evaluate on, whatever their spelling."""
    indices = evaluation_indices(run.val_dataset, config["batch_size"], config["eval_iters"])
    return os.path.realpath(config["data_dir"]), indices


def keep_beside(path: str, step: int | None) -> str:
    """Give a file of the best model a second name, with its step if that is known.

    Returns the second path. The first name is overwritten only when there is a new best model."""
    stem, suffix = os.path.splitext(path)
    label = "earlier" if step is None else f"{step:06d}"
    for number in itertools.count(1):
        copy_number = f"_{number}" if number > 1 else ""
        kept = f"{stem}_{label}{copy_number}{suffix}"
        if not os.path.exists(kept) or same_checkpoint(path, kept):
            break
    link_checkpoint(path, kept)
    return kept


def update_best(run: TrainingRun, val_loss: float = math.inf) -> bool:
    """Note the loss of an evaluation; returns whether the state becomes the best model.

    It also does where the best model was deleted. Without an evaluation its loss is Inf, so that
    the next evaluation replaces it. All processes call this."""
    is_lost = run.dist_ctx.any_rank(run.dist_ctx.is_main and run.checkpoints.is_best_lost())
    is_best = is_lost or val_loss < run.state.best_val_loss
    if is_best:
        run.state.best_val_loss = val_loss
    return is_best
