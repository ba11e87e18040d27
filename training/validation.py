"""The ranges of train.py's options."""

from collections.abc import Iterator
from typing import Any

AT_LEAST_1 = (
    "eval_interval",
    "log_interval",
    "batch_size",
    "gradient_accumulation_steps",
    "max_iters",
)
AT_LEAST_0 = (
    "eval_iters",
    "checkpoint_interval",
    "keep_checkpoints",
    "sample_interval",
    "warmup_iters",
    "learning_rate",
    "weight_decay",
    "grad_clip",
    "min_lr",
    "skip_spikes",
)


def range_errors(config: Any) -> Iterator[str]:
    """Yield a sentence for each number out of range. config: train.py's TrainConfig."""
    for minimum, names in ((1, AT_LEAST_1), (0, AT_LEAST_0)):
        for name in names:
            if getattr(config, name) < minimum:
                yield f"--{name}={getattr(config, name):g}: must be {minimum} or more"
    if config.debug_step is not None and config.debug_step < 0:
        yield f"--debug_step={config.debug_step}: must be 0 or more"
    if not 1 <= config.timeout <= 1e6:
        yield f"--timeout={config.timeout:g}: must be 1 to 1e6 seconds"
    if not 0 < config.wsd_cooldown <= 1:
        yield f"--wsd_cooldown={config.wsd_cooldown:g}: must be above 0 and at most 1"
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(config, name) < 1:
            yield f"--{name}={getattr(config, name):g}: must be at least 0 and below 1"


def warmup_note(config: Any) -> str | None:
    """A sentence if the warm-up is longer than the run: the learning rate then never reaches its
    maximum, which is that of the warm-up's last step."""
    warmup, steps = config.warmup_iters, config.max_iters
    if warmup <= steps or config.learning_rate == 0:
        return None
    last = config.learning_rate * steps / warmup
    return (
        f"note: --warmup_iters={warmup} is more than --max_iters={steps}, so the learning rate "
        f"rises to {last:g} only, not to --learning_rate={config.learning_rate:g}; "
        f"a tenth of the steps is usual: --warmup_iters={max(1, steps // 10)}"
    )
