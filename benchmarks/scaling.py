"""
The figures of docs/scaling.md, from what this machine measures and a few assumptions:

    python -m docs.scaling
"""

import json
import math
import os
import resource
import tempfile
import time

import torch

from checkpoints.file import content_hash, save_checkpoint, write_model_args
from checkpoints.manager import snapshot
from model import ModelArgs, Transformer, flops_per_token
from ops.cross_entropy import CHUNK_ELEMENTS
from runtime.atomic_files import write_atomically
from runtime.device import autocast, disable_malloc_trim
from textdata.loader import epoch_index
from textdata.token_shards import TokenDataset

# The model: Llama 3.2 1B's shape.
ARGS = ModelArgs(
    2048, 16, 32, 8, vocab_size=128256, hidden_dim=8192, rope_theta=500000.0, max_seq_len=2048
)
TOKENS = 10**12
NODES, GPUS_A_NODE = 64, 8
MICRO_BATCH = 4  # sequences
GPUS = NODES * GPUS_A_NODE
STEP_TOKENS = GPUS * MICRO_BATCH * ARGS.max_seq_len
PARAMETERS = Transformer.on_meta(ARGS).num_parameters()

# Assumed, not measured here: H100s (80 GB, 989 TFLOP/s in bfloat16) of which training gets 40%, as
# nanochat's and torchtitan's published runs do; 8 network cards of 50 GB/s a node; a shared disk that
# takes 2 GB/s; interruptions as often as in Llama 3's training, 466 in 54 days of 16,384 GPUs (arXiv 2407.21783).
FLOPS = 989e12 * 0.4
NETWORK = 8 * 50e9  # bytes a second in and out of a node
DISK = 2e9
GPU_HOURS_A_FAILURE = 54 * 24 * 16384 / 466


def timed(action) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def activation_bytes() -> int:
    """What one block keeps of one sequence for its backward pass."""
    return kept_bytes(sequences=2) - kept_bytes(
        sequences=1
    )  # weights in 16 bits are kept once, whatever the batch


def kept_bytes(sequences: int) -> int:
    kept, model = {}, Transformer(ModelArgs(**vars(ARGS) | dict(n_layers=1, vocab_size=64)))

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (
            storage.nbytes(),
            tensor,
        )  # held, so that no other takes its place
        return tensor

    inputs = torch.zeros(sequences, ARGS.max_seq_len, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        autocast("cpu", "bfloat16"),
    ):
        model.forward_hidden(inputs)
    return sum(size for size, _ in kept.values())


def checkpoint_costs() -> dict:
    """Of 15M parameters with their moments: bytes of a parameter, and bytes a second of each part of saving."""
    model = Transformer(ModelArgs(vocab_size=32000))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64))[1].backward()
    optimizer.step()
    state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), iter_num=1)
    state["model_args"] = write_model_args(model.args)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "ckpt.pt")
        times = {}
        for _ in range(2):  # the second time counts
            times["copy"] = timed(lambda: snapshot(state))
            times["hash"] = timed(lambda: content_hash(state))
            times["write"] = timed(lambda: save_checkpoint(path, state))
        size = os.path.getsize(path)
    return {"bytes of a parameter": size / model.num_parameters()} | {
        n: size / took for n, took in times.items()
    }


def data_costs() -> dict:
    """Of a shard of 400 GB, all hole: the memory that opening and reading it takes, the time of a window."""
    windows_read, tokens = 2000, 10**11
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "data.bin"), "wb") as file:
            file.truncate(4 * tokens)
        shards = [
            {"file": "data.bin", "tokens": tokens, "train": [0, tokens], "val": [tokens, tokens]}
        ]
        meta = {
            "dtype": "<u4",
            "vocab_size": ARGS.vocab_size,
            "tokenizer_hash": "none",
            "complete": True,
            "shards": shards,
        }
        write_atomically(os.path.join(folder, "meta.json"), json.dumps(meta).encode())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        windows = TokenDataset(folder, "train", ARGS.max_seq_len)
        read = lambda position: windows[epoch_index(position, len(windows), 1337)]
        took = timed(lambda: [read(position) for position in range(windows_read)])
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"MB more memory": (after - before) / 1024, "ms a window": took / windows_read * 1e3}


def size_rows() -> list[tuple]:
    flops = flops_per_token(ARGS, ARGS.max_seq_len)
    return [
        ("parameters", f"{PARAMETERS / 1e9:.3f} G", "counted"),
        ("operations a token, 2,048 of context", f"{flops / 1e9:.2f} GFLOP", "`flops_per_token`"),
        (
            "tokens a step",
            f"{STEP_TOKENS / 1e6:.1f} M",
            f"{GPUS} GPUs x {MICRO_BATCH} x {ARGS.max_seq_len}",
        ),
        ("steps", f"{TOKENS / STEP_TOKENS:,.0f}", ""),
        (
            "a step, of products alone",
            f"{STEP_TOKENS * flops / GPUS / FLOPS:.2f} s",
            "assumed rate",
        ),
        ("the whole", f"{TOKENS * flops / GPUS / FLOPS / 3600:.1f} h", ""),
    ]


