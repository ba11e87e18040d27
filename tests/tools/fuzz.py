"""
Damage models and tokenizers at random and read them. A reader must either refuse a damaged file
with one sentence that names it, or read what the file holds. It must not crash, hang, raise another
exception, fill the memory, or accept damage that it can notice.

    python -m tests.tools.fuzz --files=10000
    python -m tests.tools.fuzz --format=gguf --first=1234 --files=1 --keep=damaged

The seed, the reader and a number identify a file: the second line makes one file again and keeps
it. Files are read in a separate process, as a file may end it.
"""

import argparse
import faulthandler
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from model import parameter_shapes
from tests.tools.damage import (
    damaged_archive,
    damaged_bytes,
    damaged_gguf,
    damaged_json,
    damaged_safetensors,
    is_zip,
)
from tests.tools.fuzz_readers import READERS, Contents, Reader
from tests.tools.refusals import describe, last_frame, problem_with_refusal

try:
    import resource
except ImportError:  # Windows: memory is not limited there
    resource = None

TIME_LIMIT = 10.0  # seconds per file
MEMORY_ALLOWANCE = 300 << 20  # bytes that reading may take in addition to the process
MAX_DEATHS = 20  # of the process on files of one reader; then the rest is skipped
OUTCOMES = ("refused", "equal", "changed", "failed")


# One file


class Damage(NamedTuple):
    """One damaged file."""

    file: str
    content: bytes | str | None  # bytes; None: the file is missing; a string: a folder is there
    max_changes: float  # values of tensors that may have changed


def choose_damage(rng: random.Random, reader: Reader, originals: dict[str, bytes]) -> Damage:
    """Damage one of the files. In a folder, the file may be missing."""
    pattern = rng.choice(reader.files)
    file = rng.choice([name for name in sorted(originals) if fnmatch(name, pattern)])
    content = originals[file]
    if len(originals) > 1 and rng.random() < 0.04:
        return Damage(file, rng.choice((None, b"", "folder")), 0)
    if file.endswith(".json"):
        edit = rng.choice((damaged_json, damaged_json, damaged_bytes))
        return Damage(file, edit(rng, content), 0)
    if rng.random() < 0.35:
        if content.startswith(b"GGUF"):
            return Damage(file, damaged_gguf(rng, content), 0)
        if is_zip(content):  # its checksums are right again
            return Damage(file, damaged_archive(rng, content), math.inf)
        if file.endswith(".safetensors"):
            return Damage(file, damaged_safetensors(rng, content), math.inf)
    damaged = damaged_bytes(rng, content)
    max_changes = reader.max_changes * count_changed(content, damaged)
    return Damage(file, damaged, 0 if file.startswith("tokenizer") else max_changes)


def count_changed(before: bytes, after: bytes) -> int:
    """The number of bytes that differ, those that only one has included."""
    shorter = min(len(before), len(after))
    a, b = (np.frombuffer(part, np.uint8, shorter) for part in (before, after))
    return int(np.count_nonzero(a != b)) + abs(len(before) - len(after))


class Verdict(NamedTuple):
    """The outcome for one file: refused, equal (to what was written), changed or failed."""

    reader: str
    number: int
    outcome: str
    cause: str = ""  # of a failure; failures are grouped by it
    detail: str = ""


class TookTooLong(BaseException):
    """Not an Exception, so that no reader mistakes it for damage."""


def raise_took_too_long(*_: object) -> None:
    """The handler of the alarm."""
    raise TookTooLong("not done in time")


