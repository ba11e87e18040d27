"""
tokenizer.json, the vocabulary of Hugging Face's tokenizers library, and tokenizer_config.json.

SentencePiece's byte-pair encoding has a score for each token. The library has an ordered list of
merges instead: every pair of tokens that joins to a token, sorted by the score of the joined token.
Llama 3's ranks become merges in the same way. Its tokens are bytes. They are written in GPT-2's
byte-level alphabet: one printable character for each byte.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from textdata.tokenizer import (
    BYTE,
    CONTROL,
    LLAMA3_PATTERN,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Llama3Tokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    proto_from_pieces,
    require_bos_eos,
)

SUPPORTED_PIECE_TYPES = {NORMAL, UNKNOWN, CONTROL, BYTE}
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


# GPT-2's byte-level alphabet


def bytes_to_unicode() -> list[str]:
    """The character for each byte: itself for printable Latin-1, from U+0100 on for the others."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


BYTE_TO_UNICODE = bytes_to_unicode()
UNICODE_TO_BYTE = {character: byte for byte, character in enumerate(BYTE_TO_UNICODE)}


def to_byte_unicode(token: bytes) -> str:
    """Write bytes in the byte-level alphabet."""
    return "".join(BYTE_TO_UNICODE[byte] for byte in token)


def from_byte_unicode(text: str) -> bytes:
    """The bytes of a text in the byte-level alphabet. Raises ValueError for other characters."""
    if not UNICODE_TO_BYTE.keys() >= set(text):
        raise ValueError(f"{text[:50]!r} is not in the byte-level alphabet")
    return bytes(UNICODE_TO_BYTE[character] for character in text)


# Merges


def sentencepiece_merges(pieces: Sequence[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Every pair of pieces that joins to a normal piece.

    The order is by (-score of the joined piece, id of the left piece, id of the right piece).
    """
    ids = {text: i for i, (text, _, piece_type) in enumerate(pieces) if piece_type == NORMAL}
    merges = []
    for text, i in ids.items():
        for split in range(1, len(text)):
            left, right = ids.get(text[:split]), ids.get(text[split:])
            if left is not None and right is not None:
                merges.append((-pieces[i][1], left, right))
    return [(pieces[left][0], pieces[right][0]) for _, left, right in sorted(merges)]


def rank_merges(ranks: list[bytes]) -> list[tuple[str, str]]:
    """Every pair of tokens that joins to a token.

    The order is by (rank of the joined token, rank of the left token, rank of the right token).
    """
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    merges = []
    for rank, token in enumerate(ranks):
        for split in range(1, len(token)):
            left, right = rank_of.get(token[:split]), rank_of.get(token[split:])
            if left is not None and right is not None:
                merges.append((rank, left, right))
    names = [to_byte_unicode(token) for token in ranks]
    return [(names[left], names[right]) for _, left, right in sorted(merges)]


# Writing


def unsupported_reason(tokenizer: Tokenizer) -> str | None:
    """Why tokenizer.json or GGUF cannot store a vocabulary, or None if they can."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return None
    if not tokenizer.is_bpe:
        return (
            "this vocabulary is not a byte-pair encoding, the only type that the format supports; "
            "use --format=ckpt"
        )
    if tokenizer.normalizes:
        return (
            "this vocabulary normalizes text before tokenization, which the format cannot store; "
            "use one of tinystories.py train_vocab, or --format=ckpt"
        )
    for text, _, piece_type in tokenizer.pieces:
        if piece_type not in SUPPORTED_PIECE_TYPES:
            return (
                f"this vocabulary has a user-defined or unused piece, {text!r}; use --format=ckpt"
            )
    return None


def to_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        content = sentencepiece_to_json(tokenizer)
    else:
        assert isinstance(tokenizer, Llama3Tokenizer), "there are two types of tokenizers"
        content = llama3_to_json(tokenizer)
    head = {"version": "1.0", "truncation": None, "padding": None}
    bos = token_names(tokenizer)[tokenizer.bos_id]
    return head | content | {"post_processor": bos_template(bos, tokenizer.bos_id)}


def bos_template(bos: str, bos_id: int) -> dict[str, Any]:
    """The post-processor that puts a token before each text."""
    return {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": bos, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [
            {"SpecialToken": {"id": bos, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": bos, "type_id": 1}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def token_names(tokenizer: Tokenizer) -> list[str]:
    """The name of each token in tokenizer.json."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return [text for text, _, _ in tokenizer.pieces]
    assert isinstance(tokenizer, Llama3Tokenizer), "there are two types of tokenizers"
    return [to_byte_unicode(token) for token in tokenizer.ranks] + tokenizer.special


def added_token(token_id: int, name: str) -> dict[str, Any]:
    """The description of a special token."""
    return {
        "id": token_id,
        "content": name,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def sentencepiece_to_json(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """The parts of tokenizer.json that a SentencePiece vocabulary determines."""
    special = [
        added_token(i, text)
        for i, (text, _, piece_type) in enumerate(tokenizer.pieces)
        if piece_type in (UNKNOWN, CONTROL)
    ]
    normalizers: list[dict] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    decoders: list[dict] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if tokenizer.has_dummy_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": "▁"})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown_token(tokenizer),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece_type == BYTE for _, _, piece_type in tokenizer.pieces),
            "ignore_merges": False,
            "vocab": {text: i for i, (text, _, _) in enumerate(tokenizer.pieces)},
            "merges": sentencepiece_merges(tokenizer.pieces),
        },
    }


def unknown_token(tokenizer: SentencePieceTokenizer) -> str | None:
    """The piece for unknown characters, None if there is none."""
    unknown = (text for text, _, piece_type in tokenizer.pieces if piece_type == UNKNOWN)
    return next(unknown, None)


def llama3_to_json(tokenizer: Llama3Tokenizer) -> dict[str, Any]:
    """The parts of tokenizer.json that a Llama 3 vocabulary determines."""
    n_ranks = len(tokenizer.ranks)
    split = {
        "type": "Split",
        "pattern": {"Regex": LLAMA3_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    return {
        "added_tokens": [
            added_token(n_ranks + i, name) for i, name in enumerate(tokenizer.special)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {to_byte_unicode(token): rank for rank, token in enumerate(tokenizer.ranks)},
            "merges": rank_merges(tokenizer.ranks),
        },
    }


def to_config(tokenizer: Tokenizer, max_seq_len: int) -> dict[str, Any]:
    """The content of tokenizer_config.json.

    The class is PreTrainedTokenizerFast: with LlamaTokenizer, transformers 5 replaces the
    normalizer of tokenizer.json by its own.
    """
    names = token_names(tokenizer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[tokenizer.bos_id],
        "eos_token": names[tokenizer.eos_id],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
    }
    if isinstance(tokenizer, SentencePieceTokenizer):
        config["unk_token"] = unknown_token(tokenizer)
    elif isinstance(tokenizer, Llama3Tokenizer) and "<|eot_id|>" in tokenizer.special:
        config["chat_template"] = CHAT_TEMPLATE
    return config


# Reading


def from_json(text: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json.

    Raises ValueError if it is damaged, or neither like Llama 2's nor like Llama 3's.
    """
    try:
        content = json.loads(text)
        model = content["model"]
        added_tokens = content.get("added_tokens") or []
        ids = model["vocab"] | {entry["content"]: entry["id"] for entry in added_tokens}
        if model["type"] != "BPE" or sorted(ids.values()) != list(range(len(ids))):
            raise ValueError("not a byte-pair vocabulary with the ids 0, 1, 2, ...")
        if model.get("byte_fallback") or "▁" in model["vocab"]:
            return parse_sentencepiece(content, ids)
        return parse_llama3(content, ids)
    except (KeyError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        raise ValueError(f"not a tokenizer.json ({str(error)[:100]})") from error


def names_by_id(ids: dict[str, int]) -> list[str]:
    """The tokens in the order of their ids."""
    return [name for name, _ in sorted(ids.items(), key=lambda item: item[1])]


def parse_llama3(content: dict[str, Any], ids: dict[str, int]) -> Llama3Tokenizer:
    """A vocabulary like Llama 3's. ids includes the special tokens.

    Raises ValueError if it tokenizes in another way.
    """
    model = content["model"]
    if content.get("normalizer") or not has_llama3_pretokenizer(content.get("pre_tokenizer")):
        raise ValueError("its pre-tokenizer differs from that of Llama 3")
    names = names_by_id(ids)
    ranked = [name for name in names if name in model["vocab"]]
    if ranked != names[: len(ranked)]:
        raise ValueError("its special tokens are not the last tokens")
    merged_ids = [ids[left + right] for left, right in map(parse_merge, model["merges"])]
    if merged_ids != sorted(merged_ids):
        raise ValueError("its merges are in another order than its tokens")
    return Llama3Tokenizer([from_byte_unicode(name) for name in ranked], names[len(ranked) :])


def has_llama3_pretokenizer(pre_tokenizer: Any) -> bool:
    """Whether a pre-tokenizer splits text as Llama 3 does."""
    is_sequence = pre_tokenizer["type"] == "Sequence"
    steps = pre_tokenizer["pretokenizers"] if is_sequence else [pre_tokenizer]
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        return False
    split, byte_level = steps
    if byte_level.get("add_prefix_space", True) or byte_level.get("use_regex", True):
        return False
    if split.get("behavior") != "Isolated" or split.get("invert"):
        return False
    return split["pattern"] == {"Regex": LLAMA3_PATTERN}


def parse_merge(merge: str | list) -> tuple[str, str]:
    """The two tokens of a merge. Older files write them as one string with a space."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def parse_sentencepiece(content: dict[str, Any], ids: dict[str, int]) -> Tokenizer:
    """A vocabulary like Llama 2's, with scores in the order of its merges.

    ids includes the special tokens. Raises ValueError if it tokenizes in another way.
    """
    has_prefix = has_prefix_space(content.get("normalizer"), content.get("pre_tokenizer") or {})
    rank: dict[str, int] = {}
    for merge in content["model"]["merges"]:
        rank.setdefault("".join(parse_merge(merge)), len(rank))
    types = piece_types(content)
    pieces = []
    for name in names_by_id(ids):
        piece_type = types.get(name, BYTE if BYTE_PIECE.fullmatch(name) else NORMAL)
        score = -float(rank.get(name, len(rank))) if piece_type == NORMAL else 0.0
        pieces.append((name, score, piece_type))
    proto = proto_from_pieces(pieces, has_dummy_prefix=has_prefix)
    return require_bos_eos(SentencePieceTokenizer(proto))


def piece_types(content: dict[str, Any]) -> dict[str, int]:
    """The SentencePiece types of the unknown token and of the added tokens, by name."""
    types = {
        entry["content"]: CONTROL if entry.get("special") else USER_DEFINED
        for entry in content.get("added_tokens") or []
    }
    return types | {content["model"].get("unk_token"): UNKNOWN}


def has_prefix_space(normalizer: Any, pre_tokenizer: dict[str, Any]) -> bool:
    """Whether a space is put before each text.

    Vocabularies like Llama 2's replace spaces by ▁ in a normalizer or in a pre-tokenizer. Raises
    ValueError if one of them does anything else.
    """
    if normalizer is None and pre_tokenizer.get("type") == "Metaspace":
        default = "always" if pre_tokenizer.get("add_prefix_space", True) else "never"
        if pre_tokenizer.get("replacement") == "▁" and pre_tokenizer.get("split") is False:
            return pre_tokenizer.get("prepend_scheme", default) != "never"
    strings = json_strings(normalizer)
    known_keys = {"type", "normalizers", "prepend", "pattern", "String", "content"}
    known = known_keys | {"Sequence", "Prepend", "Replace", "▁", " "}
    if pre_tokenizer or not {"Replace", "▁"} <= strings <= known:
        raise ValueError("its normalizer differs from that of Llama 2")
    return "Prepend" in strings


def json_strings(value: Any) -> set[str]:
    """All keys and strings in a JSON value."""
    if isinstance(value, dict):
        return set(value).union(*map(json_strings, value.values()))
    if isinstance(value, list):
        return set[str]().union(*map(json_strings, value))
    return {value} if isinstance(value, str) else set()
