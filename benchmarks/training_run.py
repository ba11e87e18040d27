"""
cria's training run with random tokens: all that the benchmarks use of train.py and training/.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch.nn.parallel import DistributedDataParallel

import train
from configurator import configure
from model import iter_initial_weights
from runtime.device import disable_malloc_trim
from runtime.distributed import init_distributed
from textdata.token_shards import TokenDataset
from training.compile import maybe_compile
from training.parallel import is_sharded, load_weights
from training.setup import Data, build_components, save_state
from training.state import TrainingRun

CONFIGS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "config")
PRESETS = {
    "260K": [f"{CONFIGS}/stories260K.py"],
    "15M": [f"{CONFIGS}/stories15M.py"],
    "15M-32000": [f"{CONFIGS}/stories15M.py", "--vocab_size=32000"],
    "42M": [f"{CONFIGS}/stories42M.py"],
    "110M": [f"{CONFIGS}/stories110M.py"],
}
MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768, "mps": 8192}
NUM_BATCHES = 8  # different ones, repeated

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


class EmptyTokenizer:
    """All that a run uses of its tokenizer when the tokens are random."""

    files: ClassVar[dict[str, bytes]] = {}
    hash = ""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def to_bin(self) -> bytes:
        """An empty file, so that model.bin is written as in a run with a vocabulary."""
        return b""


class BenchmarkRun(NamedTuple):
    """A training run, and the module that its forward pass calls."""

    run: TrainingRun
    forward: torch.nn.Module


def read_config(options: list[str]) -> train.TrainConfig:
    """The config of train.py for these command-line arguments."""
    return configure(train.TrainConfig, options)[0]


def preset_options(
    preset: str, device: str, batch_size: int, max_seq_len: int | None = None
) -> list[str]:
    """The preset's arguments for a step of one micro-batch, without dropout, because the baselines
    have none. batch_size 0: as many sequences as MICRO_BATCH_TOKENS allows."""
    options = [*PRESETS[preset], "--dropout=0", "--gradient_accumulation_steps=1"]
    if max_seq_len:
        options.append(f"--max_seq_len={max_seq_len}")
    tokens, length = MICRO_BATCH_TOKENS[device.partition(":")[0]], read_config(options).max_seq_len
    return [*options, f"--batch_size={batch_size or max(1, tokens // length)}"]


def random_batches(config: train.TrainConfig, device: str) -> Batches:
    """Endless (inputs, targets), each (batch_size, max_seq_len), of tokens drawn in advance."""
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_BATCHES, 2, config.batch_size, config.max_seq_len)
    batches = torch.randint(config.vocab_size, shape, generator=generator).to(device)
    while True:
        for batch in batches:
            inputs, targets = batch.unbind()
            yield inputs, targets


def build_run(options: list[str], device: str) -> BenchmarkRun:
    """A new run of train.py with these arguments, compiled and distributed as they ask."""
    config = read_config(options)
    dist_ctx, device = init_distributed(device)
    disable_malloc_trim()
    torch.manual_seed(0)
    no_dataset = cast(TokenDataset, ())  # has no windows
    data = Data(cast(Any, EmptyTokenizer(config.vocab_size)), no_dataset, no_dataset)
    run = build_components(config, dist_ctx, device, data, config.model_args())
    load_weights(run.model, iter_initial_weights(config.model_args()))
    forward = maybe_compile(run)
    if dist_ctx.size > 1 and not is_sharded(run.model):
        forward = DistributedDataParallel(forward, gradient_as_bucket_view=True)
    return BenchmarkRun(run, forward)


def step_function(benchmark_run: BenchmarkRun) -> Callable[[], int]:
    """A function that trains one step and returns the number of tokens over all processes."""
    run, forward = benchmark_run
    batches = random_batches(run.config, run.device)

    def step() -> int:
        train.training_step(run, forward, batches)
        run.state.iter_num += 1
        return run.config.sequences_per_step * run.config.max_seq_len

    return step


def cria_step(options: list[str], device: str) -> Callable[[], int]:
    """A variant's step(): cria's training step as train.py runs it."""
    return step_function(build_run(options, device))


def prepare_out_dir(run: TrainingRun) -> None:
    """Write the files that every output folder has. A save would write them otherwise."""
    run.checkpoints.write_run_files()


def start_saving(run: TrainingRun) -> None:
    """Start writing a checkpoint in the background."""
    save_state(run, best=False)


def finish_saving(run: TrainingRun) -> None:
    """Wait until the checkpoint is written."""
    run.checkpoints.flush()
