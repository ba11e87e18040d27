"""
tokenizer.json, the vocabulary of Hugging Face's tokenizers library, and tokenizer_config.json.

SentencePiece's byte-pair encoding has a score for each token, the library an ordered list of
merges: every way to make a token out of two others, the best token first. Llama 3's ranks become
merges likewise; its tokens are written in GPT-2's alphabet, in which every byte is a letter.
"""

import json
import re

from textdata.tokenizer import (
    BYTE,
    CONTROL,
    LLAMA3_PATTERN,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Llama3Tokenizer,
    Piece,
    SentencePieceTokenizer,
    Tokenizer,
    proto_from_pieces,
    require_bos_eos,
)


def byte_alphabet() -> list[str]:
    """The letter that stands for each byte in GPT-2's vocabularies: printable Latin-1 for itself,
    the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


LETTERS = byte_alphabet()
BYTES = {letter: byte for byte, letter in enumerate(LETTERS)}


def to_letters(token: bytes) -> str:
    return "".join(LETTERS[byte] for byte in token)


def from_letters(text: str) -> bytes:
    """Raises ValueError for a letter that stands for no byte."""
    if not BYTES.keys() >= set(text):
        raise ValueError(f"{text[:50]!r} is not spelled in bytes")
    return bytes(BYTES[letter] for letter in text)


def sentencepiece_merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every way to make a normal piece of two others, ordered by (-score, left id, right id)."""
    ids = {piece: i for i, (piece, _, kind) in enumerate(pieces) if kind == NORMAL}
    merges = []
    for piece, i in ids.items():
        for cut in range(1, len(piece)):
            left, right = ids.get(piece[:cut]), ids.get(piece[cut:])
            if left is not None and right is not None:
                merges.append((-pieces[i][1], left, right))
    return [(pieces[left][0], pieces[right][0]) for _, left, right in sorted(merges)]


