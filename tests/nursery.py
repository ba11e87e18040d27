"""
Commands without the seconds that PyTorch takes to be imported: on Linux each runs in a fork of one process
that has imported it already.

A fork differs from a process of its own in its end, which passes over atexit and the interpreter's own
shutdown; in imports that another script has made for it; and in Python's hashes, which all forks share. Tests
of these start real ones.
"""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.timing import free_port

ROOT = Path(__file__).resolve().parent.parent
CAN_FORK = sys.platform == "linux"
SCRIPTS = ["train", "sample", "export", "tinystories"]
IMPORTED_LATER = [
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "matplotlib.figure",
]


class Command:
    """python SCRIPT ARGUMENTS, begun in the folder cwd, without standard input."""

    def __init__(
        self, script: str, arguments: list[str], cwd: str, environment: dict, forks: bool = True
    ):
        self.arguments = [str(ROOT / script), *arguments]
        self.folder = tempfile.TemporaryDirectory()
        self.said = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        for path in self.said:
            path.touch()
        self.start(cwd, environment, forks and CAN_FORK)

    def start(self, cwd: str, environment: dict, forks: bool):
        if forks:
            context = multiprocessing.get_context("forkserver")
            self.process = context.Process(
                target=be, args=(self.arguments, cwd, environment, self.said)
            )
            self.process.start()
            self.wait, self.status = self.process.join, lambda: self.process.exitcode
            return
        with self.said[0].open("wb") as output, self.said[1].open("wb") as errors:
            streams = dict(stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
            self.process = subprocess.Popen(
                [sys.executable, *self.arguments], cwd=cwd, env=environment, **streams
            )
        self.wait, self.status = self.process.wait, self.process.poll

    def end(self, timeout: float) -> subprocess.CompletedProcess:
        """Its end, and what it said. Raises subprocess.TimeoutExpired after so many seconds."""
        with self.folder:
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.wait(timeout)
                status = self.status()
                output, errors = (path.read_text(encoding="utf-8") for path in self.said)
                if status is None:
                    raise subprocess.TimeoutExpired(self.arguments, timeout, output, errors)
            finally:
                self.kill()
        return subprocess.CompletedProcess(self.arguments, status, output, errors)

    def kill(self):
        if self.status() is None:
            self.process.kill()
            self.wait()


def prepare_to_fork():
    """Let the first process import what the commands will, from where this is called."""
    multiprocessing.forkserver.set_forkserver_preload(["tests.nursery", *SCRIPTS, *IMPORTED_LATER])
    multiprocessing.forkserver.ensure_running()


def be(arguments: list[str], cwd: str, environment: dict, said: list[Path]):
    """Go on as that command, in this process, which is its alone."""
    for number, path in enumerate([os.devnull, *said]):
        opened = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = arguments, os.path.dirname(arguments[0])
    runpy.run_path(arguments[0], run_name="__main__")


def run_together(
    script: str, processes: int, *arguments, timeout: float = 180
) -> list[subprocess.CompletedProcess]:
    """The processes of one run, with the environments that torchrun would give them."""
    where = places(processes) if processes > 1 else [{}]
    commands, deadline = [], time.monotonic() + timeout
    try:
        for place in where:
            commands.append(
                Command(script, [*map(str, arguments)], os.getcwd(), os.environ | place)
            )
        return [command.end(max(0, deadline - time.monotonic())) for command in commands]
    finally:
        for command in commands:
            command.kill()


def places(processes: int) -> list[dict]:
    together = dict(MASTER_ADDR="localhost", MASTER_PORT=free_port(), WORLD_SIZE=processes)
    return [
        {name: str(value) for name, value in (together | dict(RANK=rank, LOCAL_RANK=rank)).items()}
        for rank in range(processes)
    ]
