"""
Measure what the README claims.

    python bench.py train                        training speed and memory beside the baselines
    python bench.py train --preset=15M --json=bench.json
    python bench.py cost                         training as models, contexts and batches grow
    python bench.py save                         what checkpoints cost a run
    python bench.py data                         pretokenizing and reading batches
    python bench.py sample                       sample.py, and decoding with several options
    python bench.py sample --preset=15M --batch=1 --variants=int8,llama.cpp

Every variant runs in a separate process. The processes take turns, round after round, so that a
machine that slows down affects all of them. The tables show medians, and ratios to the baseline of
the same round.
"""

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch

from benchmarks import data, decoding
from benchmarks.machine import describe_machine
from benchmarks.records import path_problems, write_records
from benchmarks.saving import measure_saving
from benchmarks.timing import Measurement, Variant, measure, timing_problems
from benchmarks.training import (
    BASELINE,
    COST_SETTINGS,
    matmul_variants,
    measure_cost,
    split_matmul,
    training_variants,
    utilization,
)
from benchmarks.training_run import PRESETS, cria_step, preset_options, read_config
from configurator import configure, exit_with_errors, run_main
from model import ModelArgs, Transformer
from runtime.device import peak_flops, pick_device

DATA_BATCH = (8, 256)  # sequences and tokens of the batches that bench.py data reads


@dataclass(frozen=True)
class TrainBench:
    """Measure tokens per second and peak memory of training steps: cria's and the baselines'."""

    # the size of the model
    preset: Literal["all", "260K", "15M", "15M-32000", "42M", "110M"] = "all"
    batch_size: int = 0  # sequences in a micro-batch; 0: 2048 tokens on a CPU, 32768 on a GPU
    rounds: int = 5  # turns of each variant
    seconds: float = 4.0  # length of a turn, at least one step
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    json: str = ""  # also write the records to this file

    def validate(self) -> Iterator[str]:
        if self.batch_size < 0:
            yield f"--batch_size={self.batch_size}: must be 0 or more"
        yield from timing_problems(self)
        yield from path_problems(self.json)


@dataclass(frozen=True)
class CostBench:
    """Measure cria's training step as models, contexts, batches and processes grow."""

    rounds: int = 3  # turns of each setting
    seconds: float = 4.0  # length of a turn, at least one step
    # the size of the model
    preset: Literal["all", "260K", "15M", "15M-32000", "42M", "110M"] = "all"
    compile: bool = True  # compile the model; takes minutes with several processes
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    json: str = ""  # also write the records to this file

    def validate(self) -> Iterator[str]:
        yield from timing_problems(self)
        yield from path_problems(self.json)


@dataclass(frozen=True)
class SaveBench:
    """Measure training with checkpoints in the background, and without."""

    # the size of the model
    preset: Literal["260K", "15M", "15M-32000", "42M", "110M"] = "15M"
    checkpoint_interval: int = 50  # steps between checkpoints
    rounds: int = 9  # turns of each variant, of checkpoint_interval steps
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    json: str = ""  # also write the records to this file

    def validate(self) -> Iterator[str]:
        for name in ("checkpoint_interval", "rounds"):
            if getattr(self, name) < 1:
                yield f"--{name}={getattr(self, name)}: must be 1 or more"
        yield from path_problems(self.json)


def run_train(config: TrainBench) -> None:
    """bench.py train: one table per preset."""
    device = pick_device(config.device)
    print(describe_machine(device))
    records = []
    for preset in PRESETS if config.preset == "all" else [config.preset]:
        options = preset_options(preset, device, config.batch_size)
        variants = training_variants(options, device) + matmul_variants(device)
        measurements = measure(variants, config.rounds, config.seconds)
        records += report_training(preset, options, device, measurements)
        write_records(config.json, records)


def report_training(
    preset: str, options: list[str], device: str, measurements: dict[str, Measurement]
) -> list[dict]:
    """Print a preset's table; returns its records."""
    config = read_config(options)
    args = config.model_args()
    steps, products = split_matmul(measurements)
    speeds = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s {dtype}" for dtype, rate in products.items())
    title = "MFU" if peak_flops(device) else "of matmul peak"
    print(
        f"\n{preset}: {count_parameters(args)} parameters, vocabulary {args.vocab_size}, ", end=""
    )
    print(f"micro-batch {config.batch_size} x {config.max_seq_len} tokens; ", end="")
    print(f"matrix products: {speeds}\n")
    print(f"| variant | tokens/s | x baseline | spread | peak memory | {title} |")
    print("|---|---:|---:|---:|---:|---:|")
    records = []
    for name, step in steps.items():
        record = {"preset": preset, "variant": name, "tokens_per_second": step.rate}
        record |= ratio_record("ratio_to_plain", step.rates, steps[BASELINE].rates)
        record["peak_memory_bytes"] = step.peak_memory
        used = utilization(options, device, step.rate, max(products.values()))
        record |= {"share_of_ceiling": used, "batch_size": config.batch_size}
        record |= {"max_seq_len": config.max_seq_len, "device": device}
        ratio, spread = f"{record['ratio_to_plain']:.2f}", spread_text(record, 2)
        memory = f"{step.peak_memory / 2**20:,.0f} MB"
        print(f"| {name} | {step.rate:,.0f} | {ratio} | {spread} | {memory} | {used:.0%} |")
        sys.stdout.flush()
        records.append(record)
    return records


