"""
llama2.c's .bin files, in three versions, little-endian.

v0: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len; a negative
    vocab_size means a classifier of its own), then float32.
v1: a header of 256 bytes (magic, version, the seven int32, a byte that is 1 where the classifier is
    the embedding), then float32.
v2: the same header with the group size after that byte; norms in float32, every other tensor as
    int8 values, then float32 scales, one a group of the flattened tensor (Q8_0).
"""

import math
import os
import struct
from collections.abc import Iterator

import numpy as np
import torch

from formats.lazy_model import (
    BLOCK,
    LazyModel,
    LazyTensor,
    find_tokenizer,
    read_into,
    stored_in_file,
    write_values,
)
from model import ModelArgs, parameter_shapes
from ops.rope import precompute_rope_cache
from runtime.atomic_files import AtomicFile, FileSource

DTYPES = {"v0": ("float32",), "v1": ("float32",), "v2": ("q8_0",)}
SHAPE = struct.Struct("<7i")
HEADER = struct.Struct("<Ii7iB")  # version 1 and 2: magic, version, shape, tied
GROUP_SIZE = struct.Struct("<i")  # follows in version 2
MAGIC = 0x616B3432  # "ak42"
HEADER_SIZE = 256
NORM_EPS, ROPE_THETA = 1e-5, 10000.0  # what every reader takes for granted
LARGEST_GROUP = 64

# In every version, all layers of a part follow each other.
NORMS = ("layers.{}.attention_norm.weight", "layers.{}.ffn_norm.weight")
ATTENTION = tuple(f"layers.{{}}.attention.{w}.weight" for w in ("wq", "wk", "wv", "wo"))
FEED_FORWARD = tuple(f"layers.{{}}.feed_forward.{w}.weight" for w in ("w1", "w2", "w3"))
V0_ORDER = (
    *("tok_embeddings.weight", NORMS[0], *ATTENTION, NORMS[1], *FEED_FORWARD),
    *("norm.weight", "rope_cos", "rope_sin", "output.weight"),
)
V1_ORDER = (
    *NORMS,
    "norm.weight",
    "tok_embeddings.weight",
    *ATTENTION,
    *FEED_FORWARD,
    "output.weight",
)


