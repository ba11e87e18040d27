"""
The speed of decoding with randomly initialized models: sample.py as a command, then warm decoding
with several sampling options, beside other programs.
"""

import itertools
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch

from benchmarks import baselines
from benchmarks.llama_cpp import (
    GGUF_DTYPES,
    SAME_DTYPE,
    NativeBuild,
    native_problems,
    wheel_step,
)
from benchmarks.records import path_problems
from benchmarks.sample_command import measure_command
from benchmarks.timing import Measurable, Measurement, Variant, measure_cases, timing_problems
from formats.lazy_model import from_model
from formats.writer import write_model
from generation.engine import InferenceEngine
from generation.prepared_model import PreparedModel, prepare_for_inference
from generation.request import Request
from generation.sampling_params import SamplingParams
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
README_OPTIONS = {"temperature": 0.8, "top_p": 0.9}
TEMPERATURE_ONLY = "temperature only"
OPTION_SETS: dict[str, dict[str, Any]] = {  # of SamplingParams
    "defaults": {},
    "README's options": README_OPTIONS,
    "top_k 300": {"top_k": 300},
    "greedy": {"temperature": 0.0},
    TEMPERATURE_ONLY: {"temperature": 0.8},
}
DIFFERENT = "different options"  # row i has option set i, in turn
# Variants that need a package; without it they are left out.
PACKAGES = {"transformers": "transformers", "llama.cpp (wheel)": "xllamacpp"}
CRIA_VARIANTS = ("float32", "bfloat16", "int8", "uncompiled float32", "uncompiled int8")
VARIANTS = ("sample.py", "plain", "transformers", "llama.cpp", *CRIA_VARIANTS)


@dataclass(frozen=True)
class SampleBench:
    """Measure sample.py's time to its tokens, and decoding with several sampling options."""

    preset: Literal["all", "15M", "42M", "110M"] = "all"  # the size of the model
    batch: Literal["all", 1, 4, 16, 64] = "all"  # sequences decoded at once
    threads: Literal["all", 1, 2] = 2  # per process; all: 1 and 2, but on a GPU only 2
    rounds: int = 3  # turns of each variant with each option set
    seconds: float = 4.0  # length of a turn, which has at least one batch of sequences
    # what to measure, separated by commas, such as int8,float32: sample.py, plain, transformers,
    # llama.cpp, float32, bfloat16, int8, uncompiled float32, uncompiled int8
    variants: str = "all"
    # a native build's llama-bench, which has llama-batched-bench beside it
    llama_bench: str = ""
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    json: str = ""  # also write the records to this file

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes to measure."""
        return (1, 4, 16, 64) if self.batch == "all" else (self.batch,)

    @property
    def selected(self) -> list[str]:
        """The names in VARIANTS to measure."""
        names = [name.strip() for name in self.variants.split(",")]
        return list(VARIANTS) if self.variants == "all" else names

    def thread_counts(self, device: str) -> tuple[int, ...]:
        """The numbers of threads to measure."""
        if self.threads == "all":
            return (1, 2) if device == "cpu" else (2,)
        return (self.threads,)

    def validate(self) -> Iterator[str]:
        """Yield one sentence for each problem."""
        if not set(self.selected) <= set(VARIANTS):
            yield f"--variants={self.variants}: must be all, or some of {', '.join(VARIANTS)}"
        yield from timing_problems(self)
        yield from native_problems(self.llama_bench, self.batches != (1,))
        yield from path_problems(self.json)


# The variants


def random_model(args: ModelArgs) -> Transformer:
    """A model in evaluation mode; the same weights in every process."""
    torch.manual_seed(0)
    return Transformer(args).eval()


def row_params(case: str, row: int) -> SamplingParams:
    """The sampling parameters of a row, without stop tokens.

    Args:
        case: the name of an option set, or DIFFERENT.
    """
    names = list(OPTION_SETS)
    name = names[row % len(names)] if case == DIFFERENT else case
    return SamplingParams(max_new_tokens=TOKENS, **OPTION_SETS[name])


def prepare(
    args: ModelArgs, device: str, batch_size: int, dtype: str, compile: bool
) -> PreparedModel:
    """A random model with its compiled steps. Raises ValueError if it cannot be compiled."""
    prepared = prepare_for_inference(random_model(args).to(device), dtype, batch_size, compile)
    prepared.wait_for_compilation()
    is_compiled = prepared.is_compiled(batch_size, batch_size)
    if prepared.draft:
        is_compiled &= prepared.draft.is_compiled(1, 1)
    if compile and not is_compiled:
        raise ValueError("it cannot be compiled here: leave it out with --variants")
    return prepared


def cria_step(
    args: ModelArgs, device: str, threads: int, batch_size: int, dtype: str, compile: bool
) -> Callable[[str], int]:
    """A step(case) that generates a batch of TOKENS tokens and returns their number."""
    torch.set_num_threads(threads)
    engine = InferenceEngine(prepare(args, device, batch_size, dtype, compile), batch_size)
    indices = itertools.count()

    def step(case: str) -> int:
        rows = range(batch_size)
        requests = [Request([BOS_ID], row_params(case, row), next(indices)) for row in rows]
        return sum(new_token.token is not None for new_token in engine.generate(requests))

    return step


def baseline_step(
    baseline: str, args: ModelArgs, device: str, threads: int, batch_size: int
) -> Callable[[], int]:
    """The step() of a baseline, plain or transformers."""
    torch.set_num_threads(threads)
    if baseline == "plain":
        return baselines.baseline_decoding(args, device, batch_size, TOKENS)
    return baselines.transformers_decoding(args, device, batch_size, TOKENS)


def variant(
    name: str, build: Callable[..., Callable], arguments: dict, cases: tuple[str, ...] = ("",)
) -> Variant:
    """A Variant that the first turn, which is not counted, warms up."""
    return Variant(name, build, arguments, warm_up=0, cases=cases)


def llama_cpp_variants(
    llama_bench: str, device: str, batch: int, threads: int, folder: str
) -> Iterator[Measurable]:
    """The variants of llama.cpp; prints why a native build's program is left out."""
    for name, dtype in GGUF_DTYPES.items():
        path = os.path.join(folder, f"{dtype}.gguf")
        if batch == 1 and find_spec("xllamacpp"):
            arguments = {"path": path, "device": device, "threads": threads}
            arguments |= {"context": CONTEXT, "length": TOKENS}
            yield variant(f"llama.cpp {name} (wheel)", wheel_step, arguments)
        if llama_bench:
            title = f"llama.cpp {name} (native build)"
            native = NativeBuild(title, ("",), llama_bench, path, threads, batch, TOKENS)
            if problem := native.problem():
                print(f"note: {title} is left out: {problem}")
            else:
                yield native


