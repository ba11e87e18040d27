"""
A folder as Meta publishes Llama 2 and 3: params.json, consolidated.NN.pth with the tensor names of
model.py, and tokenizer.model, a SentencePiece model or (Llama 3) a list of tiktoken's ranks.

The files consolidated.NN.pth are the shards of tensor parallelism: wo and w2 are split by columns,
the other matrices by rows, and norms are in every shard. The embedding is split by columns in
Llama 2 and by rows in Llama 3.
"""

import json
import os
import re
from typing import Any

import torch

from formats.ckpt import special_tokens_problem, state_dict
from formats.lazy_model import (
    TORCH_DTYPES,
    LazyModel,
    LazyTensor,
    find_tokenizer,
    read_json,
    same_values,
)
from formats.model_metadata import ModelMetadata, check_plain_format
from formats.torch_file import read_torch_file, write_torch_file
from model import ModelArgs
from ops.rope import RopeScaling
from runtime.atomic_files import AtomicFolder
from runtime.untrusted import clip, describe_value
from textdata.tokenizer import HuggingFaceTokenizer, Llama3Tokenizer, Tokenizer

DTYPES = {"meta": ("float32", "float16", "bfloat16")}
SPLIT_BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")
# What use_scaled_rope means; params.json cannot store other scalings.
SCALED_ROPE = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
# (dim, n_layers) of Llama 3.2. Its params.json omits the scaling factor, 32 instead of 3.1's 8.
LLAMA_3_2 = ((2048, 16), (3072, 28))
# Context length by generation; params.json does not contain it.
MAX_SEQ_LEN = {"llama2": 4096, "llama3": 8192, "llama3.1": 131072}
LLAMA_3_ROPE_THETA = 500000
REQUIRED_KEYS = ("dim", "n_layers", "n_heads", "vocab_size", "norm_eps")
NUMERIC_KEYS = (
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "multiple_of",
    "ffn_dim_multiplier",
    "norm_eps",
    "rope_theta",
)
OTHER_KEYS = (
    "use_scaled_rope",
    "max_seq_len",
    "max_batch_size",
    "rope_scaling_factor",
    "rope_high_freq_factor",
)
END_OF_TURN = ("<|eot_id|>", "<|eom_id|>")  # of Llama 3; Meta's code stops there, too
EXPORTED_FILES = re.compile(r"params\.json|tokenizer\.model|consolidated\.\d\d\.pth")


# Reading


def matches(path: str) -> bool:
    """Whether path is a folder with params.json."""
    return os.path.isfile(os.path.join(path, "params.json"))


def read(path: str) -> LazyModel:
    """Open a folder. Raises ValueError if it is damaged, incomplete or not a Llama."""
    params_path = os.path.join(path, "params.json")
    params = read_json(params_path)
    shards = read_shards(path)
    embedding = shards[0].get("tok_embeddings.weight")
    if embedding is None or len(embedding.shape) != 2 or "output.weight" not in shards[0]:
        raise ValueError(
            f"{path}: consolidated.00.pth has no matrix tok_embeddings.weight, or no output.weight"
        )
    embedding_axis = 0 if embedding.shape[1] == params.get("dim") else 1
    if params.get("vocab_size", -1) == -1:  # Llama 2: that of the tokenizer
        params["vocab_size"] = embedding.shape[0] * (1 if embedding_axis else len(shards))
    check_shard_count(path, params, shards)
    tensors = {}
    for name in shards[0]:
        if name != "rope.freqs":
            axis = int(name.endswith(SPLIT_BY_COLUMNS))
            axis = embedding_axis if name == "tok_embeddings.weight" else axis
            tensors[name] = concat_shards([shard[name] for shard in shards], axis, path)
    tied = same_values(tensors["output.weight"], tensors["tok_embeddings.weight"])
    if tied:
        del tensors["output.weight"]
    args = parse_args(params, params_path, tied)
    parent = os.path.dirname(os.path.abspath(path))  # Llama 2: one tokenizer for all sizes
    return LazyModel(path, args, tensors, lambda: find_tokenizer(path, parent))


def read_shards(path: str) -> list[dict[str, LazyTensor]]:
    """Open all files consolidated.NN.pth. Raises ValueError if one is missing or does not match."""
    names = sorted(
        name
        for name in os.listdir(path)
        if re.fullmatch(r"consolidated\.\d\d\.pth", name)
        and os.path.isfile(os.path.join(path, name))
    )
    expected = [f"consolidated.{number:02d}.pth" for number in range(max(1, len(names)))]
    if names != expected:
        raise ValueError(f"{path}: {min(set(expected) - set(names))} is missing")
    shards: list[dict[str, LazyTensor]] = []
    for name in names:
        shard = read_torch_file(os.path.join(path, name))
        if not isinstance(shard, dict) or not all(
            isinstance(key, str) and isinstance(tensor, LazyTensor) for key, tensor in shard.items()
        ):
            raise ValueError(f"{path}: {name} is not a state dict")
        shards.append(shard)
        if shard.keys() != shards[0].keys():
            raise ValueError(
                f"{path}: {name} and {names[0]} have different tensors; they do not belong together"
            )
    return shards


