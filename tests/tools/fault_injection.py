"""
Runs that are hurt at random moments, again and again, and must end as if nothing had been:

    python -m tests.tools.chaos --runs=100 --seed=1

A run of a small model, on 1, 2 or 4 processes, with all of it in each (ddp) or a share (fsdp), or now so
and now so, lives several times; in each life but the last something happens to it at a random moment. It
must end with the weights of the undisturbed run: the same bits on one process, to 1e-5 on several. The
table goes to standard output.
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
from pathlib import Path

from checkpoints.latest import latest_path, load_latest, remove_checkpoint
from tests.helpers import VOCAB_SIZE, max_weight_difference, write_tinystories_shard
from tests.processes import ROOT
from textdata.synthetic import story
from textdata.tokenizer import train_sentencepiece
from tinystories import Pretokenize, run_pretokenize

STEPS = 80
HANG = 180  # seconds without an end
TIMEOUT = 8  # seconds that the processes wait for each other
OPTIONS = (
    *(
        "--vocab_size=512",
        "--dim=32",
        "--n_layers=2",
        "--n_heads=4",
        "--max_seq_len=32",
        "--batch_size=2",
    ),
    *(
        "--gradient_accumulation_steps=4",
        "--learning_rate=1e-3",
        "--warmup_iters=2",
        "--eval_interval=50",
    ),
    *("--eval_iters=2", "--compile=False", "--device=cpu", "--dtype=float32", "--dropout=0.1"),
    *(
        "--checkpoint_interval=4",
        "--keep_checkpoints=2",
        f"--max_iters={STEPS}",
        f"--timeout={TIMEOUT}",
    ),
)
KINDS = ("1 process", "2 ddp", "2 fsdp", "4 ddp", "4 fsdp", "mixed")  # mixed: each life is another
FAULTS = ("SIGKILL", "SIGTERM", "SIGSTOP", "full disk", "cut checkpoint", "deleted checkpoint")


def make_data(folder: Path) -> Path:
    rng = random.Random(1337)
    stories = [story(rng) for _ in range(300)]
    write_tinystories_shard(folder / "stories" / "data00.json", stories)
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(stories, VOCAB_SIZE))
    tokenizer, stories_dir = str(folder / "tokenizer.model"), str(folder / "stories")
    options = dict(
        vocab_size=VOCAB_SIZE,
        tokenizer=tokenizer,
        input=stories_dir,
        val_fraction=0.1,
        num_workers=1,
    )
    with contextlib.redirect_stdout(sys.stderr):
        run_pretokenize(Pretokenize(data_dir=str(folder), **options))
    return folder


def start(data: Path, out_dir: Path, kind: str, disk_is_full: bool = False) -> subprocess.Popen:
    """A life of a run."""
    processes, parallel = int(kind.split()[0]), kind.split()[1].replace("process", "ddp")
    command = [sys.executable, str(ROOT / "train.py")]
    if processes > 1:
        torchrun = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
            "--max-restarts=1",
        ]
        command[1:1] = torchrun
    command += [
        *OPTIONS,
        f"--data_dir={data}",
        f"--out_dir={out_dir}",
        "--init_from=auto",
        f"--parallel={parallel}",
    ]
    limit = (
        (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)))
        if disk_is_full
        else None
    )
    with open(f"{out_dir}.log", "a") as log:
        name = uuid.uuid4().hex  # by which its processes are known
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CRIA_LIFE": name}
        streams = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        process = subprocess.Popen(command, **streams, env=environment, preexec_fn=limit)
        process.name = name
        return process


def workers(life: subprocess.Popen) -> list[int]:
    """The processes of a life that train, or will."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_text()
            is_worker = "train.py" in command and "torch.distributed.run" not in command
            if is_worker and f"CRIA_LIFE={life.name}\0" in (folder / "environ").read_text():
                found.append(int(folder.name))
    return found