def variants(
    config: SampleBench, args: ModelArgs, device: str, batch: int, threads: int, folder: str
) -> list[Measurable]:
    """The selected variants for this batch size and number of threads.

    Args:
        folder: where write_files wrote.
    """
    shape = {"args": args, "device": device, "batch_size": batch, "threads": threads}
    compared: list[Measurable] = []
    selected = config.selected
    if "plain" in selected and batch == 1 and threads == 2:
        compared.append(variant("plain", baseline_step, {"baseline": "plain"} | shape))
    if "transformers" in selected and find_spec("transformers"):
        arguments = {"baseline": "transformers"} | shape
        compared.append(variant("transformers", baseline_step, arguments))
    if "llama.cpp" in selected and device == "cpu":
        compared += llama_cpp_variants(config.llama_bench, device, batch, threads, folder)
    cases = (*OPTION_SETS, DIFFERENT) if batch > 1 else tuple(OPTION_SETS)
    for name in CRIA_VARIANTS:
        dtype = name.split()[-1]
        compile = name == dtype
        is_slow = dtype == "bfloat16" and pick_dtype("auto", device) != "bfloat16"
        is_unsupported = is_slow or (compile and device == "mps")
        if name in selected and not is_unsupported:
            arguments = shape | {"dtype": dtype, "compile": compile}
            compared.append(variant(name, cria_step, arguments, cases))
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


def write_files(args: ModelArgs, folder: str, with_gguf: bool) -> None:
    """Write the model as ckpt.pt with its tokenizer.model, and for llama.cpp as GGUF files."""
    model = from_model(random_model(args), tokenizer=dummy_tokenizer(args.vocab_size))
    write_model(model, os.path.join(folder, "ckpt.pt"), "ckpt", "float32")
    for dtype in GGUF_DTYPES.values() if with_gguf else ():
        write_model(model, os.path.join(folder, f"{dtype}.gguf"), "gguf", dtype)


