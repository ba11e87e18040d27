"""
Inject faults into training runs at random moments and check that they end with the right weights:

    python -m tests.tools.fault_injection --runs=100 --seed=1

A run of a small model on 1, 2 or 4 processes, with ddp, fsdp or a mixture, is started several
times, with the data under another path, another eval_iters, or half the batch_size. In each
attempt but the last a fault strikes at a random moment. The run must end with the weights of the
undisturbed run: the same bits on one process, within 1e-5 on several. Then it goes on with a
learning rate that makes the model worse. No attempt may lose the newest checkpoint or the best
model. A table goes to standard output.
"""

import argparse
import collections
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from tests.helpers import VOCAB_SIZE, max_weight_difference, write_tinystories_shard
from tests.processes import ROOT
from tests.tools.fault_folders import damage_folder, describe_loss, folder_state
from textdata.synthetic import story
from textdata.tokenizer import train_sentencepiece
from tinystories import Pretokenize, run_pretokenize

STEPS = 80
MAX_SECONDS = 180  # an attempt that takes longer hangs
TIMEOUT = 8  # seconds that the processes wait for each other
MAX_FILE_SIZE = 60_000  # bytes, less than a checkpoint, where the disk is full
OPTIONS = (
    "--vocab_size=512",
    "--dim=32",
    "--n_layers=2",
    "--n_heads=4",
    "--max_seq_len=32",
    "--learning_rate=1e-3",
    "--warmup_iters=2",
    "--eval_interval=20",
    "--compile=False",
    "--device=cpu",
    "--dtype=float32",
    "--checkpoint_interval=4",
    "--keep_checkpoints=2",
    f"--max_iters={STEPS}",
    f"--timeout={TIMEOUT}",
)
# With half the batch_size, dropout draws other masks: runs that change it have no dropout.
WITH_DROPOUT = ("--dropout=0.1",)
WITHOUT_DROPOUT = ("--dropout=0",)
BATCHES = (  # the same sequences per step, and the same windows per evaluation
    ("--batch_size=2", "--gradient_accumulation_steps=4", "--eval_iters=2"),
    ("--batch_size=1", "--gradient_accumulation_steps=8", "--eval_iters=4"),
)
OTHER_WINDOWS = ("--eval_iters=7",)
WORSE_STEPS = 84
WORSE = (f"--max_iters={WORSE_STEPS}", "--learning_rate=1", "--decay_lr=False")
SINGLE, MIXED = "1 process", "mixed"  # mixed: each attempt has another setup
SETUPS = (SINGLE, "2 ddp", "2 fsdp", "4 ddp", "4 fsdp", MIXED)
FAULTS = (
    "SIGKILL",
    "SIGTERM",
    "SIGSTOP",
    "full disk",
    "cut checkpoint",
    "deleted checkpoint",
    "overlapping processes",
    "copied folder",
)
KILLS_ALL = ("cut checkpoint", "deleted checkpoint", "copied folder")


def make_data(folder: Path) -> Path:
    """Write token shards of synthetic stories to the folder."""
    rng = random.Random(1337)
    stories = [story(rng) for _ in range(300)]
    write_tinystories_shard(folder / "stories" / "data00.json", stories)
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(train_sentencepiece(stories, VOCAB_SIZE))
    config = Pretokenize(
        vocab_size=VOCAB_SIZE,
        tokenizer=str(tokenizer),
        input=str(folder / "stories"),
        data_dir=str(folder),
        val_fraction=0.1,
        num_workers=1,
    )
    with contextlib.redirect_stdout(sys.stderr):
        run_pretokenize(config)
    return folder


class Attempt:
    """One start of a run: train.py, or torchrun with several processes of it."""

    def __init__(
        self, out_dir: Path, setup: str, options: Iterable[str], disk_is_full: bool = False
    ) -> None:
        self.is_single = setup == SINGLE
        self.token = uuid.uuid4().hex  # identifies its processes
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CRIA_ATTEMPT": self.token}
        with open(f"{out_dir}.log", "a") as log:
            self.process = subprocess.Popen(
                command_of(out_dir, setup, options),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                preexec_fn=limit_file_size if disk_is_full else None,
            )

    def workers(self) -> list[int]:
        """The ids of the processes that train, or will."""
        pids = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (folder / "cmdline").read_text()
                is_worker = "train.py" in command and "torch.distributed.run" not in command
                variable = f"CRIA_ATTEMPT={self.token}\0"
                if is_worker and variable in (folder / "environ").read_text():
                    pids.append(int(folder.name))
        return pids

    def wait(self) -> int | None:
        """Wait for the end; returns the status, or None if it hangs. No process is left."""
        try:
            status = self.process.wait(MAX_SECONDS)
        except subprocess.TimeoutExpired:
            status = None
        for pid in [*self.workers(), self.process.pid]:
            send(pid, signal.SIGKILL)
        self.process.wait()
        return status

    def wait_for_others(self, stopped: int) -> None:
        """Wait until the other workers ended, by the timeout or in order. A single one waits 1 s.

        After that only torchrun waits for the stopped process: forever, if the run is complete."""
        deadline = time.monotonic() + (1 if self.is_single else MAX_SECONDS)
        while time.monotonic() < deadline and (self.is_single or set(self.workers()) - {stopped}):
            time.sleep(0.2)