def end(process: subprocess.Popen) -> int | None:
    """Wait for a life's end; its status, or None for one that hangs. Nothing of it is left."""
    try:
        status = process.wait(HANG)
    except subprocess.TimeoutExpired:
        status = None
    for pid in [*workers(process), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    return status


def wait_for_others(process: subprocess.Popen, stopped: int, alone: bool):
    """Until the others do not wait for a stopped process any more: they ended, by the timeout or well. After
    that only torchrun would wait for it: for ever, if the run is over. One that is alone stays for a second."""
    deadline = time.monotonic() + (1 if alone else HANG)
    while time.monotonic() < deadline and (alone or set(workers(process)) - {stopped}):
        time.sleep(0.2)


def live(
    data: Path, out_dir: Path, kind: str, fault: str, moment: float
) -> tuple[bool, int | None]:
    """One life, with this fault after so many seconds: whether it was hit, and its status."""
    process = start(data, out_dir, kind, fault == "full disk")
    if fault == "full disk":
        status = end(process)
        return status != 0, status
    with contextlib.suppress(subprocess.TimeoutExpired):
        return False, process.wait(moment)
    hit = workers(process) or [process.pid]
    victim = random.Random(moment).choice(hit)
    name = fault if fault.startswith("SIG") else "SIGKILL"
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, getattr(signal, name))
    if name == "SIGSTOP":
        wait_for_others(process, victim, alone=kind == "1 process")
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGCONT)
    if "checkpoint" in fault:
        for pid in hit:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
    status = end(process)
    newest = Path(latest_path(str(out_dir)))
    if newest.exists() and fault == "cut checkpoint":
        part = random.Random(moment).choice(sorted(newest.iterdir())) if newest.is_dir() else newest
        copy = (
            part.read_bytes()
        )  # the file may have another name, by which it is an older checkpoint's
        part.unlink()
        part.write_bytes(copy[: len(copy) * 2 // 3])
    elif newest.exists() and fault == "deleted checkpoint":
        remove_checkpoint(str(newest))
    return True, status


def newest_step(out_dir: Path) -> int:
    try:
        found = load_latest(str(out_dir), lambda text: None)
    except ValueError:
        return -1
    return found[1]["iter_num"] if found else -1


def hurt_run(data: Path, folder: Path, lengths: dict, number: int, seed: int) -> tuple:
    """The kind of run, the faults that hit, and how the run ended: '' where it ended well.
    lengths: how many seconds an undisturbed life of each kind takes."""
    rng = random.Random(f"{seed} {number}")
    kind, faults = (
        KINDS[number % len(KINDS)],
        [rng.choice(FAULTS) for _ in range(rng.randint(1, 3))],
    )
    kind_of_life = lambda: rng.choice(list(lengths)) if kind == "mixed" else kind
    out_dir, problem, lives, hits = folder / f"run{number}", "", 0, []
    for fault in faults:
        before = newest_step(out_dir)
        now = kind_of_life()
        is_hit, status = live(data, out_dir, now, fault, rng.uniform(0.5, lengths[now]))
        lives, hits = lives + 1, hits + [fault] * is_hit
        if status is None:
            problem = f"hangs after {fault}"
        elif newest_step(out_dir) < before and "checkpoint" not in fault:
            problem = f"lost a checkpoint after {fault}"
    while not problem and newest_step(out_dir) < STEPS:
        lives += 1
        if (status := end(start(data, out_dir, kind_of_life()))) != 0 or lives > len(faults) + 3:
            problem = "hangs" if status is None else f"does not end: status {status}"
    if not problem:
        off = max_weight_difference(folder / f"undisturbed {KINDS[0]}", out_dir)
        if off > (0 if kind == "1 process" else 1e-5):
            problem = f"other weights, by {off:.1e}"
    return kind, hits, problem


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos"))
    data = make_data(folder)
    lengths = {}
    for kind in KINDS[:-1]:
        began = time.monotonic()
        assert end(start(data, folder / f"undisturbed {kind}", kind)) == 0
        lengths[kind] = time.monotonic() - began
        off = max_weight_difference(
            folder / f"undisturbed {KINDS[0]}", folder / f"undisturbed {kind}"
        )
        print(f"undisturbed, {kind}: {lengths[kind]:.0f} s, weights off by {off:.1e}", flush=True)
    table, problems = collections.Counter(), []
    for number in range(arguments.runs):
        began = time.monotonic()
        kind, faults, problem = hurt_run(data, folder, lengths, number, arguments.seed)
        seconds = time.monotonic() - began
        print(
            f"{number}: {kind}, {', '.join(faults)}: {problem or 'well'} ({seconds:.0f} s)",
            flush=True,
        )
        table.update({(fault, kind): 1 for fault in set(faults)} | {("runs", kind): 1})
        if problem:
            problems.append(f"run {number}: {problem}; see {folder}/run{number}.log")
        else:
            shutil.rmtree(folder / f"run{number}")
    print(f"\n| hit by | {' | '.join(KINDS)} |\n|---|{'---:|' * len(KINDS)}")
    for fault in ("runs", *FAULTS):
        print(f"| {fault} | {' | '.join(str(table[fault, kind]) for kind in KINDS)} |")
    print(
        f"\n{arguments.runs - len(problems)} of {arguments.runs} runs ended well.",
        *problems,
        sep="\n",
    )
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
