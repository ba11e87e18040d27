"""
The table of docs/scaling.md, from what this machine measures and a few assumptions:

    python -m benchmarks.scaling
"""

import json
import math
import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from checkpoints.file import content_hash, save_checkpoint, write_model_args
from checkpoints.snapshot import snapshot
from model import ModelArgs, Transformer, flops_per_token
from ops.cross_entropy import CHUNK_ELEMENTS
from runtime.atomic_files import write_atomically
from runtime.device import autocast, disable_malloc_trim
from textdata.loader import epoch_index
from textdata.token_shards import TokenDataset

# The model: Llama 3.2 1B's shape.
ARGS = ModelArgs(
    dim=2048,
    n_layers=16,
    n_heads=32,
    n_kv_heads=8,
    vocab_size=128256,
    hidden_dim=8192,
    rope_theta=500000.0,
    max_seq_len=2048,
)
TOKENS = 10**12
NODES = 64
GPUS_PER_NODE = 8
MICRO_BATCH = 4  # sequences
GPUS = NODES * GPUS_PER_NODE
STEP_TOKENS = GPUS * MICRO_BATCH * ARGS.max_seq_len

# Assumed, not measured here: H100s (80 GB, 989 TFLOP/s in bfloat16) with an MFU of 40%, as in the
# published runs of nanochat and torchtitan; 8 network cards of 50 GB/s per node; a shared disk of
# 2 GB/s; failures as often as in Llama 3's training: 466 in 54 days of 16,384 GPUs
# (arXiv 2407.21783).
FLOPS = 989e12 * 0.4
NETWORK = 8 * 50e9  # bytes per second into and out of a node
DISK = 2e9
GPU_HOURS_PER_FAILURE = 54 * 24 * 16384 / 466

SHARD_TOKENS = 10**11  # of the sparse file in measure_data
NUM_WINDOWS = 2000  # read in measure_data


class Row(NamedTuple):
    """A row of the table."""

    name: str
    figure: str
    source: str = ""


class CheckpointCosts(NamedTuple):
    """The cost of a checkpoint, measured with a model of 15M parameters and its moments."""

    bytes_per_parameter: float
    copy: float  # bytes per second, as the next two
    hash: float
    write: float


class DataCosts(NamedTuple):
    """The cost of reading tokens, measured on a sparse shard of 400 GB."""

    memory: float  # MB that opening and reading the shard takes
    window_ms: float  # to find, read and check one window


