"""
Commands without the seconds that PyTorch takes to be imported: each runs in a fork of one process that
has imported it already. To the command all is as if it had been started by itself.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

SCRIPTS = ["train", "sample", "export", "tinystories", "sharded"]
PRELOADED = ["tests.nursery", *SCRIPTS, "torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg"]
CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()


def run_in_fork(script: Path, arguments: list[str], cwd: Path, environment: dict, timeout: float):
    """python SCRIPT ARGUMENTS in that folder, as a CompletedProcess with what it said as text. Raises
    subprocess.TimeoutExpired for one that takes longer than timeout seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    said = [cwd.with_name(f"{cwd.name}.{name}") for name in ("stdout", "stderr")]
    process = context.Process(target=be, args=(script, arguments, cwd, environment, said))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise subprocess.TimeoutExpired(str(script), timeout)
    output, errors = (path.read_text(encoding="utf-8") for path in said)
    return subprocess.CompletedProcess([str(script), *arguments], process.exitcode, output, errors)


def be(script: Path, arguments: list[str], cwd: Path, environment: dict, said: list[Path]):
    """Go on as that command, in this process, which is its alone."""
    for number, path in enumerate([os.devnull, *said]):
        opened = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = [str(script), *arguments], str(script.parent)
    runpy.run_path(str(script), run_name="__main__")