# Measuring


def decoding(
    config: SampleBench, preset: str, args: ModelArgs, device: str
) -> Iterator[list[dict[str, Any]]]:
    """Measure the model of a preset; prints the tables and yields the records of each."""
    with_gguf = bool(config.llama_bench or find_spec("xllamacpp"))
    with tempfile.TemporaryDirectory(prefix="cria-bench-") as folder:
        write_files(args, folder, with_gguf and "llama.cpp" in config.selected)
        if "sample.py" in config.selected and 1 in config.batches:
            for threads in config.thread_counts(device):
                compile_for_command(args, device, threads)
                settings = {"preset": preset, "threads": threads}
                yield list(measure_command(settings, folder, device, config.rounds))
        for batch, threads in itertools.product(config.batches, config.thread_counts(device)):
            compared = variants(config, args, device, batch, threads, folder)
            if compared:
                measurements = measure_cases(compared, config.rounds, config.seconds)
                settings = {"preset": preset, "batch": batch, "threads": threads}
                yield report(settings, measurements)


def compile_for_command(args: ModelArgs, device: str, threads: int) -> None:
    """Compile what sample.py uses, except on MPS, where nothing is compiled."""
    torch.set_num_threads(threads)  # which compiled code depends on
    prepare(args, device, 1, "float32", compile=device != "mps")


def report(
    settings: dict[str, Any], measurements: dict[tuple[str, str], Measurement]
) -> list[dict[str, Any]]:
    """Print the tables of the variants and return their records.

    Ratios are medians over the rounds. The ratio to llama.cpp is to its file of the same dtype."""
    records = []
    for (name, case), measurement in measurements.items():
        rates = measurement.rates
        record: dict[str, Any] = {"variant": name, "options": case or TEMPERATURE_ONLY}
        record |= {"tokens_per_second": measurement.rate, "min": min(rates), "max": max(rates)}
        if name in CRIA_VARIANTS:
            record |= ratios(name, measurement, measurements)
        records.append(settings | record)
    print(f"\n{settings['preset']}: {TOKENS} tokens, ", end="")
    print(f"streams: {settings['batch']}, threads: {settings['threads']}")
    print_table("tokens/s", records, "tokens_per_second", ",.0f")
    print_table("x transformers", records, "ratio_to_transformers", ".2f")
    print_table("x llama.cpp", records, "ratio_to_llama_cpp", ".2f")
    print_table(f"x {TEMPERATURE_ONLY}", records, "ratio_to_temperature_only", ".2f")
    return records


def ratios(
    name: str, measurement: Measurement, measurements: dict[tuple[str, str], Measurement]
) -> dict[str, float]:
    """The ratios of a measurement of one of CRIA_VARIANTS to those that were measured beside it."""
    file = f"llama.cpp {SAME_DTYPE.get(name.split()[-1])}"
    native, wheel = (file + " (native build)", ""), (file + " (wheel)", "")
    bases = {
        "ratio_to_transformers": ("transformers", ""),
        "ratio_to_llama_cpp": native if native in measurements else wheel,
        "ratio_to_temperature_only": (name, TEMPERATURE_ONLY),
    }
    found = {key: measurements[base] for key, base in bases.items() if base in measurements}
    return {key: median_ratio(measurement, base) for key, base in found.items()}


def median_ratio(measurement: Measurement, base: Measurement) -> float:
    """The median over the rounds of the ratio of two rates."""
    pairs = zip(measurement.rates, base.rates, strict=True)
    return statistics.median(rate / base_rate for rate, base_rate in pairs)


def print_table(title: str, records: list[dict[str, Any]], key: str, digits: str) -> None:
    """Print the values of a key with a row per variant and a column per option set.

    Args:
        digits: format of the values.
    """
    rows: dict[str, dict[str, str]] = {}
    for record in records:
        if key in record:
            cells = rows.setdefault(record["variant"], {})
            cells[record["options"]] = format(record[key], digits)
    if not rows:
        return
    options = [
        name for name in (*OPTION_SETS, DIFFERENT) if any(name in row for row in rows.values())
    ]
    print(f"\n| {' | '.join([title, *options])} |\n|---|{'---:|' * len(options)}")
    for variant, cells in rows.items():
        print(f"| {' | '.join([variant, *(cells.get(name, '') for name in options)])} |")
    print(end="", flush=True)
