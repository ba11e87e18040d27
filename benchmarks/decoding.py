"""
How fast models of random weights tell stories, and how long the first token takes.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from benchmarks import baselines as peers
from benchmarks.records import path_problems
from benchmarks.timing import Measurement, Variant, measure, timing_problems
from export import write_model
from formats.lazy_model import from_model
from generation.compile import prepared
from generation.engine import Decoder, Decoding, Sequence
from model import ModelArgs, Transformer
from runtime.device import pick_dtype
from textdata.tokenizer import (
    BOS_ID,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    SentencePieceTokenizer,
    proto_from_pieces,
)

VOCAB_SIZE = 32000  # Llama 2's
TOKENS = 256  # that a story goes on for, after the token that begins it
CONTEXT = 512  # of the models, in which a story has room
FILES = {"llama.cpp F32": "float32", "llama.cpp Q8_0": "q8_0"}  # dtypes of GGUF files
RUNS = 3  # to the first token
SAME_KIND = {"float32": "llama.cpp F32", "int8": "llama.cpp Q8_0"}
PACKAGES = {
    "transformers": "transformers",
    "llama.cpp": "xllamacpp",
}  # without which the others are left out


@dataclass(frozen=True)
class SampleBench:
    """Tokens per second of decoding at temperature 1, beside others' loops, and seconds to the first token."""

    preset: Literal["all", "15M", "42M", "110M"] = "all"  # the size of the model
    batch: Literal["all", 1, 4, 16, 64] = (
        "all"  # how many stories are told at once; the first token goes with 1
    )
    threads: Literal["all", 1, 2] = (
        "all"  # of a process; all is 1 and 2, and on a GPU, where few matter, 2
    )
    rounds: int = 3  # how often each variant has its turn
    seconds: float = 4.0  # how long a turn lasts, at least one story of each stream
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    json: str = ""  # also write the records here

    @property
    def batches(self) -> tuple[int, ...]:
        return (1, 4, 16, 64) if self.batch == "all" else (self.batch,)

    def thread_counts(self, device: str) -> tuple[int, ...]:
        if self.threads == "all":
            return (1, 2) if device == "cpu" else (2,)
        return (self.threads,)

    def validate(self):
        yield from timing_problems(self)
        yield from path_problems(self.json)


# The variants


def random_model(args: ModelArgs) -> Transformer:
    """The same one in every process."""
    torch.manual_seed(0)
    return Transformer(args).eval()


def ours(args: ModelArgs, device: str, threads: int, batch_size: int, kind: str, compile: bool):
    torch.set_num_threads(threads)
    how = prepared(random_model(args).to(device), kind, batch_size, compile=compile)
    decoder = Decoder(
        options=Decoding(TOKENS), batch_size=batch_size, **how
    )  # nothing stops it earlier
    samples = itertools.count()

    def step() -> int:
        sequences = [Sequence([BOS_ID], next(samples)) for _ in range(batch_size)]
        return sum(token is not None for _, token in decoder.run(sequences))

    return step


def theirs(of: str, args: ModelArgs, device: str, threads: int, batch_size: int):
    torch.set_num_threads(threads)
    build = {"plain": peers.baseline_decoding, "transformers": peers.transformers_decoding}[of]
    return build(args, device, batch_size, TOKENS)


def llama_cpp(path: str, device: str, threads: int):
    return peers.llama_cpp_decoding(path, threads, CONTEXT, TOKENS)


def variants(args: ModelArgs, device: str, batch: int, threads: int, folder: str) -> list[Variant]:
    """Those that are compared with so many streams and threads. folder: where write_files wrote."""

    def variant(
        name, build, **arguments
    ):  # its first turn is not counted, so one step is enough before
        return Variant(name, build, dict(device=device, threads=threads, **arguments), warm_up=1)

    shape = dict(args=args, batch_size=batch)
    best = pick_dtype("auto", device)
    kinds = ["float32", *(["bfloat16"] if best == "bfloat16" else []), "int8"]
    chosen = [variant("plain", theirs, of="plain", **shape)] if (batch, threads) == (1, 2) else []
    if batch in (1, 16) and find_spec("transformers"):
        chosen.append(variant("transformers", theirs, of="transformers", **shape))
    if batch == 1 and device == "cpu" and find_spec("xllamacpp"):
        paths = {name: os.path.join(folder, f"{dtype}.gguf") for name, dtype in FILES.items()}
        chosen += [variant(name, llama_cpp, path=path) for name, path in paths.items()]
    for kind in ("float32", "int8") if batch == 1 else ():
        chosen.append(variant(f"{kind}, not compiled", ours, kind=kind, compile=False, **shape))
    return chosen + [variant(kind, ours, kind=kind, compile=True, **shape) for kind in kinds]


