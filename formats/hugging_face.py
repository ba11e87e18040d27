"""
A folder as transformers' save_pretrained writes it: config.json, generation_config.json, the
weights as safetensors (or the older pytorch_model.bin), in one file or in shards with an index,
and the tokenizer.

The rotary layout differs: Hugging Face turns pairs (i, i + head_dim/2), we turn neighbours (2i, 2i + 1),
so that the rows of wq and wk stand in another order.
"""

import itertools
import json
import os
import re
from functools import partial

import torch

from formats import tokenizer_json
from formats.lazy_model import (
    TORCH_DTYPES,
    LazyModel,
    LazyTensor,
    cast_lazily,
    expand_layers,
    find_tokenizer,
    one_line,
    read_json,
)
from formats.safetensors_file import read_safetensors, size_of, write_safetensors
from formats.torch_file import read_torch_file
from model import ModelArgs
from ops.rope import RopeScaling
from runtime.atomic_files import AtomicFolder, FileSource
from textdata.tokenizer import Llama3Tokenizer, SentencePieceTokenizer, Tokenizer

DTYPES = {"hf": ("float32", "float16", "bfloat16")}
SHARD_SIZE = 5_000_000_000  # bytes of weights in a file, at most

# ours, theirs
TABLE = (
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
# Keys of config.json that would change what the model computes, and the value that leaves it a Llama.
PLAIN = {
    **{
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "quantization_config": None,
    },
    "partial_rotary_factor": 1.0,
}


def heads_in(args: ModelArgs, name: str) -> int | None:
    """How many heads turn by their position in this tensor's rows, if any do."""
    return {"wq": args.n_heads, "wk": args.kv_heads}.get(name.split(".")[-2])


def to_halves(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows of wq or wk from our order to theirs."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_neighbours(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows of wq or wk from their order to ours."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


# Reading


def matches(path: str) -> bool:
    return os.path.isfile(os.path.join(path, "config.json"))


def read(path: str) -> LazyModel:
    source = FileSource(os.path.join(path, "config.json"))
    config = read_json(source.path)
    args = args_of(config, source.path)
    theirs = read_tensors(path)
    source.open().close()  # the folder may have been replaced meanwhile
    tensors = {}
    for ours, name in expand_layers(TABLE, args):
        if name not in theirs:
            raise ValueError(f"{path}: it has no {name}, which its config.json speaks of")
        tensors[ours] = reordered(theirs.pop(name), heads_in(args, ours))
    for name in theirs:  # the classifier again although tied, and the angles that older files kept
        if not (
            name.endswith("rotary_emb.inv_freq")
            or (name == "lm_head.weight" and args.tie_embeddings)
        ):
            raise ValueError(
                f"{path}: {name} is no part of a Llama as its config.json describes it"
            )
    return LazyModel(path, args, tensors, lambda: read_tokenizer(path, args.vocab_size))


def reordered(tensor: LazyTensor, n_heads: int | None) -> LazyTensor:
    if n_heads is None or len(tensor.shape) != 2 or tensor.shape[0] % (2 * n_heads):
        return tensor  # of a wrong shape: LazyModel tells
    return LazyTensor(tensor.shape, tensor.dtype, lambda: to_neighbours(tensor.read(), n_heads))


def args_of(config: dict, path: str) -> ModelArgs:
    """The architecture in a config.json, of transformers 4 or 5. Raises ValueError for another one."""
    if config.get("model_type") != "llama":
        raise ValueError(f"{path}: a model of type {config.get('model_type')!r}, not llama")
    for key, plain in PLAIN.items():
        if config.get(key) not in (None, plain):
            raise ValueError(f"{path}: {key}={config[key]!r} is more than a Llama of ours can say")
    if not isinstance(config.get("tie_word_embeddings", False), bool):
        raise ValueError(f"{path}: tie_word_embeddings is neither true nor false")
    required = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
    )
    if missing := [key for key in required if type(config.get(key)) is not int]:
        raise ValueError(f"{path}: it has no {' and no '.join(missing)}, or no whole number there")
    try:
        theta, scaling = rope_of(config)
        args = ModelArgs(
            dim=config["hidden_size"],
            hidden_dim=config["intermediate_size"],
            n_layers=config["num_hidden_layers"],
            n_heads=config["num_attention_heads"],
            n_kv_heads=config.get("num_key_value_heads"),
            vocab_size=config["vocab_size"],
            norm_eps=float(
                config.get("rms_norm_eps", 1e-6)
            ),  # what is not there has transformers' default
            rope_theta=theta,
            rope_scaling=scaling,
            max_seq_len=config.get("max_position_embeddings", 2048),
            tie_embeddings=config.get("tie_word_embeddings", False),
        )
    except (ValueError, TypeError, KeyError, OverflowError, AttributeError) as error:
        raise ValueError(f"{path}: not the settings of a Llama: {error}") from None
    if config.get("head_dim") not in (None, args.head_dim):
        raise ValueError(
            f"{path}: head_dim={config['head_dim']}, but dim/n_heads={args.head_dim} is all we can say"
        )
    return args


def rope_of(config: dict) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary positions: version 5's rope_parameters, or version 4's
    rope_theta and rope_scaling."""
    rope = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
    rope |= config.get("rope_parameters") or {}
    theta, kind = rope.get("rope_theta"), rope.get("rope_type", rope.get("type", "default"))
    theta = 10000.0 if theta is None else float(theta)
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", float(rope["factor"]))
    if kind != "llama3":
        raise ValueError(f"rope scaling of type {kind!r}: default, linear and llama3 are known")
    numbers = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    return theta, RopeScaling("llama3", *numbers, int(rope["original_max_position_embeddings"]))


def read_tensors(path: str) -> dict[str, LazyTensor]:
    """All tensors of the folder by their names there."""
    for single, reader in (
        ("model.safetensors", read_safetensors),
        ("pytorch_model.bin", read_state_dict),
    ):
        whole, index = os.path.join(path, single), os.path.join(path, f"{single}.index.json")
        if os.path.isfile(whole):
            return reader(whole)
        if os.path.isfile(index):
            return read_shards(path, index, reader)
    raise ValueError(f"{path}: it has neither model.safetensors nor pytorch_model.bin")


def read_state_dict(path: str) -> dict[str, LazyTensor]:
    content = read_torch_file(path)
    if not isinstance(content, dict) or not all(
        isinstance(tensor, LazyTensor) for tensor in content.values()
    ):
        raise ValueError(f"{path}: not a table of tensors")
    return content


def read_shards(path: str, index: str, reader) -> dict[str, LazyTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise ValueError(f"{index}: it has no weight_map from names to files")
    tensors = {}
    for shard in sorted(set(weight_map.values())):
        if os.path.basename(shard) != shard or not os.path.isfile(os.path.join(path, shard)):
            raise ValueError(
                f"{path}: the shard {shard} is missing, which {os.path.basename(index)} names"
            )
        tensors |= reader(os.path.join(path, shard))
    if missing := weight_map.keys() - tensors.keys():
        raise ValueError(f"{path}: {min(missing)} is in none of the shards")
    return tensors


def read_tokenizer(path: str, vocab_size: int | None = None) -> Tokenizer | None:
    """SentencePiece's tokenizer.model, which has the scores; but tokenizer.json where tokens were
    added to those, and for Llama 3's ranks, which have no names for the special tokens."""
    file, tokenizer = os.path.join(path, "tokenizer.json"), find_tokenizer(path)
    is_whole = isinstance(tokenizer, SentencePieceTokenizer) and vocab_size in (
        None,
        tokenizer.vocab_size,
    )
    if is_whole or not os.path.isfile(file):
        return tokenizer
    try:
        with open(file, encoding="utf-8") as text:
            return tokenizer_json.from_json(text.read())
    except ValueError as error:
        raise ValueError(one_line(f"{file}: {error}")) from error


# Writing


def unsupported_reason(args: ModelArgs) -> None:
    """It says every model."""


def write(stored: LazyModel, path: str, target: str, dtype: str):
    """Write the folder that from_pretrained loads, in transformers 4 and 5 alike."""
    args, tokenizer = stored.args, stored.own_tokenizer()
    if tokenizer and (reason := tokenizer_json.unsupported_reason(tokenizer)):
        raise ValueError(f"{path}: {reason}")
    with AtomicFolder(path, is_ours) as folder:
        write_json(folder, "config.json", config_of(args, dtype, tokenizer))
        write_json(folder, "generation_config.json", generation_config(tokenizer))
        if tokenizer:
            write_json(folder, "tokenizer.json", tokenizer_json.to_json(tokenizer))
            write_json(
                folder,
                "tokenizer_config.json",
                tokenizer_json.to_config(tokenizer, args.max_seq_len),
            )
            if not (isinstance(tokenizer, Llama3Tokenizer) and tokenizer.has_custom_special_tokens):
                with open(os.path.join(folder, "tokenizer.model"), "wb") as file:
                    file.write(tokenizer.content)
        write_shards(folder, tensors_of(stored, TORCH_DTYPES[dtype]))


def is_ours(name: str) -> bool:
    """Whether a file may give way to a folder that is written anew."""
    files = r"(generation_)?config\.json|tokenizer(_config)?\.json|tokenizer\.model|special_tokens_map\.json"
    return bool(re.fullmatch(rf"{files}|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name))


def write_json(folder: str, name: str, content: dict):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def config_of(args: ModelArgs, dtype: str, tokenizer: Tokenizer | None) -> dict:
    rope = {"rope_theta": args.rope_theta, "rope_type": "default"}
    if scaling := args.rope_scaling:
        rope |= {"rope_type": scaling.type, "factor": scaling.factor}
        if scaling.type == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
            }
            rope |= {"original_max_position_embeddings": scaling.original_max_seq_len}
    return {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        **{
            "hidden_size": args.dim,
            "intermediate_size": args.ffn_dim,
            "num_hidden_layers": args.n_layers,
        },
        **{
            "num_attention_heads": args.n_heads,
            "num_key_value_heads": args.kv_heads,
            "head_dim": args.head_dim,
        },
        **{"vocab_size": args.vocab_size, "max_position_embeddings": args.max_seq_len},
        **{
            "rms_norm_eps": args.norm_eps,
            "tie_word_embeddings": args.tie_embeddings,
            "hidden_act": "silu",
        },
        **{
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
        },
        # Version 5 reads rope_parameters; version 4 does not know it.
        **{"rope_parameters": rope, "rope_theta": args.rope_theta},
        "rope_scaling": {key: rope[key] for key in rope if key != "rope_theta"}
        if args.rope_scaling
        else None,
        **{"dtype": dtype, "torch_dtype": dtype, "use_cache": True},
        **ends_of(tokenizer),
    }


def ends_of(tokenizer: Tokenizer | None) -> dict:
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def generation_config(tokenizer: Tokenizer | None) -> dict:
    """What generate() does unasked: it also stops where the next text would begin."""
    ends = ends_of(tokenizer)
    if tokenizer:
        ends["eos_token_id"] = [tokenizer.eos_id, *sorted(tokenizer.stop_ids - {tokenizer.eos_id})]
        ends["pad_token_id"] = tokenizer.eos_id
    return {"_from_model_config": False, **ends}


def tensors_of(stored: LazyModel, dtype: torch.dtype) -> list[tuple[str, LazyTensor]]:
    """The folder's tensors under their names there, to write in dtype."""

    tensors = []
    for ours, theirs in expand_layers(TABLE, stored.args):
        n_heads = heads_in(stored.args, ours)
        change = partial(to_halves, n_heads=n_heads) if n_heads else None
        tensors.append((theirs, cast_lazily(stored, ours, dtype, change)))
    return tensors


def write_shards(folder: str, tensors: list[tuple[str, LazyTensor]]):
    """One file, or several of at most SHARD_SIZE and their index."""
    ends = list(itertools.accumulate(size_of(tensor) for _, tensor in tensors))
    shards, start = [[]], 0
    for (name, tensor), end in zip(tensors, ends, strict=True):
        if end - start > SHARD_SIZE and shards[-1]:
            shards.append([])
            start = end - size_of(tensor)
        shards[-1].append((name, tensor))
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            for number in range(1, len(shards) + 1)
        ]
        weight_map = {
            name: file for file, shard in zip(names, shards, strict=True) for name, _ in shard
        }
        index = {"metadata": {"total_size": ends[-1]}, "weight_map": weight_map}
        write_json(folder, "model.safetensors.index.json", index)
    for name, shard in zip(names, shards, strict=True):
        with open(os.path.join(folder, name), "wb") as file:
            write_safetensors(file, shard)
