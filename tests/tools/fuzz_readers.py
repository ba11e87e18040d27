"""The models, tokenizers and readers that tests/tools/fuzz.py damages and reads."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from checkpoints.file import load_checkpoint, save_checkpoint
from export import write_model
from formats import hugging_face
from formats.lazy_model import from_model
from formats.registry import open_model
from formats.safetensors_file import read_safetensors
from model import ModelArgs, Transformer, parameter_shapes
from ops.rope import RopeScaling
from tests.helpers import make_checkpoint, random_model
from textdata.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    Llama3Tokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    proto_from_pieces,
)

TEXT = "Once upon a time, a cria ate 12 café creams. 🦙\n"
WORDS = ("he", " t", " the", "in", " a", "an", "on", " o", "er", "re", " w", "it", "ing", "nd")
WORDS += (" and",)
# Rows are long enough for all matrices to be quantized.
SHAPE = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "hidden_dim": 32,
    "max_seq_len": 16,
}
GROUP = 32  # values that share a scale in Q8_0, with these dim and hidden_dim
UNTIED = {"tie_embeddings": False}
SCALED = {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 64)}


# Writing


def sentencepiece_tokenizer() -> Tokenizer:
    """A tokenizer like Llama 2's, of a few hundred tokens."""
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    words = [word.replace(" ", "▁") for word in (*" abcdefghijklmnopqrstuvwxyz.,!", *WORDS)]
    pieces += [(word, -float(i), NORMAL) for i, word in enumerate(words)]
    return SentencePieceTokenizer(proto_from_pieces(pieces))


def llama3_tokenizer() -> Tokenizer:
    """A tokenizer like Llama 3's, of a few hundred tokens."""
    single_bytes = [bytes([byte]) for byte in range(256)]
    return Llama3Tokenizer(single_bytes + [word.encode() for word in WORDS])


MakeTokenizer = Callable[[], Tokenizer]


def write_small_model(
    path: str,
    target: str,
    make_tokenizer: MakeTokenizer = sentencepiece_tokenizer,
    dtype: str = "auto",
    **overrides,
) -> None:
    """Write a model and its tokenizer to path in the format called target."""
    tokenizer = make_tokenizer()
    model = random_model(SHAPE, 0.3, vocab_size=tokenizer.vocab_size, **overrides)
    write_model(from_model(model, tokenizer=tokenizer), path, target, dtype)


def write_sharded(folder: str) -> None:
    """Write a Hugging Face folder whose weights are in several files."""
    with mock.patch.object(hugging_face, "SHARD_SIZE", 60_000):
        write_small_model(folder, "hf", llama3_tokenizer, **UNTIED, **SCALED)


def write_pytorch(folder: str) -> None:
    """Write an older Hugging Face folder, with its weights in PyTorch's format."""
    write_small_model(folder, "hf", **UNTIED)
    path = os.path.join(folder, "model.safetensors")
    tensors = {name: tensor.read() for name, tensor in read_safetensors(path).items()}
    torch.save(tensors, os.path.join(folder, "pytorch_model.bin"))
    os.remove(path)


def write_two_shards(folder: str) -> None:
    """Write Meta's folder of two shards: Llama 2's, whose embedding is split by columns."""
    write_small_model(folder, "meta", **UNTIED)
    weights = torch.load(os.path.join(folder, "consolidated.00.pth"), weights_only=True)
    for number in range(2):
        shard = {}
        for name, tensor in weights.items():
            axis = int(name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight")))
            shard[name] = tensor.chunk(2, axis)[number].clone() if tensor.dim() == 2 else tensor
        torch.save(shard, os.path.join(folder, f"consolidated.{number:02d}.pth"))


def write_training_state(folder: str) -> None:
    """Write a checkpoint with its hash and an optimizer state."""
    model = random_model(SHAPE, 0.3, vocab_size=300)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))[1].backward()
    optimizer.step()
    checkpoint = make_checkpoint(model, optimizer=optimizer.state_dict(), late_norms=[1.0])
    save_checkpoint(os.path.join(folder, "ckpt.pt"), checkpoint)


def write_tokenizer(folder: str, name: str, make_tokenizer: MakeTokenizer) -> None:
    """Write one tokenizer file."""
    tokenizer = make_tokenizer()
    content = tokenizer.to_bin() if name.endswith(".bin") else tokenizer.content
    Path(folder, name).write_bytes(content)


def write_tokenizer_json(folder: str, make_tokenizer: MakeTokenizer) -> None:
    """Write a Hugging Face folder whose only tokenizer is tokenizer.json."""
    write_small_model(folder, "hf", make_tokenizer)
    os.remove(os.path.join(folder, "tokenizer.model"))


# Reading


def no_model() -> None:
    """For what is read without a model."""


class Contents(NamedTuple):
    """Everything that a reader read."""

    args: ModelArgs | None
    tensors: dict[str, torch.Tensor]
    tokenizer_hash: str | None
    build: Callable[[], Transformer | None] = no_model


