"""
Measure what the README claims.

    python bench.py train                        training speed and memory beside others' loops
    python bench.py train --preset=15M --json=bench.json
    python bench.py cost                         training cost as models, contexts, batches and processes grow
    python bench.py save                         what writing checkpoints costs a run
    python bench.py data                         pretokenizing and reading batches
    python bench.py sample                       decoding, and the time to the first token

Every variant lives in a process of its own. They take turns, round after round, so that a machine
that slows down slows all of them; quoted are medians, and the ratio to plain of the same round.
"""

import contextlib
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import types
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from training.saving import save

import train
from benchmarks import baselines as peers
from benchmarks import data as bench_data
from benchmarks import decoding as bench_sample
from benchmarks.data import path_problems
from benchmarks.timing import WARM_UP, Measured, Variant, measure, synchronize, timing_problems
from configurator import configure, exit_with_errors, run_main
from model import Transformer, flops_per_token, iter_initial_weights
from runtime.atomic_files import write_atomically
from runtime.device import disable_malloc_trim, peak_flops, pick_device, pick_dtype
from runtime.distributed import init_distributed
from training.parallel import is_sharded, load_weights
from training.setup import equip

CONFIGS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "config")
PRESETS = {
    "260K": [f"{CONFIGS}/stories260K.py"],
    "15M": [f"{CONFIGS}/stories15M.py"],
    "15M-32000": [f"{CONFIGS}/stories15M.py", "--vocab_size=32000"],
    "42M": [f"{CONFIGS}/stories42M.py"],
    "110M": [f"{CONFIGS}/stories110M.py"],
}
TOKENS = {"cpu": 2048, "cuda": 32768, "mps": 8192}  # in a micro-batch, by the kind of device


@dataclass(frozen=True)
class TrainBench:
    """Tokens per second and peak memory of a training step, beside the same model as others train it."""

    preset: Literal["all", "260K", "15M", "15M-32000", "42M", "110M"] = (
        "all"  # the size of the model
    )
    batch_size: int = (
        0  # sequences in a micro-batch; 0: 2048 tokens' worth on a CPU, 32768 on a GPU
    )
    rounds: int = 5  # how often each variant has its turn
    seconds: float = 4.0  # how long a turn lasts, at least one step
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    json: str = ""  # also write the records here

    def validate(self):
        if self.batch_size < 0:
            yield f"--batch_size={self.batch_size}: must be 0 or more"
        yield from timing_problems(self)
        yield from path_problems(self.json)


@dataclass(frozen=True)
class CostBench:
    """Our training step as models, contexts, batches and processes grow."""

    rounds: int = 3  # how often each setting has its turn
    seconds: float = 4.0  # how long a turn lasts, at least one step
    preset: Literal["all", "260K", "15M", "15M-32000", "42M", "110M"] = (
        "all"  # the size of the model
    )
    compile: bool = True  # compile the model, which takes minutes where several processes do
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    json: str = ""  # also write the records here

    def validate(self):
        yield from timing_problems(self)
        yield from path_problems(self.json)


@dataclass(frozen=True)
class SaveBench:
    """A run that saves in the background beside one that does not."""

    preset: Literal["260K", "15M", "15M-32000", "42M", "110M"] = "15M"  # the size of the model
    checkpoint_interval: int = 50  # steps between checkpoints
    rounds: int = 9  # how often each has its turn, of so many steps
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    json: str = ""  # also write the records here

    def validate(self):
        for name in ("checkpoint_interval", "rounds"):
            if getattr(self, name) < 1:
                yield f"--{name}={getattr(self, name)}: must be 1 or more"
        yield from path_problems(self.json)


def ours(options: list[str], device: str):
    """Our own training step, as train.py runs it."""
    return our_step(*our_run(options, device))


def our_run(options: list[str], device: str):
    config, _ = configure(train.TrainConfig, options)
    dist_ctx, device = init_distributed(device)
    disable_malloc_trim()
    torch.manual_seed(0)
    run = equip(config, dist_ctx, device, (None, None, None), config.model_args())
    load_weights(run.model, iter_initial_weights(config.model_args()))
    forward = train.compiled(run)
    if dist_ctx.size > 1 and not is_sharded(run.model):
        forward = torch.nn.parallel.DistributedDataParallel(forward, gradient_as_bucket_view=True)
    return run, forward


