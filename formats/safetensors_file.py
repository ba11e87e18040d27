"""
safetensors: the length of a header, the header in JSON, then the tensors' bytes, little-endian.

The header maps each name to its dtype, shape and data_offsets, [begin, end) behind the header; the
tensors lie without gaps (https://huggingface.co/docs/safetensors).
"""

import json
import math
import os
import struct
from collections.abc import Iterable

import torch

from formats.lazy_model import LazyTensor, stored_in_file, write_values
from runtime.atomic_files import FileSource

LENGTH = struct.Struct("<Q")
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
    },
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_safetensors(path: str) -> dict[str, LazyTensor]:
    """The tensors of a file by name. Raises ValueError where the header is damaged or does not fit
    the file."""
    source, size = FileSource(path), os.path.getsize(path)
    with source.open() as file:
        start = file.read(LENGTH.size)
        length = LENGTH.unpack(start)[0] if len(start) == LENGTH.size else size
        if length > min(LARGEST_HEADER, size - LENGTH.size):
            raise ValueError(
                f"{path}: not a safetensors file, or a damaged one (its header is longer than the file)"
            )
        header = file.read(length)
    try:
        entries = json.loads(header, parse_constant=refuse_constant)
        entries.pop("__metadata__", None)
        tensors = {name: entry_of(entry) for name, entry in entries.items()}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path}: the header of this safetensors file is damaged ({str(error)[:100]})"
        ) from None
    position, data = 0, LENGTH.size + length
    for name, (_, _, begin, end) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if begin != position:
            raise ValueError(
                f"{path}: {name[:100]} begins at {begin}, not at {position}; the file is damaged"
            )
        position = end
    if data + position != size:
        raise ValueError(
            f"{path}: {size} bytes, but its header says {data + position}; it is damaged"
        )
    return {
        name: stored_in_file(source, data + begin, dtype, shape)
        for name, (dtype, shape, begin, _) in tensors.items()
    }


def entry_of(entry: dict) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """dtype, shape, begin and end of a header's entry. Raises ValueError where they do not agree."""
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, begin, end)) or len(shape) > 8:
        raise ValueError(f"sizes are whole numbers: {entry}")
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']} is not known here")
    dtype = DTYPES[entry["dtype"]]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the bytes are not those of the shape: {entry}")
    return dtype, shape, begin, end


def refuse_constant(name: str):
    raise ValueError(f"{name} is no number")


def write_safetensors(file, tensors: Iterable[tuple[str, LazyTensor]]):
    """Write named tensors, one at a time in memory, into an open binary file."""
    tensors, header, position = list(tensors), {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors:
        end = position + size_of(tensor)
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [position, end],
        }
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded = encoded.ljust(-(-len(encoded) // 8) * 8)  # values begin at a multiple of 8 bytes
    file.write(LENGTH.pack(len(encoded)) + encoded)
    for _, tensor in tensors:
        write_values(file, tensor.read(), tensor.dtype)


def size_of(tensor: LazyTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize
