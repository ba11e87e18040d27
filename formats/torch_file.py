"""
PyTorch's own files, read and written a tensor at a time: a zip archive with a pickle, in which each
tensor names a record data/N, and those records.

The pickle is read by torch.load with weights_only, which runs no code; the archive before that,
so that no record can claim more than the file has.
"""

import collections
import math
import os
import pickle
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass

import torch

from checkpoints.file import describe_load_error
from formats.lazy_model import LazyTensor, read_into, write_values
from runtime.atomic_files import FileSource

LOCAL_HEADER = struct.Struct(
    "<4s22x2H"
)  # signature, ..., lengths of the name and of the extra field
STORAGE_TYPES = {
    **{
        torch.float32: "FloatStorage",
        torch.float16: "HalfStorage",
        torch.bfloat16: "BFloat16Storage",
    },
    torch.float64: "DoubleStorage",
}


def is_zip(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\3\4"


def read_torch_file(path: str):
    """What torch.save wrote, with a LazyTensor for each tensor. Raises ValueError where it is
    damaged or holds more than data."""
    try:
        source = FileSource(path)
        records = records_of(path)
        with open(path, "rb") as file:
            content = torch.load(file, map_location="meta", weights_only=True)
        return stored_tensors(content, source, records, {})
    except (
        Exception
    ) as error:  # whatever a damaged file may lead the zip and pickle readers to raise
        raise ValueError(
            f"{path}: damaged or not a checkpoint ({describe_load_error(error)})"
        ) from error


def records_of(path: str) -> dict[int, zipfile.ZipInfo]:
    """The archive's records by where their bytes begin."""
    records, size = {}, os.path.getsize(path)
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for record in archive.infolist():
            file.seek(record.header_offset)
            header = file.read(LOCAL_HEADER.size)
            signature, *lengths = LOCAL_HEADER.unpack(header)
            offset = record.header_offset + LOCAL_HEADER.size + sum(lengths)
            is_plain = (
                record.compress_type == zipfile.ZIP_STORED
                and record.file_size == record.compress_size
            )
            if signature != b"PK\3\4" or not is_plain or offset + record.file_size > size:
                raise ValueError(f"its record {record.filename[:50]} is not whole")
            records[offset] = record
            if not re.search(r"/data/[^/]+$", record.filename):
                archive.read(record)  # the pickle and the like: Python checks their sums here
    return records


def stored_tensors(content, source: FileSource, records: dict[int, zipfile.ZipInfo], seen: dict):
    """content with a LazyTensor in the place of each tensor on the meta device. What is there
    more than once is converted once: a few bytes of pickle can speak of it billions of times."""
    if isinstance(content, torch.Tensor):
        return stored_tensor(content, source, records)
    if not isinstance(content, (dict, list, tuple)):
        return content
    if id(content) not in seen:
        seen[id(content)] = None  # of a container within itself
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        inside = {key: stored_tensors(value, source, records, seen) for key, value in pairs}
        seen[id(content)] = inside if isinstance(content, dict) else list(inside.values())
    return seen[id(content)]


def stored_tensor(
    tensor: torch.Tensor, source: FileSource, records: dict[int, zipfile.ZipInfo]
) -> LazyTensor:
    storage, itemsize = tensor.untyped_storage(), tensor.dtype.itemsize
    offset = getattr(storage, "_checkpoint_offset", None)
    record = records.get(offset)
    if tensor.layout != torch.strided or record is None or storage.nbytes() != record.file_size:
        raise ValueError("a tensor has no record of its size")
    if record.file_size % itemsize:
        raise ValueError("a tensor's record is no whole number of values")
    span = tensor.storage_offset() + sum(
        (n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
    if tensor.numel() and not tensor.numel() <= span + 1 <= record.file_size // itemsize:
        raise ValueError("a tensor reaches beyond its record")
    view = tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()

    def read():
        values = read_record(source, offset, record).view(tensor.dtype)
        return values.as_strided(
            tensor.shape, tensor.stride(), tensor.storage_offset()
        ).contiguous()

    place, checksum = (source.path, offset, *view), (record.CRC, record.file_size, *view)
    return LazyTensor(tuple(tensor.shape), tensor.dtype, read, place, checksum)


def read_record(source: FileSource, offset: int, record: zipfile.ZipInfo) -> torch.Tensor:
    """The bytes of a record, on the CPU, checked against their sum."""
    values = torch.empty(record.file_size, dtype=torch.uint8)
    with source.open(offset) as file:
        read_into(file, values, source.path)
    if zlib.crc32(values.numpy()) != record.CRC:
        raise ValueError(
            f"{source.path}: its record {record.filename} has not the sum that was written; it is damaged"
        )
    return values


@dataclass(frozen=True)
class Storage:
    """What a tensor in the pickle points to."""

    key: str
    tensor: LazyTensor


class Pickler(pickle.Pickler):
    """Pickles as torch.save does; keeps the tensors it met, a record each, in storages."""

    def __init__(self, file):
        super().__init__(file, protocol=2)
        self.storages: dict[int, Storage] = {}  # by id, so that a tied tensor is written once

    def reducer_override(self, value):
        if not isinstance(value, LazyTensor):
            return NotImplemented
        storage = self.storages.setdefault(id(value), Storage(str(len(self.storages)), value))
        strides = [math.prod(value.shape[axis + 1 :]) for axis in range(len(value.shape))]
        arguments = storage, 0, value.shape, tuple(strides), False, collections.OrderedDict()
        return torch._utils._rebuild_tensor_v2, arguments

    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        kind = getattr(torch, STORAGE_TYPES[value.tensor.dtype])
        return "storage", kind, value.key, "cpu", math.prod(value.tensor.shape)


def write_torch_file(file, content):
    """Write content, plain objects and StoredTensors, for torch.load to read, into an open binary
    file. One tensor at a time is in memory."""
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open(aligned(archive, "archive/data.pkl", 0), "w") as record:
            pickler = Pickler(record)
            pickler.dump(content)
        archive.writestr("archive/byteorder", "little")
        for storage in pickler.storages.values():
            tensor = storage.tensor
            size = math.prod(tensor.shape) * tensor.dtype.itemsize
            info = aligned(archive, f"archive/data/{storage.key}", size)
            with archive.open(info, "w", force_zip64=size >= 1 << 31) as record:
                write_values(record, tensor.read(), tensor.dtype)
        archive.writestr("archive/version", "3\n")


def aligned(archive: zipfile.ZipFile, name: str, size: int) -> zipfile.ZipInfo:
    """A record whose bytes will begin at a multiple of 64, as torch.load's mmap wants them."""
    info = zipfile.ZipInfo(name)
    zip64 = 20 if size >= 1 << 31 else 0
    padding = -(archive.fp.tell() + 30 + len(name) + zip64 + 4) % 64
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    info.file_size = size
    return info