def ratio_record(key: str, rates: list[float], baseline_rates: list[float]) -> dict:
    """The median ratio of rates in the same round under the key, with its minimum and maximum."""
    pairs = zip(rates, baseline_rates, strict=True)
    ratios = [rate / baseline_rate for rate, baseline_rate in pairs]
    return {key: statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}


def spread_text(record: dict, digits: int) -> str:
    """The range of a record's ratios."""
    return f"{record['ratio_min']:.{digits}f} to {record['ratio_max']:.{digits}f}"


def count_parameters(args: ModelArgs) -> str:
    """The number of parameters, such as 15.2M."""
    number = Transformer.on_meta(args).num_parameters()
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number / 1e3:.0f}K"


def run_cost(config: CostBench) -> None:
    """bench.py cost: one table, a row per setting that this machine has the GPUs for."""
    device = pick_device(config.device)
    print(describe_machine(device))
    print("\n| preset | length | sequences | processes | | tokens/s | of matmul peak ", end="")
    print("| peak memory of a process |\n|---|---:|---:|---:|---|---:|---:|---:|")
    records: list[dict] = []
    for setting in COST_SETTINGS:
        preset, length, batch_size, processes, parallel = setting
        lacks_gpus = device.startswith("cuda") and processes > torch.cuda.device_count()
        if lacks_gpus or config.preset not in ("all", preset):
            continue
        cost = measure_cost(setting, device, config.compile, config.rounds, config.seconds)
        print(
            f"| {preset} | {length} | {batch_size} | {processes} "
            f"| {parallel if processes > 1 else ''} | {cost.tokens_per_second:,.0f} "
            f"| {cost.utilization:.0%} | {cost.peak_memory / 2**20:,.0f} MB |",
            flush=True,
        )
        record = setting._asdict() | {"tokens_per_second": cost.tokens_per_second}
        record["share_of_ceiling"] = cost.utilization
        record["peak_memory_bytes"] = cost.peak_memory
        records.append(record)
        write_records(config.json, records)


def run_save(config: SaveBench) -> None:
    """bench.py save: one table."""
    device = pick_device(config.device)
    interval = config.checkpoint_interval
    options = preset_options(config.preset, device, batch_size=0)
    with contextlib.redirect_stdout(sys.stderr):
        rates = measure_saving(options, device, interval, config.rounds)
    without = statistics.median(rates.without_checkpoint)
    rate = statistics.median(rates.with_checkpoint)
    record = {"preset": config.preset, "checkpoint_interval": interval, "tokens_per_second": rate}
    record |= ratio_record("ratio", rates.with_checkpoint, rates.without_checkpoint)
    ratio, spread = f"{record['ratio']:.3f}", spread_text(record, 3)
    print(f"{describe_machine(device)}\n")
    print(f"| {config.preset} | tokens/s | x without | spread |\n|---|---:|---:|---:|")
    print(f"| no checkpoints | {without:,.0f} | 1 | |")
    print(f"| one in {interval} steps | {rate:,.0f} | {ratio} | {spread} |")
    write_records(config.json, [record])


def run_data(config: data.DataBench) -> None:
    """bench.py data: pretokenizing, then reading batches beside a training step."""
    print(describe_machine("cpu"))
    records = data.measure_pretokenizing(config)
    batch_size, seq_len = DATA_BATCH
    options = preset_options("15M", "cpu", batch_size)
    variant = Variant("15M", cria_step, {"options": options, "device": "cpu"})
    rate = measure([variant], rounds=3, seconds=4.0)["15M"].rate
    step_seconds = batch_size * seq_len / rate
    records += data.measure_batches(config.vocab_size, batch_size, seq_len, step_seconds)
    write_records(config.json, records)


def run_sample(config: decoding.SampleBench) -> None:
    """bench.py sample: the tables of benchmarks/decoding.py."""
    device = pick_device(config.device)
    print(describe_machine(device))
    for name, package in decoding.PACKAGES.items():
        if name.split()[0] in config.selected and not find_spec(package):
            print(f"note: {name} is left out, as {package} is not installed")
    sizes = [f"--vocab_size={decoding.VOCAB_SIZE}", f"--max_seq_len={decoding.CONTEXT}"]
    records = []
    for preset in ("15M", "42M", "110M") if config.preset == "all" else (config.preset,):
        args = read_config([*PRESETS[preset], *sizes]).model_args()
        for table in decoding.decoding(config, preset, args, device):
            records += table
            write_records(config.json, records)


BENCHMARKS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "train": (TrainBench, run_train),
    "cost": (CostBench, run_cost),
    "save": (SaveBench, run_save),
    "data": (data.DataBench, run_data),
    "sample": (decoding.SampleBench, run_sample),
}


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark that the first argument names."""
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        return print((__doc__ or "").strip())
    if name not in BENCHMARKS:
        names = ", ".join(BENCHMARKS)
        exit_with_errors(f"{name}: what to measure must come first and be one of {names}")
    config_class, run = BENCHMARKS[name]
    config, _ = configure(config_class, argv[1:], program=f"bench.py {name}")
    run(config)


if __name__ == "__main__":
    run_main(main)
