"""
All formats; finds which one a path holds, and opens it.
"""

import dataclasses
import os
from types import ModuleType

from formats import ckpt, gguf, hugging_face, llama2c, meta
from formats.lazy_model import LazyModel, one_line
from model import Transformer
from textdata.tokenizer import Tokenizer, load_tokenizer

FORMATS = (
    ckpt,
    gguf,
    hugging_face,
    meta,
    llama2c,
)  # as they are tried; model.bin has no sign of its own


def detect_format(path: str) -> ModuleType:
    """The format of what is at path. Raises ValueError, naming it, if it is none of those known."""
    if not os.path.exists(path):
        advice = "; train one with python train.py" if os.path.basename(path) == "ckpt.pt" else ""
        raise ValueError(f"{path}: there is no such file or folder{advice}")
    for module in FORMATS:
        if module.matches(path):
            return module
    if os.path.isfile(path) and any(
        module.matches(os.path.dirname(path) or ".") for module in (hugging_face, meta)
    ):
        raise ValueError(
            f"{path}: a part of a model; name its folder, {os.path.dirname(path) or '.'}"
        )
    if os.path.isdir(path):
        raise ValueError(
            f"{path}: a folder without config.json (Hugging Face) or params.json (Meta); name a model's"
        )
    raise ValueError(
        f"{path}: no model; it begins neither as ckpt.pt nor as model.bin nor as GGUF, or it is damaged"
    )


def open_model(path: str, tokenizer: str = "", max_seq_len: int | None = None) -> LazyModel:
    """The model at path, in whatever format, with its own tokenizer or the one named, and its own
    context or another. Its tensors are still on the disk. Raises ValueError where anything is wrong."""
    module = detect_format(path)
    try:
        stored = module.read(path)
    except ValueError as error:  # it may quote what is in the file
        raise ValueError(one_line(str(error))) from error
    if max_seq_len is not None:
        stored = dataclasses.replace(
            stored, args=dataclasses.replace(stored.args, max_seq_len=max_seq_len)
        )
    if tokenizer:
        named = load_tokenizer(tokenizer)
        stored = dataclasses.replace(stored, own_tokenizer=lambda: named)
    return stored


def checked_tokenizer(stored: LazyModel, named: str = "") -> Tokenizer | None:
    """The model's tokenizer, if it has one. Raises ValueError where it is another model's."""
    try:
        tokenizer = stored.own_tokenizer()
    except ValueError as error:
        raise ValueError(one_line(str(error))) from error
    if tokenizer is None:
        return None
    source = named or f"the tokenizer beside {stored.path}"
    if tokenizer.vocab_size != stored.args.vocab_size:
        raise ValueError(
            f"{source} has {tokenizer.vocab_size} tokens, but the model in {stored.path} has "
            f"{stored.args.vocab_size}: name the tokenizer it was trained with, --tokenizer=PATH"
        )
    if stored.tokenizer_hash not in (None, tokenizer.hash):
        raise ValueError(
            f"{source} (hash {tokenizer.hash[:12]}) is not the tokenizer that {stored.path} was trained with "
            f"(hash {stored.tokenizer_hash[:12]}): name that one with --tokenizer=PATH"
        )
    return tokenizer


def load_model(path: str, tokenizer: str = "") -> tuple[Transformer, Tokenizer]:
    """A model from any format, ready to evaluate, and its tokenizer, which must be there."""
    stored = open_model(path, tokenizer)
    found = checked_tokenizer(stored, tokenizer)
    if found is None:
        raise ValueError(
            f"there is no tokenizer.model beside {path}: name one with --tokenizer=PATH"
        )
    return stored.model(), found
