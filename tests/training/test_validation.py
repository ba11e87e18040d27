import math

import pytest

from train import TrainConfig
from training.optim import LRSchedule, lr_at_step
from training.validation import warmup_note


@pytest.mark.parametrize(
    "steps, warmup, expected",
    [
        (50, 1000, "rises to 2.5e-05 only"),
        (999, 1000, "rises to 0.0004995 only"),
        (5, 1000, "--warmup_iters=1"),
        (1000, 1000, None),
        (1, 1, None),
        (1001, 1000, None),
        (50, 0, None),
    ],
)
def test_a_warmup_longer_than_the_run_is_noted(steps, warmup, expected):
    """A run of 50 steps had a twentieth of the learning rate and no message."""
    note = warmup_note(TrainConfig(max_iters=steps, warmup_iters=warmup))
    assert (expected in note) if expected else note is None


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_note_agrees_with_the_schedule(steps):
    """Equal numbers gave "rises to 0.0005 only, not to 0.0005"."""
    for warmup in range(steps + 3):
        config = TrainConfig(max_iters=steps, warmup_iters=warmup)
        schedule = LRSchedule("constant", config.learning_rate, 0.0, warmup, steps, 0.2)
        highest = max(lr_at_step(step, schedule) for step in range(steps))
        reaches_maximum = math.isclose(highest, config.learning_rate)
        assert (warmup_note(config) is None) == reaches_maximum