# The files that some of them read


def made_up_tokenizer(vocab_size: int) -> SentencePieceTokenizer:
    """A vocabulary of Llama 2's kind: the bytes, and then the shortest words of small letters."""
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    letters = "▁abcdefghijklmnopqrstuvwxyz"
    words = itertools.chain.from_iterable(
        itertools.product(letters, repeat=length) for length in itertools.count(1)
    )
    for number, word in enumerate(itertools.islice(words, vocab_size - len(pieces))):
        pieces.append(("".join(word), -float(number), NORMAL))
    return SentencePieceTokenizer(proto_from_pieces(pieces))


def write_files(args: ModelArgs, folder: str):
    """The model as ckpt.pt with tokenizer.model beside it, and, for llama.cpp, as GGUF files."""
    model = from_model(random_model(args), tokenizer=made_up_tokenizer(args.vocab_size))
    write_model(model, os.path.join(folder, "ckpt.pt"), "ckpt", "float32")
    for dtype in FILES.values() if find_spec("xllamacpp") else ():
        write_model(model, os.path.join(folder, f"{dtype}.gguf"), "gguf", dtype)


# Measuring


def decoding(
    config: SampleBench, preset: str, args: ModelArgs, device: str
) -> Iterator[list[dict]]:
    """Measure a preset, print its tables, and yield the records of each as it is there."""
    with tempfile.TemporaryDirectory(prefix="cria-bench-") as folder:
        write_files(args, folder)
        for batch, threads in itertools.product(config.batches, config.thread_counts(device)):
            compared = variants(args, device, batch, threads, folder)
            measured = measure(compared, config.rounds, config.seconds)
            yield report(dict(preset=preset, batch=batch, threads=threads), measured)
        if 1 in config.batches:
            yield first_tokens(preset, folder, device, config.thread_counts(device))


def report(where: dict, measured: dict[str, Measurement]) -> list[dict]:
    """Print the table of variants that took turns; returns its records. Ratios are medians over the
    rounds; that to llama.cpp is to the file of the same kind."""
    others = [name for name in ("plain", "transformers") if name in measured]
    others += ["llama.cpp"] if measured.keys() & FILES.keys() else []
    titles = ["variant", "tokens/s", "spread", *(f"x {name}" for name in others)]
    print(
        f"\n{where['preset']}: {TOKENS} tokens, streams: {where['batch']}, threads: {where['threads']}\n"
    )
    print(f"| {' | '.join(titles)} |\n|---|{'---:|' * (len(titles) - 1)}")
    records = []
    for name, figures in measured.items():
        same_kind = SAME_KIND.get(name.partition(",")[0])
        bases = [measured.get(same_kind if other == "llama.cpp" else other) for other in others]
        spread = f"{min(figures.rates):,.0f} to {max(figures.rates):,.0f}"
        cells = [name, f"{figures.rate:,.0f}", spread, *(ratio(figures, base) for base in bases)]
        print(f"| {' | '.join(cells)} |", flush=True)
        records.append(where | dict(variant=name, tokens_per_second=figures.rate))
    return records


def ratio(figures: Measurement, base: Measurement | None) -> str:
    if base is None:
        return ""
    return f"{statistics.median(mine / its for mine, its in zip(figures.rates, base.rates, strict=True)):.2f}"


def first_tokens(
    preset: str, folder: str, device: str, thread_counts: tuple[int, ...]
) -> list[dict]:
    """Print and return how long python sample.py takes from its start to its first token, with the
    checkpoint in folder; medians."""
    script = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "sample.py")
    options = [
        f"--out_dir={folder}",
        "--start=Once upon a time",
        "--format=events",
        f"--device={device}",
    ]
    records = []
    print(
        f"\n{preset}: python sample.py from its start to the first token\n\n| threads | seconds | spread |"
    )
    print("|---:|---:|---:|")
    for threads in thread_counts:
        times = [
            seconds_to_first_token([sys.executable, script, *options], threads) for _ in range(RUNS)
        ]
        seconds = statistics.median(times)
        print(f"| {threads} | {seconds:.2f} | {min(times):.2f} to {max(times):.2f} |", flush=True)
        records.append(
            dict(preset=preset, variant="first token", batch=1, threads=threads, seconds=seconds)
        )
    return records


def seconds_to_first_token(command: list[str], threads: int) -> float:
    """Until a command that prints the events of sample.py has printed one with a token; it is ended then."""
    began = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            for line in process.stdout:
                if json.loads(line)["token"] is not None:
                    return time.perf_counter() - began
            raise ValueError(f"no first token: {process.stderr.read().decode().strip()}")
        finally:
            process.kill()
