"""
ckpt.pt, a checkpoint of ours or of llama2.c's: the table of its tensors is the model's state dict. Read
as well: ckpt.dcp, a checkpoint in shares (see sharded.py).
What training needs beyond the weights is checkpoint.py's; it is neither read nor written here.
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
from formats.lazy_model import (
    TORCH_DTYPES,
    LazyModel,
    LazyTensor,
    cast_lazily,
    find_tokenizer,
    same_values,
)
from formats.torch_file import is_zip, read_torch_file, write_torch_file
from runtime.atomic_files import AtomicFile
from textdata.tokenizer import Llama3Tokenizer, Tokenizer

DTYPES = {"ckpt": ("float32", "float16", "bfloat16")}


def matches(path: str) -> bool:
    return is_sharded_checkpoint(path) or (os.path.isfile(path) and is_zip(path))


def read(path: str) -> LazyModel:
    if is_sharded_checkpoint(path):
        return read_in_shares(path)
    checkpoint = read_torch_file(path)
    check_checkpoint(checkpoint, path)
    args, tensors = checkpoint["model_args"], checkpoint["model"]
    classifier = tensors.pop("output.weight", None) if args.tie_embeddings else None
    if classifier and not same_values(classifier, tensors["tok_embeddings.weight"]):
        raise ValueError(f"{path}: {TIED_WEIGHTS_MISMATCH}")
    tokenizer_hash = checkpoint.get("tokenizer_hash")
    return LazyModel(
        path, args, tensors, lambda: find_tokenizer(os.path.dirname(path)), tokenizer_hash
    )


def read_in_shares(path: str) -> LazyModel:
    from checkpoints.sharded import open_sharded

    outline = open_sharded(path)

    def read_one(name: str, outlined: torch.Tensor) -> torch.Tensor:
        place = f"model/{name}"
        return outline["shares"].read({place: torch.empty(outlined.shape, dtype=outlined.dtype)})[
            place
        ]

    tensors = {
        name: LazyTensor(tuple(outlined.shape), outlined.dtype, partial(read_one, name, outlined))
        for name, outlined in outline["model"].items()
    }
    own_tokenizer = partial(find_tokenizer, os.path.dirname(path.rstrip(os.sep)))
    return LazyModel(
        path, outline["model_args"], tensors, own_tokenizer, outline.get("tokenizer_hash")
    )


def unsupported_reason(args) -> None:
    """It says every model."""


def write(stored: LazyModel, path: str, target: str, dtype: str):
    """A checkpoint without training state, from which train.py goes on with fresh moments."""
    tokenizer = stored.own_tokenizer()
    if reason := special_tokens_problem(tokenizer):
        raise ValueError(f"{path}: {reason}")
    checkpoint = {
        "model": weights(stored, TORCH_DTYPES[dtype]),
        "model_args": write_model_args(stored.args),
        "iter_num": 0,
        "best_val_loss": stored_scalar(math.inf),
        "config": {"vocab_source": "custom", "vocab_size": stored.args.vocab_size},
    }
    if tokenizer or stored.tokenizer_hash:
        checkpoint["tokenizer_hash"] = tokenizer.hash if tokenizer else stored.tokenizer_hash
    with AtomicFile(path) as file:
        write_torch_file(file, checkpoint)


def weights(stored: LazyModel, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """The model's state dict, a tied classifier in it a second time, to write in dtype."""

    state = {name: cast_lazily(stored, name, dtype) for name in stored.names()}
    return state | {"output.weight": state.get("output.weight", state["tok_embeddings.weight"])}


def special_tokens_problem(tokenizer: Tokenizer | None) -> str | None:
    """Why a tokenizer.model cannot say this vocabulary, or None if it can."""
    if isinstance(tokenizer, Llama3Tokenizer) and tokenizer.has_custom_special_tokens:
        return "tokenizer.model has no place for special tokens other than Llama 3's own; use --format=hf or gguf"
    return None


def stored_scalar(value: float) -> LazyTensor:
    tensor = torch.tensor(value, dtype=torch.float64)
    return LazyTensor((), tensor.dtype, lambda: tensor)
