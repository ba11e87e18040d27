"""
A folder as Meta publishes Llama 2 and 3: params.json, consolidated.NN.pth with our names, and
tokenizer.model, SentencePiece's or (Llama 3) tiktoken's ranks.

Shards are slices of every matrix, of the columns of wo and w2 and the rows of the others; norms are
in all of them. The embedding is cut by columns in Llama 2 and by rows in Llama 3.
"""

import json
import os
import re

import torch

from formats.ckpt import special_tokens_problem, weights
from formats.lazy_model import (
    TORCH_DTYPES,
    LazyModel,
    LazyTensor,
    find_tokenizer,
    read_json,
    same_values,
)
from formats.torch_file import read_torch_file, write_torch_file
from model import ModelArgs
from ops.rope import RopeScaling
from runtime.atomic_files import AtomicFolder
from textdata.tokenizer import Llama3Tokenizer, Tokenizer

DTYPES = {"meta": ("float32", "float16", "bfloat16")}
CUT_BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")
# What use_scaled_rope means; params.json has no place for other numbers.
SCALED_ROPE = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
# Shapes of Llama 3.2, whose params.json is silent about the factor in which it differs from 3.1.
LLAMA_3_2 = ((2048, 16), (3072, 28))
ADVICE_3_2 = 'add "rope_scaling_factor": 32.0 to the file'
# What params.json says nothing of: how many positions each generation was trained on.
CONTEXT = {"llama2": 4096, "llama3": 8192, "llama3.1": 131072}
ARCHITECTURE = (
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "multiple_of",
    "ffn_dim_multiplier",
)
NUMBERS = (*ARCHITECTURE, "norm_eps", "rope_theta")
OTHER_KEYS = (
    "use_scaled_rope",
    "max_seq_len",
    "max_batch_size",
    "rope_scaling_factor",
    "rope_high_freq_factor",
)


# Reading


def matches(path: str) -> bool:
    return os.path.isfile(os.path.join(path, "params.json"))


def read(path: str) -> LazyModel:
    file = os.path.join(path, "params.json")
    params = read_json(file)
    shards = read_shards(path)
    embedding = shards[0].get("tok_embeddings.weight")
    if embedding is None or len(embedding.shape) != 2 or "output.weight" not in shards[0]:
        raise ValueError(
            f"{path}: consolidated.00.pth has no matrix tok_embeddings.weight, or no output.weight"
        )
    axis_of_embedding = 0 if embedding.shape[1] == params.get("dim") else 1
    if params.get("vocab_size", -1) == -1:  # Llama 2: as many as the tokenizer has
        params["vocab_size"] = embedding.shape[0] * (1 if axis_of_embedding else len(shards))
    check_number_of_shards(path, params, shards)
    tensors = {}
    for name in shards[0]:
        if name != "rope.freqs":
            axis = (
                axis_of_embedding
                if name == "tok_embeddings.weight"
                else int(name.endswith(CUT_BY_COLUMNS))
            )
            tensors[name] = joined([shard[name] for shard in shards], axis, path)
    tied = same_values(tensors["output.weight"], tensors["tok_embeddings.weight"])
    if tied:
        del tensors["output.weight"]
    args = args_of(params, file, tied)
    # Meta puts Llama 2's vocabulary beside the folders of its sizes.
    folders = path, os.path.dirname(os.path.abspath(path))
    return LazyModel(path, args, tensors, lambda: find_tokenizer(*folders))


def read_shards(path: str) -> list[dict[str, LazyTensor]]:
    names = sorted(
        name for name in os.listdir(path) if re.fullmatch(r"consolidated\.\d\d\.pth", name)
    )
    names = [name for name in names if os.path.isfile(os.path.join(path, name))]
    expected = [f"consolidated.{number:02d}.pth" for number in range(max(1, len(names)))]
    if names != expected:
        raise ValueError(f"{path}: {min(set(expected) - set(names))} is missing")
    shards = [read_torch_file(os.path.join(path, name)) for name in names]
    for name, shard in zip(names, shards, strict=True):
        if not isinstance(shard, dict) or not all(
            isinstance(tensor, LazyTensor) for tensor in shard.values()
        ):
            raise ValueError(f"{path}: {name} is no table of tensors")
        if shard.keys() != shards[0].keys():
            raise ValueError(
                f"{path}: {name} and {names[0]} have not the same tensors; they do not belong together"
            )
    return shards


def check_number_of_shards(path: str, params: dict, shards: list):
    query = shards[0].get("layers.0.attention.wq.weight")
    rows = query.shape[0] if query is not None and query.shape else 0
    dim = params.get("dim")
    if rows and isinstance(dim, int) and dim % rows == 0 and dim // rows != len(shards):
        raise ValueError(
            f"{path}: it has {len(shards)} of the {dim // rows} files consolidated.NN.pth"
        )


def joined(parts: list[LazyTensor], axis: int, path: str) -> LazyTensor:
    """The whole of a tensor's slices; read one slice at a time."""
    first = parts[0]
    if len(parts) == 1 or len(first.shape) < 2:
        return first
    if any(part.shape != first.shape or part.dtype != first.dtype for part in parts):
        raise ValueError(
            f"{path}: the shards have slices of different shapes; they do not belong together"
        )
    length = first.shape[axis]
    shape = tuple(n * len(parts) if i == axis else n for i, n in enumerate(first.shape))

    def read():
        whole = torch.empty(shape, dtype=first.dtype)
        for number, part in enumerate(parts):
            whole.narrow(axis, number * length, length).copy_(part.read())
        return whole

    return LazyTensor(
        shape,
        first.dtype,
        read,
        *zip(*((part.place, part.checksum) for part in parts), strict=True),
    )


