"""
Byte-pair encodings of Hugging Face's tokenizers library, as a tokenizer.json describes them: the
byte-level ones (GPT-2, SmolLM2, Qwen) and those with ▁ for a space and a fallback to bytes.

It encodes as the library does, with one exception: the name of a special token in a text is plain
text. Added tokens that are not special are found in a text.
"""

import functools
import hashlib
import json
import os
import re
from typing import Any

import tokenizers

from runtime.untrusted import describe_value
from textdata.base_tokenizer import Tokenizer
from textdata.bpe_merges import UNICODE_TO_BYTE, from_byte_unicode

BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
UNKNOWN_SURFACE = " ⁇ ".encode()  # as SentencePiece writes an unknown character
# Parts of a tokenizer.json that encoding depends on.
ENCODING_KEYS = ("normalizer", "pre_tokenizer", "model", "added_tokens")


class HuggingFaceTokenizer(Tokenizer):
    """A byte-pair encoding of the tokenizers library.

    Args:
        description: the object in a tokenizer.json.
        bos: the name of the token that begins a text.
        eos: the name of the token that ends a text.

    Raises ValueError if the library cannot read it, if its decoder is of another type, or if a name
    is not a token. Raises KeyError, TypeError or AttributeError if the object is damaged.
    """

    def __init__(self, description: dict[str, Any], bos: str, eos: str):
        self.bos = bos
        self.eos = eos
        self.description = normalize_description(description)
        self.backend = new_backend(self.description)
        added_tokens = self.description["added_tokens"]
        self.special_tokens = {
            entry["content"]: entry["id"]
            for entry in added_tokens
            if entry["special"] and not BYTE_PIECE.fullmatch(entry["content"])
        }
        self.added_tokens = {
            entry["content"]: entry["id"] for entry in added_tokens if not entry["special"]
        }
        self.ids: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        for name in (bos, eos):
            if name not in self.ids:
                raise ValueError(f"{name[:50]!r} begins or ends a text, but is not a token")
        self.vocab_size = 1 + max(self.ids.values())
        if self.vocab_size > 4 * len(self.ids):
            raise ValueError(f"it has {len(self.ids)} tokens, but ids up to {self.vocab_size - 1}")
        self.bos_id = self.ids[bos]
        self.eos_id = self.ids[eos]
        self.stop_ids = frozenset({self.bos_id, self.eos_id})
        self.is_byte_level = uses_byte_level(self.description["decoder"])
        self.has_dummy_prefix = not self.is_byte_level and strips_prefix(
            self.description["decoder"]
        )

    @functools.cached_property
    def names(self) -> list[str | None]:
        """The name of each token; None for an id that has none."""
        names: list[str | None] = [None] * self.vocab_size
        for name, token in self.ids.items():
            names[token] = name
        return names

    @property
    def unused_ids(self) -> list[int]:
        return [token for token, name in enumerate(self.names) if name is None]

    @property
    def min_embeddings(self) -> int:
        encoded = {**self.description["model"]["vocab"], **self.added_tokens}
        names = encoded.keys() - self.special_tokens.keys()
        return 1 + max(self.bos_id, self.eos_id, *(encoded[name] for name in names))

    @functools.cached_property
    def content(self) -> bytes:
        """The content of its tokenizer.json."""
        return json.dumps(self.description, ensure_ascii=False).encode("utf-8", "surrogatepass")

    @functools.cached_property
    def files(self) -> dict[str, bytes]:
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.names[self.bos_id],
            "eos_token": self.names[self.eos_id],
        }
        encoded = json.dumps(config, ensure_ascii=False, indent=2).encode("utf-8")
        return {"tokenizer.json": self.content, "tokenizer_config.json": encoded}

    @functools.cached_property
    def without_prefix(self) -> Tokenizer:
        changes = {
            key: remove_prefix(self.description[key]) for key in ("normalizer", "pre_tokenizer")
        }
        return HuggingFaceTokenizer(self.description | changes, self.bos, self.eos)

    @functools.cached_property
    def hash(self) -> str:
        parts: dict[str, Any] = {key: self.description[key] for key in ENCODING_KEYS}
        parts["bos_id"] = self.bos_id
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        unknown = self.description["model"].get("unk_token")
        return [b"" if name is None else self._bytes_of(name, unknown) for name in self.names]

    def _bytes_of(self, name: str, unknown: str | None) -> bytes:
        if name in self.special_tokens:
            has_surface = name == unknown and not self.is_byte_level
            return UNKNOWN_SURFACE if has_surface else b""
        if name in self.added_tokens:
            return name.encode()
        if self.is_byte_level:
            is_encoded = UNICODE_TO_BYTE.keys() >= set(name)
            return from_byte_unicode(name) if is_encoded else name.encode()
        if BYTE_PIECE.fullmatch(name):
            return bytes([int(name[3:5], 16)])
        return UNKNOWN_SURFACE if name == unknown else name.replace("▁", " ").encode()

    def encode(self, text: str, bos: bool = False) -> list[int]:
        return [self.bos_id] * bos + self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[list[int]]:
        if num_threads == 1:
            return [self.encode(text) for text in texts]
        # The library reads the variable at the first batch of the process.
        os.environ.setdefault("RAYON_NUM_THREADS", str(num_threads))
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def special_id(self, name: str) -> int:
        """The id of a special token. Raises ValueError if the vocabulary does not have it."""
        if name not in self.special_tokens:
            raise ValueError(f"this vocabulary has no special token {name}")
        return self.special_tokens[name]

    def to_bin(self) -> bytes:
        """Always raises ValueError: tokenizer.bin has scores, not merges."""
        raise ValueError(
            "tokenizer.bin cannot store the vocabulary of a tokenizer.json; use --format=hf or gguf"
        )