def rank_merges(ranks: list[bytes]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, ordered by (its rank, left rank, right rank)."""
    rank_of, merges = {token: rank for rank, token in enumerate(ranks)}, []
    for rank, token in enumerate(ranks):
        pairs = (
            (rank_of.get(token[:cut]), rank_of.get(token[cut:])) for cut in range(1, len(token))
        )
        merges += [
            (rank, left, right) for left, right in pairs if left is not None and right is not None
        ]
    letters = [to_letters(token) for token in ranks]
    return [(letters[left], letters[right]) for _, left, right in sorted(merges)]


# Writing


def unsupported_reason(tokenizer: Tokenizer) -> str | None:
    """Why other programs would cut a text into other tokens, or None if they would not."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        if not tokenizer.is_bpe:
            return "this vocabulary is no byte-pair encoding, which is all the format can say; use --format=ckpt"
        if tokenizer.normalizes:
            return (
                "this vocabulary normalizes a text before it cuts it, which the format cannot say; use one of "
                "tinystories.py train_vocab, or --format=ckpt"
            )
        known = {NORMAL, UNKNOWN, CONTROL, BYTE}
        for piece, _, kind in tokenizer.pieces:
            if kind not in known:
                return f"this vocabulary has a user-defined or unused piece, {piece!r}; use --format=ckpt"
    return None


def to_json(tokenizer: Tokenizer) -> dict:
    """The content of tokenizer.json."""
    content = (
        sentencepiece_json(tokenizer)
        if isinstance(tokenizer, SentencePieceTokenizer)
        else ranks_json(tokenizer)
    )
    begin = token_names(tokenizer)[tokenizer.bos_id]
    special = {"id": begin, "ids": [tokenizer.bos_id], "tokens": [begin]}
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": begin, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [
            *(
                {"SpecialToken": {"id": begin, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ),
            *(
                {"SpecialToken": {"id": begin, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ),
        ],
        "special_tokens": {begin: special},
    }
    return (
        {"version": "1.0", "truncation": None, "padding": None}
        | content
        | {"post_processor": template}
    )


def token_names(tokenizer: Tokenizer) -> list[str]:
    """What tokenizer.json calls each token."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return [piece for piece, _, _ in tokenizer.pieces]
    return [to_letters(token) for token in tokenizer.ranks] + tokenizer.special


def added(number: int, name: str) -> dict:
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {"id": number, "content": name} | flags


def sentencepiece_json(tokenizer: SentencePieceTokenizer) -> dict:
    special = [
        added(i, piece)
        for i, (piece, _, kind) in enumerate(tokenizer.pieces)
        if kind in (UNKNOWN, CONTROL)
    ]
    has_bytes = any(kind == BYTE for _, _, kind in tokenizer.pieces)
    prepend = [{"type": "Prepend", "prepend": "▁"}] * tokenizer.has_dummy_prefix
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * tokenizer.has_dummy_prefix
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "type": "BPE",
            **{"dropout": None, "unk_token": unknown_of(tokenizer)},
            **{"continuing_subword_prefix": None, "end_of_word_suffix": None},
            **{"fuse_unk": True, "byte_fallback": has_bytes, "ignore_merges": False},
            "vocab": {piece: i for i, (piece, _, _) in enumerate(tokenizer.pieces)},
            "merges": sentencepiece_merges(tokenizer.pieces),
        },
    }


def unknown_of(tokenizer: SentencePieceTokenizer) -> str | None:
    return next((piece for piece, _, kind in tokenizer.pieces if kind == UNKNOWN), None)


def ranks_json(tokenizer: Llama3Tokenizer) -> dict:
    split = {
        "type": "Split",
        "pattern": {"Regex": LLAMA3_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    letters = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    return {
        "added_tokens": [
            added(len(tokenizer.ranks) + i, name) for i, name in enumerate(tokenizer.special)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, letters]},
        "decoder": letters,
        "model": {
            "type": "BPE",
            **{
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
            },
            **{"fuse_unk": False, "byte_fallback": False, "ignore_merges": True},
            "vocab": {to_letters(token): rank for rank, token in enumerate(tokenizer.ranks)},
            "merges": rank_merges(tokenizer.ranks),
        },
    }


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def to_config(tokenizer: Tokenizer, max_seq_len: int) -> dict:
    """The content of tokenizer_config.json. No class of its own is named: transformers 5 puts
    LlamaTokenizer's normalizer in place of ours."""
    names = token_names(tokenizer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[tokenizer.bos_id],
        "eos_token": names[tokenizer.eos_id],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
    }
    if isinstance(tokenizer, SentencePieceTokenizer):
        return config | {"unk_token": unknown_of(tokenizer)}
    return config | ({"chat_template": CHAT_TEMPLATE} if "<|eot_id|>" in tokenizer.special else {})


# Reading


def from_json(text: str) -> Tokenizer:
    """The vocabulary of a tokenizer.json. Raises ValueError for one that is neither like Llama 2's
    nor like Llama 3's."""
    try:
        content = json.loads(text)
        model, special = content["model"], content.get("added_tokens") or []
        vocab = model["vocab"] | {entry["content"]: entry["id"] for entry in special}
        names = [name for name, _ in sorted(vocab.items(), key=lambda item: item[1])]
        if model["type"] != "BPE" or sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError("not a byte-pair vocabulary whose ids are 0, 1, 2, ...")
        if model.get("byte_fallback") or "▁" in model["vocab"]:
            return from_merges(names, special, model["merges"], content)
        if content.get("normalizer") or not cuts_as_llama3(content.get("pre_tokenizer")):
            raise ValueError("it cuts words in another way than Llama 3")
        in_model = [name for name in names if name in model["vocab"]]
        if in_model != names[: len(in_model)]:
            raise ValueError("special tokens stand among the others")
        made = [vocab[left + right] for left, right in map(pair_of, model["merges"])]
        if made != sorted(made):
            raise ValueError("it merges in another order than that of the tokens")
        return Llama3Tokenizer([from_letters(name) for name in in_model], names[len(in_model) :])
    except (KeyError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        raise ValueError(f"not a tokenizer.json ({str(error)[:100]})") from error


def cuts_as_llama3(pre_tokenizer: dict) -> bool:
    steps = (
        pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    )
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        return False
    split, letters = steps
    plain = not letters.get("add_prefix_space", True) and not letters.get("use_regex", True)
    whole = split.get("behavior") == "Isolated" and not split.get("invert")
    return plain and whole and split["pattern"] == {"Regex": LLAMA3_PATTERN}


def pair_of(merge: str | list) -> tuple[str, str]:
    """The two tokens of a merge, of which older files make one text."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def from_merges(
    names: list[str], added_tokens: list, merges: list, content: dict
) -> SentencePieceTokenizer:
    """A SentencePiece vocabulary whose scores order the tokens as the merges do."""
    has_dummy_prefix = prefixes(content.get("normalizer"), content.get("pre_tokenizer") or {})
    rank: dict[str, int] = {}
    for merge in merges:
        rank.setdefault("".join(pair_of(merge)), len(rank))
    added_kinds = {
        entry["content"]: CONTROL if entry.get("special") else USER_DEFINED
        for entry in added_tokens
    }
    unknown, pieces = content["model"].get("unk_token"), []
    for name in names:
        is_byte = re.fullmatch(r"<0x[0-9A-F]{2}>", name)
        kind = UNKNOWN if name == unknown else added_kinds.get(name, BYTE if is_byte else NORMAL)
        pieces.append((name, -float(rank.get(name, len(rank))) if kind == NORMAL else 0.0, kind))
    proto = proto_from_pieces(pieces, has_dummy_prefix=has_dummy_prefix)
    return require_bos_eos(SentencePieceTokenizer(proto))


def prefixes(normalizer: dict | None, pre_tokenizer: dict) -> bool:
    """Whether a space is put before each text. Llama 2's vocabularies say by a normalizer, or by a
    pre-tokenizer, that spaces become ▁. Raises ValueError for one that does anything else."""
    if normalizer is None and pre_tokenizer.get("type") == "Metaspace":
        always = "always" if pre_tokenizer.get("add_prefix_space", True) else "never"
        if pre_tokenizer.get("replacement") == "▁" and pre_tokenizer.get("split") is False:
            return pre_tokenizer.get("prepend_scheme", always) != "never"
    strings = json_strings(normalizer)
    known = {"type", "normalizers", "prepend", "pattern", "String", "content"}
    if (
        pre_tokenizer
        or not {"Replace", "▁"} <= strings <= {"Sequence", "Prepend", "Replace", "▁", " "} | known
    ):
        raise ValueError("it normalizes a text in another way than Llama 2")
    return "Prepend" in strings


def json_strings(value) -> set[str]:
    """All keys and texts in a JSON value."""
    if isinstance(value, dict):
        return set(value).union(*map(json_strings, value.values()))
    if isinstance(value, list):
        return set().union(*map(json_strings, value))
    return {value} if isinstance(value, str) else set()
