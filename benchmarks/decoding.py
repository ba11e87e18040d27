"""
The speed of decoding with randomly initialized models, and the time to the first token.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch

from benchmarks import baselines
from benchmarks.records import path_problems
from benchmarks.timing import Measurement, Variant, measure, timing_problems
from formats.lazy_model import from_model
from formats.writer import write_model
from generation.compile import prepare_for_inference
from generation.engine import InferenceEngine
from generation.sampling_params import SamplingParams
from generation.sequence import SequenceState
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
TOKENS = 256  # new tokens of each sequence
CONTEXT = 512  # max_seq_len of the models
RUNS = 3  # of sample.py, for the time to the first token
FILES = {"llama.cpp F32": "float32", "llama.cpp Q8_0": "q8_0"}  # dtypes of GGUF files
SAME_DTYPE = {"float32": "llama.cpp F32", "int8": "llama.cpp Q8_0"}
# Variants that need a package; without it they are left out.
PACKAGES = {"transformers": "transformers", "llama.cpp": "xllamacpp"}


@dataclass(frozen=True)
class SampleBench:
    """Tokens per second at temperature 1, compared with other programs; time to first token."""

    preset: Literal["all", "15M", "42M", "110M"] = "all"  # the size of the model
    # sequences decoded at once; the time to the first token is measured with 1
    batch: Literal["all", 1, 4, 16, 64] = "all"
    threads: Literal["all", 1, 2] = "all"  # per process; all: 1 and 2, but on a GPU only 2
    rounds: int = 3  # turns of each variant
    seconds: float = 4.0  # length of a turn, which has at least one batch of sequences
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    json: str = ""  # also write the records to this file

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes to measure."""
        return (1, 4, 16, 64) if self.batch == "all" else (self.batch,)

    def thread_counts(self, device: str) -> tuple[int, ...]:
        """The numbers of threads to measure."""
        if self.threads == "all":
            return (1, 2) if device == "cpu" else (2,)
        return (self.threads,)

    def validate(self) -> Iterator[str]:
        """Yield one sentence for each problem."""
        yield from timing_problems(self)
        yield from path_problems(self.json)


# The variants


def random_model(args: ModelArgs) -> Transformer:
    """A model in evaluation mode; the same weights in every process."""
    torch.manual_seed(0)
    return Transformer(args).eval()


def cria_step(
    args: ModelArgs, device: str, threads: int, batch_size: int, dtype: str, compile: bool
) -> Callable[[], int]:
    """A step() that generates a batch of TOKENS tokens and returns their number."""
    torch.set_num_threads(threads)
    model = random_model(args).to(device)
    prepared = prepare_for_inference(model, dtype, batch_size, compile)
    engine = InferenceEngine(prepared, SamplingParams(TOKENS), batch_size)  # no stop tokens
    sample_indices = itertools.count()

    def step() -> int:
        sequences = [SequenceState([BOS_ID], next(sample_indices)) for _ in range(batch_size)]
        return sum(token is not None for _, token in engine.generate(sequences))

    return step


def baseline_step(
    baseline: str, args: ModelArgs, device: str, threads: int, batch_size: int
) -> Callable[[], int]:
    """The step() of a baseline, plain or transformers."""
    torch.set_num_threads(threads)
    if baseline == "plain":
        return baselines.baseline_decoding(args, device, batch_size, TOKENS)
    return baselines.transformers_decoding(args, device, batch_size, TOKENS)


def llama_cpp_step(path: str, device: str, threads: int) -> Callable[[], int]:
    """The step() of llama.cpp with a GGUF file."""
    return baselines.llama_cpp_decoding(path, threads, CONTEXT, TOKENS)


def variants(args: ModelArgs, device: str, batch: int, threads: int, folder: str) -> list[Variant]:
    """The variants to compare at this batch size and number of threads.

    Args:
        folder: where write_files wrote.
    """

    def variant(name: str, build: Callable[..., Callable[[], int]], **arguments: Any) -> Variant:
        arguments |= {"device": device, "threads": threads}
        return Variant(name, build, arguments, warm_up=1)  # the first turn is not counted either

    shape = {"args": args, "batch_size": batch}
    dtypes = ["float32", "int8"]
    if pick_dtype("auto", device) == "bfloat16":
        dtypes.insert(1, "bfloat16")
    compared = []
    if batch == 1 and threads == 2:
        compared.append(variant("plain", baseline_step, baseline="plain", **shape))
    if batch in (1, 16) and find_spec("transformers"):
        compared.append(variant("transformers", baseline_step, baseline="transformers", **shape))
    if batch == 1 and device == "cpu" and find_spec("xllamacpp"):
        for name, file_dtype in FILES.items():
            path = os.path.join(folder, f"{file_dtype}.gguf")
            compared.append(variant(name, llama_cpp_step, path=path))
    for dtype in ("float32", "int8") if batch == 1 else ():
        name = f"{dtype}, not compiled"
        compared.append(variant(name, cria_step, dtype=dtype, compile=False, **shape))
    for dtype in dtypes:
        compared.append(variant(dtype, cria_step, dtype=dtype, compile=True, **shape))
    return compared


