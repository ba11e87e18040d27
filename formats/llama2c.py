"""
llama2.c's .bin files, in three versions, little-endian.

v0: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len; a negative
    vocab_size means that output.weight is not tied), then float32.
v1: a header of 256 bytes (magic number, version, the seven int32, a byte that is 1 if the
    embeddings are tied), then float32.
v2: the same header with the group size after that byte; norms in float32, every other tensor as
    int8 values, then float32 scales, one for each group of the flattened tensor (Q8_0).
"""

import dataclasses
import math
import os
import struct
from collections.abc import Iterator, Sequence
from typing import IO, NamedTuple

import torch

from checkpoints.file import as_bytes
from formats.lazy_model import (
    BLOCK,
    LazyModel,
    LazyTensor,
    find_tokenizer,
    read_into,
    tensor_in_file,
    write_values,
)
from formats.model_metadata import ModelMetadata, check_plain_format
from model import ModelArgs, parameter_shapes
from ops.rope import precompute_rope_cache
from runtime.atomic_files import AtomicFile, FileSource
from textdata.tokenizer import BOS_ID, EOS_ID, Tokenizer

DTYPES = {"v0": ("float32",), "v1": ("float32",), "v2": ("q8_0",)}
SHAPE = struct.Struct("<7i")
HEADER = struct.Struct("<Ii7iB")  # versions 1 and 2: magic number, version, shape, tied
GROUP_SIZE = struct.Struct("<i")  # follows in version 2
MAGIC = 0x616B3432  # "ak42"
HEADER_SIZE = 256
NORM_EPS = 1e-5  # not in the file: every reader assumes it
ROPE_THETA = 10000.0  # not in the file: every reader assumes it
MAX_GROUP_SIZE = 64
ALTERNATIVES = "use --format=hf, gguf or ckpt"

# Order of the tensors. A name with {} is followed by the same tensor of all further layers.
V0_ORDER = (
    "tok_embeddings.weight",
    "layers.{}.attention_norm.weight",
    "layers.{}.attention.wq.weight",
    "layers.{}.attention.wk.weight",
    "layers.{}.attention.wv.weight",
    "layers.{}.attention.wo.weight",
    "layers.{}.ffn_norm.weight",
    "layers.{}.feed_forward.w1.weight",
    "layers.{}.feed_forward.w2.weight",
    "layers.{}.feed_forward.w3.weight",
    "norm.weight",
    "rope_cos",
    "rope_sin",
    "output.weight",
)
V1_ORDER = (
    "layers.{}.attention_norm.weight",
    "layers.{}.ffn_norm.weight",
    "norm.weight",
    "tok_embeddings.weight",
    "layers.{}.attention.wq.weight",
    "layers.{}.attention.wk.weight",
    "layers.{}.attention.wv.weight",
    "layers.{}.attention.wo.weight",
    "layers.{}.feed_forward.w1.weight",
    "layers.{}.feed_forward.w2.weight",
    "layers.{}.feed_forward.w3.weight",
    "output.weight",
)


class Header(NamedTuple):
    """What a file says before its tensors."""

    version: int
    args: ModelArgs
    group_size: int | None  # None: not quantized
    data_offset: int  # of the first tensor, in bytes


