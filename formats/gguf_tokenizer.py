"""
Vocabularies of Hugging Face's tokenizers library in GGUF.

A byte-level encoding is of the model gpt2, whose pre-tokenizer llama.cpp knows by a name. An
encoding with ▁ for a space is of the model llama, whose scores are the order of the merges. The
tokenizer.json is in the file, too, under the key that GGUF's specification gives it.
"""

import itertools
import json
from typing import Any

from formats.gguf_file import BOOL, FLOAT32, INT32, UINT32, MetadataValue, TypedValue
from formats.tokenizer_json import BYTE_LEVEL, LLAMA3_SPLIT, added_token
from textdata.hf_tokenizer import BYTE_PIECE, prepends_space
from textdata.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    proto_from_pieces,
    require_bos_eos,
)
from textdata.tokenizer_json import from_json, has_prefix_space

JSON_KEY = "tokenizer.huggingface.json"
GPT2_BYTE_LEVEL = BYTE_LEVEL | {"use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
# tokenizer.ggml.pre, the pre-tokenizer of a tokenizer.json, and whether llama.cpp looks for a whole
# word in the vocabulary before it merges (ignore_merges)
PRE_TOKENIZERS: tuple[tuple[str, list[dict[str, Any]], bool], ...] = (
    ("llama-bpe", [LLAMA3_SPLIT, BYTE_LEVEL], True),
    ("gpt-2", [GPT2_BYTE_LEVEL], False),
    ("smollm", [DIGITS, GPT2_BYTE_LEVEL], False),
)
ALIASES = {  # other names in files, with the name above
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "phi-2": "gpt-2",
    "mpt": "gpt-2",
    "olmo": "gpt-2",
    "starcoder": "smollm",
    "refact": "smollm",
}


# Reading


def parse_json(metadata: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of the tokenizer.json in a file, None if it has none. Raises ValueError if it
    is damaged."""
    content = metadata.get(JSON_KEY)
    if not isinstance(content, str):
        return None
    return from_json(content, *boundary_ids(metadata))


def boundary_ids(metadata: dict[str, Any]) -> tuple[int | None, int | None]:
    """The ids of BOS and EOS; None where a file has none."""
    bos, eos = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    return bos, eos


def parse_sentencepiece(metadata: dict[str, Any], names: list[str], types: list[int]) -> Tokenizer:
    """A SentencePiece tokenizer. Raises ValueError, LookupError or TypeError if it is damaged."""
    scores = metadata["tokenizer.ggml.scores"][: len(names)]
    bos = names[metadata.get("tokenizer.ggml.bos_token_id", 1)]
    eos = names[metadata.get("tokenizer.ggml.eos_token_id", 2)]
    if ("</s>", CONTROL) in zip(names, types, strict=True):
        eos = "</s>"  # of the vocabulary; the model may end its texts with an added token
    pieces = [
        (name, score, CONTROL if name in (bos, eos) else token_type)
        for name, score, token_type in zip(names, scores, types, strict=True)
    ]
    has_dummy_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    return require_bos_eos(
        SentencePieceTokenizer(proto_from_pieces(pieces, bos, eos, has_dummy_prefix))
    )


def parse_byte_level(metadata: dict[str, Any], names: list[str], types: list[int]) -> Tokenizer:
    """A byte-level tokenizer. Raises ValueError or LookupError if it is not supported."""
    pre_tokenizer = metadata.get("tokenizer.ggml.pre")
    pre_tokenizer = ALIASES.get(str(pre_tokenizer), pre_tokenizer)
    known = {name: (steps, ignores) for name, steps, ignores in PRE_TOKENIZERS}
    if pre_tokenizer not in known:
        raise ValueError(f"the pre-tokenizer {str(pre_tokenizer)[:50]!r} is not supported")
    steps, ignore_merges = known[pre_tokenizer]
    normal = [i for i, token_type in enumerate(types) if token_type == NORMAL]
    last_normal = max(normal, default=-1)
    added_tokens = [
        added_token(i, names[i], special=token_type != USER_DEFINED)
        for i, token_type in enumerate(types)
        if token_type in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    vocab = {
        name: i
        for i, (name, token_type) in enumerate(zip(names, types, strict=True))
        if token_type == NORMAL or i < last_normal
    }
    description = {
        "added_tokens": added_tokens,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": GPT2_BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": metadata["tokenizer.ggml.merges"],
            "ignore_merges": ignore_merges,
        },
    }
    return from_json(json.dumps(description), *boundary_ids(metadata))


def without_padding(names: list[str], types: list[int]) -> tuple[list[str], list[int]]:
    """The names and types without the unused tokens at the end, which pad the embedding."""
    count = len(names)
    while count and len(types) == len(names) and types[count - 1] == UNUSED:
        count -= 1
    return names[:count], types[: len(types) - (len(names) - count)]


# Writing


def unsupported_reason(tokenizer: HuggingFaceTokenizer) -> str | None:
    """Why llama.cpp would encode in another way, or None if it encodes in the same way.

    One difference is not refused: before a text that begins with a space, llama.cpp puts another.
    """
    description = tokenizer.description
    if tokenizer.is_byte_level:
        if description["normalizer"] is not None or pre_tokenizer_name(description) is None:
            return (
                "llama.cpp has no pre-tokenizer that splits text as the tokenizer.json of this "
                "model; use --format=hf or ckpt"
            )
        return None
    if prefix_scheme(description) is None:
        return (
            "llama.cpp cannot split text as the normalizer and the pre-tokenizer of this model's "
            "tokenizer.json; use --format=hf or ckpt"
        )
    if not has_all_merges(description["model"]):
        return (
            "llama.cpp joins every two tokens that make a token, but the tokenizer.json of this "
            "model lists only some of these merges, or in another order; use --format=hf or ckpt"
        )
    return None


def pre_tokenizer_name(description: dict[str, Any]) -> str | None:
    """llama.cpp's name for a byte-level pre-tokenizer, None if it has none."""
    pre_tokenizer = description["pre_tokenizer"] or {"type": "None"}
    is_sequence = pre_tokenizer["type"] == "Sequence"
    steps = pre_tokenizer["pretokenizers"] if is_sequence else [pre_tokenizer]
    steps = [
        {"use_regex": True, "trim_offsets": True} | step | {"trim_offsets": True}
        if step["type"] == "ByteLevel"
        else step
        for step in steps
    ]
    ignore_merges = bool(description["model"].get("ignore_merges"))
    for name, known, ignores in PRE_TOKENIZERS:
        if steps == known and ignore_merges == ignores:
            return name
    return None


def prefix_scheme(description: dict[str, Any]) -> bool | None:
    """Whether ▁ is put before a text, with ▁ for each space and no other change; None if the
    normalizer or the pre-tokenizer does anything else."""
    normalizer, pre_tokenizer = description["normalizer"], description["pre_tokenizer"]
    if normalizer is not None or pre_tokenizer is None:
        return has_prefix_space(normalizer, pre_tokenizer)
    if pre_tokenizer["type"] != "Metaspace" or pre_tokenizer.get("split") is not False:
        return None
    return prepends_space(pre_tokenizer)


def has_all_merges(model: dict[str, Any]) -> bool:
    """Whether the merges are all pairs that join to a token, and those of a token together."""
    merges = [(left, right) for left, right in model["merges"]]
    joined = [left + right for left, right in merges]
    changes = sum(a != b for a, b in itertools.pairwise(joined))
    if joined and changes != len(set(joined)) - 1:
        return False
    vocab = model["vocab"]
    all_pairs = {
        (name[:cut], name[cut:])
        for name in vocab
        if not BYTE_PIECE.fullmatch(name)
        for cut in range(1, len(name))
        if name[:cut] in vocab and name[cut:] in vocab
    }
    return set(merges) == all_pairs


def to_metadata(tokenizer: HuggingFaceTokenizer) -> dict[str, MetadataValue]:
    """The metadata of a vocabulary that unsupported_reason accepts."""
    description = tokenizer.description
    model = description["model"]
    names = [name or "" for name in tokenizer.names]
    types = [token_type(tokenizer, name) for name in names]
    metadata: dict[str, MetadataValue] = {
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": TypedValue(INT32, types),
        JSON_KEY: tokenizer.content.decode(),
    }
    if tokenizer.is_byte_level:
        return metadata | {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre_tokenizer_name(description) or "",
            "tokenizer.ggml.merges": [f"{left} {right}" for left, right in model["merges"]],
        }
    rank: dict[str, int] = {}
    for left, right in model["merges"]:
        rank.setdefault(left + right, len(rank))
    scores = [-float(rank.get(name, len(rank))) for name in names]
    metadata |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": TypedValue(FLOAT32, scores),
        "tokenizer.ggml.add_space_prefix": TypedValue(BOOL, bool(prefix_scheme(description))),
    }
    if model.get("unk_token") in tokenizer.ids:
        unknown = tokenizer.ids[model["unk_token"]]
        metadata["tokenizer.ggml.unknown_token_id"] = TypedValue(UINT32, unknown)
    return metadata


def token_type(tokenizer: HuggingFaceTokenizer, name: str) -> int:
    """The type of a token in GGUF."""
    if not name:
        return UNUSED
    if name == tokenizer.description["model"].get("unk_token"):
        return UNKNOWN
    if name in tokenizer.special_tokens:
        return CONTROL
    if name in tokenizer.added_tokens:
        return USER_DEFINED
    is_byte = BYTE_PIECE.fullmatch(name) and not tokenizer.is_byte_level
    return BYTE if is_byte else NORMAL


def fit_to_embeddings(
    metadata: dict[str, MetadataValue], num_embeddings: int
) -> dict[str, MetadataValue]:
    """The metadata of a vocabulary with as many tokens as embeddings, as llama.cpp requires.

    Unused tokens are added at the end; tokens without an embedding are left out.
    """
    names = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    assert isinstance(names, list) and isinstance(types, TypedValue), "as to_metadata returns them"
    missing = range(len(names), num_embeddings)
    padded = [*names, *("" for _ in missing)][:num_embeddings]
    all_types = [*types.value, *(UNUSED for _ in missing)][:num_embeddings]
    result = dict(metadata)
    result["tokenizer.ggml.tokens"] = [name or f"[PAD{i}]" for i, name in enumerate(padded)]
    result["tokenizer.ggml.token_type"] = TypedValue(INT32, all_types)
    scores = metadata.get("tokenizer.ggml.scores")
    if isinstance(scores, TypedValue):
        fitted = [*scores.value, *(0.0 for _ in missing)][:num_embeddings]
        result["tokenizer.ggml.scores"] = TypedValue(FLOAT32, fitted)
    return result