def our_step(run, forward):
    batches = random_batches(run.config, run.device)

    def step() -> int:
        train.training_step(run, forward, batches)
        run.iter_num += 1
        return run.config.sequences_per_step * run.config.max_seq_len

    return step


def saving(
    options: list[str], device: str, folder: str, interval: int, rounds: int
) -> dict[bool, list[float]]:
    """Tokens per second of so many of our steps, without and with a checkpoint. Both in one process, in turn:
    two processes of the same code are further apart than this."""
    run, forward = our_run(options, device)
    run.config, run.tokenizer = (
        dataclasses.replace(run.config, out_dir=folder),
        types.SimpleNamespace(hash=""),
    )
    write_atomically(
        run.path("tokenizer.model"), b""
    )  # without it the folder would count as deleted
    step, rates = our_step(run, forward), {False: [], True: []}
    for number in range(-1, rounds):
        for saves in (False, True) if number % 2 else (True, False):
            synchronize(device)
            began = time.perf_counter()
            if saves:
                save(run)
            tokens = sum(step() for _ in range(interval if number >= 0 else WARM_UP))
            synchronize(device)
            run.keeper.finish()
            rates[saves] += [tokens / (time.perf_counter() - began)] if number >= 0 else []
    return rates


def plain(options: list[str], device: str, compile: bool, dtype: str, of="plain"):
    """The loop of peers.py, or transformers' model in it."""
    config, _ = configure(train.TrainConfig, options)
    build = {"plain": peers.plain_step, "transformers": peers.transformers_step}[of]
    train_on, batches = (
        build(config.model_args(), device, compile, dtype),
        random_batches(config, device),
    )

    def step() -> int:
        train_on(*next(batches))
        return config.batch_size * config.max_seq_len

    return step


def ceiling(device: str, dtype: str, size: int):
    """The device's own matrix product, the most that any training step could do."""
    torch.set_float32_matmul_precision("high")
    left, right = torch.randn(2, size, size, device=device, dtype=getattr(torch, dtype))
    out = torch.empty_like(left)

    def step() -> int:
        torch.mm(left, right, out=out)
        return 2 * size**3

    return step


def random_batches(config, device: str):
    """Batches of tokens drawn beforehand: reading them costs nothing."""
    draw = torch.Generator().manual_seed(0)
    shape = (8, 2, config.batch_size, config.max_seq_len)
    batches = torch.randint(config.vocab_size, shape, generator=draw).to(device)
    while True:
        yield from (batch.unbind() for batch in batches)


def options_of(
    preset: str, device: str, batch_size: int, max_seq_len: int | None = None
) -> list[str]:
    """The preset's options for a step of one micro-batch, without dropout, which peers do not have."""
    options = [*PRESETS[preset], "--dropout=0", "--gradient_accumulation_steps=1"]
    options += [f"--max_seq_len={max_seq_len}"] if max_seq_len else []
    length = configure(train.TrainConfig, options)[0].max_seq_len
    return [
        *options,
        f"--batch_size={batch_size or max(1, TOKENS[device.partition(':')[0]] // length)}",
    ]


def ceilings(device: str) -> list[Variant]:
    size = 8192 if device.startswith("cuda") else 2048
    kinds = dict.fromkeys(["float32", pick_dtype("auto", device)])
    names = {"float32": "TF32"} if device.startswith("cuda") else {}
    arguments = dict(device=device, size=size)
    return [
        Variant(f"ceiling {names.get(dtype, dtype)}", ceiling, arguments | dict(dtype=dtype))
        for dtype in kinds
    ]


def train_variants(options: list[str], device: str) -> list[Variant]:
    """Plain is float32 as it is on a CPU, and bfloat16 and compiled on a GPU."""
    on_gpu, both, best = (
        device.startswith("cuda"),
        dict(options=options, device=device),
        pick_dtype("auto", device),
    )
    textbook = both | dict(compile=on_gpu, dtype=best if on_gpu else "float32")
    variants = [Variant("plain", plain, textbook)]
    if not on_gpu:
        variants.append(Variant("plain, compiled", plain, textbook | dict(compile=True)))
        if best != "float32":
            variants.append(
                Variant(
                    f"plain, compiled, {best}", plain, textbook | dict(compile=True, dtype=best)
                )
            )
    if find_spec("transformers"):
        variants.append(Variant("transformers", plain, textbook | dict(of="transformers")))
    return [*variants, Variant("ours", ours, both)]


