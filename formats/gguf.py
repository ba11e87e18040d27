"""
GGUF, the format of llama.cpp and ollama: metadata that describes the model and contains its
vocabulary, and the tensors. The layout of wq and wk for rotary embeddings is that of model.py.

The container is in gguf_file.py.
"""

import dataclasses
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch

from formats import gguf_metadata, gguf_tokenizer, tokenizer_json
from formats.gguf_file import (
    ALIGNMENT,
    BF16,
    BOOL,
    F16,
    F32,
    FLOAT32,
    FLOAT64,
    GROUP_SIZE,
    INT32,
    MAGIC,
    Q8_0,
    UINT32,
    MetadataValue,
    TensorInfo,
    TypedValue,
    pack_header,
    pad,
    read_split_container,
    write_tensor,
)
from formats.lazy_model import LazyModel, LazyTensor, expand_layers, one_line
from formats.model_metadata import ModelMetadata
from model import ModelArgs
from ops.rope import RopeScaling, rope_frequencies
from runtime.atomic_files import AtomicFile
from runtime.untrusted import describe_value
from textdata.bpe_merges import rank_merges
from textdata.tokenizer import (
    CONTROL,
    NORMAL,
    HuggingFaceTokenizer,
    Llama3Tokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

DTYPES = {"gguf": ("float32", "float16", "bfloat16", "q8_0")}
TENSOR_TYPES = {"float32": F32, "float16": F16, "bfloat16": BF16, "q8_0": Q8_0}
FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7, "bfloat16": 32}  # general.file_type
QUANTIZATION_VERSION = 2  # general.quantization_version

# Name in model.py, name in GGUF
TENSOR_NAMES = (
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
ROPE_FACTORS = "rope_freqs.weight"  # divisors of the rotary frequencies (Llama 3.1's scaling)
ROPE_SCALING_KEY = "cria.rope_scaling"  # this project's key: the parameters of those divisors
# Scalings of Llama 3.1 and 3.2, recognised by their divisors alone
KNOWN_SCALINGS: tuple[RopeScaling, ...] = (RopeScaling("llama3", 8.0), RopeScaling("llama3", 32.0))


# Reading


def matches(path: str) -> bool:
    """Whether a file begins with the magic number."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(4) == MAGIC


def read(path: str) -> LazyModel:
    """Open a file. Raises ValueError if it is damaged or not a supported Llama."""
    metadata, gguf_tensors = read_split_container(path)
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{path}: a model of architecture {describe_value(architecture)}, not llama"
        )
    rope_factors = gguf_tensors.pop(ROPE_FACTORS, None)
    args = parse_args(metadata, gguf_tensors, rope_factors, path)
    tensors = {}
    for name, gguf_name in expand_layers(TENSOR_NAMES, args):
        if gguf_name not in gguf_tensors:
            raise ValueError(f"{path}: {gguf_name} is missing; its header requires it")
        tensors[name] = gguf_tensors.pop(gguf_name)
    if gguf_tensors:
        raise ValueError(f"{path}: {min(gguf_tensors)[:100]} is not a tensor of a Llama")
    model_metadata = gguf_metadata.parse_metadata(metadata, path)
    return LazyModel(
        path,
        args,
        tensors,
        read_tokenizer=cache(partial(parse_tokenizer, metadata, path)),
        read_metadata=lambda: model_metadata,
        contains_tokenizer=True,
    )


def parse_args(
    metadata: dict[str, Any],
    tensors: dict[str, LazyTensor],
    rope_factors: LazyTensor | None,
    path: str,
) -> ModelArgs:
    """The ModelArgs of the metadata. Raises ValueError if they are invalid or not a Llama's."""
    number = partial(get_number, metadata, path)
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"{path}: it has no token_embd.weight")
    n_heads = number("attention.head_count")
    try:
        args = ModelArgs(
            dim=number("embedding_length"),
            hidden_dim=number("feed_forward_length"),
            n_layers=number("block_count"),
            n_heads=n_heads,
            n_kv_heads=number("attention.head_count_kv", n_heads),
            vocab_size=embedding.shape[0],
            norm_eps=shortest_float(number("attention.layer_norm_rms_epsilon")),
            rope_theta=shortest_float(number("rope.freq_base", 10000.0)),
            max_seq_len=number("context_length"),
            tie_embeddings="output.weight" not in tensors,
        )
        scaling = parse_rope_scaling(metadata, rope_factors, args)
        args = dataclasses.replace(args, rope_scaling=scaling)
    except (ValueError, TypeError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        if number(key, args.head_dim) != args.head_dim:
            raise ValueError(
                f"{path}: llama.{key} is {number(key)}; "
                f"only dim/n_heads={args.head_dim} is supported"
            )
    if number("expert_count", 0):
        raise ValueError(f"{path}: a mixture of experts is not supported")
    return args


def get_number(metadata: dict[str, Any], path: str, key: str, default: Any = None) -> Any:
    """A number among the metadata of the architecture. Raises ValueError if it is not there."""
    value = metadata.get(f"llama.{key}", default)
    if type(value) not in (int, float):
        problem = "missing" if value is None else describe_value(value)
        raise ValueError(f"{path}: llama.{key} is {problem}")
    return value


def shortest_float(value: float) -> float:
    """The decimal number that was rounded to a float32: 1e-5 for 9.99999975e-06."""
    return float(np.format_float_scientific(np.float32(value), unique=True))


def parse_rope_scaling(
    metadata: dict[str, Any], rope_factors: LazyTensor | None, args: ModelArgs
) -> RopeScaling | None:
    """The rotary scaling, from its type in the metadata or from the divisors of the frequencies.

    Raises ValueError if it is not supported.
    """
    scaling_type = metadata.get("llama.rope.scaling.type", "none")
    if scale := metadata.get("llama.rope.scale_linear"):  # key of older files
        return RopeScaling("linear", shortest_float(scale)) if scale != 1 else None
    if scaling_type == "linear" and rope_factors is None:
        return RopeScaling("linear", shortest_float(metadata["llama.rope.scaling.factor"]))
    if scaling_type != "none":
        raise ValueError(f"rope scaling of type {describe_value(scaling_type)} is not supported")
    if rope_factors is None:
        return None
    candidates = KNOWN_SCALINGS
    parameters = metadata.get(ROPE_SCALING_KEY, [])
    if len(parameters) == 4:
        factor, low, high, original_max_seq_len = parameters
        candidates = (RopeScaling("llama3", factor, low, high, int(original_max_seq_len)),)
    if rope_factors.shape == (args.head_dim // 2,):
        factors = rope_factors.read().float()
        for scaling in candidates:
            if torch.allclose(factors, frequency_divisors(args, scaling), rtol=1e-3):
                return scaling
    raise ValueError(f"the values of {ROPE_FACTORS} are not those of a known Llama")


def frequency_divisors(args: ModelArgs, scaling: RopeScaling) -> torch.Tensor:
    """By how much a scaling divides each rotary frequency (head_dim/2,)."""
    unscaled = rope_frequencies(args.head_dim, args.rope_theta)
    return unscaled / rope_frequencies(args.head_dim, args.rope_theta, scaling)


def parse_tokenizer(metadata: dict[str, Any], path: str) -> Tokenizer | None:
    """The tokenizer of a file, None if it has none. Raises ValueError if it is not supported."""
    model = metadata.get("tokenizer.ggml.model")
    if model in (None, "none", "no_vocab"):
        return None
    try:
        names = metadata.get("tokenizer.ggml.tokens")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("its tokens are not a list of strings")
        if tokenizer := gguf_tokenizer.parse_json(metadata):
            return tokenizer
        types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(names))
        names, types = gguf_tokenizer.without_padding(names, types)
        if model == "llama":
            return gguf_tokenizer.parse_sentencepiece(metadata, names, types)
        if model == "gpt2":
            return gguf_tokenizer.parse_byte_level(metadata, names, types)
        raise ValueError(f"a vocabulary of type {describe_value(model)} is not supported")
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}: its vocabulary cannot be read ({one_line(str(error), 100)})"
        ) from error


