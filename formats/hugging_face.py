"""
A folder as save_pretrained of transformers writes it: config.json, generation_config.json, the
weights as safetensors (or the older pytorch_model.bin), in one file or in shards with an index,
and the tokenizer.

The rows of wq and wk are in another order: Hugging Face rotates the pairs (i, i + head_dim/2), the
half-split layout; model.py rotates the pairs (2i, 2i + 1), the interleaved layout.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from formats import tokenizer_json
from formats.hugging_face_config import parse_args, to_config, to_generation_config
from formats.hugging_face_metadata import (
    MODEL_CARD,
    TEMPLATE_FILE,
    is_generated_card,
    read_metadata,
    to_model_card,
    to_post_processor,
    to_tokenizer_config,
)
from formats.lazy_model import (
    TORCH_DTYPES,
    LazyModel,
    LazyTensor,
    cast_lazily,
    expand_layers,
    find_tokenizer,
    one_line,
    read_json,
    same_values,
)
from formats.model_metadata import DEFAULT_TEMPLATE, ModelMetadata
from formats.safetensors_file import read_safetensors, tensor_size, write_safetensors
from formats.torch_file import read_torch_file
from model import ModelArgs
from runtime.atomic_files import AtomicFolder, FileSource
from textdata.tokenizer import (
    CONTROL,
    UNKNOWN,
    HuggingFaceTokenizer,
    Llama3Tokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    find_tokenizer_file,
    load_tokenizer,
)
from textdata.tokenizer_json import has_prefix_space

DTYPES = {"hf": ("float32", "float16", "bfloat16")}
SHARD_SIZE = 5_000_000_000  # maximum bytes of weights in a file

# Name in model.py, name in transformers
TENSOR_NAMES = (
    ("tok_embeddings.weight", "model.embed_tokens.weight"),
    ("layers.{}.attention_norm.weight", "model.layers.{}.input_layernorm.weight"),
    ("layers.{}.attention.wq.weight", "model.layers.{}.self_attn.q_proj.weight"),
    ("layers.{}.attention.wk.weight", "model.layers.{}.self_attn.k_proj.weight"),
    ("layers.{}.attention.wv.weight", "model.layers.{}.self_attn.v_proj.weight"),
    ("layers.{}.attention.wo.weight", "model.layers.{}.self_attn.o_proj.weight"),
    ("layers.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight"),
    ("layers.{}.feed_forward.w1.weight", "model.layers.{}.mlp.gate_proj.weight"),
    ("layers.{}.feed_forward.w3.weight", "model.layers.{}.mlp.up_proj.weight"),
    ("layers.{}.feed_forward.w2.weight", "model.layers.{}.mlp.down_proj.weight"),
    ("norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
)
# Suffixes of files that may have the weights under another name, and the name to give them
RENAMED = {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}
NO_WEIGHTS = ("tokenizer.bin", "training_args.bin", "optimizer.bin", "scheduler.bin")
EXPORTED_FILES = re.compile(
    r"(generation_)?config\.json|tokenizer(_config)?\.json|tokenizer\.model"
    r"|special_tokens_map\.json|chat_template\.jinja|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
)


# Rotary layout


def rope_heads(args: ModelArgs, name: str) -> int | None:
    """Number of heads in the rows of wq or wk; None for the tensors that are not rotated."""
    return {"wq": args.n_heads, "wk": args.kv_heads}.get(name.split(".")[-2])


def to_half_split(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Reorder the rows of wq or wk from the interleaved to the half-split layout."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_interleaved(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Reorder the rows of wq or wk from the half-split to the interleaved layout."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


# Reading


def matches(path: str) -> bool:
    """Whether path is a folder with config.json."""
    return os.path.isfile(os.path.join(path, "config.json"))


def read(path: str) -> LazyModel:
    """Open a folder. Raises ValueError if it is damaged, incomplete or not a supported Llama."""
    source = FileSource(os.path.join(path, "config.json"))
    config = read_json(source.path)
    args = parse_args(config, source.path)
    hf_tensors = read_tensors(path)
    args = untie_different_head(args, hf_tensors)
    source.open().close()  # raises ValueError if the folder was replaced meanwhile
    tensors = {}
    for name, hf_name in expand_layers(TENSOR_NAMES, args):
        if hf_name not in hf_tensors:
            raise ValueError(f"{path}: {hf_name} is missing; its config.json requires it")
        tensors[name] = interleave_lazily(hf_tensors.pop(hf_name), rope_heads(args, name))
    for hf_name in hf_tensors:
        is_tied_head = hf_name == "lm_head.weight" and args.tie_embeddings
        is_rope_buffer = hf_name.endswith("rotary_emb.inv_freq")  # in older files
        if not (is_tied_head or is_rope_buffer):
            raise ValueError(
                f"{path}: {hf_name} is not a tensor of the Llama that its config.json describes"
            )
    cached_tokenizer = cache(partial(read_tokenizer, path))
    return LazyModel(
        path,
        args,
        tensors,
        cached_tokenizer,
        read_metadata=cache(partial(read_metadata, path, config, cached_tokenizer)),
        contains_tokenizer=True,
    )


def untie_different_head(args: ModelArgs, hf_tensors: dict[str, LazyTensor]) -> ModelArgs:
    """The args, with tie_embeddings=False if the file has an LM head unlike the embedding.

    Such a head is the model's, whatever tie_word_embeddings is: transformers 5 uses it, too.
    """
    head = hf_tensors.get("lm_head.weight")
    embedding = hf_tensors.get("model.embed_tokens.weight")
    if not args.tie_embeddings or head is None or embedding is None:
        return args
    is_tied = head.shape == embedding.shape and same_values(head, embedding)
    return dataclasses.replace(args, tie_embeddings=is_tied)


def interleave_lazily(tensor: LazyTensor, n_heads: int | None) -> LazyTensor:
    """A tensor that is read in the interleaved layout, if n_heads is given."""
    if n_heads is None or len(tensor.shape) != 2 or tensor.shape[0] % (2 * n_heads):
        return tensor  # LazyModel refuses a wrong shape
    return LazyTensor(tensor.shape, tensor.dtype, lambda: to_interleaved(tensor.read(), n_heads))


def read_tensors(path: str) -> dict[str, LazyTensor]:
    """All tensors of a folder by their names in transformers.

    Raises ValueError if there are none or they are damaged.
    """
    readers: dict[str, Callable[[str], dict[str, LazyTensor]]] = {
        "model.safetensors": read_safetensors,
        "pytorch_model.bin": read_state_dict,
    }
    for name, reader in readers.items():
        file = os.path.join(path, name)
        index = f"{file}.index.json"
        if os.path.isfile(file):
            return reader(file)
        if os.path.isfile(index):
            return read_shards(path, index, reader)
    problem = f"{path}: it has neither model.safetensors nor pytorch_model.bin"
    names = sorted(os.listdir(path))
    others = [name for name in names if name.endswith(tuple(RENAMED)) and name not in NO_WEIGHTS]
    if others:
        expected = RENAMED[os.path.splitext(others[0])[1]]
        problem += f"; if {others[0]} has the weights, rename it to {expected}"
    raise ValueError(problem)


def read_state_dict(path: str) -> dict[str, LazyTensor]:
    """The tensors of a pytorch_model.bin. Raises ValueError if it is damaged."""
    content = read_torch_file(path)
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, LazyTensor) for name, tensor in content.items()
    ):
        raise ValueError(f"{path}: not a state dict")
    return content


def read_shards(
    path: str, index: str, reader: Callable[[str], dict[str, LazyTensor]]
) -> dict[str, LazyTensor]:
    """The tensors of all files that an index names. Raises ValueError if one is missing."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise ValueError(f"{index}: it has no weight_map from names to files")
    tensors: dict[str, LazyTensor] = {}
    for shard in sorted(set(weight_map.values())):
        shard_path = os.path.join(path, shard)
        if os.path.basename(shard) != shard or not os.path.isfile(shard_path):
            raise ValueError(
                f"{path}: the shard {shard} is missing; {os.path.basename(index)} names it"
            )
        tensors |= reader(shard_path)
    if missing := weight_map.keys() - tensors.keys():
        raise ValueError(f"{path}: {min(missing)} is in none of the shards")
    return tensors


