"""
Inject faults into training runs at random moments and check that they end with the right weights:

    python -m tests.tools.fault_injection --runs=100 --seed=1

A run of a small model on 1, 2 or 4 processes, with ddp, fsdp or a mixture, is started several
times. In each attempt but the last a fault strikes at a random moment. The run must end with
the weights of the undisturbed run: the same bits on one process, within 1e-5 on several. A table
goes to standard output.
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
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from checkpoints.latest import latest_path, load_latest, numbered_checkpoints
from checkpoints.links import remove_checkpoint, same_checkpoint
from tests.helpers import VOCAB_SIZE, max_weight_difference, write_tinystories_shard
from tests.processes import ROOT
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
    "--batch_size=2",
    "--gradient_accumulation_steps=4",
    "--learning_rate=1e-3",
    "--warmup_iters=2",
    "--eval_interval=50",
    "--eval_iters=2",
    "--compile=False",
    "--device=cpu",
    "--dtype=float32",
    "--dropout=0.1",
    "--checkpoint_interval=4",
    "--keep_checkpoints=2",
    f"--max_iters={STEPS}",
    f"--timeout={TIMEOUT}",
)
SINGLE, MIXED = "1 process", "mixed"  # mixed: each attempt has another setup
SETUPS = (SINGLE, "2 ddp", "2 fsdp", "4 ddp", "4 fsdp", MIXED)
FAULTS = ("SIGKILL", "SIGTERM", "SIGSTOP", "full disk", "cut checkpoint", "deleted checkpoint")


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

    def __init__(self, data: Path, out_dir: Path, setup: str, disk_is_full: bool = False) -> None:
        self.is_single = setup == SINGLE
        self.token = uuid.uuid4().hex  # identifies its processes
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CRIA_ATTEMPT": self.token}
        with open(f"{out_dir}.log", "a") as log:
            self.process = subprocess.Popen(
                command_of(data, out_dir, setup),
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


def command_of(data: Path, out_dir: Path, setup: str) -> list[str]:
    """The command line of an attempt."""
    count, parallel = setup.replace("process", "ddp").split()
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    torchrun += ["--max-restarts=1"]
    command = [sys.executable, *(torchrun if count != "1" else []), str(ROOT / "train.py")]
    command += [*OPTIONS, f"--data_dir={data}", f"--out_dir={out_dir}"]
    return [*command, "--init_from=auto", f"--parallel={parallel}"]


def limit_file_size() -> None:
    """Let this process write no file as large as a checkpoint."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_SIZE, MAX_FILE_SIZE))


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def run_attempt(
    attempt: Attempt, out_dir: Path, fault: str, delay: float
) -> tuple[bool, int | None]:
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
    if "checkpoint" in fault:
        for pid in pids:
            send(pid, signal.SIGKILL)
        attempt.process.kill()
    status = attempt.wait()
    newest = Path(latest_path(str(out_dir)))
    if newest.exists() and fault == "cut checkpoint":
        cut_checkpoint(newest, random.Random(delay))
    elif newest.exists() and fault == "deleted checkpoint":
        same = [p for p in numbered_checkpoints(str(out_dir)) if same_checkpoint(p, str(newest))]
        for path in [*same, str(newest)]:
            remove_checkpoint(path)
    return True, status


def cut_checkpoint(path: Path, rng: random.Random) -> None:
    """Cut a third of a checkpoint file, or of one file of a sharded checkpoint, in place.

    The numbered checkpoint of the same step is a hard link and loses it, too."""
    part = rng.choice(sorted(path.iterdir())) if path.is_dir() else path
    os.truncate(part, part.stat().st_size * 2 // 3)


def newest_step(out_dir: Path) -> int:
    """The step of the newest checkpoint, or -1."""
    try:
        newest = load_latest(str(out_dir), lambda text: None)
    except ValueError:
        return -1
    return newest[1]["iter_num"] if newest else -1


class Outcome(NamedTuple):
    """What happened to a run; problem is '' if it ended well."""

    setup: str
    faults: list[str]  # those that struck
    problem: str


class FaultInjection:
    """Undisturbed runs, and runs with faults that are compared with them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.seed = seed
        self.data = make_data(folder)
        self.reference = folder / f"undisturbed {SINGLE}"
        self.durations: dict[str, float] = {}  # seconds of an undisturbed attempt

    def run_undisturbed(self) -> None:
        """Run each setup without faults and print how long it takes."""
        for setup in SETUPS[:-1]:
            start, out_dir = time.monotonic(), self.folder / f"undisturbed {setup}"
            assert Attempt(self.data, out_dir, setup).wait() == 0
            self.durations[setup] = seconds = time.monotonic() - start
            difference = max_weight_difference(self.reference, out_dir)
            line = f"undisturbed, {setup}: {seconds:.0f} s, weights off by {difference:.1e}"
            print(line, flush=True)

    def run(self, number: int) -> Outcome:
        """One run with 1 to 3 faults."""
        rng = random.Random(f"{self.seed} {number}")
        setup = SETUPS[number % len(SETUPS)]
        faults = [rng.choice(FAULTS) for _ in range(rng.randint(1, 3))]
        choose_setup = lambda: rng.choice(list(self.durations)) if setup == MIXED else setup
        out_dir, struck = self.folder / f"run{number}", []
        problem = ""
        for fault in faults:
            before, attempt_setup = newest_step(out_dir), choose_setup()
            delay = rng.uniform(0.5, self.durations[attempt_setup])
            attempt = Attempt(self.data, out_dir, attempt_setup, fault == "full disk")
            has_struck, status = run_attempt(attempt, out_dir, fault, delay)
            struck += [fault] * has_struck
            if status is None:
                problem = f"hangs after {fault}"
            elif newest_step(out_dir) < before and "checkpoint" not in fault:
                problem = f"lost a checkpoint after {fault}"
        attempts_left = 4
        while not problem and newest_step(out_dir) < STEPS:
            status = Attempt(self.data, out_dir, choose_setup()).wait()
            attempts_left -= 1
            if status != 0 or attempts_left == 0:
                problem = "hangs" if status is None else f"does not end: status {status}"
        return Outcome(setup, struck, problem or self.compare(out_dir, setup))

    def compare(self, out_dir: Path, setup: str) -> str:
        """What is wrong with the weights of a complete run."""
        difference = max_weight_difference(self.reference, out_dir)
        tolerance = 0 if setup == SINGLE else 1e-5
        return f"other weights, by {difference:.1e}" if difference > tolerance else ""


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
    options = parser.parse_args(argv)
    injection = FaultInjection(Path(tempfile.mkdtemp(prefix="faults")), options.seed)
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
