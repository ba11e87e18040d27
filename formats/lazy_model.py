"""
Models with tensors that are read from a file one at a time, and helpers of several formats.
"""

import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import torch

from checkpoints.file import as_bytes, check_weights, max_abs
from formats.model_metadata import ModelMetadata, complete
from model import ModelArgs, Transformer, parameter_shapes
from runtime.atomic_files import FileSource
from runtime.lfs import require_content
from runtime.untrusted import clip
from textdata.tokenizer import MAX_FILE_SIZE, Tokenizer, find_tokenizer_file, load_tokenizer

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
READABLE_DTYPES = (*TORCH_DTYPES.values(), torch.float64)
BLOCK = 1 << 20  # values converted at a time, to bound the memory of a conversion
MAX_READ = 1 << 30  # bytes; a system call reads less than 2 GiB


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file, or one to write. read() returns it on the CPU."""

    shape: tuple[int, ...]
    dtype: torch.dtype  # in the file
    read: Callable[[], torch.Tensor]
    location: object = None  # file and offset, if known: tensors with equal locations are the same
    checksum: object = None  # if known: tensors with different checksums have different values


def no_tokenizer() -> None:
    """Used as LazyModel.read_tokenizer where there is no tokenizer."""


def no_metadata() -> None:
    """Used as LazyModel.read_metadata for formats that do not store it."""


@dataclass
class LazyModel:
    """A model in a file.

    tensors has the names of Transformer's state dict, without a tied output.weight. Raises
    ValueError if the tensors do not match args.
    """

    path: str
    args: ModelArgs
    tensors: dict[str, LazyTensor]
    read_tokenizer: Callable[[], Tokenizer | None] = no_tokenizer
    tokenizer_hash: str | None = None  # of the tokenizer it was trained with, if the file has it
    read_metadata: Callable[[], ModelMetadata | None] = no_metadata
    contains_tokenizer: bool = False  # whether the tokenizer is part of the model's file or folder

    def __post_init__(self) -> None:
        check_weights(self.args, self.tensors, self.path)
        for name, tensor in self.tensors.items():
            if tensor.dtype not in READABLE_DTYPES:
                raise ValueError(f"{self.path}: {name} has the unsupported dtype {tensor.dtype}")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrices; float32 if they are quantized."""
        return self.tensors["layers.0.attention.wq.weight"].dtype

    def metadata(self, tokenizer: Tokenizer | None) -> ModelMetadata:
        """The metadata to write with this tokenizer. Raises ValueError if it is damaged."""
        return complete(self.read_metadata(), tokenizer)

    def names(self) -> list[str]:
        """The names of the tensors, in the order of the state dict."""
        return [name for name, _ in parameter_shapes(self.args)]

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor to the CPU. Raises ValueError if it is damaged or not finite."""
        if name == "output.weight" and self.args.tie_embeddings:
            name = "tok_embeddings.weight"
        tensor = self.tensors[name].read()
        if not math.isfinite(max_abs(tensor)):
            raise ValueError(f"{self.path}: {name} contains NaN or Inf values")
        return tensor

    @torch.no_grad()
    def load(self) -> Transformer:
        """Load all tensors into a Transformer, in float32 and in evaluation mode."""
        model = Transformer.uninitialized(self.args)
        for name in self.names():
            model.get_parameter(name).copy_(self.read(name))
        return model.eval()


def from_model(
    model: Transformer, path: str = "the model", tokenizer: Tokenizer | None = None
) -> LazyModel:
    """A LazyModel of a model in memory. path appears in error messages."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return from_state_dict(model.args, weights, path, tokenizer)


def from_state_dict(
    args: ModelArgs,
    weights: dict[str, torch.Tensor],
    path: str = "the model",
    tokenizer: Tokenizer | None = None,
) -> LazyModel:
    """A LazyModel of a state dict in memory. path appears in error messages."""
    tensors = {
        name: LazyTensor(tuple(weight.shape), weight.dtype, weight.cpu)
        for name, weight in weights.items()
    }
    return LazyModel(path, args, tensors, lambda: tokenizer, tokenizer.hash if tokenizer else None)


# Tensors


def tensor_in_file(
    source: FileSource, offset: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> LazyTensor:
    """A tensor stored contiguously and little-endian at an offset of a file."""

    def read() -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        with source.open(offset) as file:
            read_into(file, tensor, source.path)
        return tensor

    return LazyTensor(shape, dtype, read)


def cast_lazily(
    model: LazyModel,
    name: str,
    dtype: torch.dtype,
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> LazyTensor:
    """A tensor of a model, to write in dtype.

    Its read() checks the range of dtype and applies transform. transform must not change the shape.
    """

    def read() -> torch.Tensor:
        tensor = model.read(name)
        check_range(tensor, dtype, name)
        return transform(tensor) if transform else tensor

    return LazyTensor(model.tensors[name].shape, dtype, read)


def same_values(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors are equal bit for bit. Reads at most one of them at a time."""
    if a.location is not None and a.location == b.location:
        return True
    if a.checksum != b.checksum or a.dtype != b.dtype:
        return False
    digests = [hashlib.sha256(as_bytes(tensor.read())).digest() for tensor in (a, b)]
    return digests[0] == digests[1]


def read_into(file: io.FileIO, tensor: torch.Tensor, path: str) -> None:
    """Fill a contiguous tensor from an open file. Raises ValueError if the file is too short."""
    remaining = as_bytes(tensor)
    while remaining:
        count = file.readinto(remaining[:MAX_READ])
        if not count:
            raise ValueError(f"{path}: it ends within a tensor; it is damaged")
        remaining = remaining[count:]


def write_values(file: IO[bytes], tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Write the values of a tensor in dtype, converting BLOCK values at a time.

    This is a function so that its local references to the tensor end before the next one is read.
    """
    tensor = tensor.reshape(1) if tensor.dim() == 0 else tensor
    rows = max(1, BLOCK // max(1, math.prod(tensor.shape[1:])))
    for block in tensor.split(rows):
        file.write(as_bytes(block.to(dtype).contiguous()))


def check_range(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    """Raise ValueError if a value of the tensor is too large for dtype."""
    if max_abs(tensor) > torch.finfo(dtype).max:
        dtype_name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{name} has values too large for {dtype_name}; use --dtype=float32 or bfloat16"
        )


def expand_layers(table: Iterable[tuple[str, str]], args: ModelArgs) -> Iterator[tuple[str, str]]:
    """The tensor names of a model, from a table of names where {} is the layer number.

    Each row has the name in Transformer's state dict and the name in the format. A tied
    output.weight is left out.
    """
    for name, format_name in table:
        if name == "output.weight" and args.tie_embeddings:
            continue
        for layer in range(args.n_layers if "{}" in name else 1):
            yield name.format(layer), format_name.format(layer)


# Other files of a model


def read_json(path: str) -> dict[str, Any]:
    """Read a JSON object from a file. Raises ValueError if it is damaged or very large."""
    require_content(path)
    if os.path.getsize(path) > MAX_FILE_SIZE:
        raise ValueError(f"{path}: too large, more than {MAX_FILE_SIZE >> 20} MB of JSON")
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON, or damaged ({str(error)[:100]})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def find_tokenizer(*folders: str) -> Tokenizer | None:
    """Load the tokenizer of the first of the folders that has one."""
    path = next(filter(None, map(find_tokenizer_file, folders)), None)
    return load_tokenizer(path) if path else None


def one_line(text: str, max_length: int = 400) -> str:
    """A text that may quote a damaged file, made safe to print on one line."""
    return clip(text, max_length)