def timed(action: Callable[[], object]) -> float:
    """The seconds that action() takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def activation_bytes() -> int:
    """Bytes that a block saves per sequence for its backward pass. The 16-bit weights are saved
    once for any batch size; the difference of two batches removes them."""
    return saved_bytes(sequences=2) - saved_bytes(sequences=1)


def saved_bytes(sequences: int) -> int:
    """Bytes that a model of one block saves for its backward pass."""
    model = Transformer(replace(ARGS, n_layers=1, vocab_size=64))
    storages: dict[int, torch.UntypedStorage] = {}  # referenced, so that no address is reused

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    inputs = torch.zeros(sequences, ARGS.max_seq_len, dtype=torch.int64)
    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    with hooks, autocast("cpu", "bfloat16"):
        model.forward_hidden(inputs)
    return sum(storage.nbytes() for storage in storages.values())


def measure_checkpoint() -> CheckpointCosts:
    """Measure the parts of saving a checkpoint."""
    model = Transformer(ModelArgs(vocab_size=32000))
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    model(tokens, tokens)[1].backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "iter_num": 1,
        "model_args": write_model_args(model.args),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "ckpt.pt")
        for _ in range(2):  # the second time counts
            copy = timed(lambda: snapshot(state))
            hashing = timed(lambda: content_hash(state))
            write = timed(lambda: save_checkpoint(path, state))
        size = os.path.getsize(path)
    return CheckpointCosts(size / model.num_parameters(), size / copy, size / hashing, size / write)


def measure_data() -> DataCosts:
    """Measure opening a sparse shard of 400 GB and reading windows of it."""
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "data.bin"), "wb") as file:
            file.truncate(4 * SHARD_TOKENS)
        shard = {
            "file": "data.bin",
            "tokens": SHARD_TOKENS,
            "train": [0, SHARD_TOKENS],
            "val": [SHARD_TOKENS, SHARD_TOKENS],
        }
        meta = {
            "dtype": "<u4",
            "vocab_size": ARGS.vocab_size,
            "tokenizer_hash": "none",
            "complete": True,
            "shards": [shard],
        }
        write_atomically(os.path.join(folder, "meta.json"), json.dumps(meta).encode())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        dataset = TokenDataset(folder, "train", ARGS.max_seq_len)

        def read_windows() -> None:
            for position in range(NUM_WINDOWS):
                dataset[epoch_index(position, len(dataset), 1337)]

        seconds = timed(read_windows)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return DataCosts((after - before) / 1024, seconds / NUM_WINDOWS * 1e3)


def size_rows(parameters: int) -> list[Row]:
    """Parameters, operations, steps and time."""
    flops = flops_per_token(ARGS, ARGS.max_seq_len)
    batch = f"{GPUS} GPUs x {MICRO_BATCH} x {ARGS.max_seq_len}"
    seconds = flops / GPUS / FLOPS  # per token
    return [
        Row("parameters", f"{parameters / 1e9:.3f} G", "counted"),
        Row(
            "operations a token, 2,048 of context", f"{flops / 1e9:.2f} GFLOP", "`flops_per_token`"
        ),
        Row("tokens a step", f"{STEP_TOKENS / 1e6:.1f} M", batch),
        Row("steps", f"{TOKENS / STEP_TOKENS:,.0f}"),
        Row("a step, of products alone", f"{STEP_TOKENS * seconds:.2f} s", "assumed rate"),
        Row("the whole", f"{TOKENS * seconds / 3600:.1f} h"),
    ]


def memory_rows(parameters: int, saved: int) -> list[Row]:
    """Memory of one GPU. saved: bytes that a block saves per sequence."""
    blocks = saved * ARGS.n_layers * MICRO_BATCH
    between = 4 * ARGS.dim * ARGS.max_seq_len * ARGS.n_layers * MICRO_BATCH  # blocks, in float32
    recomputed = between + saved * MICRO_BATCH
    logits = 3 * 4 * CHUNK_ELEMENTS
    state = 16 * parameters
    return [
        Row(
            "weights, gradients and moments in float32",
            f"{state / 1e9:.1f} GB a GPU",
            "16 bytes a parameter",
        ),
        Row(
            "the same, sharded over all GPUs",
            f"{state / GPUS / 1e6:.0f} MB a GPU",
            "`--parallel=fsdp`",
        ),
        Row("saved of one sequence by one block", f"{saved / 1e6:.0f} MB", "measured"),
        Row("activations", f"{blocks / 1e9:.1f} GB", f"x {ARGS.n_layers} blocks x {MICRO_BATCH}"),
        Row(
            "with `--activation_checkpointing`",
            f"{recomputed / 1e9:.1f} GB",
            "between blocks, and one",
        ),
        Row("logits", f"{logits / 1e9:.1f} GB", "of a chunk, its exponential, its gradient"),
    ]


def network_rows(parameters: int) -> list[Row]:
    """Traffic of one node."""
    ddp, fsdp = 2 * 4 * parameters, (2 * 2 + 4) * parameters
    return [
        Row(
            "into a node a step, ddp",
            f"{ddp / 1e9:.1f} GB",
            "a ring: float32 gradients, twice",
        ),
        Row(
            "into a node a step, fsdp",
            f"{fsdp / 1e9:.1f} GB",
            "weights in 16 bits twice, then gradients",
        ),
        Row(
            "either takes",
            f"{ddp / NETWORK:.3f} s",
            "assumed network, most of it beside the products",
        ),
    ]


def checkpoint_rows(parameters: int, costs: CheckpointCosts) -> list[Row]:
    """Sizes and times of a checkpoint, and how often to write one."""
    size = costs.bytes_per_parameter * parameters
    between_failures = GPU_HOURS_PER_FAILURE / GPUS * 3600  # seconds
    young = math.sqrt(2 * size / costs.copy * between_failures)
    in_background = "measured: in the background"
    return [
        Row("bytes of a parameter in ckpt.pt", f"{costs.bytes_per_parameter:.2f}", "measured"),
        Row("a checkpoint", f"{size / 1e9:.1f} GB"),
        Row("to copy it", f"{size / costs.copy:.0f} s", "measured: training waits"),
        Row("to hash it", f"{size / costs.hash:.0f} s", in_background),
        Row(
            "to hash, write and flush it on this machine",
            f"{size / costs.write:.0f} s",
            in_background,
        ),
        Row("to write it", f"{size / DISK:.0f} s", "assumed disk, in the background"),
        Row(
            "one process's shard (fsdp)",
            f"{size / GPUS / 1e6:.0f} MB",
            "copied and hashed in a moment",
        ),
        Row(
            "to read it on all machines",
            f"{NODES * size / DISK / 60:.0f} min",
            "assumed disk, once a machine",
        ),
        Row("hours between failures", f"{between_failures / 3600:.0f}", "assumed rate"),
        Row(
            "between checkpoints, by Young's rule",
            f"{young / 60:.0f} min",
            "root of 2 x copying x failures apart",
        ),
    ]


def data_rows(costs: DataCosts) -> list[Row]:
    """Size of the data and time to read it."""
    step_ms = costs.window_ms * MICRO_BATCH
    return [
        Row(
            "tokens on the disk",
            f"{4 * TOKENS / 1e12:.0f} TB",
            "uint32, as the vocabulary is above 65,536",
        ),
        Row(
            "memory to open and read 400 GB of tokens",
            f"{max(0.0, costs.memory):.0f} MB",
            "measured",
        ),
        Row("to find, read and check a window", f"{costs.window_ms:.2f} ms", "measured"),
        Row("a process's reading a step", f"{step_ms:.1f} ms", "in a thread, in advance"),
    ]


def main() -> None:
    """Measure and print the table."""
    disable_malloc_trim()  # as training does
    data, checkpoint, saved = measure_data(), measure_checkpoint(), activation_bytes()
    parameters = Transformer.on_meta(ARGS).num_parameters()
    rows = size_rows(parameters) + memory_rows(parameters, saved) + network_rows(parameters)
    rows += checkpoint_rows(parameters, checkpoint) + data_rows(data)
    print("| what | figure | from |\n|---|---:|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