def check_shard_count(path: str, params: dict[str, Any], shards: list[dict]) -> None:
    """Raise ValueError if the rows of wq imply another number of shards."""
    query = shards[0].get("layers.0.attention.wq.weight")
    rows = query.shape[0] if query is not None and query.shape else 0
    dim = params.get("dim")
    if rows and isinstance(dim, int) and dim % rows == 0 and dim // rows != len(shards):
        raise ValueError(
            f"{path}: it has {len(shards)} of the {dim // rows} files consolidated.NN.pth"
        )


def concat_shards(shards: list[LazyTensor], axis: int, path: str) -> LazyTensor:
    """The full tensor of its shards along an axis; read() reads one shard at a time.

    Vectors are in every shard, so the first is returned. Raises ValueError if the shapes differ.
    """
    first = shards[0]
    if len(shards) == 1 or len(first.shape) < 2:
        return first
    if any(shard.shape != first.shape or shard.dtype != first.dtype for shard in shards):
        raise ValueError(f"{path}: the shapes of the shards differ; they do not belong together")
    length = first.shape[axis]
    shape = tuple(n * len(shards) if i == axis else n for i, n in enumerate(first.shape))

    def read() -> torch.Tensor:
        full = torch.empty(shape, dtype=first.dtype)
        for number, shard in enumerate(shards):
            full.narrow(axis, number * length, length).copy_(shard.read())
        return full

    locations = tuple(shard.location for shard in shards)
    checksums = tuple(shard.checksum for shard in shards)
    return LazyTensor(shape, first.dtype, read, locations, checksums)


def parse_args(params: dict[str, Any], path: str, tied: bool) -> ModelArgs:
    """The ModelArgs of a params.json. Raises ValueError if it is invalid or not a Llama."""
    check_params(params, path)
    try:
        return ModelArgs(
            dim=params["dim"],
            n_layers=params["n_layers"],
            n_heads=params["n_heads"],
            n_kv_heads=params.get("n_kv_heads"),
            vocab_size=params["vocab_size"],
            multiple_of=params.get("multiple_of", 256),
            ffn_dim_multiplier=params.get("ffn_dim_multiplier"),
            norm_eps=float(params["norm_eps"]),
            rope_theta=float(params.get("rope_theta", 10000.0)),
            rope_scaling=parse_rope_scaling(params),
            max_seq_len=context_length(params),
            tie_embeddings=tied,
        )
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: not the configuration of a Llama: {error}") from None


def check_params(params: dict[str, Any], path: str) -> None:
    """Raise ValueError for keys of params.json that are missing, unknown or of the wrong type."""
    if missing := [key for key in REQUIRED_KEYS if key not in params]:
        raise ValueError(f"{path}: it has no {' and no '.join(missing)}")
    if unknown := [key for key in params if key not in (*NUMERIC_KEYS, *OTHER_KEYS)]:
        raise ValueError(f"{path}: {clip(unknown[0])} is not supported")
    for key in NUMERIC_KEYS:
        if type(params.get(key)) not in (int, float, type(None)):
            raise ValueError(f"{path}: {key}={describe_value(params[key])} is not a number")
    is_scaled = params.get("use_scaled_rope", False)
    if not isinstance(is_scaled, bool):
        raise ValueError(f"{path}: use_scaled_rope is neither true nor false")
    is_llama_3_2 = (params["dim"], params["n_layers"]) in LLAMA_3_2
    if is_scaled and is_llama_3_2 and "rope_scaling_factor" not in params:
        raise ValueError(
            f"{path}: Llama 3.2 scales its positions by 32, but this file does not say so: "
            'add "rope_scaling_factor": 32.0 to it'
        )


def parse_rope_scaling(params: dict[str, Any]) -> RopeScaling | None:
    """The rotary scaling of a params.json."""
    if not params.get("use_scaled_rope", False):
        return None
    return RopeScaling(
        "llama3",
        factor=float(params.get("rope_scaling_factor", SCALED_ROPE.factor)),
        low_freq_factor=SCALED_ROPE.low_freq_factor,
        high_freq_factor=float(params.get("rope_high_freq_factor", SCALED_ROPE.high_freq_factor)),
        original_max_seq_len=SCALED_ROPE.original_max_seq_len,
    )


