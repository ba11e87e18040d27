"""
Commands without the seconds that PyTorch takes to be imported: each runs in a fork of one process that
has imported it already. To the command all is as if it had been started by itself.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from turns import free_port

SCRIPTS = ["train", "sample", "export", "tinystories", "sharded"]
IMPORTED_LATER = ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "matplotlib.figure"]
CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()


class Command:
    """python SCRIPT ARGUMENTS, begun in this folder, without standard input."""

    def __init__(self, script: Path, arguments: list[str], cwd: str, environment: dict):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.nursery", *SCRIPTS, *IMPORTED_LATER])
        self.arguments, self.folder = [str(script), *arguments], tempfile.TemporaryDirectory()
        self.said = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        self.process = context.Process(target=be, args=(self.arguments, cwd, environment, self.said))
        self.process.start()

    def end(self, timeout: float) -> subprocess.CompletedProcess:
        """Its end, and what it said. Raises subprocess.TimeoutExpired after so many seconds."""
        self.process.join(timeout)
        if (status := self.process.exitcode) is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        with self.folder:
            return subprocess.CompletedProcess(
                self.arguments, status, *(path.read_text(encoding="utf-8") for path in self.said)
            )


def be(arguments: list[str], cwd: str, environment: dict, said: list[Path]):
    """Go on as that command, in this process, which is its alone."""
    for number, path in enumerate([os.devnull, *said]):
        opened = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = arguments, os.path.dirname(arguments[0])
    runpy.run_path(arguments[0], run_name="__main__")


def run_together(script: Path, processes: int, *arguments, timeout: float = 180) -> list[subprocess.CompletedProcess]:
    """The processes of one run, as torchrun would start them."""
    here, where = os.getcwd(), places(processes) if processes > 1 else [{}]
    commands = [Command(script, [*map(str, arguments)], here, os.environ | place) for place in where]
    try:
        return [command.end(timeout) for command in commands]
    finally:
        for command in commands:
            command.process.kill()


def places(processes: int) -> list[dict]:
    """The environments that torchrun would give to the processes of one run."""
    together = dict(MASTER_ADDR="localhost", MASTER_PORT=free_port(), WORLD_SIZE=processes)
    return [
        {name: str(value) for name, value in (together | dict(RANK=rank, LOCAL_RANK=rank)).items()}
        for rank in range(processes)
    ]