def table(args: ModelArgs, version: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a file, in order."""
    shapes = dict(parameter_shapes(args))
    shapes["rope_cos"] = shapes["rope_sin"] = (args.max_seq_len, args.head_dim // 2)
    for template in V1_ORDER if version else V0_ORDER:
        for layer in range(args.n_layers if "{}" in template else 1):
            name = template.format(layer)
            if name in shapes:  # no classifier where it is the embedding
                yield name, shapes[name]


def size_of(shape: tuple[int, ...], group_size: int | None) -> int:
    """Bytes of a tensor; quantized, if there is a group size and it is a matrix."""
    values = math.prod(shape)
    return (
        4 * values if group_size is None or len(shape) == 1 else values + 4 * (values // group_size)
    )


def unsupported_reason(args: ModelArgs) -> str | None:
    if args.rope_theta != ROPE_THETA:
        return f"model.bin has no place for rope_theta={args.rope_theta:g}, its readers take {ROPE_THETA:g}; {OTHERS}"
    if args.norm_eps != NORM_EPS:
        return f"model.bin has no place for norm_eps={args.norm_eps:g}, its readers take {NORM_EPS:g}; {OTHERS}"
    if args.rope_scaling:
        return f"model.bin has no place for {args.rope_scaling.type} rope scaling; {OTHERS}"
    return None


OTHERS = "use --format=hf, gguf or ckpt"


# Reading


def matches(path: str) -> bool:
    if not os.path.isfile(path) or os.path.getsize(path) < SHAPE.size:
        return False
    with open(path, "rb") as file:
        header = file.read(SHAPE.size)
    return struct.unpack_from("<I", header)[0] == MAGIC or looks_like_v0(header)


def looks_like_v0(header: bytes) -> bool:
    """Whether the seven numbers could be those of a model, be they damaged."""
    dim, hidden_dim, n_layers, *_ = SHAPE.unpack(header)
    return 0 < dim < 1 << 20 and 0 < hidden_dim < 1 << 22 and 0 < n_layers < 1 << 16


def read(path: str) -> LazyModel:
    """Raises ValueError where the header or the size is wrong."""
    source = FileSource(path)
    version, args, group_size, offset = read_header(path)
    check_size(path, args, version, group_size, offset)
    tensors = {}
    for name, shape in table(args, version):
        if group_size is None or len(shape) == 1:
            tensors[name] = stored_in_file(source, offset, torch.float32, shape)
        else:
            tensors[name] = stored_quantized(source, offset, shape, group_size)
        offset += size_of(shape, group_size)
    if version == 0:
        check_rope_tables(path, args, tensors.pop("rope_cos"), tensors.pop("rope_sin"))
    return LazyModel(path, args, tensors, lambda: find_tokenizer(os.path.dirname(path)))


def read_header(path: str) -> tuple[int, ModelArgs, int | None, int]:
    """Version, architecture, group size, and where the first tensor begins."""
    with open(path, "rb") as file:
        header = file.read(HEADER_SIZE)
    if len(header) < SHAPE.size:
        raise ValueError(f"{path}: too short for a model.bin")
    version, shape, group_size = 0, SHAPE.unpack_from(header), None
    tied = shape[5] > 0
    if struct.unpack_from("<I", header)[0] == MAGIC:
        if len(header) < HEADER_SIZE:
            raise ValueError(f"{path}: too short for a model.bin")
        _, version, *shape, tied = HEADER.unpack_from(header)
        if version not in (1, 2) or tied not in (0, 1):
            raise ValueError(
                f"{path}: version {version} of model.bin with flag {tied} is not known; it may be damaged"
            )
        if version == 2:
            (group_size,) = GROUP_SIZE.unpack_from(header, HEADER.size)
    try:
        args = ModelArgs(
            **dict(
                zip(
                    ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads"),
                    shape[:5],
                    strict=True,
                )
            ),
            vocab_size=abs(shape[5]) if version == 0 else shape[5],
            max_seq_len=shape[6],
            tie_embeddings=bool(tied),
        )
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: the header is not that of a model.bin ({error})") from None
    if group_size is not None and (group_size < 1 or args.dim % group_size):
        raise ValueError(
            f"{path}: its group size {group_size} does not divide dim={args.dim}; it is damaged"
        )
    return version, args, group_size, HEADER_SIZE if version else SHAPE.size


def check_size(path: str, args: ModelArgs, version: int, group_size: int | None, start: int):
    """Raise ValueError unless the file has the size that its header says. By arithmetic, as a
    damaged header may name millions of layers."""
    one_layer = list(table(ModelArgs(**{**vars(args), "n_layers": 1}), version))
    sizes = {name: size_of(shape, group_size) for name, shape in one_layer}
    of_layer = sum(size for name, size in sizes.items() if name.startswith("layers"))
    expected = start + sum(sizes.values()) + (args.n_layers - 1) * of_layer
    if os.path.getsize(path) != expected:
        raise ValueError(
            f"{path}: {os.path.getsize(path)} bytes, but its header says {expected}; it is damaged"
        )


def check_rope_tables(path: str, args: ModelArgs, cos: LazyTensor, sin: LazyTensor):
    for written, expected in zip(
        (cos, sin), precompute_rope_cache(args.head_dim, args.max_seq_len, ROPE_THETA), strict=True
    ):
        if not torch.allclose(written.read(), expected, atol=1e-3):
            raise ValueError(
                f"{path}: its rotary tables are not those of rope_theta={ROPE_THETA:g}; it is damaged"
            )


def stored_quantized(
    source: FileSource, offset: int, shape: tuple[int, ...], group_size: int
) -> LazyTensor:
    count = math.prod(shape)

    def read():
        quantized, scales = torch.empty(count, dtype=torch.int8), torch.empty(count // group_size)
        with source.open(offset) as file:
            read_into(file, quantized, source.path)
            read_into(file, scales, source.path)
        values = torch.empty(count // group_size, group_size)
        tensors = quantized.view_as(values), scales[:, None], values
        parts = (tensor.split(max(1, BLOCK // group_size)) for tensor in tensors)
        for integers, steps, out in zip(*parts, strict=True):
            torch.mul(integers, steps, out=out)
        return values.view(shape)

    return LazyTensor(shape, torch.float32, read)


# Writing


def write(stored: LazyModel, path: str, target: str = "v0", dtype: str = "float32"):
    """Write the model. Raises ValueError for one that the format cannot say or whose weights are not
    finite."""
    args, version = stored.args, int(target.removeprefix("v"))
    if reason := unsupported_reason(args):
        raise ValueError(f"{path}: {reason}")
    group_size = largest_group(args) if version == 2 else None
    tables = {}
    if version == 0:
        tables["rope_cos"], tables["rope_sin"] = precompute_rope_cache(
            args.head_dim, args.max_seq_len, ROPE_THETA
        )
    with AtomicFile(path) as file:
        file.write(header_of(args, version, group_size))
        for name, _ in table(args, version):
            tensor = tables.get(name)
            write_tensor(file, stored.read(name) if tensor is None else tensor, group_size)


def header_of(args: ModelArgs, version: int, group_size: int | None) -> bytes:
    vocab_size = args.vocab_size if args.tie_embeddings or version else -args.vocab_size
    shape = (
        args.dim,
        args.ffn_dim,
        args.n_layers,
        args.n_heads,
        args.kv_heads,
        vocab_size,
        args.max_seq_len,
    )
    if version == 0:
        return SHAPE.pack(*shape)
    header = HEADER.pack(MAGIC, version, *shape, args.tie_embeddings)
    return (header + (GROUP_SIZE.pack(group_size) if version == 2 else b"")).ljust(
        HEADER_SIZE, b"\0"
    )


def largest_group(args: ModelArgs) -> int:
    """How many values share a scale: 64, halved until it divides the rows of all matrices. llama2.c
    looks at dim alone, and its runq.c then drops the rest of w2's rows where hidden_dim is odd."""
    size = LARGEST_GROUP
    while args.dim % size or args.ffn_dim % size:
        size //= 2
    return size


def write_tensor(file, tensor: torch.Tensor, group_size: int | None):
    """float32; or of a matrix, if there is a group size, int8 values, then scales. Some rows at a time."""
    if group_size is None or tensor.dim() == 1:
        write_values(file, tensor, torch.float32)
        return
    scales, rows = [], max(1, BLOCK // tensor.shape[1])
    for start in range(0, len(tensor), rows):
        quantized, scale = quantize(tensor[start : start + rows].float().reshape(-1, group_size))
        file.write(quantized.numpy())
        scales.append(scale.numpy())
    file.write(np.concatenate(scales).astype("<f4", copy=False))


def quantize(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q8_0 of groups (N, G): int8 values (N, G) in [-127, 127] and float32 scales (N,), each 1/127
    of the group's largest magnitude; a half goes to the even neighbour."""
    scales = groups.abs().amax(dim=1) / 127.0  # (N,)
    values = groups / torch.where(scales == 0, 1.0, scales)[:, None]
    return values.round().clamp(-127, 127).to(
        torch.int8
    ), scales  # beyond only where a scale is subnormal