def command_of(out_dir: Path, setup: str, options: Iterable[str]) -> list[str]:
    """The command line of an attempt."""
    count, parallel = setup.replace("process", "ddp").split()
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    torchrun += ["--max-restarts=1"]
    command = [sys.executable, *(torchrun if count != "1" else []), str(ROOT / "train.py")]
    command += [*OPTIONS, f"--out_dir={out_dir}", "--init_from=auto", f"--parallel={parallel}"]
    return [*command, *options]


def limit_file_size() -> None:
    """Let this process write no file as large as a checkpoint."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_SIZE, MAX_FILE_SIZE))


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def run_attempt(attempt: Attempt, fault: str, delay: float) -> tuple[bool, int | None]:
    """Inject a fault after delay seconds; returns whether it struck, and the status."""
    if fault == "full disk":
        status = attempt.wait()
        return status != 0, status
    with contextlib.suppress(subprocess.TimeoutExpired):
        return False, attempt.process.wait(delay)
    rng = random.Random(delay)
    pids = attempt.workers() or [attempt.process.pid]
    pid = rng.choice(pids)
    name = fault if fault.startswith("SIG") else "SIGKILL"
    send(pid, getattr(signal, name))
    if name == "SIGSTOP":
        attempt.wait_for_others(pid)
        send(pid, signal.SIGCONT)
    if fault in KILLS_ALL:
        for pid in pids:
            send(pid, signal.SIGKILL)
        attempt.process.kill()
    return True, attempt.wait()


def run_overlapping(
    first: Attempt, start_second: Callable[[], Attempt], delay: float
) -> tuple[bool, int | None]:
    """Stop an attempt while a second one starts, which looks for checkpoints as the first saves.

    The second one may be refused. Returns whether they overlapped, and the status of the first;
    None if one of them hangs."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return False, first.process.wait(delay)
    second = start_second()
    time.sleep(random.Random(delay).uniform(0, 6))  # it imports PyTorch for some seconds
    pids = first.workers()
    for pid in pids:
        send(pid, signal.SIGTERM)
    status = first.wait()
    return bool(pids), None if second.wait() is None else status


class Outcome(NamedTuple):
    """What happened to a run; problem is '' if it ended well."""

    setup: str
    faults: list[str]  # those that struck
    problem: str