def run_train(config: TrainBench):
    device = pick_device(config.device)
    records = []
    print(machine(device))
    for preset in PRESETS if config.preset == "all" else [config.preset]:
        options = options_of(preset, device, config.batch_size)
        measured = measure(
            train_variants(options, device) + ceilings(device), config.rounds, config.seconds
        )
        records += report(preset, options, device, measured)
        write_records(config.json, records)


def report(
    preset: str, options: list[str], device: str, measured: dict[str, Measured]
) -> list[dict]:
    """Print a preset's table; returns its records."""
    settings, _ = configure(train.TrainConfig, options)
    args, length = settings.model_args(), settings.max_seq_len
    most = {
        name.removeprefix("ceiling "): figures.rate
        for name, figures in measured.items()
        if "ceiling" in name
    }
    known = peak_flops(device)
    share_of, share = (known, "MFU") if known else (max(most.values()), "of ceiling")
    products = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s {dtype}" for dtype, rate in most.items())
    print(f"\n{preset}: {count(args)} parameters, vocabulary {args.vocab_size}, ", end="")
    print(f"micro-batch {settings.batch_size} x {length} tokens; matrix products: {products}\n")
    print(
        f"| variant | tokens/s | x plain | spread | peak memory | {share} |\n|---|---:|---:|---:|---:|---:|"
    )
    records = []
    for name, figures in measured.items():
        if "ceiling" in name:
            continue
        ratios = [
            mine / base for mine, base in zip(figures.rates, measured["plain"].rates, strict=True)
        ]
        ratio, spread = statistics.median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"
        used = figures.rate * flops_per_token(args, length) / share_of
        memory = f"{figures.peak_memory / 2**20:,.0f} MB"
        print(
            f"| {name} | {figures.rate:,.0f} | {ratio:.2f} | {spread} | {memory} | {used:.0%} |",
            flush=True,
        )
        records.append({
            "preset": preset, "variant": name, "tokens_per_second": figures.rate, "ratio_to_plain": ratio,
            "peak_memory_bytes": figures.peak_memory, "ratio_min": min(ratios), "ratio_max": max(ratios),
            "share_of_ceiling": used, "batch_size": settings.batch_size, "max_seq_len": length, "device": device,
        })  # fmt: skip
    return records


def count(args) -> str:
    number = Transformer.on_meta(args).num_parameters()
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number / 1e3:.0f}K"


