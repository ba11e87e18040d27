"""
GGUF, the format of llama.cpp and ollama: key-value pairs that describe the model and hold its
vocabulary, and the tensors. The rotary layout is ours. The container is gguf_file.py's.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from formats import tokenizer_json
from formats.gguf_file import (
    ALIGNMENT,
    BF16,
    F16,
    F32,
    GROUP,
    MAGIC,
    Q8_0,
    TensorInfo,
    header_of,
    pad,
    read_container,
    write_tensor,
)
from formats.lazy_model import LazyModel, LazyTensor, expand_layers, one_line
from model import ModelArgs
from ops.rope import RopeScaling, rope_frequencies
from runtime.atomic_files import AtomicFile
from textdata.tokenizer import (
    CONTROL,
    NORMAL,
    Llama3Tokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    proto_from_pieces,
    require_bos_eos,
)

DTYPES = {"gguf": ("float32", "float16", "bfloat16", "q8_0")}
FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7, "bfloat16": 32}  # general.file_type

# ours, theirs
TABLE = (
    ("tok_embeddings.weight", "token_embd.weight"),
    ("layers.{}.attention_norm.weight", "blk.{}.attn_norm.weight"),
    ("layers.{}.attention.wq.weight", "blk.{}.attn_q.weight"),
    ("layers.{}.attention.wk.weight", "blk.{}.attn_k.weight"),
    ("layers.{}.attention.wv.weight", "blk.{}.attn_v.weight"),
    ("layers.{}.attention.wo.weight", "blk.{}.attn_output.weight"),
    ("layers.{}.ffn_norm.weight", "blk.{}.ffn_norm.weight"),
    ("layers.{}.feed_forward.w1.weight", "blk.{}.ffn_gate.weight"),
    ("layers.{}.feed_forward.w3.weight", "blk.{}.ffn_up.weight"),
    ("layers.{}.feed_forward.w2.weight", "blk.{}.ffn_down.weight"),
    ("norm.weight", "output_norm.weight"),
    ("output.weight", "output.weight"),
)
ROPE_FACTORS = "rope_freqs.weight"  # by how much each frequency is divided: Llama 3.1's scaling
OWN_SCALING = "cria.rope_scaling"  # the numbers behind those factors
KNOWN_SCALINGS = tuple(RopeScaling("llama3", factor) for factor in (8.0, 32.0))  # Llama 3.1, 3.2


# Reading


def matches(path: str) -> bool:
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(4) == MAGIC


def read(path: str) -> LazyModel:
    pairs, theirs = read_container(path)
    if pairs.get("general.architecture") != "llama":
        raise ValueError(
            f"{path}: a model of architecture {pairs.get('general.architecture')!r}, not llama"
        )
    factors = theirs.pop(ROPE_FACTORS, None)
    args = args_of(pairs, theirs, factors, path)
    tensors = {}
    for ours, name in expand_layers(TABLE, args):
        if name not in theirs:
            raise ValueError(f"{path}: it has no {name}, which its header speaks of")
        tensors[ours] = theirs.pop(name)
    if theirs:
        raise ValueError(f"{path}: {min(theirs)[:100]} is no part of a Llama of ours")
    return LazyModel(path, args, tensors, lambda: tokenizer_of(pairs, path))


def args_of(pairs: dict, tensors: dict, factors: LazyTensor | None, path: str) -> ModelArgs:
    """The architecture that the pairs describe. Raises ValueError for another than Llama's."""

    def number(key, default=None):
        value = pairs.get(f"llama.{key}", default)
        if type(value) not in (int, float):
            raise ValueError(
                f"{path}: llama.{key} is {'missing' if value is None else f'{str(value)[:50]}'}"
            )
        return value

    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"{path}: it has no token_embd.weight")
    heads = number("attention.head_count")
    try:
        args = ModelArgs(
            dim=number("embedding_length"),
            hidden_dim=number("feed_forward_length"),
            n_layers=number("block_count"),
            n_heads=heads,
            n_kv_heads=number("attention.head_count_kv", heads),
            vocab_size=embedding.shape[0],
            norm_eps=shortest_float(number("attention.layer_norm_rms_epsilon")),
            rope_theta=shortest_float(number("rope.freq_base", 10000.0)),
            max_seq_len=number("context_length"),
            tie_embeddings="output.weight" not in tensors,
        )
        scaling = scaling_of(pairs, factors, args)
        args = ModelArgs(**{**vars(args), "rope_scaling": scaling})
    except (ValueError, TypeError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        if number(key, args.head_dim) != args.head_dim:
            raise ValueError(
                f"{path}: llama.{key} is {number(key)}, but dim/n_heads={args.head_dim} is all we can say"
            )
    if number("expert_count", 0):
        raise ValueError(f"{path}: a mixture of experts is more than a Llama of ours can say")
    return args


def shortest_float(value: float) -> float:
    """The decimal number that was meant by one that went through a float32: 1e-5, not 9.99999975e-06."""
    return float(np.format_float_scientific(np.float32(value), unique=True))


def scaling_of(pairs: dict, factors: LazyTensor | None, args: ModelArgs) -> RopeScaling | None:
    """The rotary scaling, of which the file has the type, or only the factors."""
    kind = pairs.get("llama.rope.scaling.type", "none")
    if older := pairs.get("llama.rope.scale_linear"):
        return RopeScaling("linear", shortest_float(older)) if older != 1 else None
    if kind == "linear" and factors is None:
        return RopeScaling("linear", shortest_float(pairs["llama.rope.scaling.factor"]))
    if kind != "none":
        raise ValueError(f"rope scaling of type {kind!r} is more than a Llama of ours can say")
    if factors is None:
        return None
    own = pairs.get(OWN_SCALING, [])
    candidates = (
        (RopeScaling("llama3", *own[:3], int(own[3])),) if len(own) == 4 else KNOWN_SCALINGS
    )
    if factors.shape == (args.head_dim // 2,):
        for scaling in candidates:
            if torch.allclose(factors.read().float(), scaling_factors(args, scaling), rtol=1e-3):
                return scaling
    raise ValueError(f"the factors in {ROPE_FACTORS} are those of no Llama known here")


def scaling_factors(args: ModelArgs, scaling: RopeScaling) -> torch.Tensor:
    """By how much each frequency is divided (head_dim/2,)."""
    plain, scaled = (
        rope_frequencies(args.head_dim, args.rope_theta, choice) for choice in (None, scaling)
    )
    return plain / scaled


def tokenizer_of(pairs: dict, path: str) -> Tokenizer | None:
    """The vocabulary in the file; None if it has none."""
    model, names = pairs.get("tokenizer.ggml.model"), pairs.get("tokenizer.ggml.tokens")
    if model in (None, "none", "no_vocab"):
        return None
    try:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("its tokens are no list of texts")
        kinds = pairs.get("tokenizer.ggml.token_type", [NORMAL] * len(names))
        if model == "llama":
            pieces = list(zip(names, pairs["tokenizer.ggml.scores"], kinds, strict=True))
            ends = [
                names[pairs.get(f"tokenizer.ggml.{end}_token_id", i)]
                for end, i in (("bos", 1), ("eos", 2))
            ]
            pieces = [
                (piece, score, CONTROL if piece in ends else kind) for piece, score, kind in pieces
            ]
            has_prefix = bool(pairs.get("tokenizer.ggml.add_space_prefix", True))
            return require_bos_eos(
                SentencePieceTokenizer(proto_from_pieces(pieces, *ends, has_prefix))
            )
        if model == "gpt2" and pairs.get("tokenizer.ggml.pre") in (
            "llama-bpe",
            "llama3",
            "llama-v3",
        ):
            count = next((i for i, kind in enumerate(kinds) if kind == CONTROL), len(names))
            return Llama3Tokenizer(
                [tokenizer_json.from_letters(name) for name in names[:count]], names[count:]
            )
        raise ValueError(
            f"a vocabulary of type {model!r}, {pairs.get('tokenizer.ggml.pre')!r}, is not known here"
        )
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}: its vocabulary cannot be read ({one_line(str(error), 100)})"
        ) from error


