"""
The speed and memory of cria's training step, the baselines and the device's matrix products.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch

from benchmarks import baselines
from benchmarks.timing import Measurement, Variant, measure
from benchmarks.training_run import cria_step, preset_options, random_batches, read_config
from model import flops_per_token
from runtime.device import DTYPES, peak_flops, pick_dtype

BASELINE = "baseline"
MATMUL = "matmul "  # prefix of the names of matrix products, before their dtype
BASELINE_STEPS = {
    "baseline": baselines.baseline_step,
    "transformers": baselines.transformers_step,
}


class CostSetting(NamedTuple):
    """One row of the cost benchmark."""

    preset: str
    max_seq_len: int = 256
    batch_size: int = 8  # sequences in a micro-batch
    processes: int = 1
    parallel: str = "ddp"


COST_SETTINGS = (
    CostSetting("260K"),
    CostSetting("15M"),
    CostSetting("15M-32000"),
    CostSetting("42M"),
    CostSetting("110M"),
    CostSetting("15M", max_seq_len=512, batch_size=4),
    CostSetting("15M", max_seq_len=1024, batch_size=2),
    CostSetting("15M", max_seq_len=2048, batch_size=1),
    CostSetting("15M", max_seq_len=4096, batch_size=1),
    CostSetting("15M", batch_size=1),
    CostSetting("15M", batch_size=32),
    CostSetting("15M-32000", batch_size=32),
    CostSetting("110M", max_seq_len=1024, batch_size=2),
    CostSetting("15M", batch_size=4, processes=2),
    CostSetting("110M", batch_size=4, processes=2),
    CostSetting("110M", batch_size=2, processes=4),
    CostSetting("110M", batch_size=4, processes=2, parallel="fsdp"),
    CostSetting("110M", batch_size=2, processes=4, parallel="fsdp"),
)


class Cost(NamedTuple):
    """What a training step costs."""

    tokens_per_second: float
    peak_memory: int  # bytes, of one process
    utilization: float  # of the device's peak, or of its fastest matrix product


def baseline_step(
    options: list[str], device: str, compile: bool, dtype: str, name: str = BASELINE
) -> Callable[[], int]:
    """A variant's step(): one micro-batch through the textbook loop of benchmarks/baselines.py."""
    config = read_config(options)
    train_on = BASELINE_STEPS[name](config.model_args(), device, compile, dtype)
    batches = random_batches(config, device)

    def step() -> int:
        train_on(*next(batches))
        return config.batch_size * config.max_seq_len

    return step


def matmul_step(device: str, dtype: str, size: int) -> Callable[[], int]:
    """A variant's step(): one (size, size) matrix product, an upper bound for any training step.
    Returns floating-point operations."""
    torch.set_float32_matmul_precision("high")
    left, right = torch.randn(2, size, size, device=device, dtype=DTYPES[dtype])
    out = torch.empty_like(left)

    def step() -> int:
        torch.mm(left, right, out=out)
        return 2 * size**3

    return step


def matmul_variants(device: str) -> list[Variant]:
    """Matrix products in float32 and in the dtype of --dtype=auto, which comes last."""
    on_gpu = device.startswith("cuda")
    variants = []
    for dtype in dict.fromkeys(["float32", pick_dtype("auto", device)]):
        name = "TF32" if on_gpu and dtype == "float32" else dtype
        arguments = {"device": device, "dtype": dtype, "size": 8192 if on_gpu else 2048}
        variants.append(Variant(MATMUL + name, matmul_step, arguments))
    return variants


def training_variants(options: list[str], device: str) -> list[Variant]:
    """The training steps to compare. The baseline is float32 and eager on a CPU, bfloat16 and
    compiled on a GPU."""
    on_gpu = device.startswith("cuda")
    best_dtype = pick_dtype("auto", device)
    common = {"options": options, "device": device}
    textbook = common | {"compile": on_gpu, "dtype": best_dtype if on_gpu else "float32"}
    variant = partial(Variant, build=baseline_step)
    variants = [variant(BASELINE, arguments=textbook)]
    if not on_gpu:
        compiled = textbook | {"compile": True}
        variants.append(variant("baseline, compiled", arguments=compiled))
        if best_dtype != "float32":
            arguments = compiled | {"dtype": best_dtype}
            variants.append(variant(f"baseline, compiled, {best_dtype}", arguments=arguments))
    if find_spec("transformers"):
        variants.append(variant("transformers", arguments=textbook | {"name": "transformers"}))
    return [*variants, Variant("cria", cria_step, common)]


def utilization(options: list[str], device: str, tokens_per_second: float, matmul: float) -> float:
    """Useful floating-point operations per second, as a fraction of the device's peak if that is
    known (MFU), else of its fastest matrix product (matmul, FLOP/s)."""
    config = read_config(options)
    flops = tokens_per_second * flops_per_token(config.model_args(), config.max_seq_len)
    return flops / (peak_flops(device) or matmul)


def split_matmul(
    measurements: dict[str, Measurement],
) -> tuple[dict[str, Measurement], dict[str, float]]:
    """The training steps, and the matrix products' FLOP/s by dtype."""
    steps = {}
    products = {}
    for name, measurement in measurements.items():
        if name.startswith(MATMUL):
            products[name.removeprefix(MATMUL)] = measurement.rate
        else:
            steps[name] = measurement
    return steps, products


def measure_cost(
    setting: CostSetting, device: str, compile: bool, rounds: int, seconds: float
) -> Cost:
    """Measure cria's training step in one setting."""
    options = preset_options(setting.preset, device, setting.batch_size, setting.max_seq_len)
    options.append(f"--gradient_accumulation_steps={setting.processes}")
    options += [f"--parallel={setting.parallel}", f"--compile={compile}"]
    arguments = {"options": options, "device": device}
    variant = Variant(setting.preset, cria_step, arguments, setting.processes)
    step, matmul = measure([variant, matmul_variants(device)[-1]], rounds, seconds).values()
    fraction = utilization(options, device, step.rate, matmul.rate)
    return Cost(step.rate, step.peak_memory, fraction)
