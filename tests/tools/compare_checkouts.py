"""
Compare the behaviour of two checkouts through their command lines:

    python -m tests.tools.compare_checkouts OLD NEW
    python -m tests.tools.compare_checkouts OLD NEW --only=speed

Training must give the same weights and moments bit for bit, sampling the same records, and export
the same bytes. Each comparison prints one line; the exit status is 1 if anything differs. Speed is
only printed. Data, models and prompts are made once, by OLD.
"""

import argparse
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

STEPS = 60
TRAINING = (
    "--vocab_size=512",
    "--dim=64",
    "--n_layers=2",
    "--n_heads=4",
    "--n_kv_heads=2",
    "--max_seq_len=64",
    "--batch_size=4",
    "--gradient_accumulation_steps=2",
    "--learning_rate=1e-3",
    "--warmup_iters=5",
    "--eval_interval=30",
    "--eval_iters=2",
    "--dropout=0.1",
    "--device=cpu",
    f"--max_iters={STEPS}",
)
TRAINING_VARIANTS = {
    "dtype": ("float32", "bfloat16"),
    "optimizer": ("adamw", "muon"),
    "compile": ("False", "True"),
}
SAMPLING = ("--device=cpu", "--compile=False", "--seed=7", "--max_new_tokens=40")
SAMPLING_VARIANTS = {
    "defaults": (),
    "greedy": ("--temperature=0",),
    "top_p": ("--temperature=0.8", "--top_p=0.9"),
    "min_p": ("--top_k=0", "--min_p=0.05", "--repetition_penalty=1.1", "--logprobs=True"),
    "int8": ("--quantize=int8",),
}
NUM_PROMPTS = 50
NUM_BEAM_PROMPTS = 5
EXPORT_DTYPES = {
    "v0": ("float32",),
    "v1": ("float32",),
    "v2": ("q8_0",),
    "hf": ("float32", "float16", "bfloat16"),
    "meta": ("float32", "float16", "bfloat16"),
    "gguf": ("float32", "float16", "bfloat16", "q8_0"),
    "ckpt": ("float32", "float16", "bfloat16"),
}
SUFFIXES = {"v0": ".bin", "v1": ".bin", "v2": ".bin", "gguf": ".gguf", "ckpt": ".pt"}
SPEED_TRAINING = (
    "--vocab_size=512",
    "--batch_size=2",
    "--gradient_accumulation_steps=1",
    "--device=cpu",
    "--compile=True",
    "--eval_interval=1000",
    "--eval_iters=1",
    "--log_interval=1",
    "--max_iters=40",
)
SPEED_SAMPLING = (
    "--device=cpu",
    "--compile=True",
    "--start=Once",
    "--format=events",
    "--num_samples=4",
    "--batch_size=1",
    "--max_new_tokens=1000",
    "--min_new_tokens=1000",
)


class Checkouts(NamedTuple):
    """The two checkouts and the folder that the comparison writes to."""

    old: Path
    new: Path
    work: Path

    def items(self) -> Iterator[tuple[str, Path]]:
        """("old", folder) and ("new", folder)."""
        yield "old", self.old
        yield "new", self.new

    @property
    def data(self) -> str:
        """The option that names the token shards."""
        return f"--data_dir={self.work / 'data'}"

    @property
    def trained(self) -> Path:
        """The output folder of the small model that the old checkout trained."""
        return self.work / "trained"


class Comparison(NamedTuple):
    """What was compared, and the first difference; '' where there is none."""

    name: str
    difference: str


def run(checkout: Path, script: str, *args: object, stdin: str = "") -> str:
    """Run a script of a checkout; returns its standard output. Raises RuntimeError if it fails."""
    command = [sys.executable, str(checkout / script), *map(str, args)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CRIA_TRACEBACK": "1"}
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            command, input=stdin, cwd=folder, env=environment, capture_output=True, encoding="utf-8"
        )
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\nended with {result.returncode}:\n{result.stderr}")
    return result.stdout


# Comparing


def differences(a: Any, b: Any, name: str = "") -> Iterator[str]:
    """The names of all values that are not the same, tensors bit for bit."""
    if type(a) is not type(b):
        yield f"{name}: {type(a).__name__} and {type(b).__name__}"
    elif isinstance(a, dict):
        yield from dict_differences(a, b, name)
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            yield f"{name}: {len(a)} and {len(b)} elements"
            return
        for index, pair in enumerate(zip(a, b, strict=True)):
            yield from differences(*pair, f"{name}[{index}]")
    elif isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(as_bytes(a), as_bytes(b)):
            yield f"{name}: tensors differ"
    elif a != b and not (a != a and b != b):
        yield f"{name}: {a!r} and {b!r}"


