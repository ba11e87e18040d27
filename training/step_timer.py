"""Measures the time of training steps."""

import time


class StepTimer:
    """Seconds per step. Call restart after an evaluation or a save to leave it out."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget the steps so far and measure from now on."""
        self.started = time.perf_counter()
        self.num_steps = 0

    def count_step(self) -> None:
        """Note that a step is done."""
        self.num_steps += 1

    def lap(self) -> float:
        """The seconds per step since the last lap or restart; then restart."""
        seconds = (time.perf_counter() - self.started) / max(1, self.num_steps)
        self.restart()
        return seconds