def args_of(params: dict, path: str, tied: bool) -> ModelArgs:
    """The architecture in a params.json. Raises ValueError for another than Llama's."""
    if missing := [
        key for key in ("dim", "n_layers", "n_heads", "vocab_size", "norm_eps") if key not in params
    ]:
        raise ValueError(f"{path}: it has no {' and no '.join(missing)}")
    if unknown := [key for key in params if key not in (*NUMBERS, *OTHER_KEYS)]:
        raise ValueError(f"{path}: {unknown[0]} is more than a Llama of ours can say")
    for key in NUMBERS:
        if type(params.get(key)) not in (int, float, type(None)):
            raise ValueError(f"{path}: {key}={params[key]!r} is no number")
    scaled = params.get("use_scaled_rope", False)
    if not isinstance(scaled, bool):
        raise ValueError(f"{path}: use_scaled_rope is neither true nor false")
    if (
        scaled
        and "rope_scaling_factor" not in params
        and (params["dim"], params["n_layers"]) in LLAMA_3_2
    ):
        raise ValueError(
            f"{path}: Llama 3.2 scales its positions by 32, but this does not say so: {ADVICE_3_2}"
        )
    scaling = None
    generation = (
        "llama3.1" if scaled else "llama3" if params.get("rope_theta") == 500000 else "llama2"
    )
    try:
        if scaled:
            factor = float(params.get("rope_scaling_factor", SCALED_ROPE.factor))
            high = float(params.get("rope_high_freq_factor", SCALED_ROPE.high_freq_factor))
            scaling = RopeScaling(
                "llama3",
                factor,
                SCALED_ROPE.low_freq_factor,
                high,
                SCALED_ROPE.original_max_seq_len,
            )
        return ModelArgs(
            **{
                key: params[key]
                for key in ARCHITECTURE
                if params.get(key) is not None and key != "multiple_of"
            },
            multiple_of=params.get("multiple_of", 256),
            norm_eps=float(params["norm_eps"]),
            rope_theta=float(params.get("rope_theta", 10000.0)),
            rope_scaling=scaling,
            max_seq_len=CONTEXT[generation],
            tie_embeddings=tied,
        )
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: not the settings of a Llama: {error}") from None


# Writing


def unsupported_reason(args: ModelArgs) -> str | None:
    if args.rope_scaling not in (None, SCALED_ROPE):
        return f"params.json has no place for {args.rope_scaling}, only for Llama 3.1's; use --format=hf or gguf"
    return None


def write(stored: LazyModel, path: str, target: str, dtype: str):
    """Write the folder, in one shard, to be read by Meta's code of the tokenizer's generation."""
    if reason := unsupported_reason(stored.args):
        raise ValueError(f"{path}: {reason}")
    tokenizer = stored.own_tokenizer()
    if reason := special_tokens_problem(tokenizer):
        raise ValueError(f"{path}: {reason}")
    with AtomicFolder(path, is_ours) as folder:
        with open(os.path.join(folder, "params.json"), "w", encoding="utf-8") as file:
            json.dump(params_of(stored.args, tokenizer), file)
        if tokenizer:
            with open(os.path.join(folder, "tokenizer.model"), "wb") as file:
                file.write(tokenizer.content)
        with open(os.path.join(folder, "consolidated.00.pth"), "wb") as file:
            write_torch_file(file, weights(stored, TORCH_DTYPES[dtype]))


def is_ours(name: str) -> bool:
    """Whether a file may give way to a folder that is written anew."""
    return bool(re.fullmatch(r"params\.json|tokenizer\.model|consolidated\.\d\d\.pth", name))


def params_of(args: ModelArgs, tokenizer: Tokenizer | None) -> dict:
    """params.json. It knows no hidden_dim, only how to come to it. What Llama 2's code does not know
    is left out where it says nothing new."""
    params = {
        "dim": args.dim,
        "n_layers": args.n_layers,
        "n_heads": args.n_heads,
        "n_kv_heads": args.kv_heads,
    }
    params |= {"vocab_size": args.vocab_size, "norm_eps": args.norm_eps, **feed_forward_of(args)}
    if args.rope_theta != 10000.0 or args.rope_scaling or isinstance(tokenizer, Llama3Tokenizer):
        params |= {"rope_theta": args.rope_theta, "use_scaled_rope": args.rope_scaling is not None}
    return params


def feed_forward_of(args: ModelArgs) -> dict:
    """multiple_of and, where it takes one, an ffn_dim_multiplier that lead to the feed-forward width."""
    plain = ModelArgs(
        dim=args.dim,
        n_heads=1,
        multiple_of=args.multiple_of,
        ffn_dim_multiplier=args.ffn_dim_multiplier,
    )
    if plain.ffn_dim == args.ffn_dim:
        multiplier = (
            {}
            if args.ffn_dim_multiplier is None
            else {"ffn_dim_multiplier": args.ffn_dim_multiplier}
        )
        return {"multiple_of": args.multiple_of} | multiplier
    base = int(2 * (4 * args.dim) / 3)
    multiplier = (args.ffn_dim + 0.5) / base  # half a step above, so that rounding down hits it
    assert int(multiplier * base) == args.ffn_dim, "a feed-forward width that no multiplier gives"
    return {"multiple_of": 1, "ffn_dim_multiplier": multiplier}