class FaultInjection:
    """Undisturbed runs, and runs with faults that are compared with them."""

    def __init__(self, folder: Path, seed: int, faults: list[str]) -> None:
        self.folder = folder
        self.seed = seed
        self.faults = faults
        self.data = make_data(folder / "data")
        (folder / "link").symlink_to(self.data)
        self.references = {
            dropout: folder / f"undisturbed {SINGLE} {dropout[0].lstrip('-')}"
            for dropout in (WITH_DROPOUT, WITHOUT_DROPOUT)
        }
        self.durations: dict[str, float] = {}  # seconds of an undisturbed attempt

    def run_undisturbed(self) -> None:
        """Run each setup without faults and print how long it takes."""
        for setup in SETUPS[:-1]:
            start = time.monotonic()
            reference = self.references[WITH_DROPOUT]
            out_dir = reference if setup == SINGLE else self.folder / f"undisturbed {setup}"
            self.run_plainly(out_dir, setup, WITH_DROPOUT)
            self.durations[setup] = seconds = time.monotonic() - start
            difference = max_weight_difference(reference, out_dir)
            line = f"undisturbed, {setup}: {seconds:.0f} s, weights off by {difference:.1e}"
            print(line, flush=True)
        self.run_plainly(self.references[WITHOUT_DROPOUT], SINGLE, WITHOUT_DROPOUT)

    def run_plainly(self, out_dir: Path, setup: str, dropout: tuple[str, ...]) -> None:
        """Run from the start to the end without a fault."""
        options = (*BATCHES[0], *dropout, f"--data_dir={self.data}")
        assert Attempt(out_dir, setup, options).wait() == 0, f"see {out_dir}.log"

    def options(self, rng: random.Random, dropout: tuple[str, ...]) -> list[str]:
        """The options of an attempt: any path of the data, sometimes other windows or batches."""
        data = self.data
        paths = (data, f"{data}/", f"{data.parent}/./{data.name}", os.path.relpath(data))
        path = rng.choice([*paths, self.folder / "link"])
        batch = rng.choice(BATCHES) if dropout == WITHOUT_DROPOUT else BATCHES[0]
        windows = OTHER_WINDOWS if rng.random() < 0.3 else ()
        return [f"--data_dir={path}", *batch, *windows, *dropout]

    def run(self, number: int) -> Outcome:
        """One run with 1 to 3 faults, and some steps that make the model worse."""
        rng = random.Random(f"{self.seed} {number}")
        setup = SETUPS[number % len(SETUPS)]
        dropout = rng.choice((WITH_DROPOUT, WITHOUT_DROPOUT))
        faults = [rng.choice(self.faults) for _ in range(rng.randint(1, 3))]
        out_dir = self.folder / f"run{number}"
        struck: list[str] = []

        def start(fault: str = "", more: tuple[str, ...] = ()) -> Attempt:
            attempt_setup = rng.choice(list(self.durations)) if setup == MIXED else setup
            options = [*self.options(rng, dropout), *more]
            return Attempt(out_dir, attempt_setup, options, disk_is_full=fault == "full disk")

        for fault in faults:
            before = folder_state(out_dir)
            delay = rng.uniform(0.5, self.durations.get(setup, max(self.durations.values())))
            if fault == "overlapping processes":
                has_struck, status = run_overlapping(start(), start, delay)
            else:
                has_struck, status = run_attempt(start(fault), fault, delay)
            struck += [fault] * has_struck
            lost = "hangs" if status is None else describe_loss(before, folder_state(out_dir))
            if lost:
                return Outcome(setup, struck, f"{lost} after {fault}")
            if has_struck:
                damage_folder(out_dir, fault, rng)
        problem = self.complete(out_dir, start) or self.compare(out_dir, setup, dropout)
        return Outcome(setup, struck, problem or self.worsen(out_dir, start))

    def complete(self, out_dir: Path, start: Callable[..., Attempt]) -> str:
        """Start the run until it is complete; returns what went wrong."""
        for _ in range(4):
            before = folder_state(out_dir)
            if before.newest_step >= STEPS:
                return ""
            status = start().wait()
            if status != 0:
                return "hangs" if status is None else f"does not end: status {status}"
            if lost := describe_loss(before, folder_state(out_dir)):
                return lost
        return "does not end"

    def compare(self, out_dir: Path, setup: str, dropout: tuple[str, ...]) -> str:
        """What is wrong with the weights of a complete run."""
        difference = max_weight_difference(self.references[dropout], out_dir)
        tolerance = 0 if setup == SINGLE and dropout == WITH_DROPOUT else 1e-5
        return f"other weights, by {difference:.1e}" if difference > tolerance else ""

    def worsen(self, out_dir: Path, start: Callable[..., Attempt]) -> str:
        """Go on with a much too high learning rate: the best model must stay."""
        before = folder_state(out_dir)
        status = start("", WORSE).wait()
        after = folder_state(out_dir)
        if status != 0 or after.newest_step != WORSE_STEPS:
            return f"does not go on: status {status}"
        return describe_loss(before, after)


def print_table(outcomes: Iterable[Outcome]) -> None:
    """Print how many runs of each setup each fault struck at least once."""
    table: collections.Counter[tuple[str, str]] = collections.Counter()
    for outcome in outcomes:
        table.update((row, outcome.setup) for row in {"runs", *outcome.faults})
    print(f"\n| fault | {' | '.join(SETUPS)} |\n|---|{'---:|' * len(SETUPS)}")
    for row in ("runs", *FAULTS):
        print(f"| {row} | {' | '.join(str(table[row, setup]) for setup in SETUPS)} |")


def main(argv: list[str] | None = None) -> None:
    """Read the command line, run, and exit with status 1 if any run did not end well."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.fault_injection",
        description="Inject faults into training runs at random moments.",
    )
    parser.add_argument("--runs", type=int, default=100, help="runs with faults")
    parser.add_argument("--seed", type=int, default=1, help="another seed gives other faults")
    parser.add_argument("--faults", nargs="+", default=FAULTS, choices=FAULTS, help="only these")
    options = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="faults"))
    injection = FaultInjection(folder, options.seed, list(options.faults))
    injection.run_undisturbed()
    outcomes, problems = [], []
    for number in range(options.runs):
        start = time.monotonic()
        outcome = injection.run(number)
        outcomes.append(outcome)
        seconds = time.monotonic() - start
        result = f"{', '.join(outcome.faults)}: {outcome.problem or 'ended well'}"
        print(f"{number}: {outcome.setup}, {result} ({seconds:.0f} s)", flush=True)
        if outcome.problem:
            log = injection.folder / f"run{number}.log"
            problems.append(f"run {number}: {outcome.problem}; see {log}")
        else:
            shutil.rmtree(injection.folder / f"run{number}")
    print_table(outcomes)
    well = options.runs - len(problems)
    print(f"\n{well} of {options.runs} runs ended well.", *problems, sep="\n")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
