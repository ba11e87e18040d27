"""
Scripts run by tests: in the test's process, in a new process, or in the ranks of one group.

Almost every test runs a script in its process, which saves the time of importing PyTorch.
A new process is for signals, kills, locks, environment variables and several ranks.
"""

import atexit
import contextlib
import ctypes
import importlib
import io
import os
import platform
import random
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

import configurator
from benchmarks.timing import free_port
from runtime.distributed import hard_exit

ROOT = Path(__file__).resolve().parent.parent
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class Result(NamedTuple):
    """How a script ended, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


class TookTooLong(BaseException):
    """A script in this process exceeded its timeout. Not an Exception: scripts catch those."""


def run_in_process(
    script: str,
    *args: object,
    cwd: str | Path | None = None,
    stdin: str | bytes | None = "",
    timeout: float = 120,
) -> Result:
    """Run `python SCRIPT ARGS` in this process, and restore the process afterwards.

    Args:
        script: its file name, such as "train.py".
        cwd: the folder to run in; the current one by default.
        stdin: what it reads on standard input; None where standard input is closed.
        timeout: seconds until TookTooLong is raised (not on Windows).
    """
    main = importlib.import_module(Path(script).stem).main
    content = stdin.encode() if isinstance(stdin, str) else stdin
    with contextlib.ExitStack() as stack:
        stack.enter_context(restored_process())
        stack.enter_context(contextlib.chdir(cwd or os.getcwd()))
        sys.argv = [str(ROOT / script), *map(str, args)]
        sys.stdin = None if content is None else text_stream(content)
        sys.stdout = text_stream()
        sys.stderr = text_stream()
        output, errors = sys.stdout, sys.stderr
        with time_limit(timeout):
            returncode = exit_status(main)
    return Result(returncode, written_to(output), written_to(errors))


def exit_status(main) -> int:
    """Run a script's main as its last line does; returns the status that the process would have."""
    try:
        configurator.run_main(main)
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
            return 1
        return exit.code or 0
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def text_stream(content: bytes = b"") -> io.TextIOWrapper:
    """A stream with a .buffer and .reconfigure(), as the standard streams have them."""
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", newline="\n")


def written_to(stream: io.TextIOWrapper) -> str:
    """All that was written to a stream of text_stream."""
    stream.flush()
    return stream.buffer.getvalue().decode(stream.encoding)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TookTooLong in the block after so many seconds."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def end(number, frame):
        raise TookTooLong(f"no end after {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextlib.contextmanager
def restored_process() -> Iterator[None]:
    """Restore all process-wide state that a script may change when the block ends."""
    streams = sys.argv, sys.stdin, sys.stdout, sys.stderr
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    reset_dynamo()
    with warnings.catch_warnings(), restored_torch():
        show_warnings_as_python_does()
        try:
            yield
        finally:
            sys.argv, sys.stdin, sys.stdout, sys.stderr = streams
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if os.environ != environment:
                os.environ.clear()
                os.environ.update(environment)
            atexit.unregister(hard_exit)
            tqdm._instances.clear()
            reset_dynamo()
            enable_malloc_trim()


@contextlib.contextmanager
def restored_torch() -> Iterator[None]:
    """Restore PyTorch's global settings and the random states; end the process group."""
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    random_state, torch_state = random.getstate(), torch.get_rng_state()
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        random.setstate(random_state)
        torch.set_rng_state(torch_state)


def reset_dynamo() -> None:
    """Drop compiled code: PyTorch limits the number of compiled variants per process."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def enable_malloc_trim() -> None:
    """Undo runtime.device.disable_malloc_trim with glibc's default values."""
    if platform.libc_ver()[0] == "glibc":
        set_option = ctypes.CDLL(None).mallopt
        set_option(-4, 65536)  # M_MMAP_MAX
        set_option(-1, 128 * 1024)  # M_TRIM_THRESHOLD


def show_warnings_as_python_does() -> None:
    """Print warnings to standard error as Python does by default; pytest collects them."""

    def show(message, category, filename, lineno, file=None, line=None):
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))

    warnings.showwarning = show
    warnings.resetwarnings()
    warnings.simplefilter("default")
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)


# Real processes


def run_process(
    script: str,
    *args: object,
    cwd: str | Path | None = None,
    env: dict[str, str] | None = None,
    timeout: float = 120,
) -> Result:
    """Run `python SCRIPT ARGS` in a new process with these environment variables added."""
    result = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, args)],
        cwd=cwd,
        env=os.environ | (env or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
    )
    return Result(result.returncode, result.stdout, result.stderr)


def read_until(process: subprocess.Popen, text: str) -> str:
    """The output of a process up to the line with this text. AssertionError if it never comes."""
    output = ""
    for line in process.stdout:
        output += line
        if text in line:
            return output
    raise AssertionError(output + (process.stderr.read() if process.stderr else ""))


def rank_environments(world_size: int) -> list[dict[str, str]]:
    """The environment variables that torchrun would give to each rank of one run."""
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": world_size}
    ranks = [group | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(world_size)]
    return [{name: str(value) for name, value in rank.items()} for rank in ranks]


def run_ranks(script: str, world_size: int, *args, timeout: float = 180) -> list[Result]:
    """Run a script in world_size processes that form one group, as torchrun would start them."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    deadline = time.monotonic() + timeout
    processes = [
        subprocess.Popen(command, env=os.environ | rank, text=True, **streams)
        for rank in (rank_environments(world_size) if world_size > 1 else [{}])
    ]
    results = []
    try:
        for process in processes:
            outputs = process.communicate(timeout=max(0, deadline - time.monotonic()))
            results.append(Result(process.returncode, *outputs))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return results


def train_on_ranks(world_size: int, *args) -> None:
    """Run train.py in world_size processes, all of which must succeed."""
    for result in run_ranks("train.py", world_size, *args):
        assert result.returncode == 0, result.stderr