def machine(device: str) -> str:
    """What this was measured on, in a line."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()
    return f"{device}: {name}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, {platform.system()}"


def cpu_name() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            fields = dict(line.split(":", 1) for line in lines if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        name = fields.get("model name", platform.machine())
        kinds = [
            kind
            for kind in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
            if kind in fields.get("flags", "")
        ]
        return f"{name} (family {fields.get('cpu family')}, model {fields.get('model')}; {' '.join(kinds)})"
    return platform.processor() or platform.machine()


COSTS = [  # (preset, sequence length, sequences in a micro-batch, processes, and how they share the model)
    *((preset, 256, 8, 1) for preset in PRESETS),
    *(("15M", length, 2048 // length or 1, 1) for length in (512, 1024, 2048, 4096)),
    ("15M", 256, 1, 1),
    ("15M", 256, 32, 1),
    ("15M-32000", 256, 32, 1),
    ("110M", 1024, 2, 1),
    ("15M", 256, 4, 2),
    ("110M", 256, 4, 2),
    ("110M", 256, 2, 4),
    ("110M", 256, 4, 2, "fsdp"),
    ("110M", 256, 2, 4, "fsdp"),
]


def run_cost(config: CostBench):
    device, records = pick_device(config.device), []
    print(machine(device))
    print(
        "\n| preset | length | sequences | processes | | tokens/s | of ceiling | peak memory of a process |"
    )
    print("|---|---:|---:|---:|---|---:|---:|---:|")
    for preset, length, batch, processes, *parallel in COSTS:
        lacks_gpus = device.startswith("cuda") and processes > torch.cuda.device_count()
        if lacks_gpus or config.preset not in ("all", preset):
            continue
        parallel = parallel[0] if parallel else "ddp"
        options = [
            *options_of(preset, device, batch, length),
            f"--gradient_accumulation_steps={processes}",
        ]
        options += [f"--parallel={parallel}", f"--compile={config.compile}"]
        variant = Variant(preset, ours, dict(options=options, device=device), processes)
        measured = measure([variant, ceilings(device)[-1]], config.rounds, config.seconds)
        figures, most = measured.values()
        args = configure(train.TrainConfig, options)[0].model_args()
        used = figures.rate * flops_per_token(args, length) / (peak_flops(device) or most.rate)
        print(
            f"| {preset} | {length} | {batch} | {processes} | {parallel if processes > 1 else ''} "
            f"| {figures.rate:,.0f} | {used:.0%} "
            f"| {figures.peak_memory / 2**20:,.0f} MB |",
            flush=True,
        )
        records.append({
            "preset": preset, "max_seq_len": length, "batch_size": batch, "processes": processes,
            "parallel": parallel,
            "tokens_per_second": figures.rate, "share_of_ceiling": used, "peak_memory_bytes": figures.peak_memory,
        })  # fmt: skip
        write_records(config.json, records)


def write_records(path: str, records: list[dict]):
    if path:
        write_atomically(path, (json.dumps(records, indent=1) + "\n").encode())


def run_save(config: SaveBench):
    device = pick_device(config.device)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        options = options_of(config.preset, device, 0)
        rates = saving(options, device, folder, config.checkpoint_interval, config.rounds)
    ratios = [mine / base for mine, base in zip(rates[True], rates[False], strict=True)]
    ratio, spread = statistics.median(ratios), f"{min(ratios):.3f} to {max(ratios):.3f}"
    without, with_one = (statistics.median(rates[saves]) for saves in (False, True))
    print(
        f"{machine(device)}\n\n| {config.preset} | tokens/s | x without | spread |\n|---|---:|---:|---:|"
    )
    print(f"| no checkpoints | {without:,.0f} | 1 | |")
    print(
        f"| one in {config.checkpoint_interval} steps | {with_one:,.0f} | {ratio:.3f} | {spread} |"
    )
    write_records(config.json, [{
        "preset": config.preset, "checkpoint_interval": config.checkpoint_interval, "tokens_per_second": with_one,
        "ratio": ratio, "ratio_min": min(ratios), "ratio_max": max(ratios),
    }])  # fmt: skip


def run_data(config: bench_data.DataBench):
    print(machine("cpu"))
    records = bench_data.pretokenizing(config)
    variant = Variant("15M", ours, dict(options=options_of("15M", "cpu", 8), device="cpu"))
    step = 8 * 256 / measure([variant], rounds=3, seconds=4.0)["15M"].rate
    records += bench_data.sampling(config, batch_size=8, seq_len=256, step_seconds=step)
    write_records(config.json, records)


def run_sample(config: bench_sample.SampleBench):
    device, records = pick_device(config.device), []
    print(machine(device))
    for name, package in bench_sample.PACKAGES.items():
        if not find_spec(package):
            print(f"note: {name} is left out, as {package} is not installed")
    sizes = [f"--vocab_size={bench_sample.VOCAB_SIZE}", f"--max_seq_len={bench_sample.CONTEXT}"]
    for preset in ("15M", "42M", "110M") if config.preset == "all" else (config.preset,):
        settings, _ = configure(train.TrainConfig, [*PRESETS[preset], *sizes])
        for measured in bench_sample.decoding(config, preset, settings.model_args(), device):
            records += measured
            write_records(config.json, records)


BENCHES = {
    "train": (TrainBench, run_train),
    "cost": (CostBench, run_cost),
    "save": (SaveBench, run_save),
    "data": (bench_data.DataBench, run_data),
    "sample": (bench_sample.SampleBench, run_sample),
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    which = argv[0] if argv else "--help"
    if which in ("-h", "--help"):
        return print(__doc__.strip())
    if which not in BENCHES:
        exit_with_errors(
            f"{which}: what to measure must come first and be one of {', '.join(BENCHES)}"
        )
    config_class, run = BENCHES[which]
    config, _ = configure(config_class, argv[1:], program=f"bench.py {which}")
    run(config)


if __name__ == "__main__":
    run_main(main)