class FuzzTarget:
    """A good file or folder of a reader, to damage and to read."""

    def __init__(self, reader: Reader, folder: str, keep: str | None = None) -> None:
        self.reader = reader
        self.folder = os.path.join(folder, reader.name)
        self.keep = keep
        os.makedirs(self.folder)
        reader.write(self.folder)
        self.path = os.path.join(self.folder, reader.target).rstrip(os.sep)
        names = set(os.listdir(self.folder))
        self.originals = {name: Path(self.folder, name).read_bytes() for name in names}
        self.expected = reader.read(self.path)

    def damage(self, seed: int, number: int) -> Damage:
        """The damage with this number, the same in every call."""
        rng = random.Random(f"{seed} {self.reader.name} {number}")
        return choose_damage(rng, self.reader, self.originals)

    def try_number(self, seed: int, number: int, time_limit: float) -> Verdict:
        """Damage a file, read it, and restore it."""
        damage = self.damage(seed, number)
        path = Path(self.folder, damage.file)
        replace_file(path, damage.content)
        if self.keep:
            shutil.copytree(self.folder, os.path.join(self.keep, f"{self.reader.name}-{number}"))
        try:
            return Verdict(self.reader.name, number, *self.read(damage, time_limit))
        finally:
            replace_file(path, self.originals[damage.file])

    def read(self, damage: Damage, time_limit: float) -> tuple[str, ...]:
        """The outcome, cause and detail of reading what is damaged."""
        signal.setitimer(signal.ITIMER_REAL, time_limit)
        try:
            contents = self.reader.read(self.path)
            if contents.args != self.expected.args:
                contents.build()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # TookTooLong and Rust's panics are not Exceptions
            problem = problem_with_refusal(error, self.path)
            if not problem:
                return ("refused",)
            return "failed", f"{problem} ({last_frame(error)})", describe(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        changed, problem = self.compare(contents, damage)
        if problem:
            return "failed", problem, damage.file
        return ("changed" if changed else "equal",)

    def compare(self, contents: Contents, damage: Damage) -> tuple[bool, str]:
        """Whether the contents differ from what was written, and what is wrong with them."""
        args, expected = contents.args, self.expected
        is_reordered = damage.file == "config.json" and args and changes_heads(args, expected.args)
        shapes = dict(parameter_shapes(args)) if args else {}
        num_changed = 0
        for name, tensor in contents.tensors.items():
            has_shape = tuple(tensor.shape) == shapes[name]
            if not (has_shape and tensor.is_floating_point() and tensor.isfinite().all()):
                return True, f"a tensor of another shape or type passed ({tensor.dtype})"
            num_changed += count_differences(tensor, expected.tensors.get(name), is_reordered)
        if num_changed > damage.max_changes:
            return True, "more values changed than the damage explains"
        is_guarded = is_zip(self.originals[damage.file]) and damage.max_changes == 0
        if args != expected.args and is_guarded:
            return True, "another architecture passed in spite of the checksums"
        other_tokenizer = contents.tokenizer_hash != expected.tokenizer_hash
        if other_tokenizer and not damage.file.startswith("tok") and ".gguf" not in damage.file:
            return True, "another tokenizer was read, but its file is unchanged"
        return bool(num_changed or other_tokenizer or args != expected.args), ""


def changes_heads(args, expected) -> bool:
    """Whether the number of heads changed, which changes the order of rows in some formats."""
    return (args.n_heads, args.kv_heads) != (expected.n_heads, expected.kv_heads)


def replace_file(path: Path, content: bytes | str | None) -> None:
    """Make path a file with these bytes, a folder (a string) or nothing (None)."""
    if path.is_dir():
        path.rmdir()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.unlink(missing_ok=True)
        if content is not None:
            path.mkdir()


def count_differences(a: torch.Tensor, b: torch.Tensor | None, is_reordered: bool) -> int:
    """The number of values that differ in any bit; is_reordered: in any order of the rows."""
    if b is None or a.shape != b.shape:
        return a.numel()
    bits_a, bits_b = (part.float().numpy().view(np.uint32).ravel() for part in (a, b))
    count = np.count_nonzero(bits_a != bits_b)
    if count and is_reordered:
        count = np.count_nonzero(np.sort(bits_a) != np.sort(bits_b))
    return int(count)


# Many files, in a separate process

Job = tuple[Reader, range]  # a reader and the numbers of its files


class Settings(NamedTuple):
    """What all files of one run have in common."""

    seed: int = 0
    time_limit: float = TIME_LIMIT
    keep: str | None = None  # a folder for the damaged files


def limit_memory() -> None:
    """Let the process grow by MEMORY_ALLOWANCE at most, where the system can."""
    if resource is None or not os.path.exists("/proc/self/statm"):
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    hard_limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft_limit = pages * resource.getpagesize() + MEMORY_ALLOWANCE
    resource.setrlimit(resource.RLIMIT_AS, (soft_limit, hard_limit))


def unlimit_memory() -> None:
    """Undo limit_memory."""
    if resource is not None:
        hard_limit = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (hard_limit, hard_limit))


def worker_main(connection, log: str, jobs: list[Job], settings: Settings) -> None:
    """Send a verdict for every file of every job."""
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 2)  # libraries print there about each damaged file
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, raise_took_too_long)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(log)) as folder:
        for reader, numbers in jobs:
            unlimit_memory()
            target = FuzzTarget(reader, folder, settings.keep)
            limit_memory()
            for number in numbers:
                connection.send(target.try_number(settings.seed, number, settings.time_limit))


