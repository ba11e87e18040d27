"""
Read a tokenizer.json, the vocabulary of Hugging Face's tokenizers library.

A vocabulary that a SentencePiece model or Llama 3's ranks represent exactly becomes that, so that
every format can store it. Any other becomes a HuggingFaceTokenizer.
"""

import json
import os
from typing import Any

from textdata.base_tokenizer import Tokenizer
from textdata.bpe_merges import from_byte_unicode, rank_merges, sentencepiece_merges
from textdata.hf_tokenizer import BYTE_PIECE, HuggingFaceTokenizer, parse_merge
from textdata.llama3_tokenizer import LLAMA3_PATTERN, Llama3Tokenizer
from textdata.sentencepiece_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    Piece,
    SentencePieceTokenizer,
    proto_from_pieces,
)

# Names of the tokens that begin and end a text, where no other file names them.
USUAL_BOS = ("<|begin_of_text|>", "<s>", "<|endoftext|>", "<bos>")
USUAL_EOS = ("<|end_of_text|>", "</s>", "<|endoftext|>", "<eos>")
# Errors of Python for JSON that is damaged or not a vocabulary.
DAMAGED = (
    json.JSONDecodeError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
    RuntimeError,
)


def parse_tokenizer_json(content: bytes, folder: str) -> Tokenizer:
    """The tokenizer of the content of a tokenizer.json. Other files of its folder name BOS and EOS.

    Raises ValueError if it is damaged or not supported.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise ValueError("not a tokenizer.json (it is not UTF-8 text)") from None
    return from_json(text, *read_special_names(folder))


def read_special_names(folder: str) -> tuple[str | int | None, str | int | None]:
    """BOS and EOS by the files of a folder: names in tokenizer_config.json or
    special_tokens_map.json, or ids in config.json; None if no file has them."""
    found: dict[str, str | int | None] = {"bos": None, "eos": None}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json"):
        content = read_object(os.path.join(folder, name))
        for key in found:
            value: Any = content.get(f"{key}_token")
            value = value.get("content") if isinstance(value, dict) else value
            value = value or content.get(f"{key}_token_id")
            value = value[0] if isinstance(value, list) and value else value
            if found[key] is None and type(value) in (str, int):
                found[key] = value
    return found["bos"], found["eos"]


def read_object(path: str) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def from_json(text: str, bos: str | int | None = None, eos: str | int | None = None) -> Tokenizer:
    """The tokenizer of a tokenizer.json.

    Args:
        text: the content of the file.
        bos: name or id of the token that begins a text; None: the usual name.
        eos: name or id of the token that ends a text; None: the usual name.

    Raises ValueError if it is damaged or not supported.
    """
    try:
        content = json.loads(text)
        added_tokens = content.get("added_tokens") or []
        vocab = content["model"]["vocab"]
        ids = vocab | {entry["content"]: entry["id"] for entry in added_tokens}
        names = boundary_names(ids, bos, eos)
        exact = exact_sentencepiece(content, ids, *names) or exact_llama3(content, ids, names[0])
        return exact or HuggingFaceTokenizer(content, *names)
    except DAMAGED as error:
        raise ValueError(f"not a tokenizer.json ({str(error)[:100]})") from error


def boundary_names(
    ids: dict[str, int], bos: str | int | None, eos: str | int | None
) -> tuple[str, str]:
    """The names of BOS and EOS. If a vocabulary has only one of them, it marks both ends of a text.

    Raises ValueError if there is none.
    """
    by_id = {token: name for name, token in ids.items()}
    first = find_name(by_id, bos, USUAL_BOS)
    last = find_name(by_id, eos, USUAL_EOS)
    if not first and not last:
        raise ValueError(
            "no token begins or ends a text: name one as bos_token in tokenizer_config.json"
        )
    return first or last, last or first


def find_name(by_id: dict[int, str], given: str | int | None, usual: tuple[str, ...]) -> str:
    """The name of the given token, or the first usual one that exists; empty if there is none."""
    if isinstance(given, str):
        return given
    if given is not None:
        return by_id.get(given, "")
    names = set(by_id.values())
    return next((name for name in usual if name in names), "")


# Vocabularies that a SentencePiece model or a list of ranks represents


def names_by_id(ids: dict[str, int]) -> list[str] | None:
    """The tokens in the order of their ids; None if the ids are not 0, 1, 2, ..."""
    if sorted(ids.values()) != list(range(len(ids))):
        return None
    return [name for name, _ in sorted(ids.items(), key=lambda item: item[1])]


def exact_llama3(content: dict[str, Any], ids: dict[str, int], bos: str) -> Llama3Tokenizer | None:
    """The vocabulary as Llama 3's, if it encodes every text in the same way; else None.

    ids includes the added tokens.
    """
    model = content["model"]
    names = names_by_id(ids)
    if names is None or bos != "<|begin_of_text|>" or "<|end_of_text|>" not in ids:
        return None
    if content.get("normalizer") or not has_llama3_pretokenizer(content.get("pre_tokenizer")):
        return None
    n_ranks = sum(name in model["vocab"] for name in names)
    added_tokens = content.get("added_tokens") or []
    added = {entry["content"] for entry in added_tokens if entry.get("special")}
    if set(names[n_ranks:]) != added or len(added_tokens) != len(added):
        return None
    if model["type"] != "BPE" or not model.get("ignore_merges"):
        return None
    ranks = [from_byte_unicode(name) for name in names[:n_ranks]]
    if [tuple(parse_merge(merge)) for merge in model["merges"]] != rank_merges(ranks):
        return None
    return Llama3Tokenizer(ranks, names[n_ranks:])


def has_llama3_pretokenizer(pre_tokenizer: Any) -> bool:
    """Whether a pre-tokenizer splits text as Llama 3 does."""
    if pre_tokenizer is None:
        return False
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


def exact_sentencepiece(
    content: dict[str, Any], ids: dict[str, int], bos: str, eos: str
) -> SentencePieceTokenizer | None:
    """The vocabulary as a SentencePiece model with scores in the order of its merges, if that
    encodes every text in the same way; else None.

    ids includes the added tokens.
    """
    model = content["model"]
    names = names_by_id(ids)
    unknown = model.get("unk_token")
    has_prefix = has_prefix_space(content.get("normalizer"), content.get("pre_tokenizer"))
    if names is None or has_prefix is None or unknown not in ids:
        return None
    added_tokens = content.get("added_tokens") or []
    special = {entry["content"] for entry in added_tokens if entry.get("special")}
    eos = "</s>" if "</s>" in special else eos  # an instruct model may name an added token
    if len(special) < len(added_tokens) or not {bos, eos} <= special:
        return None
    if any(BYTE_PIECE.fullmatch(name) for name in special) or model.get("ignore_merges"):
        return None
    merges = [tuple(parse_merge(merge)) for merge in model["merges"]]
    rank: dict[str, int] = {}
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    pieces = []
    for name in names:
        piece_type = BYTE if BYTE_PIECE.fullmatch(name) else NORMAL
        piece_type = CONTROL if name in special else piece_type
        score = -float(rank.get(name, len(rank))) if piece_type == NORMAL else 0.0
        pieces.append(Piece(name, score, UNKNOWN if name == unknown else piece_type))
    has_bytes = any(piece.type == BYTE for piece in pieces)
    fuses = has_bytes or model.get("fuse_unk")  # SentencePiece fuses adjacent unknown characters
    if not fuses or model["type"] != "BPE" or has_bytes != bool(model.get("byte_fallback")):
        return None
    if sentencepiece_merges(pieces) != merges:
        return None
    return SentencePieceTokenizer(proto_from_pieces(pieces, bos, eos, has_prefix))


def has_prefix_space(normalizer: Any, pre_tokenizer: Any) -> bool | None:
    """Whether a space is put before each text by a normalizer that replaces spaces by ▁, as Llama
    2's does; None if the normalizer or the pre-tokenizer does anything else."""
    if pre_tokenizer is not None or normalizer is None:
        return None
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    prefix = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if steps == [prefix, replace]:
        return True
    return False if steps == [replace] else None
