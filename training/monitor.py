"""
Whether a run is well: spikes of its loss and gradient, and numbers that are none.
"""

import math
import statistics

import torch

from training.state import Run

FEWEST_NORMS, MOST_NORMS = 20, 100  # of gradients, of which the median is the usual one
SPIKE = 5.0  # times the usual norm, or loss, are worth a line
SMALLEST_SCALE = 2.0**-10  # a GradScaler that has come down to this will not recover


def skips(run: Run, norm) -> bool:
    """Whether a gradient of this norm is a spike, and left out; only with --skip_spikes, as to know the
    norm is to wait for the device. The usual norm is part of the checkpoint, so a resumed run skips alike."""
    if not run.config.skip_spikes:
        return False
    usual = statistics.median(run.late_norms) if len(run.late_norms) >= FEWEST_NORMS else math.inf
    if math.isfinite(norm.item()):
        run.late_norms = [*run.late_norms, norm.item()][-MOST_NORMS:]
    is_spike = norm.item() > run.config.skip_spikes * usual
    if is_spike:
        run.say(
            f"step {run.iter_num}: skipped, its gradient has norm {norm.item():.4g}, the usual one is {usual:.4g}"
        )
    return is_spike


def tell_spikes(run: Run, **figures):
    """Say where a figure is far above what it was of late."""
    for name, value in figures.items() if run.dist_ctx.is_main else ():
        if not math.isfinite(value):
            continue  # in float16 an overflow, which the scaler sees to
        late = [record[name] for record in run.metrics.records[-MOST_NORMS:] if record.get(name)]
        usual = statistics.median(late) if len(late) >= FEWEST_NORMS else math.inf
        if value > SPIKE * usual:
            run.say(
                f"step {run.iter_num}: {name} {value:.4g} is {value / usual:.0f} times what is usual"
            )


def remember_bad(run: Run, norm):
    """Note the first step whose gradient is no number; on the device, so that nobody waits for it."""
    is_first = ~norm.isfinite() & (run.first_bad < 0)
    run.first_bad = torch.where(is_first, run.iter_num, run.first_bad)


def check_finite(run: Run, step: int, loss: float, norm: float):
    """Raise ValueError where the run cannot go on after this step. In float16 an overflow only costs its step:
    the scaler has skipped it and lowered the scale, until the scale itself gives out."""
    if run.scaler.is_enabled():
        if run.scaler.get_scale() > SMALLEST_SCALE:
            return
    elif math.isfinite(loss) and math.isfinite(norm):
        return
    run.keeper.join()  # which may just be writing one
    if not run.scaler.is_enabled() and 0 <= int(run.first_bad) < step:
        step = int(run.first_bad)  # it is noticed only where the loss is reported
    kept = (
        "nothing is saved yet"
        if run.saved_at is None
        else f"{run.path('ckpt.pt')} of step {run.saved_at} is intact"
    )
    raise ValueError(
        f"step {step}, which reads from sequence {run.position + (step - run.iter_num) * run.config.sequences_per_step}"
        f" on: the loss is {loss} and the norm of the gradient {norm}; {kept}. Lower --learning_rate or raise "
        f"--warmup_iters; python train.py --init_from=auto --out_dir={run.config.out_dir} --debug_step={step} shows "
        "that batch, with your other options"
    )
