"""
The container that is a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): a header,
key-value pairs, a list of tensors, and, aligned, their values.

Q8_0: blocks of 32 values of a row, each a float16 scale and 32 int8.
"""

import math
import mmap
import struct
from dataclasses import dataclass

import numpy as np
import torch

from formats.lazy_model import (
    BLOCK,
    LazyTensor,
    check_range,
    read_into,
    stored_in_file,
    write_values,
)
from runtime.atomic_files import FileSource

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
GROUP = 32  # values in a block of Q8_0
BLOCK_SIZE = 2 + GROUP  # its bytes
F32, F16, Q8_0, BF16 = 0, 1, 8, 30  # types of tensors
TORCH_TYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}


# Reading

SCALARS = {  # type of a value: its layout
    **{
        0: "<B",
        1: "<b",
        2: "<H",
        3: "<h",
        4: "<I",
        5: "<i",
        6: "<f",
        7: "<?",
        10: "<Q",
        11: "<q",
        12: "<d",
    },
}
STRING, ARRAY = 8, 9


class Cursor:
    """Reads a mapped file from front to back. Raises ValueError past its end."""

    def __init__(self, content):
        self.content, self.position = content, 0

    def take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self.content):
            raise ValueError("it ends within its header")
        start, self.position = self.position, end
        return self.content[start:end]

    def scalar(self, layout: str):
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def string(self) -> str:
        return self.take(self.scalar("<Q")).decode("utf-8")

    def value(self, kind: int):
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"a value of type {kind} is not known")
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if kind in SCALARS:
            layout = SCALARS[kind]
            values = np.frombuffer(
                self.take(count * struct.calcsize(layout)), np.dtype(layout.replace("?", "b"))
            )
            return values.tolist()
        if kind != STRING or count * 8 > len(self.content) - self.position:
            raise ValueError("a list is longer than the file, or nested")
        return [self.string() for _ in range(count)]


@dataclass(frozen=True)
class TensorInfo:
    """shape: ours, rows first; offset: from the beginning of the values."""

    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def size(self) -> int:
        count = math.prod(self.shape)
        return (
            count // GROUP * BLOCK_SIZE
            if self.kind == Q8_0
            else count * TORCH_TYPES[self.kind].itemsize
        )


def read_container(path: str) -> tuple[dict, dict[str, LazyTensor]]:
    """The key-value pairs and the tensors of a file. Raises ValueError where it is damaged."""
    source = FileSource(path)
    with source.open() as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            cursor = Cursor(content)
            pairs, infos = read_header(cursor)
        except (ValueError, struct.error) as error:
            raise ValueError(f"{path}: damaged, or not a GGUF file ({error})") from None
        size, position = len(content), cursor.position
    alignment = pairs.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(
            f"{path}: general.alignment={alignment!r} is no power of two; it is damaged"
        )
    start, end = position + -position % alignment, 0
    for name, info in sorted(infos.items(), key=lambda item: item[1].offset):
        if info.offset != end:
            raise ValueError(
                f"{path}: {name[:100]} begins at {info.offset}, not at {end}; it is damaged"
            )
        end += info.size + -info.size % alignment
    if not end - alignment < size - start <= end:  # the last tensor may be padded or not
        raise ValueError(f"{path}: {size} bytes, but its header says {start + end}; it is damaged")
    for name, info in infos.items():
        if start + info.offset + info.size > size:
            raise ValueError(f"{path}: it ends within {name[:100]}; it is damaged")
    return pairs, {name: stored_tensor(source, start, info) for name, info in infos.items()}


