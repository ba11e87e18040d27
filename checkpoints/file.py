"""
Training state on disk: saved atomically, loaded strictly and without running code.

A checkpoint is a dict with llama2.c's keys, so that its scripts read ours and we read theirs:
model, optimizer, model_args, iter_num, best_val_loss, config. Beside them stand our own: scaler,
position (sequences read so far), late_norms (see health.py), tokenizer_hash, versions, and sha256 of
all the rest. No random state: see train.py.
"""

import dataclasses
import errno
import hashlib
import math
import os
import pickle
import re
import zipfile

import torch

from model import ModelArgs, parameter_shapes
from ops.rope import RopeScaling
from runtime.atomic_files import AtomicFile

# What torch.load raises for files that it did not write.
UNREADABLE = (
    *(
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,
    ),
    *(pickle.UnpicklingError, zipfile.BadZipFile),
)
# Of an OSError that tells nothing of what the file holds.
TRANSIENT_ERRNOS = {errno.EIO, errno.EACCES, errno.ENOMEM, getattr(errno, "ESTALE", errno.EIO)}
FORMAT = 1  # of our own keys
TIED_WEIGHTS_MISMATCH = "the weights do not fit the model: its classifier differs from its embedding, which this model ties"
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


def save_checkpoint(path: str, checkpoint: dict):
    """Write a checkpoint so that path holds the old one or all of the new one. Raises
    ValueError, and leaves the old, if a weight is not finite; OSError if it cannot be kept."""
    bad = [
        name for name, weight in checkpoint["model"].items() if not math.isfinite(max_abs(weight))
    ]
    if bad:
        raise ValueError(
            f"{path} not written: the weights have values that are no numbers (first in {bad[0]})"
        )
    write_hashed(path, checkpoint)


def write_hashed(path: str, content: dict):
    """Write this and its SHA-256, or nothing. Raises OSError."""
    try:
        with AtomicFile(path) as file:
            torch.save(content | {"sha256": content_hash(content)}, file)
    except RuntimeError as error:
        raise write_error(path, error) from error


def write_error(path: str, error: RuntimeError) -> OSError:
    """What PyTorch's writer means, which hides the cause of a short write."""
    return OSError(
        f"{path}: could not be written whole; is the disk full? ({str(error).splitlines()[0]})"
    )


def content_hash(checkpoint: dict) -> str:
    """SHA-256 of a checkpoint's content but for its own sha256: of every name, number and tensor."""
    digest = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(value, dict | list | tuple):
            digest.update(f"{type(value).__name__}{len(value)}".encode())
            for item in value.items() if isinstance(value, dict) else value:
                add(item)
        else:
            digest.update(repr(value).encode())

    add({name: value for name, value in checkpoint.items() if name != "sha256"})
    return digest.hexdigest()


def describe_load_error(error: Exception) -> str:
    """Why torch.load refused a file, in a few words, and without its advice to trust the file."""
    text = str(error) or "it is empty"
    if "Weights only load failed" in text:
        unsafe = re.search(r"(GLOBAL \S+) was not an allowed", text)
        return (
            f"it holds more than data: {unsafe[1]}"
            if unsafe
            else "its pickle is no table of tensors"
        )
    return text.splitlines()[0][:100]


def max_abs(tensor: torch.Tensor) -> float:
    """The largest magnitude in a tensor; no finite number if one of its values is none. Reads it
    once, at the speed of memory."""
    low, high = torch.aminmax(tensor)
    return max(-low.item(), high.item()) if low.item() == low.item() else math.nan


def load_checkpoint(path: str) -> dict:
    """The checkpoint on the CPU, its model a state dict with our names, its model_args a ModelArgs
    that the weights fit.

    Raises ValueError, naming the file, where it is damaged, unsafe or not a checkpoint."""
    if not os.path.exists(path):
        raise ValueError(f"{path}: there is no checkpoint here; train one with python train.py")
    if os.path.isdir(path):
        raise ValueError(f"{path}: is a folder, not a checkpoint")
    try:
        checkpoint = read_hashed(path)
    except UNREADABLE as error:
        raise as_value_error(path, error) from error
    check_checkpoint(checkpoint, path)
    tied = [checkpoint["model"].get(name) for name in ("tok_embeddings.weight", "output.weight")]
    if checkpoint["model_args"].tie_embeddings and tied[1] is not None and not torch.equal(*tied):
        raise ValueError(f"{path}: {TIED_WEIGHTS_MISMATCH}")
    return checkpoint


def as_value_error(path: str, error: Exception) -> Exception:
    """The refusal of a file that raised this; or the error itself, if it says nothing of the file."""
    if getattr(error, "errno", None) in TRANSIENT_ERRNOS or "can't allocate memory" in str(error):
        return error
    return ValueError(f"{path}: damaged or not a checkpoint ({describe_load_error(error)})")


