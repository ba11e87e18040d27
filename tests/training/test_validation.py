import pytest

from train import TrainConfig
from training.validation import warmup_note


@pytest.mark.parametrize(
    "steps, warmup, expected",
    [
        (50, 1000, "rises to 2.5e-05 only"),
        (1000, 1000, "rises to 0.0005 only"),
        (5, 1000, "--warmup_iters=1"),
        (1001, 1000, None),
        (50, 0, None),
    ],
)
def test_a_warmup_longer_than_the_run_is_noted(steps, warmup, expected):
    """A run of 50 steps had a twentieth of the learning rate and no message."""
    note = warmup_note(TrainConfig(max_iters=steps, warmup_iters=warmup))
    assert (expected in note) if expected else note is None