def list_tensors(args: ModelArgs, version: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a file, in order."""
    shapes = dict(parameter_shapes(args))
    shapes["rope_cos"] = shapes["rope_sin"] = (args.max_seq_len, args.head_dim // 2)
    for template in V1_ORDER if version else V0_ORDER:
        for layer in range(args.n_layers if "{}" in template else 1):
            name = template.format(layer)
            if name in shapes:  # a tied output.weight is not
                yield name, shapes[name]


def is_quantized(shape: tuple[int, ...], group_size: int | None) -> bool:
    """Whether a tensor is stored in int8: norms, with one dimension, are not."""
    return group_size is not None and len(shape) > 1


def tensor_size(shape: tuple[int, ...], group_size: int | None) -> int:
    """Size of a tensor in a file, in bytes."""
    count = math.prod(shape)
    if group_size is None or not is_quantized(shape, group_size):
        return 4 * count
    return count + 4 * (count // group_size)


# Reading


def matches(path: str) -> bool:
    """Whether a file begins with the magic number or with a plausible shape."""
    if not os.path.isfile(path) or os.path.getsize(path) < SHAPE.size:
        return False
    with open(path, "rb") as file:
        header = file.read(SHAPE.size)
    return struct.unpack_from("<I", header)[0] == MAGIC or looks_like_v0(header)


def looks_like_v0(header: bytes) -> bool:
    """Whether the seven numbers could be the shape of a model, even a damaged one."""
    dim, hidden_dim, n_layers, *_ = SHAPE.unpack(header)
    return 0 < dim < 1 << 20 and 0 < hidden_dim < 1 << 22 and 0 < n_layers < 1 << 16


def read(path: str) -> LazyModel:
    """Open a file of any version. Raises ValueError if its header or its size is wrong."""
    source = FileSource(path)
    header = read_header(path)
    check_size(path, header)
    offset = header.data_offset
    tensors: dict[str, LazyTensor] = {}
    for name, shape in list_tensors(header.args, header.version):
        if header.group_size is not None and is_quantized(shape, header.group_size):
            tensors[name] = quantized_tensor(source, offset, shape, header.group_size)
        else:
            tensors[name] = tensor_in_file(source, offset, torch.float32, shape)
        offset += tensor_size(shape, header.group_size)
    if header.version == 0:
        check_rope_tables(path, header.args, tensors.pop("rope_cos"), tensors.pop("rope_sin"))
    folder = os.path.dirname(path)
    return LazyModel(path, header.args, tensors, lambda: find_tokenizer(folder))


def read_header(path: str) -> Header:
    """Read and check the header of a file. Raises ValueError if it is damaged."""
    with open(path, "rb") as file:
        content = file.read(HEADER_SIZE)
    if len(content) < SHAPE.size:
        raise ValueError(f"{path}: too short for a model.bin")
    if struct.unpack_from("<I", content)[0] == MAGIC:
        return parse_versioned_header(content, path)
    *shape, vocab_size, max_seq_len = SHAPE.unpack_from(content)
    args = parse_args((*shape, abs(vocab_size), max_seq_len), vocab_size > 0, path)
    return Header(0, args, None, SHAPE.size)


def parse_versioned_header(content: bytes, path: str) -> Header:
    """The header of version 1 or 2. Raises ValueError if it is damaged."""
    if len(content) < HEADER_SIZE:
        raise ValueError(f"{path}: too short for a model.bin")
    _, version, *shape, tied = HEADER.unpack_from(content)
    if version not in (1, 2) or tied not in (0, 1):
        raise ValueError(
            f"{path}: version {version} of model.bin with flag {tied} is not known; "
            "it may be damaged"
        )
    args = parse_args(shape, bool(tied), path)
    if version == 1:
        return Header(version, args, None, HEADER_SIZE)
    (group_size,) = GROUP_SIZE.unpack_from(content, HEADER.size)
    if group_size < 1 or args.dim % group_size:
        raise ValueError(
            f"{path}: its group size {group_size} does not divide dim={args.dim}; it is damaged"
        )
    return Header(version, args, group_size, HEADER_SIZE)


def parse_args(shape: Sequence[int], tied: bool, path: str) -> ModelArgs:
    """The ModelArgs of the seven numbers of a header. Raises ValueError if they are impossible."""
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = shape
    try:
        return ModelArgs(
            dim=dim,
            hidden_dim=hidden_dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            vocab_size=vocab_size,
            max_seq_len=max_seq_len,
            tie_embeddings=tied,
        )
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: the header is not that of a model.bin ({error})") from None


def check_size(path: str, header: Header) -> None:
    """Raise ValueError unless the file has the size that its header implies.

    The size of one layer is multiplied: a damaged header may name millions of layers.
    """
    one_layer = dataclasses.replace(header.args, n_layers=1)
    sizes = {
        name: tensor_size(shape, header.group_size)
        for name, shape in list_tensors(one_layer, header.version)
    }
    layer_size = sum(size for name, size in sizes.items() if name.startswith("layers"))
    expected = sum(sizes.values()) + (header.args.n_layers - 1) * layer_size + header.data_offset
    size = os.path.getsize(path)
    if size != expected:
        raise ValueError(f"{path}: {size} bytes, but its header implies {expected}; it is damaged")


def check_rope_tables(path: str, args: ModelArgs, cos: LazyTensor, sin: LazyTensor) -> None:
    """Raise ValueError if the rotary embedding tables are not those of ROPE_THETA."""
    expected = precompute_rope_cache(args.head_dim, args.max_seq_len, ROPE_THETA)
    for table, expected_table in zip((cos, sin), expected, strict=True):
        if not torch.allclose(table.read(), expected_table, atol=1e-3):
            raise ValueError(
                f"{path}: its rotary tables are not those of rope_theta={ROPE_THETA:g}; "
                "it is damaged"
            )


def quantized_tensor(
    source: FileSource, offset: int, shape: tuple[int, ...], group_size: int
) -> LazyTensor:
    """A tensor in Q8_0 at an offset of a file; read() dequantizes it to float32."""
    count = math.prod(shape)

    def read() -> torch.Tensor:
        quantized = torch.empty(count, dtype=torch.int8)
        scales = torch.empty(count // group_size)
        with source.open(offset) as file:
            read_into(file, quantized, source.path)
            read_into(file, scales, source.path)
        values = torch.empty(count // group_size, group_size)
        rows = max(1, BLOCK // group_size)
        blocks = zip(
            quantized.view_as(values).split(rows),
            scales[:, None].split(rows),
            values.split(rows),
            strict=True,
        )
        for quantized_block, scale_block, out in blocks:
            torch.mul(quantized_block, scale_block, out=out)
        return values.view(shape)

    return LazyTensor(shape, torch.float32, read)


# Writing


def unsupported_reason(args: ModelArgs) -> str | None:
    """Why model.bin cannot store the model, or None if it can."""
    if args.rope_theta != ROPE_THETA:
        return (
            f"model.bin cannot store rope_theta={args.rope_theta:g}, "
            f"its readers assume {ROPE_THETA:g}; {ALTERNATIVES}"
        )
    if args.norm_eps != NORM_EPS:
        return (
            f"model.bin cannot store norm_eps={args.norm_eps:g}, "
            f"its readers assume {NORM_EPS:g}; {ALTERNATIVES}"
        )
    if args.rope_scaling:
        return f"model.bin cannot store {args.rope_scaling.type} rope scaling; {ALTERNATIVES}"
    return None


def check_metadata(metadata: ModelMetadata, tokenizer: Tokenizer | None) -> list[str]:
    """The names of what model.bin cannot store. Raises ValueError if its readers never stop."""
    reader_stop_ids = {BOS_ID: "", EOS_ID: "run.c ends there in chat mode only"}
    return check_plain_format(metadata, reader_stop_ids, "model.bin")


def write(model: LazyModel, path: str, target: str = "v0", dtype: str = "float32") -> None:
    """Write a file of version target.

    Raises ValueError if the format cannot store the model or a weight is not finite.
    """
    args = model.args
    version = int(target.removeprefix("v"))
    if reason := unsupported_reason(args):
        raise ValueError(f"{path}: {reason}")
    group_size = group_size_for(args) if version == 2 else None
    rope_cache: dict[str, torch.Tensor] = {}
    if version == 0:
        cos, sin = precompute_rope_cache(args.head_dim, args.max_seq_len, ROPE_THETA)
        rope_cache = {"rope_cos": cos, "rope_sin": sin}
    with AtomicFile(path) as file:
        file.write(pack_header(args, version, group_size))
        for name, _ in list_tensors(args, version):
            cached = rope_cache.get(name)
            write_tensor(file, model.read(name) if cached is None else cached, group_size)


def pack_header(args: ModelArgs, version: int, group_size: int | None) -> bytes:
    """The header of a file. group_size is None unless the version is 2."""
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
    if group_size is not None:
        header += GROUP_SIZE.pack(group_size)
    return header.ljust(HEADER_SIZE, b"\0")


def group_size_for(args: ModelArgs) -> int:
    """How many values share a scale: 64, halved until it divides the rows of all matrices.

    llama2.c considers dim alone. Its runq.c then ignores the rest of each row of w2 if hidden_dim
    is not a multiple.
    """
    size = MAX_GROUP_SIZE
    while args.dim % size or args.ffn_dim % size:
        size //= 2
    return size


def write_tensor(file: IO[bytes], tensor: torch.Tensor, group_size: int | None) -> None:
    """Write a tensor in float32, or a matrix in Q8_0 if there is a group size; BLOCK values at a
    time."""
    if group_size is None or not is_quantized(tuple(tensor.shape), group_size):
        write_values(file, tensor, torch.float32)
        return
    scales = []
    for rows in tensor.split(max(1, BLOCK // tensor.shape[1])):
        quantized, scale = quantize(rows.float().reshape(-1, group_size))
        file.write(as_bytes(quantized))
        scales.append(scale)
    write_values(file, torch.cat(scales), torch.float32)


def quantize(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize groups (N, G) to Q8_0: int8 values (N, G) and float32 scales (N,).

    A scale is 1/127 of the group's largest magnitude. Values are in [-127, 127]; halves round to
    even.
    """
    scales = groups.abs().amax(dim=1) / 127.0  # (N,)
    values = groups / torch.where(scales == 0, 1.0, scales)[:, None]
    quantized = values.round().clamp(-127, 127)  # out of range only where a scale is subnormal
    return quantized.to(torch.int8), scales