def dict_differences(a: dict, b: dict, name: str) -> Iterator[str]:
    """The keys that only one has, and the differences of the values that both have."""
    if a.keys() != b.keys():
        yield f"{name}: keys {sorted(map(str, a.keys() ^ b.keys()))} are in one only"
    for key in [key for key in a if key in b]:
        yield from differences(a[key], b[key], f"{name}.{key}" if name else str(key))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, which also compares NaN and signed zeros."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def first_difference(a: Any, b: Any) -> str:
    """The first of differences(a, b), and how many more there are; '' if there is none."""
    found = list(differences(a, b))
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return found[0] + more if found else ""


def file_digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in a folder. Of an archive only the content counts."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    digest = lambda file: hashlib.sha256(content_of(file)).hexdigest()
    return {str(file.relative_to(folder)): digest(file) for file in files}


def content_of(path: Path) -> bytes:
    """The bytes of a file; of a zip archive the names and bytes of its records, not their dates."""
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = [name.encode() + b"\0" + archive.read(name) for name in archive.namelist()]
    return b"".join(len(record).to_bytes(8, "little") + record for record in records)


# What is compared


def make_data(checkouts: Checkouts) -> None:
    """Write token shards and a small trained model with the old checkout."""
    data, texts = checkouts.data, checkouts.work / "stories"
    options = ("--num_stories=2000", f"--data_dir={texts}")
    run(checkouts.old, "tinystories.py", "synthesize", *options)
    options = ("--vocab_size=512", "--num_workers=1", f"--input={texts}", data)
    run(checkouts.old, "tinystories.py", "pretokenize", *options)
    options = (*TRAINING, "--dtype=float32", "--compile=False")
    run(checkouts.old, "train.py", *options, data, f"--out_dir={checkouts.trained}")


def read_prompts(checkouts: Checkouts) -> list[str]:
    """The first 1 to 8 words of stories in the synthetic data."""
    (shard, *_) = sorted((checkouts.work / "stories").glob("*.json"))
    texts = [record["story"] for record in json.loads(shard.read_text(encoding="utf-8"))]
    return [" ".join(text.split()[: 1 + i % 8]) for i, text in enumerate(texts[:NUM_PROMPTS])]


def compare_training(checkouts: Checkouts) -> Iterator[Comparison]:
    """Weights, moments and losses after STEPS steps, for each precision, optimizer and compile."""
    for values in itertools.product(*TRAINING_VARIANTS.values()):
        name = "training " + " ".join(values[:2]) + (" compiled" if values[2] == "True" else "")
        options = [f"--{key}={value}" for key, value in zip(TRAINING_VARIANTS, values, strict=True)]
        states = []
        for version, checkout in checkouts.items():
            out_dir = checkouts.work / name.replace(" ", "-") / version
            run(checkout, "train.py", *TRAINING, *options, checkouts.data, f"--out_dir={out_dir}")
            states.append(read_training_state(out_dir))
        yield Comparison(name, first_difference(*states))


def read_training_state(out_dir: Path) -> dict:
    """What a run must leave alike: weights, optimizer state, step and losses."""
    checkpoint = torch.load(out_dir / "ckpt.pt", map_location="cpu", weights_only=True)
    state = {key: checkpoint[key] for key in ("iter_num", "model", "optimizer", "best_val_loss")}
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    keys = ("iter", "loss", "val_loss", "grad_norm", "lr")
    return state | {"metrics": [{k: r[k] for k in keys if k in r} for r in records]}


def compare_sampling(checkouts: Checkouts) -> Iterator[Comparison]:
    """The records of each set of options, of beam search and of scoring."""
    prompts = read_prompts(checkouts)
    commands = {
        name: (("--start=-", "--format=jsonl", *options), prompts)
        for name, options in SAMPLING_VARIANTS.items()
    }
    beams = ("--start=-", "--format=jsonl", "--num_beams=4", "--num_samples=2")
    commands["beam search"] = (beams, prompts[:NUM_BEAM_PROMPTS])
    text = checkouts.work / "score.txt"
    text.write_text("\n".join(prompts), encoding="utf-8")
    commands["score"] = ((f"--score={text}",), [])
    for name, (options, lines) in commands.items():
        outputs = [
            run(
                checkout,
                "sample.py",
                *SAMPLING[: 2 if name == "score" else None],
                f"--out_dir={checkouts.trained}",
                *options,
                stdin="\n".join(lines),
            )
            for _, checkout in checkouts.items()
        ]
        records = [output.splitlines() if name == "score" else parse(output) for output in outputs]
        yield Comparison(f"sampling {name}", first_difference(*records))


