"""
A model to and from the files that other programs read.

    python export.py out/model.bin --checkpoint=out/ckpt.pt

llama2.c's version 0: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size,
max_seq_len; a negative vocab_size means an untied classifier), then float32 tensors in the order
of v0_tensors.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from atomic import AtomicFile
from checkpoint import load_model
from configurator import configure, print_overrides, run_script
from model import ModelArgs, Transformer, rope_tables

HEADER = struct.Struct("<7i")
V0_NORM_EPS, V0_ROPE_THETA = 1e-5, 10000.0  # what every reader of version 0 takes for granted


def v0_tensors(args: ModelArgs) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a version 0 file, in order: read and written from this."""
    kv_dim = args.kv_heads * args.head_dim
    of_layers = {
        "attention_norm": (args.dim,),
        "attention.wq": (args.dim, args.dim),
        "attention.wk": (kv_dim, args.dim),
        "attention.wv": (kv_dim, args.dim),
        "attention.wo": (args.dim, args.dim),
        "ffn_norm": (args.dim,),
        "feed_forward.w1": (args.ffn_dim, args.dim),
        "feed_forward.w2": (args.dim, args.ffn_dim),
        "feed_forward.w3": (args.ffn_dim, args.dim),
    }
    yield "tok_embeddings.weight", (args.vocab_size, args.dim)
    for part, shape in of_layers.items():
        for layer in range(args.n_layers):
            yield f"layers.{layer}.{part}.weight", shape
    yield "norm.weight", (args.dim,)
    yield "rope_cos", (args.max_seq_len, args.head_dim // 2)
    yield "rope_sin", (args.max_seq_len, args.head_dim // 2)
    if not args.tie_embeddings:
        yield "output.weight", (args.vocab_size, args.dim)


def v0_refusal(args: ModelArgs) -> str | None:
    """Why version 0 cannot say this model, or None if it can."""
    if args.rope_theta != V0_ROPE_THETA:
        return f"model.bin has no place for rope_theta={args.rope_theta:g}, its readers take {V0_ROPE_THETA:g}"
    if args.norm_eps != V0_NORM_EPS:
        return f"model.bin has no place for norm_eps={args.norm_eps:g}, its readers take {V0_NORM_EPS:g}"
    return None


def write_v0(model: Transformer, path: str):
    """Write the model as a version 0 file, atomically. Raises ValueError for a model that the
    format cannot say or whose weights are not finite."""
    args = model.args
    if refusal := v0_refusal(args):
        raise ValueError(f"{path}: {refusal}")
    vocab_size = args.vocab_size if args.tie_embeddings else -args.vocab_size
    tensors = {**model.state_dict(), "rope_cos": model.rope_cos, "rope_sin": model.rope_sin}
    with AtomicFile(path) as file:
        file.write(
            HEADER.pack(
                args.dim, args.ffn_dim, args.n_layers, args.n_heads, args.kv_heads, vocab_size, args.max_seq_len
            )
        )
        for name, _ in v0_tensors(args):
            values = tensors[name].detach().float().cpu().contiguous().numpy()
            if not np.isfinite(values).all():
                raise ValueError(f"{path} not written: {name} has values that are no numbers")
            file.write(values.astype("<f4", copy=False).data)


def read_v0(path: str) -> Transformer:
    """The model in a version 0 file. Raises ValueError where the header or the size is wrong."""
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise ValueError(f"{path}: too short for a model.bin")
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = HEADER.unpack(header)
    try:
        args = ModelArgs(
            dim=dim,
            hidden_dim=hidden_dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            vocab_size=abs(vocab_size),
            max_seq_len=max_seq_len,
            tie_embeddings=vocab_size > 0,
        )
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: the header is not that of a model.bin ({error})") from None
    # Layers by arithmetic: a damaged header may name millions of them.
    one_layer = dict(v0_tensors(ModelArgs(**{**vars(args), "n_layers": 1})))
    per_layer = sum(np.prod(shape, dtype=object) for name, shape in one_layer.items() if name.startswith("layers"))
    others = sum(np.prod(shape, dtype=object) for name, shape in one_layer.items() if not name.startswith("layers"))
    expected = HEADER.size + 4 * (n_layers * per_layer + others)
    if os.path.getsize(path) != expected:
        raise ValueError(f"{path}: {os.path.getsize(path)} bytes, but its header says {expected}; it is damaged")
    content = np.memmap(path, "<f4", mode="r", offset=HEADER.size)
    model, state, position = Transformer(args), {}, 0
    for name, shape in v0_tensors(args):
        size = int(np.prod(shape))
        state[name] = torch.from_numpy(content[position : position + size].reshape(shape).astype(np.float32))
        position += size
    tables = state.pop("rope_cos"), state.pop("rope_sin")
    if not all(torch.allclose(*pair, atol=1e-3) for pair in zip(tables, rope_tables_of(args), strict=True)):
        raise ValueError(f"{path}: its rotary tables are not those of rope_theta={V0_ROPE_THETA:g}; it is damaged")
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise ValueError(f"{path}: it holds values that are no numbers")
    model.load_state_dict(state | ({"output.weight": state["tok_embeddings.weight"]} if args.tie_embeddings else {}))
    return model.eval()


def rope_tables_of(args: ModelArgs):
    return rope_tables(args.head_dim, args.max_seq_len, args.rope_theta)


def read_model(path: str) -> tuple[Transformer, str | None]:
    """The model in a checkpoint or a model.bin, told apart by content, and its tokenizer's hash
    where the file has it. Raises ValueError, naming the file, for anything else."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: there is no such file")
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip:
        model, checkpoint = load_model(path)
        return model, checkpoint.get("tokenizer_hash")
    return read_v0(path), None


@dataclass(frozen=True)
class ExportConfig:
    """Write a model as llama2.c's model.bin (float32, version 0)."""

    output: str = ""  # the file to write; may be given bare
    checkpoint: str = "out/ckpt.pt"  # what to read: a ckpt.pt or a model.bin

    def problems(self):
        if not self.output:
            yield "say what to write: python export.py out/model.bin"
        elif self.output.endswith(".pt"):  # the slip of taking the bare argument for the input
            yield f"{self.output}: this writes a model.bin; name the checkpoint to read with --checkpoint=PATH"
        elif os.path.realpath(self.output) == os.path.realpath(self.checkpoint):
            yield f"{self.output}: is also what --checkpoint reads; write elsewhere"


def main():
    config, given = configure(ExportConfig, positional=("output",))
    print_overrides(config, given)
    model, _ = read_model(config.checkpoint)
    os.makedirs(os.path.dirname(config.output) or ".", exist_ok=True)
    write_v0(model, config.output)
    print(f"wrote {config.output}: {model.num_parameters():,} parameters, {os.path.getsize(config.output):,} bytes")


if __name__ == "__main__":
    run_script(main)
