"""
All formats: detect the format of a path, open and load models.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Protocol

from formats import ckpt, gguf, hugging_face, llama2c, meta
from formats.lazy_model import LazyModel, one_line
from formats.model_metadata import ModelMetadata, configure_tokenizer
from model import ModelArgs, Transformer
from runtime.lfs import require_content
from textdata.tokenizer import Tokenizer, load_tokenizer


class Format(Protocol):
    """The interface of a format module; formats/__init__.py describes it."""

    @property
    def DTYPES(self) -> Mapping[str, tuple[str, ...]]:
        """The values of --format that the module writes, each with its values of --dtype."""

    def matches(self, path: str) -> bool:
        """Whether path has this format."""

    def read(self, path: str) -> LazyModel:
        """Open a model; raises ValueError if it is damaged or unsupported."""

    def unsupported_reason(self, args: ModelArgs) -> str | None:
        """Why the format cannot store a model with these ModelArgs."""

    def check_metadata(self, metadata: ModelMetadata, tokenizer: Tokenizer | None) -> list[str]:
        """The names of what the format cannot store; raises ValueError if it must store it."""

    def write(self, model: LazyModel, path: str, target: str, dtype: str) -> None:
        """Write a model atomically."""


# In the order of detection. llama2c is last: the first version of model.bin has no magic number.
FORMATS: tuple[Format, ...] = (ckpt, gguf, hugging_face, meta, llama2c)


def detect_format(path: str) -> Format:
    """The format of a file or folder. Raises ValueError if it has none of the known formats."""
    if not os.path.exists(path):
        advice = "; train one with python train.py" if os.path.basename(path) == "ckpt.pt" else ""
        raise ValueError(f"{path}: there is no such file or folder{advice}")
    require_content(path)
    for module in FORMATS:
        if module.matches(path):
            return module
    folder = os.path.dirname(path) or "."
    if path.endswith(".safetensors") and not hugging_face.matches(folder):
        raise ValueError(f"{path}: weights without the config.json that belongs beside them")
    if os.path.isfile(path) and (hugging_face.matches(folder) or meta.matches(folder)):
        raise ValueError(f"{path}: a file of a model folder; name the folder, {folder}")
    if os.path.isdir(path):
        raise ValueError(
            f"{path}: a folder without config.json (Hugging Face) or params.json (Meta); "
            "name the folder or file of a model"
        )
    raise ValueError(
        f"{path}: not a model; it begins neither as ckpt.pt nor as model.bin nor as GGUF, "
        "or it is damaged"
    )


def open_model(path: str, tokenizer: str = "", max_seq_len: int | None = None) -> LazyModel:
    """Open a model in any format, without reading its weights.

    Args:
        path: the file or folder.
        tokenizer: path of the tokenizer to use instead of the model's.
        max_seq_len: context length to use instead of the model's.

    Raises ValueError if the model or the tokenizer is damaged or unsupported.
    """
    module = detect_format(path)
    try:
        model = module.read(path)
    except ValueError as error:  # the message may quote the file
        raise ValueError(one_line(str(error))) from error
    if max_seq_len is not None:
        args = dataclasses.replace(model.args, max_seq_len=max_seq_len)
        model = dataclasses.replace(model, args=args)
    if tokenizer:
        loaded = load_tokenizer(tokenizer)
        model = dataclasses.replace(
            model,
            read_tokenizer=lambda: loaded,
            contains_tokenizer=contains_tokenizer(model, loaded.hash),
        )
    return model


def contains_tokenizer(model: LazyModel, tokenizer_hash: str) -> bool:
    """Whether a tokenizer of this hash is part of the model's file or folder."""
    try:
        tokenizer = model.read_tokenizer() if model.contains_tokenizer else None
    except ValueError:
        return False
    return tokenizer is not None and tokenizer.hash == tokenizer_hash


def checked_tokenizer(model: LazyModel, tokenizer_path: str = "") -> Tokenizer | None:
    """The tokenizer of a model, or None if it has none. Its stop_ids are those of the model.

    tokenizer_path, the option that named it, appears in messages. Raises ValueError if the
    tokenizer does not match the model.
    """
    try:
        tokenizer = model.read_tokenizer()
    except ValueError as error:
        raise ValueError(one_line(str(error))) from error
    if tokenizer is None:
        return None
    name = tokenizer_path or f"the tokenizer beside {model.path}"
    # A model may have more embeddings than tokens, to pad its matrices.
    is_its_own = model.contains_tokenizer or model.tokenizer_hash == tokenizer.hash
    num_embeddings = model.args.vocab_size
    if tokenizer.vocab_size != num_embeddings and not is_its_own:
        raise ValueError(
            f"{name} has {tokenizer.vocab_size} tokens, but the model in {model.path} has "
            f"{num_embeddings}: name the tokenizer it was trained with, --tokenizer=PATH"
        )
    if tokenizer.min_embeddings > num_embeddings:
        raise ValueError(
            f"{name} encodes texts with ids up to {tokenizer.min_embeddings - 1}, but the model in "
            f"{model.path} has {num_embeddings} embeddings: its files do not belong together"
        )
    if model.tokenizer_hash not in (None, tokenizer.hash):
        raise ValueError(
            f"{name} (hash {tokenizer.hash[:12]}) is not the tokenizer that {model.path} was "
            f"trained with (hash {model.tokenizer_hash[:12]}): "
            "name that one with --tokenizer=PATH"
        )
    return configure_tokenizer(tokenizer, model.read_metadata())


def known_tokenizer(model: LazyModel) -> Tokenizer | None:
    """The tokenizer in or beside a model, or None if there is none that matches it."""
    try:
        return checked_tokenizer(model)
    except ValueError:
        return None


def load_model(path: str, tokenizer: str = "") -> tuple[Transformer, Tokenizer]:
    """Load a model in any format, ready to evaluate, and its tokenizer.

    tokenizer is the path of the tokenizer to use instead of the model's. Raises ValueError if
    there is none or if it does not match the model.
    """
    model = open_model(path, tokenizer)
    loaded = checked_tokenizer(model, tokenizer)
    if loaded is None:
        raise ValueError(
            f"no tokenizer is beside {path}: name the one it was trained with, --tokenizer=PATH"
        )
    return model.load(), loaded
