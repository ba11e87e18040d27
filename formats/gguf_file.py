"""
The container of GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): a header,
metadata as key-value pairs, descriptions of the tensors, and, aligned, their values.

Q8_0 stores blocks of 32 values of a row, each as a float16 scale and 32 int8. The other quantized
types are dequantized by the gguf package. llama.cpp splits a large model into several files.
"""

import functools
import math
import mmap
import os
import re
import struct
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np
import torch

from formats.lazy_model import (
    BLOCK,
    LazyTensor,
    check_range,
    read_into,
    tensor_in_file,
    write_values,
)
from runtime.atomic_files import FileSource
from runtime.lfs import require_content
from runtime.untrusted import describe_value

MAGIC = b"GGUF"
VERSION = 3
READABLE_VERSIONS = (2, 3)
ALIGNMENT = 32  # bytes, of files written here and of files without general.alignment
MAX_DIMENSIONS = 4

# Types of tensors (ggml_type)
F32, F16, Q8_0, BF16 = 0, 1, 8, 30
TORCH_DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
SPLIT_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MAX_SPLITS = 99999  # the number has five digits
GROUP_SIZE = 32  # values in a block of Q8_0
BLOCK_SIZE = 2 + GROUP_SIZE  # bytes of a block of Q8_0

# Types of metadata values (gguf_metadata_value_type)
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, FLOAT64 = 4, 5, 6, 7, 8, 9, 12
SCALAR_LAYOUTS = {  # as struct formats
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    UINT32: "<I",
    INT32: "<i",
    FLOAT32: "<f",
    BOOL: "<?",
    10: "<Q",
    11: "<q",
    FLOAT64: "<d",
}


class TypedValue(NamedTuple):
    """A number, or a list of numbers, of one of the types in SCALAR_LAYOUTS."""

    type: int
    value: Any


MetadataValue = str | list[str] | TypedValue


@dataclass(frozen=True)
class TensorInfo:
    """The description of a tensor."""

    shape: tuple[int, ...]  # as in PyTorch; the file has it in reverse
    type: int  # ggml_type
    offset: int  # in bytes, from the first value of the file

    @property
    def size(self) -> int:
        """Size of the values in bytes."""
        block = block_of(self.type)
        return math.prod(self.shape) // block.num_values * block.num_bytes


class Block(NamedTuple):
    """The unit of a type of tensors: as many values are stored in as many bytes."""

    num_values: int
    num_bytes: int
    name: str


@functools.cache
def block_of(tensor_type: int) -> Block:
    """The block of a type. Raises NotImplementedError if the type cannot be read."""
    if tensor_type in TORCH_DTYPES:
        return Block(1, TORCH_DTYPES[tensor_type].itemsize, "")
    if tensor_type == Q8_0:
        return Block(GROUP_SIZE, BLOCK_SIZE, "Q8_0")
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    try:
        known = GGMLQuantizationType(tensor_type)
        num_values, num_bytes = GGML_QUANT_SIZES[known]
        dequantize(np.zeros((1, num_bytes), np.uint8), known)
    except ValueError:
        raise NotImplementedError(f"type {tensor_type}, unknown to the gguf package") from None
    except NotImplementedError:
        raise NotImplementedError(f"type {known.name}") from None
    return Block(num_values, num_bytes, known.name)


# Reading