def parse(output: str) -> list[dict]:
    """The records of --format=jsonl, of which there must be some."""
    records = [json.loads(line) for line in output.splitlines()]
    assert records, "sample.py printed nothing"
    return records


def compare_formats(checkouts: Checkouts) -> Iterator[Comparison]:
    """The bytes of each file of each format and data type."""
    for target, dtypes in EXPORT_DTYPES.items():
        for dtype in dtypes:
            digests = []
            for version, checkout in checkouts.items():
                folder = checkouts.work / "exported" / version / f"{target}-{dtype}"
                output = folder / f"model{SUFFIXES.get(target, '')}"
                folder.mkdir(parents=True)
                options = (f"--from={checkouts.trained}/ckpt.pt", f"--format={target}")
                run(checkout, "export.py", output, *options, f"--dtype={dtype}")
                digests.append(file_digests(folder))
            assert digests[0], "export.py wrote nothing"
            yield Comparison(f"formats {target} {dtype}", first_difference(*digests))


# Speed


def measure_speed(checkouts: Checkouts, rounds: int) -> Iterator[str]:
    """One line for training and one for decoding; the checkouts run in turn."""
    for name, measure in (("training", training_speed), ("decoding", decoding_speed)):
        rates: dict[str, list[float]] = {"old": [], "new": []}
        for number in range(rounds):
            for version, checkout in checkouts.items():
                out_dir = checkouts.work / "speed" / f"{version}{number}"
                rates[version].append(measure(checkouts, checkout, out_dir))
        old, new = (statistics.median(rates[version]) for version in ("old", "new"))
        yield f"speed {name}: old {old:,.1f}, new {new:,.1f}, ratio {new / old:.3f}"


def training_speed(checkouts: Checkouts, checkout: Path, out_dir: Path) -> float:
    """Tokens per second, the median of the second half of the steps."""
    options = (checkout / "config" / "stories15M.py", *SPEED_TRAINING, checkouts.data)
    run(checkout, "train.py", *options, f"--out_dir={out_dir}")
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    rates = [record["tok_per_s"] for record in map(json.loads, lines) if "tok_per_s" in record]
    return statistics.median(rates[len(rates) // 2 :])


def decoding_speed(checkouts: Checkouts, checkout: Path, _: Path) -> float:
    """Pieces of text per second in the second half of the output, after all compilation.

    The model is the one that the old checkout trained when the speed of training was measured."""
    options = (*SPEED_SAMPLING, f"--out_dir={checkouts.work / 'speed' / 'old0'}")
    command = [sys.executable, str(checkout / "sample.py"), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, **streams) as process:
        times = [time.perf_counter() for _ in process.stdout]
    if process.returncode or len(times) < 100:
        raise RuntimeError(f"{' '.join(command)}\nended with {process.returncode}")
    half = len(times) // 2
    return (len(times) - 1 - half) / (times[-1] - times[half])


# The command

COMPARISONS = {
    "training": compare_training,
    "sampling": compare_sampling,
    "formats": compare_formats,
}


def compare(checkouts: Checkouts, parts: list[str], rounds: int) -> bool:
    """Print a line per comparison; returns whether all are equal."""
    make_data(checkouts)
    all_equal = True
    for part in parts:
        if part == "speed":
            for line in measure_speed(checkouts, rounds):
                print(line, flush=True)
            continue
        for name, difference in COMPARISONS[part](checkouts):
            print(f"{name}: {'NOT EQUAL, ' + difference if difference else 'equal'}", flush=True)
            all_equal = all_equal and not difference
    return all_equal


def main(argv: list[str] | None = None) -> None:
    """Read the command line, compare, and exit with status 1 if anything differs."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.compare_checkouts",
        description="Compare the behaviour of two checkouts.",
    )
    parser.add_argument("old", type=Path, help="folder of the older checkout")
    parser.add_argument("new", type=Path, help="folder of the newer checkout")
    parts = [*COMPARISONS, "speed"]
    parser.add_argument("--only", choices=parts, help="one part; by default all of them")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each checkout for the speed")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        checkouts = Checkouts(options.old.resolve(), options.new.resolve(), Path(work))
        if not compare(checkouts, [options.only] if options.only else parts, options.rounds):
            sys.exit(1)


if __name__ == "__main__":
    main()