def read_hashed(path: str) -> dict:
    """What torch.save wrote, compared with the SHA-256 in it, if there is one. Raises an UNREADABLE."""
    with open(path, "rb") as file:
        content = torch.load(file, map_location="cpu", weights_only=True)
    written = content.get("sha256") if isinstance(content, dict) else None
    if written is not None and written != content_hash(content):
        raise ValueError("its sha256 is another; if you changed it, delete that key")
    return content


# Of what a checkpoint may hold beside the model and the optimizer's state.
FIELD_TYPES = {
    "config": dict,
    "iter_num": int,
    "tokenizer_hash": str,
    "scaler": dict,
    "position": int,
    "late_norms": list,
}


def check_checkpoint(checkpoint, path: str):
    """Raise ValueError unless this is a training checkpoint, its tensors (or what stands for them,
    with shapes) those of its model_args. Gives the weights our names, makes model_args a ModelArgs."""
    missing = {"model", "model_args", "iter_num"} - set(
        checkpoint if isinstance(checkpoint, dict) else ()
    )
    if missing:
        raise ValueError(
            f"{path}: not a training checkpoint, it has no {', '.join(sorted(missing))}"
        )
    state = checkpoint["model"]
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and hasattr(v, "shape") for k, v in state.items()
    ):
        raise ValueError(f"{path}: not a training checkpoint, its model is no table of tensors")
    for name, kind in FIELD_TYPES.items():
        if name in checkpoint and not isinstance(checkpoint[name], kind):
            raise ValueError(
                f"{path}: not a training checkpoint, its {name} is {type(checkpoint[name]).__name__}"
            )
    for name in ("iter_num", "position"):
        if not 0 <= checkpoint.get(name, 0) < 2**63:
            raise ValueError(f"{path}: not a training checkpoint, its {name} is {checkpoint[name]}")
    checkpoint["model"] = {strip_prefixes(name): weight for name, weight in state.items()}
    checkpoint["model_args"] = read_model_args(path, checkpoint["model_args"])
    check_weights(checkpoint["model_args"], checkpoint["model"], path)


def strip_prefixes(name: str) -> str:
    """Without the prefixes that torch.compile and DDP put before a parameter's name."""
    return name.removeprefix("module.").removeprefix("_orig_mod.").removeprefix("module.")


def read_model_args(path: str, saved: dict) -> ModelArgs:
    known = {field.name for field in dataclasses.fields(ModelArgs)}
    if not isinstance(saved, dict) or not set(LLAMA2C_MODEL_ARGS[:1]) <= set(saved) <= known:
        raise ValueError(f"{path}: model_args are not those of a Llama: {saved}")
    try:
        if saved.get("rope_scaling") is not None:
            scaling = dict(saved["rope_scaling"])
            scaling["type"] = scaling.pop(
                "kind"
            )  # the key in files written since the first release
            saved = saved | {"rope_scaling": RopeScaling(**scaling)}
        return ModelArgs(**saved)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: model_args are not those of a Llama: {error}") from error


def write_model_args(args: ModelArgs) -> dict:
    """llama2.c's keys, and further ones only where the architecture needs them: llama2.c's
    readers do not know more."""
    saved = {name: getattr(args, name) for name in LLAMA2C_MODEL_ARGS} | {
        "n_kv_heads": args.kv_heads
    }
    plain = dataclasses.replace(ModelArgs(), **saved)
    extra = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name not in saved}
    if args.rope_scaling:
        scaling = dataclasses.asdict(args.rope_scaling)
        extra["rope_scaling"] = {"kind": scaling.pop("type"), **scaling}
    return saved | {name: value for name, value in extra.items() if value != getattr(plain, name)}


def check_weights(args: ModelArgs, tensors: dict, path: str):
    """Raise ValueError unless tensors (name to anything with a shape) are those of the model, naming
    what is missing, unexpected or of another shape. A tied classifier may be there or not."""
    problems, known = [], {"output.weight"} if args.tie_embeddings else set()
    for name, shape in parameter_shapes(args):
        known.add(name)
        if name not in tensors:
            problems.append(f"no {name}")
        elif tuple(tensors[name].shape) != shape:
            problems.append(f"{name} is {tuple(tensors[name].shape)}, not {shape}")
        if len(problems) == 3:
            break
    else:
        problems += [f"unexpected {name}" for name in tensors if name not in known]
    if problems:
        raise ValueError(f"{path}: the weights do not fit the model: {'; '.join(problems[:3])}")


def is_sharded_checkpoint(path: str) -> bool:
    """Whether it is a folder as sharded.py writes it, perhaps a damaged one."""
    return any(os.path.isfile(os.path.join(path, name)) for name in (".metadata", "run.pt"))