def check_tokenizer(tokenizer: Tokenizer | None) -> str | None:
    """The hash of a tokenizer, after it has encoded and decoded a text."""
    if tokenizer is None:
        return None
    ids = tokenizer.encode(TEXT, bos=True)
    valid = set(range(tokenizer.vocab_size))
    assert {tokenizer.bos_id, tokenizer.eos_id, *ids} <= valid, "an id of no token"
    tokenizer.decode(ids)
    return tokenizer.hash


def read_model(path: str) -> Contents:
    """Read a model with all its tensors and its tokenizer."""
    model = open_model(path)
    tensors = {name: model.read(name) for name in model.names()}
    return Contents(model.args, tensors, check_tokenizer(model.read_tokenizer()), model.load)


def read_tokenizer(path: str, load: Callable[[str], Tokenizer] = load_tokenizer) -> Contents:
    """Read a tokenizer alone."""
    return Contents(None, {}, check_tokenizer(load(path)))


def read_checkpoint(path: str) -> Contents:
    """Read a checkpoint as a resumed run does."""
    checkpoint = load_checkpoint(path)
    args, weights = checkpoint["model_args"], checkpoint["model"]
    tensors = {name: weights[name] for name, _ in parameter_shapes(args)}
    return Contents(args, tensors, None)


@dataclass(frozen=True)
class Reader:
    """How to make a good file or folder, and how to read it."""

    name: str
    write: Callable[[str], None]  # into an empty folder
    files: tuple[str, ...]  # patterns of those to damage; a repeated pattern is damaged more often
    target: str = ""  # what is read in that folder; the folder itself if empty
    max_changes: int = 0  # values that one changed byte may change; 0 where a checksum guards them
    read: Callable[[str], Contents] = read_model


def write_into(folder: str, name: str, target: str, options: dict) -> None:
    """Write a small model to this name in a folder."""
    write_small_model(os.path.join(folder, name), target, **options)


def model_reader(
    name: str,
    target: str,
    file: str = "",
    patterns: tuple[str, ...] = (),
    max_changes: int = 0,
    **options,
) -> Reader:
    """A reader of one format. options: of write_small_model."""
    write = partial(write_into, name=file, target=target, options=options)
    return Reader(name, write, patterns or (file,), file, max_changes)


def tokenizer_reader(name: str, make_tokenizer: MakeTokenizer) -> Reader:
    """A reader of one tokenizer file, whose name chooses the format."""
    write = partial(write_tokenizer, name=name, make_tokenizer=make_tokenizer)
    return Reader(name, write, (name,), name, read=read_tokenizer)


def json_reader(name: str, make_tokenizer: MakeTokenizer) -> Reader:
    """A reader of tokenizer.json."""
    write = partial(write_tokenizer_json, make_tokenizer=make_tokenizer)
    read = partial(read_tokenizer, load=hugging_face.read_tokenizer)
    return Reader(name, write, ("tokenizer.json",), read=read)


HF_FILES = ("*.safetensors", "*.safetensors", "config.json", "tokenizer.model")
META_FILES = ("consolidated.*",) * 4 + ("params.json", "tokenizer.model")
PYTORCH_FILES = ("pytorch_model.bin",) * 4 + ("config.json",)
Q8_0 = {"make_tokenizer": llama3_tokenizer, "dtype": "q8_0"} | SCALED
READERS = (
    model_reader("ckpt", "ckpt", "ckpt.pt"),
    Reader("resume", write_training_state, ("ckpt.pt",), "ckpt.pt", read=read_checkpoint),
    model_reader("v0", "v0", "v0.bin", max_changes=1, **UNTIED),
    model_reader("v1", "v1", "v1.bin", max_changes=1, **UNTIED),
    model_reader("v2", "v2", "v2.bin", max_changes=GROUP),
    model_reader("hf", "hf", patterns=HF_FILES, max_changes=1, **UNTIED),
    Reader("hf-shards", write_sharded, (*HF_FILES, "*.index.json"), max_changes=1),
    Reader("hf-bin", write_pytorch, PYTORCH_FILES),
    model_reader("meta", "meta", patterns=META_FILES),
    Reader("meta-shards", write_two_shards, META_FILES),
    model_reader("gguf", "gguf", "model.gguf", max_changes=1, **UNTIED),
    model_reader("gguf-q8_0", "gguf", "model.gguf", max_changes=GROUP, **Q8_0),
    tokenizer_reader("tokenizer.model", sentencepiece_tokenizer),
    tokenizer_reader("tokenizer.bin", sentencepiece_tokenizer),
    tokenizer_reader("tokenizer.tiktoken", llama3_tokenizer),
    json_reader("tokenizer.json-sentencepiece", sentencepiece_tokenizer),
    json_reader("tokenizer.json-llama3", llama3_tokenizer),
)
