"""
safetensors files: the length of a header, the header in JSON, then the tensors, little-endian.

The header maps each name to its dtype, shape and data_offsets, [begin, end) after the header. The
tensors are stored without gaps (https://huggingface.co/docs/safetensors).
"""

import json
import math
import os
import struct
from collections.abc import Sequence
from typing import IO, Any, NamedTuple, NoReturn

import torch

from formats.lazy_model import LazyTensor, tensor_in_file, write_values
from runtime.atomic_files import FileSource
from runtime.lfs import require_content

HEADER_LENGTH = struct.Struct("<Q")
MAX_HEADER_LENGTH = 100_000_000  # bytes; the limit of the format
MAX_DIMENSIONS = 8
HEADER_ALIGNMENT = 8  # bytes; the tensors begin at a multiple
DTYPE_BY_NAME = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAME_BY_DTYPE = {dtype: name for name, dtype in DTYPE_BY_NAME.items()}


class Entry(NamedTuple):
    """The description of a tensor in a header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_safetensors(path: str) -> dict[str, LazyTensor]:
    """The tensors of a file by name. Raises ValueError if the header does not match the file."""
    require_content(path)
    source = FileSource(path)
    size = os.path.getsize(path)
    with source.open() as file:
        prefix = file.read(HEADER_LENGTH.size)
        is_complete = len(prefix) == HEADER_LENGTH.size
        length = HEADER_LENGTH.unpack(prefix)[0] if is_complete else size
        if length > min(MAX_HEADER_LENGTH, size - HEADER_LENGTH.size):
            raise ValueError(
                f"{path}: not a safetensors file, or a damaged one "
                "(its header is longer than the file)"
            )
        entries = parse_header(file.read(length), path)
    data_offset = HEADER_LENGTH.size + length
    check_offsets(entries, data_offset, size, path)
    return {
        name: tensor_in_file(source, data_offset + entry.begin, entry.dtype, entry.shape)
        for name, entry in entries.items()
    }


def parse_header(header: bytes, path: str) -> dict[str, Entry]:
    """The entries of a header by name. Raises ValueError if it is damaged."""
    try:
        content = json.loads(header, parse_constant=reject_constant)
        content.pop("__metadata__", None)
        return {name: parse_entry(entry) for name, entry in content.items()}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path}: the header of this safetensors file is damaged ({str(error)[:100]})"
        ) from None


def parse_entry(entry: dict[str, Any]) -> Entry:
    """An entry of a header. Raises ValueError if dtype, shape and data_offsets do not agree."""
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    is_valid = all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, begin, end))
    if not is_valid or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"its sizes are not whole numbers: {entry}")
    if entry["dtype"] not in DTYPE_BY_NAME:
        raise ValueError(f"dtype {entry['dtype']} is not supported")
    dtype = DTYPE_BY_NAME[entry["dtype"]]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the number of bytes does not match the shape: {entry}")
    return Entry(dtype, shape, begin, end)


def check_offsets(entries: dict[str, Entry], data_offset: int, size: int, path: str) -> None:
    """Raise ValueError unless the tensors follow each other to the end of the file."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise ValueError(
                f"{path}: {name[:100]} begins at {entry.begin}, not at {position}; "
                "the file is damaged"
            )
        position = entry.end
    if data_offset + position != size:
        raise ValueError(
            f"{path}: {size} bytes, but its header implies {data_offset + position}; it is damaged"
        )


def reject_constant(name: str) -> NoReturn:
    """Raise ValueError for NaN and Infinity in a header."""
    raise ValueError(f"{name} is not a number")


def write_safetensors(file: IO[bytes], tensors: Sequence[tuple[str, LazyTensor]]) -> None:
    """Write named tensors to an open file, with one at a time in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors:
        end = position + tensor_size(tensor)
        header[name] = {
            "dtype": NAME_BY_DTYPE[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [position, end],
        }
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % HEADER_ALIGNMENT)
    file.write(HEADER_LENGTH.pack(len(encoded)) + encoded)
    for _, tensor in tensors:
        write_values(file, tensor.read(), tensor.dtype)


def tensor_size(tensor: LazyTensor) -> int:
    """Size of a tensor in a file, in bytes."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize
