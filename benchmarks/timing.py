"""
Fair timing: variants in separate processes that take turns, round after round, so that a machine
that slows down affects all of them.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import torch

from runtime.distributed import shutdown_distributed

WARM_UP = 3  # steps; the first ones compile, allocate and fill caches


class TimingOptions(Protocol):
    """The options that every timed benchmark has."""

    @property
    def rounds(self) -> int: ...

    @property
    def seconds(self) -> float: ...


class Variant(NamedTuple):
    """One of the things to compare: step(), which runs in its own processes."""

    name: str
    build: Callable[..., Callable[..., int]]  # build(**arguments) returns step() -> units of work
    arguments: dict[str, Any]
    processes: int = 1
    warm_up: int = WARM_UP  # steps before the first turn
    cases: tuple[str, ...] = ("",)  # each is measured separately: step(case), or step() for ""

    def start(self) -> "VariantProcesses":
        """Start its processes; returns when they are ready."""
        return VariantProcesses(self)


class Measurement(NamedTuple):
    """The result of measuring a variant."""

    rates: list[float]  # units of work per second, one per round
    peak_memory: int  # bytes, of one process

    @property
    def rate(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.rates)


class Turn(NamedTuple):
    """The result of one turn."""

    units: int  # of work
    seconds: float
    peak_memory: int  # bytes

    @property
    def rate(self) -> float:
        return self.units / self.seconds


class Runner(Protocol):
    """What measures the turns of a variant."""

    def measure_turn(self, seconds: float, case: str) -> Turn: ...

    def stop(self) -> None: ...


class Measurable(Protocol):
    """A Variant, or another program that can be measured like one."""

    @property
    def name(self) -> str: ...

    @property
    def cases(self) -> tuple[str, ...]: ...

    def start(self) -> Runner: ...


def worker_main(pipe: Connection, variant: Variant, rank: int, port: int) -> None:
    """The process of a variant: build it, then run as many steps as each message says."""
    sys.stdout = sys.stderr  # standard output is for the tables
    if variant.processes > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // variant.processes))
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ["MASTER_PORT"] = str(port)
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
        os.environ["WORLD_SIZE"] = str(variant.processes)
    try:
        run_turns(pipe, variant)
        shutdown_distributed()
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {str(error).strip()}")


def run_turns(pipe: Connection, variant: Variant) -> None:
    """Send None when the variant is ready, then a Turn for each (number of steps, case)."""
    device = variant.arguments["device"]
    step = variant.build(**variant.arguments)
    for _ in range(variant.warm_up):
        step(*filter(None, variant.cases[:1]))
    pipe.send(None)
    while message := pipe.recv():
        steps, case = message
        arguments = [case] if case else []
        synchronize(device)
        started = time.perf_counter()
        units = sum(step(*arguments) for _ in range(steps))
        synchronize(device)
        pipe.send(Turn(units, time.perf_counter() - started, peak_memory(device)))


def synchronize(device: str) -> None:
    """Wait until the device has finished its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


def peak_memory(device: str) -> int:
    """Bytes that PyTorch allocated on a GPU, or the largest resident size of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if peak := largest_resident_size("self"):
        return peak
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def largest_resident_size(process: int | str) -> int:
    """Peak resident bytes of a process; 0 if it has ended, or on other systems than Linux."""
    try:
        with open(f"/proc/{process}/status") as status:
            peaks = [int(line.split()[1]) for line in status if line.startswith("VmHWM")]
    except OSError:
        return 0
    return peaks[0] * 1024 if peaks else 0


class VariantProcesses:
    """The processes of one variant, which wait for their turn. Raises ValueError if one fails."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.steps = 1  # of the next turn
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self.pipes: list[Connection] = []
        for rank in range(variant.processes):
            pipe, worker_pipe = context.Pipe()
            arguments = (worker_pipe, variant, rank, port)
            context.Process(target=worker_main, args=arguments, daemon=True).start()
            worker_pipe.close()
            self.pipes.append(pipe)
        self.receive()

    def receive(self) -> list[Turn | None]:
        """One message from each process, read as they arrive: a process that fails can leave the
        others waiting for it."""
        messages: dict[Connection, Turn | None] = {}
        while len(messages) < len(self.pipes):
            waiting = [pipe for pipe in self.pipes if pipe not in messages]
            for pipe in multiprocessing.connection.wait(waiting):
                assert isinstance(pipe, Connection)
                try:
                    message = pipe.recv()
                except EOFError:
                    message = "its process died (out of memory?)"
                if isinstance(message, str):
                    raise ValueError(f"{self.variant.name}: {message}")
                messages[pipe] = message
        return [messages[pipe] for pipe in self.pipes]

    def measure_turn(self, seconds: float, case: str = "") -> Turn:
        """Run one turn; the next one will take about so many seconds."""
        for pipe in self.pipes:
            pipe.send((self.steps, case))
        turn = self.receive()[0]
        assert turn is not None, "a process answers each number of steps with a Turn"
        self.steps = max(1, round(self.steps * seconds / max(turn.seconds, 1e-9)))
        return turn

    def stop(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            with contextlib.suppress(OSError):  # the process may have ended
                pipe.send(None)
            pipe.close()


def free_port() -> int:
    """A TCP port of this machine that no process uses."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def timing_problems(config: TimingOptions) -> Iterator[str]:
    """Yield a message for each invalid timing option."""
    if config.rounds < 1:
        yield f"--rounds={config.rounds}: must be 1 or more"
    if config.seconds <= 0:
        yield f"--seconds={config.seconds:g}: must be above 0"


def measure(variants: list[Variant], rounds: int, seconds: float) -> dict[str, Measurement]:
    """Measure every variant by name, with one turn per round of about so many seconds."""
    measurements = measure_cases(variants, rounds, seconds)
    return {name: measurement for (name, _), measurement in measurements.items()}


def measure_cases(
    variants: Sequence[Measurable], rounds: int, seconds: float
) -> dict[tuple[str, str], Measurement]:
    """Measure every case of every variant by (name, case), with one turn of each per round."""
    runners: list[Runner] = []
    keys = [(variant.name, case) for variant in variants for case in variant.cases]
    try:
        for variant in variants:
            print(f"  starting {variant.name} ...", file=sys.stderr, flush=True)
            runners.append(variant.start())
            # This turn, which is not counted, finds the number of steps per turn.
            runners[-1].measure_turn(seconds, variant.cases[0])
        by_name = {variant.name: runner for variant, runner in zip(variants, runners, strict=True)}
        turns = [
            [by_name[name].measure_turn(seconds, case) for name, case in keys]
            for _ in range(rounds)
        ]
    finally:
        for runner in runners:
            runner.stop()
    return {
        key: Measurement([turn.rate for turn in column], max(turn.peak_memory for turn in column))
        for key, column in zip(keys, zip(*turns, strict=True), strict=True)
    }