# Files


def dummy_tokenizer(vocab_size: int) -> SentencePieceTokenizer:
    """A SentencePiece vocabulary like Llama 2's: the bytes, then the shortest lower-case words."""
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    letters = "▁abcdefghijklmnopqrstuvwxyz"
    words = itertools.chain.from_iterable(
        itertools.product(letters, repeat=length) for length in itertools.count(1)
    )
    for rank, word in enumerate(itertools.islice(words, vocab_size - len(pieces))):
        pieces.append(("".join(word), -float(rank), NORMAL))
    return SentencePieceTokenizer(proto_from_pieces(pieces))


def write_files(args: ModelArgs, folder: str) -> None:
    """Write the model as ckpt.pt with its tokenizer.model, and for llama.cpp as GGUF files."""
    model = from_model(random_model(args), tokenizer=dummy_tokenizer(args.vocab_size))
    write_model(model, os.path.join(folder, "ckpt.pt"), "ckpt", "float32")
    for dtype in FILES.values() if find_spec("xllamacpp") else ():
        write_model(model, os.path.join(folder, f"{dtype}.gguf"), "gguf", dtype)


# Measuring


def decoding(
    config: SampleBench, preset: str, args: ModelArgs, device: str
) -> Iterator[list[dict[str, Any]]]:
    """Measure the model of a preset; prints each table and yields its records."""
    with tempfile.TemporaryDirectory(prefix="cria-bench-") as folder:
        write_files(args, folder)
        for batch, threads in itertools.product(config.batches, config.thread_counts(device)):
            compared = variants(args, device, batch, threads, folder)
            measurements = measure(compared, config.rounds, config.seconds)
            settings = {"preset": preset, "batch": batch, "threads": threads}
            yield report(settings, measurements)
        if 1 in config.batches:
            yield first_tokens(preset, folder, device, config.thread_counts(device))


def report(settings: dict[str, Any], measurements: dict[str, Measurement]) -> list[dict[str, Any]]:
    """Print the table of the variants and return its records.

    Ratios are medians over the rounds. The ratio to llama.cpp is to its file of the same dtype."""
    others: list[str] = [name for name in ("plain", "transformers") if name in measurements]
    if measurements.keys() & FILES.keys():
        others.append("llama.cpp")
    titles = ["variant", "tokens/s", "spread", *(f"x {name}" for name in others)]
    streams, threads = settings["batch"], settings["threads"]
    print(f"\n{settings['preset']}: {TOKENS} tokens, streams: {streams}, threads: {threads}\n")
    print(f"| {' | '.join(titles)} |\n|---|{'---:|' * (len(titles) - 1)}")
    records = []
    for name, measurement in measurements.items():
        llama_cpp_file = SAME_DTYPE.get(name.partition(",")[0], "")
        spread = f"{min(measurement.rates):,.0f} to {max(measurement.rates):,.0f}"
        cells = [name, f"{measurement.rate:,.0f}", spread]
        for other in others:
            base = measurements.get(llama_cpp_file if other == "llama.cpp" else other)
            cells.append(median_ratio(measurement, base))
        print(f"| {' | '.join(cells)} |", flush=True)
        records.append(settings | {"variant": name, "tokens_per_second": measurement.rate})
    return records


def median_ratio(measurement: Measurement, base: Measurement | None) -> str:
    """The median over the rounds of the ratio of two rates; empty without a base."""
    if base is None:
        return ""
    pairs = zip(measurement.rates, base.rates, strict=True)
    return f"{statistics.median(rate / base_rate for rate, base_rate in pairs):.2f}"


def first_tokens(
    preset: str, folder: str, device: str, thread_counts: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Measure the time from the start of sample.py to its first token, with the checkpoint in
    folder; prints the table of medians and returns its records."""
    script = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "sample.py")
    options = ["--start=Once upon a time", "--format=events", f"--device={device}"]
    command = [sys.executable, script, f"--out_dir={folder}", *options]
    print(f"\n{preset}: python sample.py from its start to the first token\n")
    print("| threads | seconds | spread |\n|---:|---:|---:|")
    records = []
    for threads in thread_counts:
        times = [seconds_to_first_token(command, threads) for _ in range(RUNS)]
        median = statistics.median(times)
        print(f"| {threads} | {median:.2f} | {min(times):.2f} to {max(times):.2f} |", flush=True)
        record = {"preset": preset, "variant": "first token", "batch": 1}
        records.append(record | {"threads": threads, "seconds": median})
    return records


def seconds_to_first_token(command: list[str], threads: int) -> float:
    """The time until a command that prints sample.py's events prints a token; then it is killed."""
    start_time = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        assert process.stdout and process.stderr, "both are pipes"
        try:
            if not any(json.loads(line)["token"] is not None for line in process.stdout):
                raise ValueError(f"no first token: {process.stderr.read().decode().strip()}")
            return time.perf_counter() - start_time
        finally:
            process.kill()