def context_length(params: dict[str, Any]) -> int:
    """The context length of the generation of Llama that a params.json describes."""
    if params.get("use_scaled_rope", False):
        return MAX_SEQ_LEN["llama3.1"]
    is_llama_3 = params.get("rope_theta") == LLAMA_3_ROPE_THETA
    return MAX_SEQ_LEN["llama3" if is_llama_3 else "llama2"]


# Writing


def unsupported_reason(args: ModelArgs) -> str | None:
    """Why params.json cannot store the model, or None if it can."""
    if args.rope_scaling not in (None, SCALED_ROPE):
        return (
            f"params.json cannot store {args.rope_scaling}, only that of Llama 3.1; "
            "use --format=hf or gguf"
        )
    return None


def check_metadata(metadata: ModelMetadata, tokenizer: Tokenizer | None) -> list[str]:
    """The names of what params.json cannot store. Raises ValueError if its readers never stop."""
    if tokenizer is None:
        return check_plain_format(metadata, dict.fromkeys(metadata.stop_ids, ""), "params.json")
    reader_stop_ids = {tokenizer.bos_id: "Meta's code does not end there", tokenizer.eos_id: ""}
    if isinstance(tokenizer, Llama3Tokenizer):
        names = [name for name in END_OF_TURN if name in tokenizer.special]
        reader_stop_ids |= {tokenizer.special_id(name): "" for name in names}
    return check_plain_format(metadata, reader_stop_ids, "params.json")


def write(model: LazyModel, path: str, target: str, dtype: str) -> None:
    """Write a folder with one shard, for Meta's code of Llama 2 or, by the tokenizer, Llama 3."""
    if reason := unsupported_reason(model.args):
        raise ValueError(f"{path}: {reason}")
    tokenizer = model.read_tokenizer()
    if reason := special_tokens_problem(tokenizer):
        raise ValueError(f"{path}: {reason}")
    if isinstance(tokenizer, HuggingFaceTokenizer):
        raise ValueError(
            f"{path}: tokenizer.model cannot store the vocabulary of a tokenizer.json; "
            "use --format=hf, gguf or ckpt"
        )
    with AtomicFolder(path, is_exported_file) as folder:
        with open(os.path.join(folder, "params.json"), "w", encoding="utf-8") as params_file:
            json.dump(to_params(model.args, tokenizer), params_file)
        if tokenizer:
            with open(os.path.join(folder, "tokenizer.model"), "wb") as file:
                file.write(tokenizer.content)
        with open(os.path.join(folder, "consolidated.00.pth"), "wb") as file:
            write_torch_file(file, state_dict(model, TORCH_DTYPES[dtype]))


def is_exported_file(name: str) -> bool:
    """Whether an export may replace a file of this name."""
    return bool(EXPORTED_FILES.fullmatch(name))


def to_params(args: ModelArgs, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The content of params.json.

    It has the keys of Llama 2's code. Keys of Llama 3 are added only for a Llama 3 tokenizer or if
    their values are not the defaults.
    """
    params: dict[str, Any] = {
        "dim": args.dim,
        "n_layers": args.n_layers,
        "n_heads": args.n_heads,
        "n_kv_heads": args.kv_heads,
        "vocab_size": args.vocab_size,
        "norm_eps": args.norm_eps,
    }
    params |= to_feed_forward_params(args)
    if args.rope_theta != 10000.0 or args.rope_scaling or isinstance(tokenizer, Llama3Tokenizer):
        params |= {"rope_theta": args.rope_theta, "use_scaled_rope": args.rope_scaling is not None}
    return params


def to_feed_forward_params(args: ModelArgs) -> dict[str, Any]:
    """multiple_of and, if needed, ffn_dim_multiplier that result in the model's ffn_dim.

    params.json cannot store the width itself.
    """
    without_hidden_dim = ModelArgs(
        dim=args.dim,
        n_heads=1,
        multiple_of=args.multiple_of,
        ffn_dim_multiplier=args.ffn_dim_multiplier,
    )
    if without_hidden_dim.ffn_dim == args.ffn_dim:
        params: dict[str, Any] = {"multiple_of": args.multiple_of}
        if args.ffn_dim_multiplier is not None:
            params["ffn_dim_multiplier"] = args.ffn_dim_multiplier
        return params
    base = int(2 * (4 * args.dim) / 3)
    multiplier = (args.ffn_dim + 0.5) / base  # half a unit more, so that it rounds down to ffn_dim
    assert int(multiplier * base) == args.ffn_dim, "no multiplier results in this width"
    return {"multiple_of": 1, "ffn_dim_multiplier": multiplier}