def normalize_description(description: dict[str, Any]) -> dict[str, Any]:
    """Remove dropout, truncation and padding. Raises ValueError unless it is BPE without a prefix
    or suffix in the names of its tokens."""
    model = {**description["model"], "dropout": None}
    if model["type"] != "BPE":
        model_type = str(model["type"])[:50]
        raise ValueError(f"a vocabulary of type {model_type}; only BPE is supported")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"{key} is not supported")
    model["merges"] = [parse_merge(merge) for merge in model["merges"]]
    added_tokens = [
        {**entry, "special": bool(entry.get("special"))}
        for entry in description.get("added_tokens") or []
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": description.get("normalizer"),
        "pre_tokenizer": description.get("pre_tokenizer"),
        "post_processor": description.get("post_processor"),
        "decoder": description.get("decoder"),
        "model": model,
    }


def new_backend(description: dict[str, Any]) -> tokenizers.Tokenizer:
    """The library's tokenizer. Byte tokens that are marked as special are ordinary tokens in it."""
    vocab = description["model"]["vocab"]
    added_tokens = [
        entry
        for entry in description["added_tokens"]
        if not (BYTE_PIECE.fullmatch(entry["content"]) and entry["content"] in vocab)
    ]
    changes = {"added_tokens": added_tokens, "post_processor": None}
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(description | changes))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's own errors; Rust's panics are no Exception
        raise ValueError(f"the tokenizers library cannot read it: {str(error)[:100]}") from error
    for entry in description["added_tokens"]:
        if backend.token_to_id(entry["content"]) != entry["id"]:
            name = entry["content"][:50]
            raise ValueError(f"the id of {name!r}, {entry['id']}, does not follow the other ids")
    backend.encode_special_tokens = True  # the name of a special token is plain text
    return backend


def remove_prefix(step: Any) -> Any:
    """A normalizer or pre-tokenizer that puts no space before a text and keeps the spaces at its
    ends. None if nothing else is left of it."""
    if step is None or step["type"] in ("Prepend", "Strip"):
        return None
    if step["type"] == "Sequence":
        key = "normalizers" if "normalizers" in step else "pretokenizers"
        steps = [remove_prefix(inner) for inner in step[key]]
        return {**step, key: [inner for inner in steps if inner is not None]}
    changes: dict[str, dict[str, Any]] = {
        "Metaspace": {"prepend_scheme": "never", "add_prefix_space": False},
        "ByteLevel": {"add_prefix_space": False},
    }
    return {**step, **changes.get(step["type"], {})}


def parse_merge(merge: str | list[str]) -> list[str]:
    """The two tokens of a merge. Older files write them as one string with a space. Raises
    ValueError for anything but two tokens."""
    tokens = merge.split(" ") if isinstance(merge, str) else merge
    are_texts = isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)
    if not are_texts or len(tokens) != 2:
        raise ValueError(f"a merge in it is {describe_value(merge)}, not two tokens")
    return tokens


def decoder_steps(decoder: Any) -> list[dict[str, Any]]:
    """The steps of a decoder."""
    if decoder is None:
        raise ValueError("it has no decoder")
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def uses_byte_level(decoder: Any) -> bool:
    """Whether the characters of a token are bytes. Raises ValueError for an unsupported decoder."""
    types = [step["type"] for step in decoder_steps(decoder)]
    if types == ["ByteLevel"]:
        return True
    if types and set(types) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return False
    raise ValueError(f"its decoder {' and '.join(types)[:100]} is not supported")


def strips_prefix(decoder: Any) -> bool:
    """Whether decoding removes a space at the beginning of a text."""
    for step in decoder_steps(decoder):
        if step["type"] == "Strip" and step.get("content") == " " and step.get("start"):
            return True
        if step["type"] == "Metaspace":
            return prepends_space(step)
    return False


def prepends_space(metaspace: dict[str, Any]) -> bool:
    """Whether a Metaspace step puts a space before a text. Older files have add_prefix_space."""
    default = "always" if metaspace.get("add_prefix_space", True) else "never"
    return metaspace.get("prepend_scheme", default) != "never"