def fuzz(
    readers: Iterable[Reader], numbers: range, settings: Settings | None = None
) -> Iterator[Verdict]:
    """Yield a verdict for every file. A process that a file ended is started again."""
    settings = settings or Settings()
    jobs = [(reader, numbers) for reader in readers]
    deaths: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        while jobs:
            last = None
            for last in run_worker(jobs, os.path.join(folder, "log"), settings):
                yield last
            jobs = remaining_jobs(jobs, last)
            deaths[last.reader] += 1
            if deaths[last.reader] == MAX_DEATHS and jobs and jobs[0][0].name == last.reader:
                cause = "died so often that the rest is skipped"
                yield Verdict(last.reader, jobs[0][1][0], "failed", cause)
                jobs = jobs[1:]


def remaining_jobs(jobs: list[Job], last: Verdict) -> list[Job]:
    """The jobs that follow the file of a verdict."""
    index = [reader.name for reader, _ in jobs].index(last.reader)
    reader, numbers = jobs[index]
    rest = numbers[numbers.index(last.number) + 1 :]
    return ([(reader, rest)] if rest else []) + jobs[index + 1 :]


def run_worker(jobs: list[Job], log: str, settings: Settings) -> Iterator[Verdict]:
    """Yield the verdicts of one process. If a file ends it, the last verdict says so."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, log, jobs, settings)
    process = context.Process(target=worker_main, args=arguments, daemon=True)
    process.start()
    sender.close()
    try:
        for reader, number in ((reader, number) for reader, numbers in jobs for number in numbers):
            try:
                is_ready = receiver.poll(60 + 2 * settings.time_limit)
                verdict = receiver.recv() if is_ready else None
                cause = "" if is_ready else "the process hangs"
            except EOFError:
                process.join()
                cause = f"the process died ({process.exitcode})"
            if cause:
                tail = Path(log).read_bytes()[-1500:].decode("utf-8", "replace")
                assert process.exitcode != 1, f"the fuzzer itself failed:\n{tail}"
                yield Verdict(reader.name, number, "failed", cause, tail)
                return
            yield verdict
    finally:
        process.kill()
        process.join()


# The command


def report(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Print a line per reader; returns the failures."""
    titles = "".join(f"{title:>9}" for title in ("files", *OUTCOMES, "seconds"))
    print(f"{'reader':28}{titles}")
    failures: list[Verdict] = []
    start, counts, name = time.time(), Counter(), ""
    for verdict in verdicts:
        if name not in ("", verdict.reader):
            print_counts(name, counts, time.time() - start)
            start, counts = time.time(), Counter()
        name = verdict.reader
        counts[verdict.outcome] += 1
        if verdict.outcome == "failed":
            failures.append(verdict)
    print_counts(name, counts, time.time() - start)
    return failures


def print_counts(name: str, counts: Counter[str], seconds: float) -> None:
    """Print the line of one reader."""
    cells = (counts.total(), *(counts[outcome] for outcome in OUTCOMES), round(seconds))
    print(f"{name:28}" + "".join(f"{cell:>9}" for cell in cells), flush=True)


def explain(failures: list[Verdict]) -> str:
    """The failures by cause, with the first files and the detail of one."""
    causes: dict[str, list[Verdict]] = {}
    for failure in failures:
        causes.setdefault(failure.cause, []).append(failure)
    lines = []
    for cause, group in causes.items():
        files = ", ".join(f"{failure.reader} {failure.number}" for failure in group[:8])
        lines.append(f"\n{cause}: {len(group)}, {files}\n{group[0].detail}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, fuzz, and exit with status 1 if any file failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.fuzz", description="Read files that were damaged at random."
    )
    parser.add_argument("--files", type=int, default=1000, help="files per reader")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other files")
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--format", default="", help="only readers whose names start with this")
    parser.add_argument("--limit", type=float, default=TIME_LIMIT, help="seconds per file")
    parser.add_argument("--keep", help="a folder to keep the damaged files in")
    options = parser.parse_args(argv)
    readers = [reader for reader in READERS if reader.name.startswith(options.format)]
    if not readers or options.files < 1:
        names = ", ".join(reader.name for reader in READERS)
        parser.error(f"--format: one of {names}; --files: at least 1")
    numbers = range(options.first, options.first + options.files)
    settings = Settings(options.seed, options.limit, options.keep)
    failures = report(fuzz(readers, numbers, settings))
    print(explain(failures))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