# Writing


class TensorToWrite(NamedTuple):
    """A tensor of a file to write, with its name in GGUF."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def unsupported_reason(args: ModelArgs) -> None:
    """None: the format stores every model."""


def check_metadata(metadata: ModelMetadata, tokenizer: Tokenizer | None) -> list[str]:
    """The stop ids that llama.cpp does not learn from a file; the rest is stored."""
    names = tokenizer_json.token_names(tokenizer) if tokenizer else []
    return gguf_metadata.lost_stop_ids(metadata, names)


def write(model: LazyModel, path: str, target: str, dtype: str) -> None:
    """Write a file. In q8_0, a matrix is float16 if its row length is not a multiple of 32."""
    tokenizer = model.read_tokenizer()
    if tokenizer is None:
        raise ValueError(
            f"{path}: llama.cpp reads no GGUF file without a vocabulary; "
            "name it with --tokenizer=PATH"
        )
    reason = tokenizer_json.unsupported_reason(tokenizer)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        reason = gguf_tokenizer.unsupported_reason(tokenizer)
    if reason:
        raise ValueError(f"{path}: {reason}")
    tensors = list_tensors(model)
    infos = describe_tensors(tensors, dtype)
    with AtomicFile(path) as file:
        file.write(pack_header(to_metadata(model, tokenizer, dtype), infos))
        pad(file)
        for tensor in tensors:
            write_tensor(file, tensor.read(), infos[tensor.name].type, tensor.name)
            pad(file)


def list_tensors(model: LazyModel) -> list[TensorToWrite]:
    """The tensors to write, in order."""
    tensors = [
        TensorToWrite(gguf_name, model.tensors[name].shape, partial(model.read, name))
        for name, gguf_name in expand_layers(TENSOR_NAMES, model.args)
    ]
    scaling = model.args.rope_scaling
    if scaling and scaling.type == "llama3":
        divisors = frequency_divisors(model.args, scaling)
        tensors.append(TensorToWrite(ROPE_FACTORS, tuple(divisors.shape), lambda: divisors))
    return tensors


def describe_tensors(tensors: list[TensorToWrite], dtype: str) -> dict[str, TensorInfo]:
    """Type and offset of each tensor of a file, by name."""
    infos: dict[str, TensorInfo] = {}
    offset = 0
    for name, shape, _ in tensors:
        tensor_type = F32 if len(shape) == 1 else TENSOR_TYPES[dtype]
        if tensor_type == Q8_0 and shape[-1] % GROUP_SIZE:
            tensor_type = F16
        infos[name] = TensorInfo(shape, tensor_type, offset)
        offset += infos[name].size + -infos[name].size % ALIGNMENT
    return infos


def to_metadata(model: LazyModel, tokenizer: Tokenizer, dtype: str) -> dict[str, MetadataValue]:
    """The metadata of a file."""
    args = model.args
    model_metadata = model.metadata(tokenizer)
    path_without_suffix, _ = os.path.splitext(os.path.abspath(model.path))
    metadata: dict[str, MetadataValue] = {
        "general.architecture": "llama",
        "general.name": model_metadata.name or os.path.basename(path_without_suffix),
        "general.file_type": TypedValue(UINT32, FILE_TYPES[dtype]),
        "general.quantization_version": TypedValue(UINT32, QUANTIZATION_VERSION),
        "general.alignment": TypedValue(UINT32, ALIGNMENT),
        "llama.vocab_size": TypedValue(UINT32, args.vocab_size),
        "llama.context_length": TypedValue(UINT32, args.max_seq_len),
        "llama.embedding_length": TypedValue(UINT32, args.dim),
        "llama.block_count": TypedValue(UINT32, args.n_layers),
        "llama.feed_forward_length": TypedValue(UINT32, args.ffn_dim),
        "llama.rope.dimension_count": TypedValue(UINT32, args.head_dim),
        "llama.rope.freq_base": TypedValue(FLOAT32, args.rope_theta),
        "llama.attention.head_count": TypedValue(UINT32, args.n_heads),
        "llama.attention.head_count_kv": TypedValue(UINT32, args.kv_heads),
        "llama.attention.layer_norm_rms_epsilon": TypedValue(FLOAT32, args.norm_eps),
    }
    metadata |= to_rope_metadata(args.rope_scaling)
    return metadata | to_vocabulary(tokenizer, args) | gguf_metadata.to_metadata(model_metadata)


def to_rope_metadata(scaling: RopeScaling | None) -> dict[str, MetadataValue]:
    """The metadata of a rotary scaling."""
    if scaling is None:
        return {}
    if scaling.type == "linear":
        return {
            "llama.rope.scaling.type": "linear",
            "llama.rope.scaling.factor": TypedValue(FLOAT32, scaling.factor),
        }
    parameters = [
        scaling.factor,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.original_max_seq_len,
    ]
    return {ROPE_SCALING_KEY: TypedValue(FLOAT64, parameters)}


def to_vocabulary(tokenizer: Tokenizer, args: ModelArgs) -> dict[str, MetadataValue]:
    """The metadata of a vocabulary with one token for each embedding."""
    return gguf_tokenizer.fit_to_embeddings(to_tokenizer_metadata(tokenizer), args.vocab_size)


def to_tokenizer_metadata(tokenizer: Tokenizer) -> dict[str, MetadataValue]:
    """The metadata that contains the vocabulary."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return to_sentencepiece_metadata(tokenizer)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return gguf_tokenizer.to_metadata(tokenizer)
    assert isinstance(tokenizer, Llama3Tokenizer), "there are three types of tokenizers"
    return to_llama3_metadata(tokenizer)


def to_sentencepiece_metadata(tokenizer: SentencePieceTokenizer) -> dict[str, MetadataValue]:
    """The metadata of a SentencePiece vocabulary."""
    names, scores, types = zip(*tokenizer.pieces, strict=True)
    metadata: dict[str, MetadataValue] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": list(names),
        "tokenizer.ggml.scores": TypedValue(FLOAT32, list(scores)),
        "tokenizer.ggml.token_type": TypedValue(INT32, list(types)),
        "tokenizer.ggml.add_space_prefix": TypedValue(BOOL, tokenizer.has_dummy_prefix),
    }
    if tokenizer.processor.unk_id() >= 0:
        unknown = tokenizer.processor.unk_id()
        metadata["tokenizer.ggml.unknown_token_id"] = TypedValue(UINT32, unknown)
    return metadata


def to_llama3_metadata(tokenizer: Llama3Tokenizer) -> dict[str, MetadataValue]:
    """The metadata of a Llama 3 vocabulary."""
    types = [NORMAL] * len(tokenizer.ranks) + [CONTROL] * len(tokenizer.special)
    merges = rank_merges(tokenizer.ranks)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokenizer_json.token_names(tokenizer),
        "tokenizer.ggml.token_type": TypedValue(INT32, types),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
    }