# Writing


def unsupported_reason(args: ModelArgs) -> None:
    """It says every model."""


def write(stored: LazyModel, path: str, target: str, dtype: str):
    """Write the file. In q8_0, a matrix whose rows are no multiple of 32 stays float16."""
    tokenizer = stored.own_tokenizer()
    if tokenizer is None:
        raise ValueError(
            f"{path}: llama.cpp reads no GGUF file without a vocabulary; name it with --tokenizer=PATH"
        )
    if reason := tokenizer_json.unsupported_reason(tokenizer):
        raise ValueError(f"{path}: {reason}")
    tensors = list(tensors_of(stored, dtype))
    with AtomicFile(path) as file:
        file.write(
            header_of(
                pairs_of(stored, tokenizer, dtype), [(name, info) for name, info, _ in tensors]
            )
        )
        pad(file)
        for name, info, read in tensors:
            write_tensor(file, read(), info.kind, name)
            pad(file)


def tensors_of(stored: LazyModel, dtype: str) -> Iterator[tuple[str, TensorInfo, Callable]]:
    """Name, description and reader of every tensor to write, in order."""
    args, offset = stored.args, 0
    kinds = {"float32": F32, "float16": F16, "bfloat16": BF16, "q8_0": Q8_0}
    names = expand_layers(TABLE, args)
    entries = [
        (theirs, stored.tensors[ours].shape, partial(stored.read, ours)) for ours, theirs in names
    ]
    if args.rope_scaling and args.rope_scaling.type == "llama3":
        factors = scaling_factors(args, args.rope_scaling)
        entries.append((ROPE_FACTORS, tuple(factors.shape), lambda: factors))
    for name, shape, read in entries:
        kind = F32 if len(shape) == 1 else kinds[dtype]
        info = TensorInfo(shape, F16 if kind == Q8_0 and shape[-1] % GROUP else kind, offset)
        yield name, info, read
        offset += info.size + -info.size % ALIGNMENT


