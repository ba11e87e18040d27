"""
What a checkpoint in the background costs a training run.
"""

import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.timing import WARM_UP, synchronize
from benchmarks.training_run import (
    build_run,
    finish_saving,
    prepare_out_dir,
    start_saving,
    step_function,
)
from training.state import TrainingRun


class SavingRates(NamedTuple):
    """Tokens per second of each round, without and with one checkpoint."""

    without_checkpoint: list[float]
    with_checkpoint: list[float]


def measure_saving(options: list[str], device: str, interval: int, rounds: int) -> SavingRates:
    """Train interval steps per turn, without and with a checkpoint in turn, after a warm-up.

    Both run in one process, because two processes with the same code differ by more than this."""
    rates = SavingRates([], [])
    with tempfile.TemporaryDirectory() as folder:
        benchmark_run = build_run([*options, f"--out_dir={folder}"], device)
        run, step = benchmark_run.run, step_function(benchmark_run)
        prepare_out_dir(run)
        for save in (False, True):
            measure_turn(run, step, WARM_UP, save)
        for number in range(rounds):
            for save in (False, True) if number % 2 else (True, False):
                turns = rates.with_checkpoint if save else rates.without_checkpoint
                turns.append(measure_turn(run, step, interval, save))
    return rates


def measure_turn(run: TrainingRun, step: Callable[[], int], steps: int, save: bool) -> float:
    """Tokens per second of so many steps, with a checkpoint if save."""
    synchronize(run.device)
    started = time.perf_counter()
    if save:
        start_saving(run)
    tokens = sum(step() for _ in range(steps))
    synchronize(run.device)
    finish_saving(run)
    return tokens / (time.perf_counter() - started)
