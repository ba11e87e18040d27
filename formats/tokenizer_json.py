"""
Write tokenizer.json, the vocabulary of Hugging Face's tokenizers library, and
tokenizer_config.json. textdata/tokenizer_json.py reads them.

SentencePiece's byte-pair encoding has a score for each token. The library has an ordered list of
merges instead: every pair of tokens that joins to a token, sorted by the score of the joined token.
Llama 3's ranks become merges in the same way. Its tokens are bytes. They are written in GPT-2's
byte-level alphabet: one printable character for each byte.
"""

from typing import Any

from textdata.bpe_merges import rank_merges, sentencepiece_merges, to_byte_unicode
from textdata.tokenizer import (
    BYTE,
    CONTROL,
    LLAMA3_PATTERN,
    NORMAL,
    UNKNOWN,
    HuggingFaceTokenizer,
    Llama3Tokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

SUPPORTED_PIECE_TYPES = {NORMAL, UNKNOWN, CONTROL, BYTE}
# Llama 3's pre-tokenizer
LLAMA3_SPLIT = {
    "type": "Split",
    "pattern": {"Regex": LLAMA3_PATTERN},
    "behavior": "Isolated",
    "invert": False,
}
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


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
    """The content of tokenizer.json; of all but HuggingFaceTokenizer, without post_processor."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.description
    if isinstance(tokenizer, SentencePieceTokenizer):
        content = sentencepiece_to_json(tokenizer)
    else:
        assert isinstance(tokenizer, Llama3Tokenizer), "there are three types of tokenizers"
        content = llama3_to_json(tokenizer)
    return {"version": "1.0", "truncation": None, "padding": None} | content


def token_names(tokenizer: Tokenizer) -> list[str]:
    """The name of each token in tokenizer.json; empty for an id without a token."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return [name or "" for name in tokenizer.names]
    if isinstance(tokenizer, SentencePieceTokenizer):
        return [text for text, _, _ in tokenizer.pieces]
    assert isinstance(tokenizer, Llama3Tokenizer), "there are three types of tokenizers"
    return [to_byte_unicode(token) for token in tokenizer.ranks] + tokenizer.special


def added_token(token_id: int, name: str, special: bool = True) -> dict[str, Any]:
    """The description of a token that is found in a text before all others."""
    return {
        "id": token_id,
        "content": name,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
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
    return {
        "added_tokens": [
            added_token(n_ranks + i, name) for i, name in enumerate(tokenizer.special)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [LLAMA3_SPLIT, BYTE_LEVEL]},
        "decoder": BYTE_LEVEL,
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
