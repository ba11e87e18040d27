"""
Fair timing: variants in processes of their own that take turns, round after round, so that a machine
that slows down slows all of them alike.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import socket
import statistics
import sys
import time
from typing import NamedTuple

import torch

from runtime.distributed import shutdown_distributed

WARM_UP = 3  # steps; the first ones compile, allocate and fill caches


class Variant(NamedTuple):
    name: str
    build: object  # build(**arguments) returns step(), which returns how much it did: tokens, operations
    arguments: dict
    processes: int = 1
    warm_up: int = WARM_UP  # steps before its first turn


class Measured(NamedTuple):
    rates: list[float]  # units of work per second, one a round
    peak_memory: int  # bytes, of one process

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def work(pipe, variant: Variant, rank: int, port: int):
    """A variant's own process: build it, then take a turn whenever the pipe says how long."""
    sys.stdout = sys.stderr  # standard output is for the tables
    device = variant.arguments["device"]
    if variant.processes > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // variant.processes))
        where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=rank, LOCAL_RANK=rank)
        os.environ |= {name: str(value) for name, value in where.items()} | {
            "WORLD_SIZE": str(variant.processes)
        }
    try:
        step = variant.build(**variant.arguments)
        for _ in range(variant.warm_up):
            step()
        pipe.send(None)
        while steps := pipe.recv():
            synchronize(device)
            began = time.perf_counter()
            units = sum(step() for _ in range(steps))
            synchronize(device)
            pipe.send((units, time.perf_counter() - began, peak_memory(device)))
        shutdown_distributed()
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {str(error).strip()}")


def synchronize(device: str):
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


def peak_memory(device: str) -> int:
    """Bytes: what PyTorch took of a GPU, or the largest resident size of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if peak := largest_resident_size("self"):
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def largest_resident_size(process: int | str) -> int:
    """Bytes, so far; 0 where the system does not tell (only Linux does), or the process is gone."""
    try:
        with open(f"/proc/{process}/status") as status:
            return next(
                (int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")), 0
            )
    except OSError:
        return 0


class Turns:
    """The processes of one variant, waiting for their turn."""

    def __init__(self, variant: Variant):
        self.variant, self.steps = variant, 1
        context, port = multiprocessing.get_context("spawn"), free_port()
        self.pipes = []
        for rank in range(variant.processes):
            ours, theirs = context.Pipe()
            context.Process(target=work, args=(theirs, variant, rank, port), daemon=True).start()
            theirs.close()
            self.pipes.append(ours)
        self.receive()

    def receive(self) -> list:
        """What each process says, asked as they are ready: one that fails may leave another waiting
        for it. Raises ValueError for a failure."""
        said, waiting = {}, list(self.pipes)
        while waiting:
            for pipe in multiprocessing.connection.wait(waiting):
                try:
                    said[pipe] = pipe.recv()
                except EOFError:
                    said[pipe] = "its process died (out of memory?)"
                if isinstance(said[pipe], str):
                    raise ValueError(f"{self.variant.name}: {said[pipe]}")
                waiting.remove(pipe)
        return [said[pipe] for pipe in self.pipes]

    def take(self, seconds: float) -> tuple[float, int]:
        """(units per second, peak memory in bytes) of one turn."""
        for pipe in self.pipes:
            pipe.send(self.steps)
        units, took, memory = self.receive()[0]
        self.steps = max(1, round(self.steps * seconds / max(took, 1e-9)))
        return units / took, memory

    def end(self):
        for pipe in self.pipes:
            with contextlib.suppress(OSError):  # it may be gone
                pipe.send(0)
            pipe.close()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def timing_problems(config):
    """What is wrong with how often and how long variants are to take turns."""
    if config.rounds < 1:
        yield f"--rounds={config.rounds}: must be 1 or more"
    if config.seconds <= 0:
        yield f"--seconds={config.seconds:g}: must be above 0"


def measure(variants: list[Variant], rounds: int, seconds: float) -> dict[str, Measured]:
    """Every variant's rates, a turn each in every round."""
    turns = []
    try:
        for variant in variants:
            print(f"  starting {variant.name} ...", file=sys.stderr, flush=True)
            turns.append(Turns(variant))
            turns[-1].take(seconds)  # finds how many steps a turn has
        taken = [[turn.take(seconds) for turn in turns] for _ in range(rounds)]
    finally:
        for turn in turns:
            turn.end()
    columns = zip(*taken, strict=True)
    return {
        variant.name: Measured([rate for rate, _ in column], max(memory for _, memory in column))
        for variant, column in zip(variants, columns, strict=True)
    }