def pairs_of(stored: LazyModel, tokenizer: Tokenizer, dtype: str) -> dict:
    """The key-value pairs, as (type, value)."""
    args, scaling = stored.args, stored.args.rope_scaling
    name = os.path.basename(os.path.splitext(os.path.abspath(stored.path))[0])
    pairs = {
        "general.architecture": "llama",
        "general.name": name,
        "general.file_type": (4, FILE_TYPES[dtype]),
        "general.quantization_version": (4, 2),
        "general.alignment": (4, ALIGNMENT),
        "llama.vocab_size": (4, args.vocab_size),
        "llama.context_length": (4, args.max_seq_len),
        "llama.embedding_length": (4, args.dim),
        "llama.block_count": (4, args.n_layers),
        "llama.feed_forward_length": (4, args.ffn_dim),
        "llama.rope.dimension_count": (4, args.head_dim),
        "llama.rope.freq_base": (6, args.rope_theta),
        "llama.attention.head_count": (4, args.n_heads),
        "llama.attention.head_count_kv": (4, args.kv_heads),
        "llama.attention.layer_norm_rms_epsilon": (6, args.norm_eps),
    }
    if scaling and scaling.type == "linear":
        pairs |= {
            "llama.rope.scaling.type": "linear",
            "llama.rope.scaling.factor": (6, scaling.factor),
        }
    elif scaling:
        numbers = (
            scaling.factor,
            scaling.low_freq_factor,
            scaling.high_freq_factor,
            scaling.original_max_seq_len,
        )
        pairs[OWN_SCALING] = (12, list(numbers))
    return pairs | vocabulary_of(tokenizer)


def vocabulary_of(tokenizer: Tokenizer) -> dict:
    """The pairs that hold the vocabulary."""
    pairs = {
        "tokenizer.ggml.bos_token_id": (4, tokenizer.bos_id),
        "tokenizer.ggml.eos_token_id": (4, tokenizer.eos_id),
        "tokenizer.ggml.add_bos_token": (7, True),
        "tokenizer.ggml.add_eos_token": (7, False),
    }
    if isinstance(tokenizer, SentencePieceTokenizer):
        names, scores, kinds = zip(*tokenizer.pieces, strict=True)
        return pairs | {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": list(names),
            "tokenizer.ggml.scores": (6, list(scores)),
            "tokenizer.ggml.token_type": (5, list(kinds)),
            "tokenizer.ggml.unknown_token_id": (4, tokenizer.processor.unk_id()),
            "tokenizer.ggml.add_space_prefix": (7, tokenizer.has_dummy_prefix),
        }
    pairs |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokenizer_json.token_names(tokenizer),
        "tokenizer.ggml.token_type": (
            5,
            [NORMAL] * len(tokenizer.ranks) + [CONTROL] * len(tokenizer.special),
        ),
        "tokenizer.ggml.merges": [
            f"{left} {right}" for left, right in tokenizer_json.rank_merges(tokenizer.ranks)
        ],
    }
    if "<|eot_id|>" in tokenizer.special:
        pairs["tokenizer.ggml.eot_token_id"] = (4, tokenizer.special_id("<|eot_id|>"))
        pairs["tokenizer.chat_template"] = tokenizer_json.CHAT_TEMPLATE
    return pairs
