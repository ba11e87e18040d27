"""Watches a run for loss spikes, gradient spikes, NaN or Inf values, and wrong devices."""

import copy
import math
import statistics

import torch

from textdata.loader import evaluation_batches
from training.parallel import is_sharded
from training.state import TrainingRun

MIN_HISTORY = 20  # gradient norms or losses before a median is meaningful
MAX_HISTORY = 100  # of the latest ones, which the median is taken of
SPIKE_FACTOR = 5.0  # times the recent median: worth a line in the log
MIN_LOSS_SCALE = 2.0**-10  # a GradScaler that has come down to this does not recover


def recent_median(values: list[float]) -> float:
    """The median of recent values; Inf while there are too few."""
    return statistics.median(values) if len(values) >= MIN_HISTORY else math.inf


def should_skip_step(run: TrainingRun, grad_norm: torch.Tensor) -> bool:
    """Whether to skip an optimizer step because its gradient norm is a spike (--skip_spikes).

    Reading the norm waits for the device, so nothing is read without the option. The recent norms
    are part of the checkpoint: a resumed run skips the same steps."""
    if not run.config.skip_spikes:
        return False
    norm = grad_norm.item()
    median = recent_median(run.state.recent_grad_norms)
    if math.isfinite(norm):
        run.state.recent_grad_norms = [*run.state.recent_grad_norms, norm][-MAX_HISTORY:]
    is_spike = norm > run.config.skip_spikes * median
    if is_spike:
        step = run.state.iter_num
        run.log(f"step {step}: skipped, gradient norm {norm:.4g}, recent median {median:.4g}")
    return is_spike


def log_spikes(run: TrainingRun, **figures: float) -> None:
    """Log every figure that is far above the recent median in the metrics of the same name."""
    if not run.dist_ctx.is_main:
        return
    for name, value in figures.items():
        if not math.isfinite(value):
            continue  # in float16 an overflow, which the GradScaler handles
        recent = [r[name] for r in run.metrics.records[-MAX_HISTORY:] if r.get(name)]
        median = recent_median(recent)
        if value > SPIKE_FACTOR * median:
            factor = f"{value / median:.0f} times the recent median"
            run.log(f"step {run.state.iter_num}: {name} {value:.4g} is {factor}")


def record_first_nonfinite(run: TrainingRun, grad_norm: torch.Tensor) -> None:
    """Record the first step whose gradient norm is NaN or Inf, without waiting for the device."""
    is_first = ~grad_norm.isfinite() & (run.first_nonfinite_step < 0)
    step = torch.where(is_first, run.state.iter_num, run.first_nonfinite_step)
    run.first_nonfinite_step.copy_(step)


def check_finite(run: TrainingRun, step: int, loss: float, grad_norm: float) -> None:
    """Raise ValueError if the loss or the gradient norm of a step is NaN or Inf.

    In float16 an overflow costs only its step: the GradScaler skips it and lowers the loss scale.
    The run ends when the scale gets too small."""
    if run.scaler.is_enabled():
        if run.scaler.get_scale() > MIN_LOSS_SCALE:
            return
    elif math.isfinite(loss) and math.isfinite(grad_norm):
        return
    raise divergence_error(run, step, f"the loss is {loss} and the gradient norm {grad_norm}")


def check_evaluation(run: TrainingRun, val_loss: float) -> None:
    """Raise ValueError if the validation loss is NaN or Inf after the last step.

    Before the first step the weights are to blame, and saving them names the first."""
    if run.state.iter_num and not run.scaler.is_enabled() and not math.isfinite(val_loss):
        last_step = run.state.iter_num - 1
        raise divergence_error(run, last_step, f"the validation loss after it is {val_loss}")


def divergence_error(run: TrainingRun, step: int, reason: str) -> ValueError:
    """The error of a run that diverged at a step, or at an earlier one with a NaN or Inf norm."""
    run.checkpoints.join()  # a checkpoint may be being written
    first_step = int(run.first_nonfinite_step)
    if not run.scaler.is_enabled() and 0 <= first_step < step:
        step = first_step  # the loss is read at log_interval only
    config = run.config
    sequence = run.state.position + (step - run.state.iter_num) * config.sequences_per_step
    return ValueError(
        f"step {step}, which reads from sequence {sequence} on: {reason}; {describe_saved(run)}. "
        "Lower --learning_rate or raise --warmup_iters; "
        f"python train.py --init_from=auto --out_dir={config.out_dir} --debug_step={step} shows "
        "that batch, with your other options"
    )


def describe_saved(run: TrainingRun) -> str:
    """Which checkpoint is intact. Only the main process of a run knows."""
    step = run.checkpoints.last_saved_step
    if not run.dist_ctx.is_main:
        return "rank 0 says which checkpoint is intact"
    if step is None:
        return "nothing is saved yet"
    latest = "ckpt.dcp" if is_sharded(run.model) else "ckpt.pt"
    return f"{run.path(latest)} of step {step} is intact"


@torch.no_grad()
def check_against_cpu(run: TrainingRun) -> None:
    """Raise ValueError if the device and the CPU compute different losses for one sequence.

    Apple's MPS has silently computed wrong results."""
    run.model.eval()
    inputs, targets = next(evaluation_batches(run.val_dataset, batch_size=1, num_batches=1))
    loss = run.model(inputs.to(run.device), targets.to(run.device))[1].item()
    expected = copy.deepcopy(run.model).cpu()(inputs, targets)[1].item()
    run.model.train()
    if not math.isclose(loss, expected, rel_tol=1e-2):
        raise ValueError(
            f"--device={run.device} computes a loss of {loss:.4f} where the CPU computes "
            f"{expected:.4f}: another version of PyTorch may be right; --device=cpu is right"
        )
