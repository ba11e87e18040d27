"""
config.json and generation_config.json of transformers 4 and 5.
"""

from collections.abc import Sequence
from typing import Any

from formats.model_metadata import ModelMetadata
from model import ModelArgs
from ops.rope import RopeScaling
from runtime.untrusted import describe_value

# Keys of config.json that change the computation, and the only value that model.py supports.
SUPPORTED_VALUES = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}
REQUIRED_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)


# Reading


def parse_args(config: dict[str, Any], path: str) -> ModelArgs:
    """The ModelArgs of a config.json of transformers 4 or 5.

    Raises ValueError if it is invalid or not a supported Llama.
    """
    check_config(config, path)
    try:
        rope_theta, rope_scaling = parse_rope(config)
        args = ModelArgs(
            dim=config["hidden_size"],
            hidden_dim=config["intermediate_size"],
            n_layers=config["num_hidden_layers"],
            n_heads=config["num_attention_heads"],
            n_kv_heads=config.get("num_key_value_heads"),
            vocab_size=config["vocab_size"],
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),  # transformers' default
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_seq_len=config.get("max_position_embeddings", 2048),  # transformers' default
            tie_embeddings=config.get("tie_word_embeddings", False),
        )
    except (ValueError, TypeError, KeyError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"{path}: not the configuration of a Llama: {error}") from None
    if config.get("head_dim") not in (None, args.head_dim):
        raise ValueError(
            f"{path}: head_dim={describe_value(config['head_dim'])}; "
            f"only dim/n_heads={args.head_dim} is supported"
        )
    return args


def check_config(config: dict[str, Any], path: str) -> None:
    """Raise ValueError if config.json lacks a size or has an unsupported value."""
    if config.get("model_type") != "llama":
        model_type = describe_value(config.get("model_type"))
        raise ValueError(f"{path}: a model of type {model_type}, not llama")
    for key, supported in SUPPORTED_VALUES.items():
        if config.get(key) not in (None, supported):
            raise ValueError(f"{path}: {key}={describe_value(config[key])} is not supported")
    if not isinstance(config.get("tie_word_embeddings", False), bool):
        raise ValueError(f"{path}: tie_word_embeddings is neither true nor false")
    if missing := [key for key in REQUIRED_SIZES if type(config.get(key)) is not int]:
        raise ValueError(
            f"{path}: it has no {' and no '.join(missing)}, or the value is not a whole number"
        )


def parse_rope(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding.

    transformers 5 has them in rope_parameters, transformers 4 in rope_theta and rope_scaling.
    """
    rope = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
    rope |= config.get("rope_parameters") or {}
    theta = 10000.0 if rope["rope_theta"] is None else float(rope["rope_theta"])
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return theta, None
    if rope_type == "linear":
        return theta, RopeScaling("linear", float(rope["factor"]))
    if rope_type != "llama3":
        raise ValueError(
            f"rope scaling of type {describe_value(rope_type)}: "
            "only default, linear and llama3 are supported"
        )
    scaling = RopeScaling(
        "llama3",
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_seq_len=int(rope["original_max_position_embeddings"]),
    )
    return theta, scaling


# Writing


def to_config(args: ModelArgs, dtype: str, metadata: ModelMetadata) -> dict[str, Any]:
    """The content of config.json."""
    rope = to_rope_parameters(args)
    left_out = {metadata.bos_id} - {metadata.eos_id}  # BOS, unless it is also EOS
    eos_ids = [number for number in metadata.stop_ids if number not in left_out]
    rope_scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "intermediate_size": args.ffn_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.max_seq_len,
        "rms_norm_eps": args.norm_eps,
        "tie_word_embeddings": args.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "rope_parameters": rope,  # transformers 5; version 4 reads the next two
        "rope_theta": args.rope_theta,
        "rope_scaling": rope_scaling if args.rope_scaling else None,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
        "bos_token_id": metadata.bos_id,
        "eos_token_id": one_or_list(eos_ids or metadata.stop_ids),
    }


def to_rope_parameters(args: ModelArgs) -> dict[str, Any]:
    """The rope_parameters of config.json."""
    rope: dict[str, Any] = {"rope_theta": args.rope_theta, "rope_type": "default"}
    scaling = args.rope_scaling
    if scaling is None:
        return rope
    rope |= {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type == "llama3":
        rope |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    return rope


def to_generation_config(metadata: ModelMetadata) -> dict[str, Any]:
    """The content of generation_config.json: generate() stops at each of stop_ids."""
    config = {"_from_model_config": False} | metadata.generation
    config |= {"bos_token_id": metadata.bos_id, "eos_token_id": one_or_list(metadata.stop_ids)}
    return config if metadata.pad_id is None else config | {"pad_token_id": metadata.pad_id}


def one_or_list(ids: Sequence[int]) -> int | list[int] | None:
    """Token ids as transformers writes them: null, a number, or a list of several."""
    if len(ids) > 1:
        return list(ids)
    return ids[0] if ids else None
