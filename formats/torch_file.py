"""
PyTorch's files, read and written one tensor at a time: a zip archive with a pickle, data.pkl, and a
record data/N for the values of each tensor. The pickle refers to the records.

torch.load reads the pickle with weights_only, so that it runs no code, after the checks of
checkpoints/safe_load.py.
"""

import collections
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import torch

from checkpoints.file import as_bytes, describe_load_error
from checkpoints.safe_load import (
    LOCAL_HEADER,
    ZIP_SIGNATURE,
    check_not_old,
    check_tensor,
    load_on_meta,
    read_records,
)
from formats.lazy_model import LazyTensor, read_into, write_values
from runtime.atomic_files import FileSource
from runtime.lfs import require_content

ZIP64_SIZE = 1 << 31  # bytes; a record of this size or larger has a zip64 extra field
ZIP64_EXTRA_SIZE = 20  # bytes
RECORD_ALIGNMENT = 64  # bytes; torch.load(mmap=True) needs it
STORAGE_TYPES = {
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.float64: "DoubleStorage",
}


# Reading


def is_zip(path: str) -> bool:
    """Whether a file begins as a zip archive."""
    with open(path, "rb") as file:
        return file.read(4) == ZIP_SIGNATURE


def read_torch_file(path: str) -> Any:
    """The content of a file of torch.save, with a LazyTensor for each tensor.

    Raises ValueError if it is damaged or contains more than data.
    """
    require_content(path)
    check_not_old(path)
    try:
        source = FileSource(path)
        records = read_records(path)
        content = load_on_meta(path, records)
        return replace_tensors(content, source, records, {})
    except Exception as error:  # the readers of zip and pickle raise anything for damaged files
        raise ValueError(
            f"{path}: damaged or not a checkpoint ({describe_load_error(error)})"
        ) from error


def replace_tensors(
    content: Any, source: FileSource, records: dict[int, zipfile.ZipInfo], seen: dict[int, Any]
) -> Any:
    """The content with a LazyTensor for each tensor on the meta device.

    seen maps the id of a container to its result. A container that occurs more than once is
    converted once: a few bytes of pickle can refer to it billions of times.
    """
    if isinstance(content, torch.Tensor):
        return open_tensor(content, source, records)
    if not isinstance(content, (dict, list, tuple)):
        return content
    if id(content) not in seen:
        seen[id(content)] = None  # for a container that contains itself
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        inside = {key: replace_tensors(value, source, records, seen) for key, value in pairs}
        seen[id(content)] = inside if isinstance(content, dict) else list(inside.values())
    return seen[id(content)]


def open_tensor(
    tensor: torch.Tensor, source: FileSource, records: dict[int, zipfile.ZipInfo]
) -> LazyTensor:
    """The LazyTensor of a meta tensor. Raises ValueError if its record does not contain it."""
    record = check_tensor(tensor, records)
    record_offset: Any = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    view = (tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())

    def read() -> torch.Tensor:
        values = read_record(source, record_offset, record).view(tensor.dtype)
        offset = tensor.storage_offset()
        return values.as_strided(tensor.shape, tensor.stride(), offset).contiguous()

    location = (source.path, record_offset, *view)
    checksum = (record.CRC, record.file_size, *view)
    return LazyTensor(tuple(tensor.shape), tensor.dtype, read, location, checksum)


def read_record(source: FileSource, offset: int, record: zipfile.ZipInfo) -> torch.Tensor:
    """The bytes of a record. Raises ValueError if they do not match its checksum."""
    values = torch.empty(record.file_size, dtype=torch.uint8)
    with source.open(offset) as file:
        read_into(file, values, source.path)
    if zlib.crc32(as_bytes(values)) != record.CRC:
        raise ValueError(
            f"{source.path}: its record {record.filename} does not match its checksum; "
            "it is damaged"
        )
    return values


# Writing


@dataclass(frozen=True)
class Storage:
    """A record of the archive, as the pickle refers to it."""

    key: str
    tensor: LazyTensor


class TensorPickler(pickle.Pickler):
    """Pickles as torch.save does, with a record in storages for each tensor."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file, protocol=2)
        self.storages: dict[int, Storage] = {}  # by id, so that a tied tensor is written once

    def reducer_override(self, value: Any) -> Any:
        """Pickle a LazyTensor as torch.Tensor does."""
        if not isinstance(value, LazyTensor):
            return NotImplemented
        storage = self.storages.setdefault(id(value), Storage(str(len(self.storages)), value))
        strides = [math.prod(value.shape[axis + 1 :]) for axis in range(len(value.shape))]
        rebuild: Callable = torch._utils._rebuild_tensor_v2
        hooks: dict = collections.OrderedDict()
        return rebuild, (storage, 0, value.shape, tuple(strides), False, hooks)

    def persistent_id(self, value: Any) -> tuple | None:
        """Refer to a record."""
        if not isinstance(value, Storage):
            return None
        storage_type = getattr(torch, STORAGE_TYPES[value.tensor.dtype])
        return "storage", storage_type, value.key, "cpu", math.prod(value.tensor.shape)


def write_torch_file(file: IO[bytes], content: Any) -> None:
    """Write plain objects and LazyTensors to an open file, for torch.load.

    One tensor at a time is in memory.
    """
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open(aligned_record(archive, "archive/data.pkl", 0), "w") as record:
            pickler = TensorPickler(record)
            pickler.dump(content)
        archive.writestr(small_record("archive/byteorder"), "little")
        for storage in pickler.storages.values():
            tensor = storage.tensor
            size = math.prod(tensor.shape) * tensor.dtype.itemsize
            info = aligned_record(archive, f"archive/data/{storage.key}", size)
            with archive.open(info, "w", force_zip64=size >= ZIP64_SIZE) as record:
                write_values(record, tensor.read(), tensor.dtype)
        archive.writestr(small_record("archive/version"), "3\n")


def small_record(name: str) -> zipfile.ZipInfo:
    """A record without a timestamp, so that the same model gives the same bytes at any time."""
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o600 << 16  # permissions, as writestr sets them
    return info


def aligned_record(archive: zipfile.ZipFile, name: str, size: int) -> zipfile.ZipInfo:
    """A record to append, padded so that its content begins at a multiple of RECORD_ALIGNMENT."""
    assert archive.fp is not None, "the archive is open"
    info = zipfile.ZipInfo(name)
    zip64 = ZIP64_EXTRA_SIZE if size >= ZIP64_SIZE else 0
    extra_header = 4
    header_size = LOCAL_HEADER.size + len(name) + zip64 + extra_header
    padding = -(archive.fp.tell() + header_size) % RECORD_ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    info.file_size = size
    return info