class BinaryReader:
    """Reads a mapped file sequentially. Raises ValueError at its end."""

    def __init__(self, content: mmap.mmap):
        self.content = content
        self.position = 0

    def take(self, size: int) -> bytes:
        """The next bytes."""
        start = self.position
        if start + size > len(self.content):
            raise ValueError("it ends within its header")
        self.position += size
        return self.content[start : self.position]

    def scalar(self, layout: str) -> Any:
        """A number in a struct format."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def string(self) -> str:
        """A length and UTF-8."""
        return self.take(self.scalar("<Q")).decode("utf-8")

    def value(self, value_type: int) -> Any:
        """A metadata value. Raises ValueError for an unknown type."""
        if value_type in SCALAR_LAYOUTS:
            return self.scalar(SCALAR_LAYOUTS[value_type])
        if value_type == STRING:
            return self.string()
        if value_type == ARRAY:
            return self.array()
        raise ValueError(f"a value of type {value_type} is not known")

    def array(self) -> list:
        """A list of numbers or of strings. Raises ValueError for nested lists."""
        item_type = self.scalar("<I")
        count = self.scalar("<Q")
        if item_type in SCALAR_LAYOUTS:
            layout = SCALAR_LAYOUTS[item_type]
            content = self.take(count * struct.calcsize(layout))
            return np.frombuffer(content, np.dtype(layout.replace("?", "b"))).tolist()
        if item_type != STRING or count * 8 > len(self.content) - self.position:
            raise ValueError("a list is longer than the file, or nested")
        return [self.string() for _ in range(count)]


def read_split_container(path: str) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """The metadata and the tensors of a file, or of all files of a split model.

    path is any of its files. Raises ValueError if one is damaged or missing.
    """
    metadata, tensors = read_container(path)
    count = metadata.get("split.count", 1)
    if type(count) is not int or not 0 <= count <= MAX_SPLITS:
        raise ValueError(f"{path}: split.count is {describe_value(count)}; it is damaged")
    if count in (0, 1):
        return metadata, tensors
    match = SPLIT_NAME.fullmatch(os.path.basename(path))
    if not match or int(match["count"]) != count:
        raise ValueError(
            f"{path}: one of {count} files of a split model; give it its name again, "
            f"NAME-00001-of-{count:05d}.gguf for the first"
        )
    tensors = {}
    first_metadata: dict[str, Any] = {}
    for number in range(1, count + 1):
        name = f"{match['prefix']}-{number:05d}-of-{count:05d}.gguf"
        part = os.path.join(os.path.dirname(path), name)
        if not os.path.isfile(part):
            raise ValueError(f"{path}: {name} of the same split model is not beside it")
        require_content(part)
        metadata, part_tensors = read_container(part)
        if metadata.get("split.no") != number - 1 or metadata.get("split.count") != count:
            raise ValueError(f"{part}: not file {number} of {count} of a split model")
        if repeated := tensors.keys() & part_tensors.keys():
            raise ValueError(f"{part}: {min(repeated)[:100]} is in another of the files, too")
        first_metadata = first_metadata or metadata
        tensors |= part_tensors
    expected = first_metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise ValueError(
            f"{path}: the files have {len(tensors)} tensors, not {describe_value(expected)}"
        )
    return first_metadata, tensors


def read_container(path: str) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """The metadata and the tensors of a file. Raises ValueError if it is damaged."""
    source = FileSource(path)
    with source.open() as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            reader = BinaryReader(content)
            metadata, infos = read_header(reader)
        except (ValueError, struct.error) as error:
            raise ValueError(f"{path}: damaged, or not a GGUF file ({error})") from None
        except NotImplementedError as error:
            raise ValueError(f"{path}: {error}, which cannot be read") from None
        size = len(content)
        position = reader.position
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(
            f"{path}: general.alignment={describe_value(alignment)} is not a power of two; "
            "it is damaged"
        )
    data_offset = position + -position % alignment
    check_offsets(infos, size - data_offset, alignment, path)
    tensors = {name: open_tensor(source, data_offset, info) for name, info in infos.items()}
    return metadata, tensors


def read_header(reader: BinaryReader) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The metadata and the descriptions of the tensors. Raises ValueError if they are damaged."""
    magic = reader.take(4)
    version = reader.scalar("<I")
    if magic != MAGIC or version not in READABLE_VERSIONS:
        raise ValueError(f"version {version} is not known")
    n_tensors = reader.scalar("<Q")
    n_pairs = reader.scalar("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_pairs):  # a number that is too large reaches the end of the file
        key = reader.string()
        metadata[key] = reader.value(reader.scalar("<I"))
    infos: dict[str, TensorInfo] = {}
    for _ in range(n_tensors):
        name = reader.string()
        info = read_tensor_info(reader, name)
        if name in infos:
            raise ValueError(f"{name[:100]} occurs twice")
        infos[name] = info
    return metadata, infos


def read_tensor_info(reader: BinaryReader, name: str) -> TensorInfo:
    """The description of a tensor. Raises ValueError if it is damaged or not supported."""
    dimensions = reader.scalar("<I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"{name[:100]} has {dimensions} dimensions")
    shape = tuple(reader.scalar("<Q") for _ in range(dimensions))[::-1]
    info = TensorInfo(shape, type=reader.scalar("<I"), offset=reader.scalar("<Q"))
    try:
        block = block_of(info.type)
    except NotImplementedError as error:
        raise NotImplementedError(f"{name[:100]} is quantized in {error}") from None
    if min(shape) < 1 or shape[-1] % block.num_values:
        raise ValueError(f"{name[:100]} has the shape {shape}")
    return info


def check_offsets(infos: dict[str, TensorInfo], data_size: int, alignment: int, path: str) -> None:
    """Raise ValueError unless the tensors follow each other, aligned, to the end of the data."""
    end = 0
    for name, info in sorted(infos.items(), key=lambda item: item[1].offset):
        if info.offset != end:
            raise ValueError(
                f"{path}: {name[:100]} begins at {info.offset}, not at {end}; it is damaged"
            )
        end += info.size + -info.size % alignment
    if not end - alignment < data_size <= end:  # the last tensor may be padded or not
        raise ValueError(
            f"{path}: {data_size} bytes of tensors, but its header implies {end}; it is damaged"
        )
    for name, info in infos.items():
        if info.offset + info.size > data_size:
            raise ValueError(f"{path}: it ends within {name[:100]}; it is damaged")


def open_tensor(source: FileSource, data_offset: int, info: TensorInfo) -> LazyTensor:
    """The tensor of a description; a quantized one is read as float32."""
    offset = data_offset + info.offset
    if info.type in TORCH_DTYPES:
        return tensor_in_file(source, offset, TORCH_DTYPES[info.type], info.shape)
    if info.type == Q8_0:
        read = functools.partial(read_q8_0, source, offset, info.shape)
    else:
        read = functools.partial(read_quantized, source, offset, info)
    return LazyTensor(info.shape, torch.float32, read)


def read_quantized(source: FileSource, offset: int, info: TensorInfo) -> torch.Tensor:
    """Read a quantized tensor and dequantize it to float32 with the gguf package."""
    from gguf import GGMLQuantizationType, dequantize

    block = block_of(info.type)
    values = torch.empty(math.prod(info.shape) // block.num_values, block.num_values)
    with source.open(offset) as file:
        for blocks in values.split(max(1, BLOCK // block.num_values)):  # (N, num_values)
            raw = torch.empty(len(blocks), block.num_bytes, dtype=torch.uint8)
            read_into(file, raw, source.path)
            dequantized = dequantize(raw.numpy(), GGMLQuantizationType(info.type))
            blocks.copy_(torch.from_numpy(dequantized).view_as(blocks))
    return values.view(info.shape)


def read_q8_0(source: FileSource, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Read a tensor in Q8_0 and dequantize it to float32."""
    values = torch.empty(math.prod(shape) // GROUP_SIZE, GROUP_SIZE)
    with source.open(offset) as file:
        for groups in values.split(BLOCK // GROUP_SIZE):  # (N, 32)
            raw = torch.empty(len(groups), BLOCK_SIZE, dtype=torch.uint8)
            read_into(file, raw, source.path)
            scales = raw[:, :2].contiguous().view(torch.float16).float()  # (N, 1)
            torch.mul(raw[:, 2:].contiguous().view(torch.int8), scales, out=groups)
    return values.view(shape)


# Writing


def pack_header(metadata: dict[str, MetadataValue], infos: dict[str, TensorInfo]) -> bytes:
    """The header, the metadata and the descriptions of the tensors."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(infos), len(metadata))]
    for key, value in metadata.items():
        parts += [pack_string(key), pack_value(value)]
    for name, info in infos.items():
        dimensions = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *info.shape[::-1])
        parts += [pack_string(name), dimensions, struct.pack("<IQ", info.type, info.offset)]
    return b"".join(parts)


def pack_string(text: str) -> bytes:
    """The length of a text and its UTF-8."""
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def pack_value(value: MetadataValue) -> bytes:
    """The type of a metadata value and the value."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + pack_string(value)
    if isinstance(value, list):
        strings = b"".join(map(pack_string, value))
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + strings
    layout = SCALAR_LAYOUTS[value.type].removeprefix("<")
    if isinstance(value.value, list):
        count = len(value.value)
        return struct.pack(f"<IIQ{count}{layout}", ARRAY, value.type, count, *value.value)
    return struct.pack(f"<I{layout}", value.type, value.value)


def pad(file: IO[bytes]) -> None:
    """Write zeros up to a multiple of ALIGNMENT."""
    file.write(b"\0" * (-file.tell() % ALIGNMENT))


def write_tensor(file: IO[bytes], tensor: torch.Tensor, tensor_type: int, name: str) -> None:
    """Write the values of a tensor, BLOCK at a time. Raises ValueError if one is out of range."""
    if tensor_type == Q8_0:
        for rows in tensor.split(max(1, BLOCK // tensor.shape[1])):
            file.write(quantize(rows.float().reshape(-1, GROUP_SIZE), name).data)
        return
    check_range(tensor, TORCH_DTYPES[tensor_type], name)
    write_values(file, tensor, TORCH_DTYPES[tensor_type])


def quantize(groups: torch.Tensor, name: str) -> np.ndarray:
    """Quantize groups (N, 32) to the bytes of Q8_0 (N, 34).

    A scale is 1/127 of the group's largest magnitude, in float16. The values are multiples of the
    rounded scale, so that the error is at most half a step. Raises ValueError if a scale is too
    large for float16.
    """
    scales = (groups.abs().amax(dim=1) / 127.0).half()  # (N,)
    if not scales.isfinite().all():
        raise ValueError(f"{name} has values too large for q8_0; use --dtype=float32 or bfloat16")
    steps = scales.float()
    values = groups / torch.where(steps == 0, 1.0, steps)[:, None]
    packed = np.empty((len(groups), BLOCK_SIZE), dtype=np.uint8)
    packed[:, :2] = scales.numpy().view(np.uint8).reshape(-1, 2)
    packed[:, 2:] = values.round().clamp(-127, 127).to(torch.int8).numpy().view(np.uint8)
    return packed