def read_tokenizer(path: str) -> Tokenizer | None:
    """The tokenizer of a folder, None if it has none.

    tokenizer.json is what transformers uses. A SentencePiece tokenizer.model beside it is preferred
    where both have the same tokens and both replace spaces by ▁ in the same way, because only it
    has the scores. Raises ValueError if the tokenizer is damaged or not supported.
    """
    file = os.path.join(path, "tokenizer.json")
    if not os.path.isfile(file):
        return find_tokenizer(path)
    try:
        beside = find_tokenizer(path)
        if find_tokenizer_file(path) == file:  # the only one
            return beside
        if isinstance(beside, SentencePieceTokenizer) and not beside.is_bpe:
            return beside  # a unigram model, which is read from tokenizer.model only
        tokenizer = load_tokenizer(file)
    except ValueError as error:
        raise ValueError(one_line(str(error))) from error
    is_same = isinstance(beside, SentencePieceTokenizer) and has_same_pieces(beside, tokenizer)
    return beside if is_same else tokenizer


def has_same_pieces(model: SentencePieceTokenizer, tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer.json represents the pieces of a tokenizer.model, and no other tokens."""
    names = [piece.text for piece in model.pieces]
    if names != tokenizer_json.token_names(tokenizer):
        return False
    if isinstance(tokenizer, SentencePieceTokenizer):
        return model.has_dummy_prefix == tokenizer.has_dummy_prefix
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return False
    description = tokenizer.description
    prefix = has_prefix_space(description["normalizer"], description["pre_tokenizer"])
    ends = (tokenizer.bos_id, tokenizer.eos_id)
    special = [piece.text for piece in model.pieces if piece.type in (CONTROL, UNKNOWN)]
    return (
        prefix == model.has_dummy_prefix
        and ends == (model.bos_id, model.eos_id)
        and {entry["content"] for entry in description["added_tokens"]} <= set(special)
    )


# Writing


def unsupported_reason(args: ModelArgs) -> None:
    """None: the format stores every model."""


def check_metadata(metadata: ModelMetadata, tokenizer: Tokenizer | None) -> list[str]:
    """An empty list: the format stores everything."""
    return []


def write(model: LazyModel, path: str, target: str, dtype: str) -> None:
    """Write a folder that from_pretrained loads in transformers 4 and 5."""
    tokenizer = model.read_tokenizer()
    if tokenizer and (reason := tokenizer_json.unsupported_reason(tokenizer)):
        raise ValueError(f"{path}: {reason}")
    metadata = model.metadata(tokenizer)
    with AtomicFolder(path, partial(is_exported_file, path)) as folder:
        write_json(folder, "config.json", to_config(model.args, dtype, metadata))
        write_json(folder, "generation_config.json", to_generation_config(metadata))
        write_text(folder, TEMPLATE_FILE, single_template(metadata))
        write_text(folder, MODEL_CARD, to_model_card(metadata))
        if tokenizer:
            write_tokenizer(folder, tokenizer, metadata, model.args.max_seq_len)
        write_shards(folder, list_tensors(model, TORCH_DTYPES[dtype]))


def is_exported_file(folder: str, name: str) -> bool:
    """Whether an export may replace a file of this name in a folder."""
    if name == MODEL_CARD:
        return is_generated_card(os.path.join(folder, name))
    return bool(EXPORTED_FILES.fullmatch(name))


def single_template(metadata: ModelMetadata) -> str:
    """The chat template if there is one only; several are in tokenizer_config.json."""
    is_single = set(metadata.chat_templates) == {DEFAULT_TEMPLATE}
    return metadata.chat_templates[DEFAULT_TEMPLATE] if is_single else ""


def write_tokenizer(
    folder: str, tokenizer: Tokenizer, metadata: ModelMetadata, max_seq_len: int
) -> None:
    """Write tokenizer.json, tokenizer_config.json and, if it is sufficient, tokenizer.model."""
    post_processor = {"post_processor": to_post_processor(metadata, tokenizer)}
    write_json(folder, "tokenizer.json", tokenizer_json.to_json(tokenizer) | post_processor)
    config = to_tokenizer_config(metadata, tokenizer, max_seq_len)
    write_json(folder, "tokenizer_config.json", config)
    if isinstance(tokenizer, Llama3Tokenizer) and tokenizer.has_custom_special_tokens:
        return
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        with open(os.path.join(folder, "tokenizer.model"), "wb") as file:
            file.write(tokenizer.content)


def write_text(folder: str, name: str, content: str) -> None:
    """Write a file in UTF-8, unless there is nothing to write."""
    if content:
        with open(os.path.join(folder, name), "w", encoding="utf-8", newline="") as file:
            file.write(content)


def write_json(folder: str, name: str, content: dict[str, Any]) -> None:
    """Write an indented JSON file."""
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def list_tensors(model: LazyModel, dtype: torch.dtype) -> list[tuple[str, LazyTensor]]:
    """The tensors to write in dtype, with their names in transformers."""
    tensors = []
    for name, hf_name in expand_layers(TENSOR_NAMES, model.args):
        n_heads = rope_heads(model.args, name)
        reorder = partial(to_half_split, n_heads=n_heads) if n_heads else None
        tensors.append((hf_name, cast_lazily(model, name, dtype, reorder)))
    return tensors


def write_shards(folder: str, tensors: list[tuple[str, LazyTensor]]) -> None:
    """Write one file, or several of at most SHARD_SIZE bytes of weights and their index."""
    shards = split_shards(tensors)
    files = ["model.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        weight_map = {
            name: file for file, shard in zip(files, shards, strict=True) for name, _ in shard
        }
        total_size = sum(tensor_size(tensor) for _, tensor in tensors)
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(folder, "model.safetensors.index.json", index)
    for file_name, shard in zip(files, shards, strict=True):
        with open(os.path.join(folder, file_name), "wb") as file:
            write_safetensors(file, shard)


def split_shards(tensors: list[tuple[str, LazyTensor]]) -> list[list[tuple[str, LazyTensor]]]:
    """Split tensors, in order, into shards of at most SHARD_SIZE bytes or of one tensor."""
    shards: list[list[tuple[str, LazyTensor]]] = [[]]
    shard_size = 0
    for name, tensor in tensors:
        size = tensor_size(tensor)
        if shards[-1] and shard_size + size > SHARD_SIZE:
            shards.append([])
            shard_size = 0
        shards[-1].append((name, tensor))
        shard_size += size
    return shards
