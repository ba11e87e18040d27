"""
Training state on disk: saved atomically, loaded strictly and without running code.

A checkpoint is a dict with the keys of llama2.c, so that either project reads the other's files:
model, optimizer, model_args, iter_num, best_val_loss, config. This project adds scaler, position
(number of sequences read so far), late_norms (recent gradient norms), tokenizer_hash, eval_hash (of
the windows that best_val_loss was measured on), model_metadata (see formats/model_metadata.py),
versions, and sha256, the hash of all other entries. Random number generator state is not stored:
see train.py.
"""

import dataclasses
import errno
import hashlib
import math
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from checkpoints.safe_load import check_not_old, safe_load
from model import ModelArgs, parameter_shapes
from ops.rope import RopeScaling
from runtime.atomic_files import AtomicFile
from runtime.lfs import require_content
from runtime.untrusted import clip, describe_keys, describe_value

FORMAT = 1  # version of the keys that this project adds
# Exceptions that torch.load raises for files that torch.save did not write.
UNREADABLE = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    zlib.error,
    AssertionError,
)
# An OSError with one of these numbers says nothing about the content of the file.
TRANSIENT_ERRNOS = {
    errno.EIO,
    errno.EACCES,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ETIMEDOUT,
    getattr(errno, "ESTALE", errno.EIO),
}
TIED_WEIGHTS_MISMATCH = (
    "the weights do not fit the model: tie_embeddings is set, "
    "but output.weight differs from tok_embeddings.weight"
)
LLAMA2C_MODEL_ARGS = (
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "multiple_of",
    "max_seq_len",
    "dropout",
)
# Types of the entries other than the model and the optimizer state.
FIELD_TYPES = {
    "config": dict,
    "iter_num": int,
    "tokenizer_hash": str,
    "eval_hash": str,
    "scaler": dict,
    "position": int,
    "late_norms": list,
    "model_metadata": str,
}
MAX_PROBLEMS = 3  # mismatched weights that an error message lists


class HasShape(Protocol):
    """A tensor, or a description of one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each dimension."""


# Writing


