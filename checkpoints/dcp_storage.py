"""
Reading and writing the files of a PyTorch distributed checkpoint (DCP).

Its index, the file .metadata, is a pickle. It is unpickled without running code, and checked
before a tensor is read.
"""

import io
import math
import os
import pickle
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from checkpoints.safe_load import BYTES_PER_OBJECT, MIN_OBJECT_LIMIT, check_pickle
from runtime.untrusted import describe_value

METADATA_FILE = ".metadata"
# The only classes and functions that the pickle of DCP's metadata may name.
ALLOWED_METADATA_CLASSES = {
    ("torch", "Size"),
    ("torch", "float32"),
    ("torch", "float16"),
    ("torch", "bfloat16"),
    ("torch", "float64"),
    ("torch", "strided"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    *(("torch.distributed.checkpoint.metadata", name) for name in dcp.metadata.__all__),
}


class DCPWriter(dcp.FileSystemWriter):
    """DCP's writer without storage metadata, because that contains the path of the folder."""

    def storage_meta(self) -> None:
        """Return no storage metadata."""


class DCPReader(dcp.FileSystemReader):
    """DCP's reader with metadata that was read and checked before."""

    def __init__(self, folder: str, metadata: Metadata):
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata without reading the file again."""
        return self.metadata


class SafeMetadataUnpickler(pickle.Unpickler):
    """Unpickles DCP's metadata and calls nothing outside ALLOWED_METADATA_CLASSES."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of that name. Raises ValueError if it is not allowed."""
        if (module, name) not in ALLOWED_METADATA_CLASSES:
            raise ValueError(f"{module}.{name} is not allowed in {METADATA_FILE}")
        return super().find_class(module, name)


def read_metadata(folder: str, files: dict[str, str]) -> Metadata:
    """Read and check DCP's metadata.

    Raises ValueError unless it describes only tensors and all of their values are in these files.
    """
    if METADATA_FILE not in files:
        raise ValueError(f"the sha256 of {METADATA_FILE} is missing")
    with open(os.path.join(folder, METADATA_FILE), "rb") as file:
        content = file.read()
    size = sum(os.path.getsize(os.path.join(folder, name)) for name in files)
    check_pickle(content, max(MIN_OBJECT_LIMIT, size // BYTES_PER_OBJECT), allowed=None)
    metadata = SafeMetadataUnpickler(io.BytesIO(content)).load()
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{METADATA_FILE} is not an index of tensors")
    entries = tensor_entries(metadata)
    for name, entry in entries.items():
        check_entry(name, entry)
    expected = sum(math.prod(e.size) * e.properties.dtype.itemsize for e in entries.values())
    if expected > size:
        raise ValueError("its tensors are larger than its files")
    for info in metadata.storage_data.values():
        if info.relative_path not in files:
            name = describe_value(info.relative_path)
            raise ValueError(f"{METADATA_FILE} names a file of no shard, {name}")
    return metadata


def tensor_entries(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """The descriptions of the tensors. Raises ValueError for objects other than tensors."""
    entries: dict[str, TensorStorageMetadata] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{METADATA_FILE} is not an index of tensors")
        entries[name] = entry
    return entries


def check_entry(name: str, entry: TensorStorageMetadata) -> None:
    """Raise ValueError unless the shards cover the tensor."""
    for chunk in entry.chunks:
        axes = zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
        if not all(0 <= start <= start + length <= size for start, length, size in axes):
            raise ValueError(f"a shard of {name} exceeds its shape")
    if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
        raise ValueError(f"some values of {name} are missing")
