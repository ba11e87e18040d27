"""
ckpt.pt, a checkpoint of this project or of llama2.c. Its tensor names are those of model.py.

A sharded checkpoint, ckpt.dcp (see checkpoints/sharded.py), is read too. Training state beyond the
weights is neither read nor written here; checkpoints/file.py does that.
"""

import math
import os
from functools import partial

import torch

from checkpoints.file import (
    TIED_WEIGHTS_MISMATCH,
    check_checkpoint,
    is_sharded_checkpoint,
    write_model_args,
)
from checkpoints.safe_load import is_old_pickle
from formats import model_metadata
from formats.lazy_model import (
    TORCH_DTYPES,
    LazyModel,
    LazyTensor,
    cast_lazily,
    find_tokenizer,
    same_values,
)
from formats.model_metadata import ModelMetadata
from formats.torch_file import is_zip, read_torch_file, write_torch_file
from model import ModelArgs
from runtime.atomic_files import AtomicFile
from textdata.tokenizer import Llama3Tokenizer, Tokenizer

METADATA_KEY = "model_metadata"  # of a checkpoint: a ModelMetadata as JSON
DTYPES = {"ckpt": ("float32", "float16", "bfloat16")}


def matches(path: str) -> bool:
    """Whether path is a sharded checkpoint or a file of torch.save."""
    is_file = os.path.isfile(path) and (is_zip(path) or is_old_pickle(path))
    return is_file or is_sharded_checkpoint(path)


# Reading


def read(path: str) -> LazyModel:
    """Open a checkpoint. Raises ValueError if it is damaged or not a checkpoint."""
    if is_sharded_checkpoint(path):
        return read_sharded(path)
    checkpoint = check_checkpoint(read_torch_file(path), path)
    args = checkpoint["model_args"]
    tensors = checkpoint["model"]
    lm_head = tensors.pop("output.weight", None) if args.tie_embeddings else None
    if lm_head and not same_values(lm_head, tensors["tok_embeddings.weight"]):
        raise ValueError(f"{path}: {TIED_WEIGHTS_MISMATCH}")
    read_tokenizer = partial(find_tokenizer, os.path.dirname(path))
    return LazyModel(
        path,
        args,
        tensors,
        read_tokenizer,
        checkpoint.get("tokenizer_hash"),
        read_metadata=partial(read_metadata, checkpoint.get(METADATA_KEY), path),
    )


def read_metadata(content: str | None, path: str) -> ModelMetadata | None:
    """The metadata in a checkpoint, None if it has none. Raises ValueError if it is damaged."""
    return None if content is None else model_metadata.from_json(content, path)


def read_sharded(path: str) -> LazyModel:
    """Open a sharded checkpoint. Raises ValueError if it is damaged."""
    from checkpoints.sharded import open_sharded  # importing DCP takes a second

    checkpoint = open_sharded(path)

    def read_tensor(name: str, meta: torch.Tensor) -> torch.Tensor:
        key = f"model/{name}"
        empty = torch.empty(meta.shape, dtype=meta.dtype)
        return checkpoint["sharded_tensors"].read({key: empty})[key]

    tensors = {
        name: LazyTensor(tuple(meta.shape), meta.dtype, partial(read_tensor, name, meta))
        for name, meta in checkpoint["model"].items()
    }
    read_tokenizer = partial(find_tokenizer, os.path.dirname(path.rstrip(os.sep)))
    tokenizer_hash = checkpoint.get("tokenizer_hash")
    return LazyModel(
        path,
        checkpoint["model_args"],
        tensors,
        read_tokenizer,
        tokenizer_hash,
        read_metadata=partial(read_metadata, checkpoint.get(METADATA_KEY), path),
    )


# Writing


def unsupported_reason(args: ModelArgs) -> None:
    """None: the format stores every model."""


def check_metadata(metadata: ModelMetadata, tokenizer: Tokenizer | None) -> list[str]:
    """An empty list: the format stores everything."""
    return []


def write(model: LazyModel, path: str, target: str, dtype: str) -> None:
    """Write a checkpoint without training state; train.py resumes it with a new optimizer state."""
    tokenizer = model.read_tokenizer()
    if reason := special_tokens_problem(tokenizer):
        raise ValueError(f"{path}: {reason}")
    vocab_size = tokenizer.vocab_size if tokenizer else model.args.vocab_size
    checkpoint = {
        "model": state_dict(model, TORCH_DTYPES[dtype]),
        "model_args": write_model_args(model.args),
        "iter_num": 0,
        "best_val_loss": scalar_tensor(math.inf),
        "config": {"vocab_source": "custom", "vocab_size": vocab_size},
    }
    if tokenizer or model.tokenizer_hash:
        checkpoint["tokenizer_hash"] = tokenizer.hash if tokenizer else model.tokenizer_hash
    if metadata := model.read_metadata():
        checkpoint[METADATA_KEY] = model_metadata.to_json(metadata)
    with AtomicFile(path) as file:
        write_torch_file(file, checkpoint)


def state_dict(model: LazyModel, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """The model's state dict, to write in dtype; a tied output.weight is in it a second time."""
    state = {name: cast_lazily(model, name, dtype) for name in model.names()}
    return state | {"output.weight": state.get("output.weight", state["tok_embeddings.weight"])}


def special_tokens_problem(tokenizer: Tokenizer | None) -> str | None:
    """Why a tokenizer.model cannot store this vocabulary, or None if it can."""
    if isinstance(tokenizer, Llama3Tokenizer) and tokenizer.has_custom_special_tokens:
        return (
            "tokenizer.model cannot store special tokens other than those of Llama 3; "
            "use --format=hf or gguf"
        )
    return None


def scalar_tensor(value: float) -> LazyTensor:
    """A float64 tensor without dimensions."""
    tensor = torch.tensor(value, dtype=torch.float64)
    return LazyTensor((), tensor.dtype, lambda: tensor)