def save_checkpoint(path: str, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint atomically: path holds the old content or all of the new content.

    Raises ValueError, and keeps the old file, if a weight is not finite. Raises OSError if the
    file cannot be written.
    """
    for name, weight in checkpoint["model"].items():
        if not math.isfinite(max_abs(weight)):
            raise ValueError(
                f"{path} not written: the weights of step {checkpoint['iter_num']} contain NaN or "
                f"Inf values (first in {name})"
            )
    write_hashed(path, checkpoint)


def write_hashed(path: str, content: dict[str, Any]) -> None:
    """Write content and its SHA-256 atomically with torch.save. Raises OSError."""
    try:
        with AtomicFile(path) as file:
            torch.save(content | {"sha256": content_hash(content)}, file)
    except RuntimeError as error:
        raise write_error(path, error) from error


def write_error(path: str, error: RuntimeError) -> OSError:
    """The OSError for a RuntimeError of PyTorch's writer, which does not name its cause."""
    reason = str(error).splitlines()[0]
    return OSError(f"{path}: could not be written completely; is the disk full? ({reason})")


def content_hash(checkpoint: dict[str, Any]) -> str:
    """SHA-256 of every name, number and tensor of a checkpoint except its sha256 entry."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(as_bytes(value.detach().cpu().contiguous()))
        elif isinstance(value, dict | list | tuple):
            digest.update(f"{type(value).__name__}{len(value)}".encode())
            for item in value.items() if isinstance(value, dict) else value:
                add(item)
        else:
            digest.update(repr(value).encode())

    add({name: value for name, value in checkpoint.items() if name != "sha256"})
    return digest.hexdigest()


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, not copied."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()  # numpy's stubs lack the protocol
    return memoryview(array)


def max_abs(tensor: torch.Tensor) -> float:
    """The largest magnitude in a tensor, NaN if a value is NaN. Reads the tensor once."""
    low, high = torch.aminmax(tensor)
    return max(-low.item(), high.item()) if low.item() == low.item() else math.nan


def write_model_args(args: ModelArgs) -> dict[str, Any]:
    """The model_args entry of a checkpoint.

    It has the keys of llama2.c. Further keys appear only where the architecture needs them,
    because llama2.c refuses keys it does not know.
    """
    saved = {name: getattr(args, name) for name in LLAMA2C_MODEL_ARGS}
    saved["n_kv_heads"] = args.kv_heads
    defaults = dataclasses.replace(ModelArgs(), **saved)
    extra = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name not in saved}
    if args.rope_scaling:
        scaling = dataclasses.asdict(args.rope_scaling)
        extra["rope_scaling"] = {"kind": scaling.pop("type"), **scaling}  # the key in files
    return saved | {k: value for k, value in extra.items() if value != getattr(defaults, k)}


# Reading


def load_checkpoint(path: str) -> dict[str, Any]:
    """Load a checkpoint to the CPU.

    In the result, model is a state dict without prefixes, and model_args is a ModelArgs that
    matches the weights. Raises ValueError, with the path, if the file is damaged, unsafe or not a
    checkpoint.
    """
    if not os.path.exists(path):
        raise ValueError(f"{path}: there is no checkpoint here; train one with python train.py")
    if not os.path.isfile(path):
        other = "folder" if os.path.isdir(path) else "device or a pipe"
        raise ValueError(f"{path}: is a {other}, not a checkpoint")
    require_content(path)
    check_not_old(path)
    try:
        content = read_hashed(path)
    except UNREADABLE as error:
        raise as_value_error(path, error) from error
    checkpoint = check_checkpoint(content, path)
    embedding = checkpoint["model"]["tok_embeddings.weight"]
    lm_head = checkpoint["model"].get("output.weight")
    is_tied = checkpoint["model_args"].tie_embeddings
    if is_tied and lm_head is not None and not torch.equal(embedding, lm_head):
        raise ValueError(f"{path}: {TIED_WEIGHTS_MISMATCH}")
    return checkpoint


def read_hashed(path: str, mmap: bool = False) -> Any:
    """Load a file of torch.save and verify its SHA-256 entry, if it has one.

    mmap: map the tensors into memory instead of reading them. Raises one of the exceptions in
    UNREADABLE.
    """
    content = safe_load(path, "cpu", mmap)
    expected = content.get("sha256") if isinstance(content, dict) else None
    if expected is not None and expected != content_hash(content):
        raise ValueError("its sha256 does not match; if you changed the file, delete that key")
    return content


def as_value_error(path: str, error: BaseException) -> BaseException:
    """A ValueError that calls the file damaged; or a transient error of the system, with a path."""
    if "can't allocate memory" in str(error):
        return error
    number = transient_errno(error)
    if number and getattr(error, "filename", None):
        return error
    if number:
        return OSError(number, os.strerror(number), path)
    return ValueError(f"{path}: damaged or not a checkpoint ({describe_load_error(error)})")


def transient_errno(error: BaseException) -> int | None:
    """The number of a transient error of the system, or None for any other error.

    PyTorch writes the number into the text of a RuntimeError."""
    number = getattr(error, "errno", None)
    match = re.search(r": ([^:]+) \((\d{1,3})\)$", str(error))
    if isinstance(error, RuntimeError) and match and match[1] == os.strerror(int(match[2])):
        number = int(match[2])
    return number if number in TRANSIENT_ERRNOS else None


def describe_load_error(error: BaseException) -> str:
    """Why torch.load failed, on one line, without its advice to trust the file."""
    text = str(error) or "it is empty"
    if "Weights only load failed" not in text:
        return clip(text.splitlines()[0])
    unsafe = re.search(r"(GLOBAL \S+) was not an allowed", text)
    return (
        f"it holds more than data: {clip(unsafe[1])}"
        if unsafe
        else "its pickle is not a state dict"
    )


def check_checkpoint(content: Any, path: str) -> dict[str, Any]:
    """Validate the content of a checkpoint.

    Returns it with model_args as a ModelArgs and without prefixes in the names of the weights.
    Only the shapes of the weights are read, so meta tensors and lazy tensors pass too. Raises
    ValueError if an entry is missing or invalid or if the weights do not match model_args.
    """
    required = {"model", "model_args", "iter_num"}
    missing = required - set(content if isinstance(content, dict) else ())
    if missing:
        raise ValueError(
            f"{path}: not a training checkpoint, it has no {', '.join(sorted(missing))}"
        )
    check_fields(content, path)
    weights = {strip_prefixes(name): weight for name, weight in content["model"].items()}
    args = read_model_args(path, content["model_args"])
    check_weights(args, weights, path)
    return content | {"model": weights, "model_args": args}


def check_fields(checkpoint: dict[str, Any], path: str) -> None:
    """Raise ValueError if an entry of a checkpoint has the wrong type or is out of range."""
    weights = checkpoint["model"]
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and hasattr(weight, "shape") for name, weight in weights.items()
    ):
        raise ValueError(f"{path}: not a training checkpoint, its model is not a state dict")
    for name, expected in FIELD_TYPES.items():
        if name in checkpoint and not isinstance(checkpoint[name], expected):
            found = type(checkpoint[name]).__name__
            raise ValueError(f"{path}: not a training checkpoint, its {name} has the type {found}")
    for name in ("iter_num", "position"):
        if not 0 <= checkpoint.get(name, 0) < 2**63:
            found = describe_value(checkpoint[name])
            raise ValueError(f"{path}: not a training checkpoint, its {name} is {found}")


def strip_prefixes(name: str) -> str:
    """A parameter's name without the prefixes of torch.compile and DDP."""
    return name.removeprefix("module.").removeprefix("_orig_mod.").removeprefix("module.")


def read_model_args(path: str, saved: Any) -> ModelArgs:
    """The ModelArgs of a checkpoint's model_args entry. Raises ValueError if it is invalid."""
    known = {field.name for field in dataclasses.fields(ModelArgs)}
    if not isinstance(saved, dict) or not {"dim"} <= set(saved) <= known:
        found = describe_keys(saved) if isinstance(saved, dict) else describe_value(saved)
        raise ValueError(f"{path}: model_args are not those of a Llama: {found}")
    try:
        if saved.get("rope_scaling") is not None:
            scaling = dict(saved["rope_scaling"])
            scaling["type"] = scaling.pop("kind")  # the key in files
            saved = saved | {"rope_scaling": RopeScaling(**scaling)}
        return ModelArgs(**saved)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        reason = clip(str(error), 200)
        raise ValueError(f"{path}: model_args are not those of a Llama: {reason}") from error


def check_weights(args: ModelArgs, weights: Mapping[str, HasShape], path: str) -> None:
    """Raise ValueError unless names and shapes of the weights match the model.

    The message lists missing and unexpected weights and wrong shapes. A tied output.weight is
    optional.
    """
    problems: list[str] = []
    known = {"output.weight"} if args.tie_embeddings else set()
    for name, shape in parameter_shapes(args):
        known.add(name)
        if name not in weights:
            problems.append(f"no {name}")
        elif tuple(weights[name].shape) != shape:
            problems.append(f"{name} is {tuple(weights[name].shape)}, not {shape}")
        if len(problems) == MAX_PROBLEMS:  # a damaged file may describe millions of layers
            break
    else:
        problems += [f"unexpected {clip(name)}" for name in weights if name not in known]
    if problems:
        listed = "; ".join(problems[:MAX_PROBLEMS])
        raise ValueError(f"{path}: the weights do not fit the model: {listed}")


def is_sharded_checkpoint(path: str) -> bool:
    """Whether path is a sharded checkpoint (see sharded.py), complete or damaged."""
    return any(os.path.isfile(os.path.join(path, name)) for name in (".metadata", "run.pt"))