def read_header(cursor: Cursor) -> tuple[dict, dict[str, TensorInfo]]:
    magic, version = cursor.take(4), cursor.scalar("<I")
    if magic != MAGIC or version not in (2, 3):
        raise ValueError(f"version {version} is not known")
    n_tensors, n_pairs = cursor.scalar("<Q"), cursor.scalar("<Q")
    pairs, infos = {}, {}
    for _ in range(n_pairs):  # a number too large runs into the end of the file
        key = cursor.string()
        pairs[key] = cursor.value(cursor.scalar("<I"))
    for _ in range(n_tensors):
        name, dimensions = cursor.string(), cursor.scalar("<I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"{name[:100]} has {dimensions} dimensions")
        shape = tuple(cursor.scalar("<Q") for _ in range(dimensions))[::-1]
        info = TensorInfo(shape, cursor.scalar("<I"), cursor.scalar("<Q"))
        if info.kind not in (*TORCH_TYPES, Q8_0):
            raise ValueError(
                f"{name[:100]} is quantized in type {info.kind}; F32, F16, BF16 and Q8_0 are known here"
            )
        if min(shape) < 1 or (info.kind == Q8_0 and shape[-1] % GROUP) or name in infos:
            raise ValueError(f"{name[:100]} has the shape {shape}, or is there twice")
        infos[name] = info
    return pairs, infos


def stored_tensor(source: FileSource, start: int, info: TensorInfo) -> LazyTensor:
    if info.kind != Q8_0:
        return stored_in_file(source, start + info.offset, TORCH_TYPES[info.kind], info.shape)
    return LazyTensor(
        info.shape, torch.float32, lambda: read_quantized(source, start + info.offset, info.shape)
    )


def read_quantized(source: FileSource, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.empty(math.prod(shape) // GROUP, GROUP)
    with source.open(offset) as file:
        for part in values.split(BLOCK // GROUP):
            raw = torch.empty(len(part), BLOCK_SIZE, dtype=torch.uint8)
            read_into(file, raw, source.path)
            scales = raw[:, :2].contiguous().view(torch.float16).float()  # (N, 1)
            torch.mul(raw[:, 2:].contiguous().view(torch.int8), scales, out=part)
    return values.view(shape)


# Writing


def header_of(pairs: dict, infos: list[tuple[str, TensorInfo]]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(infos), len(pairs))]
    for key, value in pairs.items():
        parts += [packed_string(key), packed_value(value)]
    for name, info in infos:
        dimensions = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *info.shape[::-1])
        parts += [packed_string(name), dimensions, struct.pack("<IQ", info.kind, info.offset)]
    return b"".join(parts)


def packed_string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def packed_value(value) -> bytes:
    """A text, a list of texts, or (type, number or list of numbers), with its type before it."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + packed_string(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(packed_string, value))
    kind, value = value
    layout = SCALARS[kind].removeprefix("<")
    if isinstance(value, list):
        return struct.pack(f"<IIQ{len(value)}{layout}", ARRAY, kind, len(value), *value)
    return struct.pack(f"<I{layout}", kind, value)


def pad(file):
    file.write(b"\0" * (-file.tell() % ALIGNMENT))


def write_tensor(file, tensor: torch.Tensor, kind: int, name: str):
    if kind == Q8_0:
        for rows in tensor.split(max(1, BLOCK // tensor.shape[1])):
            file.write(quantize(rows.float().reshape(-1, GROUP), name))
        return
    check_range(tensor, TORCH_TYPES[kind], name)
    write_values(file, tensor, TORCH_TYPES[kind])


def quantize(groups: torch.Tensor, name: str) -> np.ndarray:
    """Q8_0 of groups (N, 32): per group the scale, 1/127 of its largest magnitude, in float16, and the
    values in steps of the scale as it was rounded, so that none is off by more than half a step."""
    scales = (groups.abs().amax(dim=1) / 127.0).half()  # (N,)
    if not scales.isfinite().all():
        raise ValueError(f"{name} has values too large for q8_0; use --dtype=float32 or bfloat16")
    steps = scales.float()
    values = groups / torch.where(steps == 0, 1.0, steps)[:, None]
    packed = np.empty((len(groups), BLOCK_SIZE), dtype=np.uint8)
    packed[:, :2] = scales.numpy().view(np.uint8).reshape(-1, 2)
    packed[:, 2:] = values.round().clamp(-127, 127).to(torch.int8).numpy().view(np.uint8)
    return packed
