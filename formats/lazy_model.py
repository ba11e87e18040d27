"""
A model as it lies in a file: what it is made of, and tensors that are read one at a time.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from checkpoints.file import check_weights, max_abs
from model import ModelArgs, Transformer, parameter_shapes
from runtime.atomic_files import FileSource
from textdata.tokenizer import Tokenizer, load_tokenizer

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BLOCK = 1 << 20  # values that are converted at a time, so that a conversion takes little memory


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file, or one to write: read() brings it to the CPU, dtype is that in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    place: object = None  # where its values lie, if it is known: tensors of one place are one
    checksum: object = None  # known without reading: tensors of other checksums have other values


@dataclass
class LazyModel:
    """A model in a file. tensors has our names, without a classifier that is the embedding. Raises
    ValueError where they are not those of args."""

    path: str
    args: ModelArgs
    tensors: dict[str, LazyTensor]
    own_tokenizer: Callable[[], Tokenizer | None] = field(default=lambda: None)
    tokenizer_hash: str | None = None  # of the vocabulary it was trained with, where the file tells

    def __post_init__(self):
        check_weights(self.args, self.tensors, self.path)
        for name, tensor in self.tensors.items():
            if tensor.dtype not in (*TORCH_DTYPES.values(), torch.float64):
                raise ValueError(
                    f"{self.path}: {name} is of {tensor.dtype}, which is not read here"
                )

    @property
    def dtype(self) -> torch.dtype:
        """That of the matrices; float32 where they are quantized."""
        return self.tensors["layers.0.attention.wq.weight"].dtype

    def names(self) -> list[str]:
        return [name for name, _ in parameter_shapes(self.args)]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU. Raises ValueError where it is damaged or has values that are no numbers."""
        if name == "output.weight" and self.args.tie_embeddings:
            name = "tok_embeddings.weight"
        tensor = self.tensors[name].read()
        if not math.isfinite(max_abs(tensor)):
            raise ValueError(f"{self.path}: {name} has values that are no numbers")
        return tensor

    @torch.no_grad()
    def model(self) -> Transformer:
        """The model, in float32, ready to evaluate."""
        model = Transformer.uninitialized(self.args)
        for name in self.names():
            model.get_parameter(name).copy_(self.read(name))
        return model.eval()


def from_model(
    model: Transformer, path: str = "the model", tokenizer: Tokenizer | None = None
) -> LazyModel:
    """A model in memory, seen as one in a file."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return from_state_dict(model.args, weights, path, tokenizer)


def from_state_dict(
    args: ModelArgs, weights: dict, path: str = "the model", tokenizer: Tokenizer | None = None
):
    """The same of a state dict."""
    tensors = {
        name: LazyTensor(tuple(weight.shape), weight.dtype, lambda weight=weight: weight.cpu())
        for name, weight in weights.items()
    }
    return LazyModel(path, args, tensors, lambda: tokenizer, tokenizer.hash if tokenizer else None)


def same_values(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors are equal, bit for bit. One at a time is in memory."""
    if a.place is not None and a.place == b.place:
        return True
    if a.checksum is None or a.checksum != b.checksum:
        return False
    digests = [hashlib.sha256(as_bytes(tensor.read())).digest() for tensor in (a, b)]
    return digests[0] == digests[1]


def stored_in_file(
    source: FileSource, offset: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> LazyTensor:
    """A tensor whose little-endian values lie in a file from offset on."""

    def read():
        tensor = torch.empty(shape, dtype=dtype)
        with source.open(offset) as file:
            read_into(file, tensor, source.path)
        return tensor

    return LazyTensor(shape, dtype, read)


def cast_lazily(
    lazy_model: LazyModel, name: str, dtype: torch.dtype, change: Callable | None = None
) -> LazyTensor:
    """A tensor of a model, to be written in dtype, with its rows in another order if change says so."""

    def read():
        tensor = lazy_model.read(name)
        check_range(tensor, dtype, name)
        return change(tensor) if change else tensor

    return LazyTensor(lazy_model.tensors[name].shape, dtype, read)


def read_json(path: str) -> dict:
    """The settings in a file. Raises ValueError where it is damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON, or damaged ({str(error)[:100]})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a table of settings")
    return content


def read_into(file, tensor: torch.Tensor, path: str):
    """Fill a contiguous tensor from an open file. Raises ValueError where the file ends before."""
    left = memoryview(as_bytes(tensor))
    while left:
        count = file.readinto(left[: 1 << 30])  # the system reads less than 2 GiB at once
        if not count:
            raise ValueError(f"{path}: it ends within a tensor; it is damaged")
        left = left[count:]


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def write_values(file, tensor: torch.Tensor, dtype: torch.dtype):
    """Write the values of a tensor in order, in dtype, some rows at a time. A function of its own, so
    that no part of a tensor is held when the next one is read."""
    tensor = tensor.reshape(1) if tensor.dim() == 0 else tensor
    rows = max(1, BLOCK // max(1, math.prod(tensor.shape[1:])))
    for part in tensor.split(rows):
        file.write(as_bytes(part.to(dtype).contiguous()))


def check_range(tensor: torch.Tensor, dtype: torch.dtype, name: str):
    """Raise ValueError where a value of the tensor is too large for dtype."""
    if max_abs(tensor) > torch.finfo(dtype).max:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"{name} has values too large for {kind}; use --dtype=float32 or bfloat16")


def expand_layers(table: Iterable[tuple[str, str]], args: ModelArgs) -> Iterator[tuple[str, str]]:
    """Our name and theirs of every tensor of a model, in order, from a table in which {} stands for
    the number of a layer. Without a classifier that is the embedding."""
    for ours, theirs in table:
        if ours == "output.weight" and args.tie_embeddings:
            continue
        for layer in range(args.n_layers if "{}" in ours else 1):
            yield ours.format(layer), theirs.format(layer)


def one_line(text: str, longest: int = 400) -> str:
    """A text that may quote a damaged file, fit to be printed."""
    printable = "".join(character if character.isprintable() else "�" for character in text)
    return printable if len(printable) <= longest else printable[:longest] + "…"


def find_tokenizer(*folders: str) -> Tokenizer | None:
    """The tokenizer.model or tokenizer.bin in the first of the folders that has one."""
    paths = (
        os.path.join(folder, name)
        for folder in folders
        for name in ("tokenizer.model", "tokenizer.bin")
    )
    path = next(filter(os.path.isfile, paths), None)
    return load_tokenizer(path) if path else None