def memory_rows(kept: int) -> list[tuple]:
    blocks = kept * ARGS.n_layers * MICRO_BATCH
    between = 4 * ARGS.dim * ARGS.max_seq_len * ARGS.n_layers * MICRO_BATCH  # blocks, in float32
    logits = 3 * 4 * CHUNK_ELEMENTS
    return [
        (
            "weights, gradients and moments in float32",
            f"{16 * PARAMETERS / 1e9:.1f} GB a GPU",
            "16 bytes a parameter",
        ),
        (
            "the same, shared among all GPUs",
            f"{16 * PARAMETERS / GPUS / 1e6:.0f} MB a GPU",
            "`--parallel=fsdp`",
        ),
        ("kept of one sequence by one block", f"{kept / 1e6:.0f} MB", "measured"),
        ("activations", f"{blocks / 1e9:.1f} GB", f"x {ARGS.n_layers} blocks x {MICRO_BATCH}"),
        (
            "with `--activation_checkpointing`",
            f"{(between + kept * MICRO_BATCH) / 1e9:.1f} GB",
            "between blocks, and one",
        ),
        ("logits", f"{logits / 1e9:.1f} GB", "of a chunk, its exponential, its gradient"),
    ]


def network_rows() -> list[tuple]:
    ddp, fsdp = 2 * 4 * PARAMETERS, (2 * 2 + 4) * PARAMETERS
    return [
        ("into a node a step, ddp", f"{ddp / 1e9:.1f} GB", "a ring: float32 gradients, twice"),
        (
            "into a node a step, fsdp",
            f"{fsdp / 1e9:.1f} GB",
            "weights in 16 bits twice, then gradients",
        ),
        (
            "either takes",
            f"{ddp / NETWORK:.3f} s",
            "assumed network, most of it beside the products",
        ),
    ]


def checkpoint_rows(costs: dict) -> list[tuple]:
    size = costs["bytes of a parameter"] * PARAMETERS
    between_failures = GPU_HOURS_A_FAILURE / GPUS * 3600  # seconds
    young = math.sqrt(2 * size / costs["copy"] * between_failures)
    return [
        ("bytes of a parameter in ckpt.pt", f"{costs['bytes of a parameter']:.2f}", "measured"),
        ("a checkpoint", f"{size / 1e9:.1f} GB", ""),
        ("to copy it", f"{size / costs['copy']:.0f} s", "measured: training waits"),
        ("to hash it", f"{size / costs['hash']:.0f} s", "measured: in the background"),
        (
            "to hash, write and flush it on this machine",
            f"{size / costs['write']:.0f} s",
            "measured: in the background",
        ),
        ("to write it", f"{size / DISK:.0f} s", "assumed disk, in the background"),
        (
            "one process's share (fsdp)",
            f"{size / GPUS / 1e6:.0f} MB",
            "copied and hashed in a moment",
        ),
        (
            "to read it on all machines",
            f"{NODES * size / DISK / 60:.0f} min",
            "assumed disk, once a machine",
        ),
        ("hours between failures", f"{between_failures / 3600:.0f}", "assumed rate"),
        (
            "between checkpoints, by Young's rule",
            f"{young / 60:.0f} min",
            "root of 2 x copying x failures apart",
        ),
    ]


def data_rows(data: dict) -> list[tuple]:
    return [
        (
            "tokens on the disk",
            f"{4 * TOKENS / 1e12:.0f} TB",
            "uint32, as the vocabulary is above 65,536",
        ),
        (
            "memory to open and read 400 GB of tokens",
            f"{max(0.0, data['MB more memory']):.0f} MB",
            "measured",
        ),
        ("to place, read and check a window", f"{data['ms a window']:.2f} ms", "measured"),
        (
            "a process's reading a step",
            f"{data['ms a window'] * MICRO_BATCH:.1f} ms",
            "in a thread, ahead",
        ),
    ]


def main(argv: list[str] | None = None) -> None:
    disable_malloc_trim()  # as training does
    data, costs, kept = data_costs(), checkpoint_costs(), activation_bytes()
    print("| what | figure | from |\n|---|---:|---|")
    for row in [
        *size_rows(),
        *memory_rows(kept),
        *network_rows(),
        *checkpoint_rows(costs),
        *data_rows(data),
    ]:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
