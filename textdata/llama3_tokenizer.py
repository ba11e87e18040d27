"""
Llama 3's tokenizer: byte-pair encoding by rank with tiktoken, special tokens and the chat format.
"""

import base64
import binascii
import functools
import hashlib
import itertools
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import tiktoken

from textdata.base_tokenizer import Tokenizer

# The regular expression that splits a text before byte-pair encoding (Meta's llama3/tokenizer.py).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_NUM_SPECIAL = 256
LLAMA3_NAMED_SPECIAL = {  # number of the special token -> name; the others are reserved
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
STOP_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
MAX_RUN = 25_000  # characters; tiktoken's time and stack grow with the square of a run's length
RUN_PATTERN = re.compile(r"\s+|\S+")


def llama3_special_tokens() -> list[str]:
    """The names of Llama 3's special tokens, in the order of their ids."""
    reserved = itertools.count()
    return [
        LLAMA3_NAMED_SPECIAL.get(i) or f"<|reserved_special_token_{next(reserved)}|>"
        for i in range(LLAMA3_NUM_SPECIAL)
    ]


class Llama3Tokenizer(Tokenizer):
    """Byte-pair encoding by rank.

    Args:
        ranks: the bytes of each token, in the order of their ids. Every single byte is a token.
        special: the names of the special tokens that follow; Llama 3's own by default.

    Raises ValueError for tokens that occur twice or are missing.
    """

    def __init__(self, ranks: list[bytes], special: list[str] | None = None):
        special = llama3_special_tokens() if special is None else special
        by_bytes = {token: rank for rank, token in enumerate(ranks)}
        by_name = {name: len(ranks) + i for i, name in enumerate(special)}
        if len(by_bytes) < len(ranks) or len(by_name) < len(special):
            raise ValueError("a token occurs twice")
        if not all(bytes([byte]) in by_bytes for byte in range(256)) or b"" in by_bytes:
            raise ValueError("not every byte is a token")
        if not {"<|begin_of_text|>", "<|end_of_text|>"} <= by_name.keys():
            raise ValueError("no <|begin_of_text|> and <|end_of_text|>")
        self.ranks = ranks
        self.special = special
        self.encoding = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=by_bytes, special_tokens=by_name
        )
        self.vocab_size = len(ranks) + len(special)
        self.bos_id = by_name["<|begin_of_text|>"]
        self.eos_id = by_name["<|end_of_text|>"]
        self.stop_ids = frozenset(by_name[name] for name in STOP_TOKENS if name in by_name)

    @property
    def has_custom_special_tokens(self) -> bool:
        """Whether the special tokens differ from Llama 3's. content does not hold them."""
        return self.special != llama3_special_tokens()

    @functools.cached_property
    def content(self) -> bytes:
        """A tiktoken file: one line for each rank, with the token in base64 and the rank."""
        return b"".join(
            base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(self.ranks)
        )

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        return self.ranks + [b""] * len(self.special)

    @functools.cached_property
    def hash(self) -> str:
        """The SHA-256 of content, and of the special tokens if they are not Llama 3's."""
        suffix = repr(self.special).encode() if self.has_custom_special_tokens else b""
        return hashlib.sha256(self.content + suffix).hexdigest()

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """The token ids of the text. The name of a special token in it is encoded as plain text."""
        ids = [self.bos_id] * bos
        for part in split_long_runs(text):
            ids += self.encoding.encode_ordinary(part)
        return ids

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[list[int]]:
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(self.encode, texts))

    def encode_chat(self, messages: list[tuple[str, str]]) -> list[int]:
        """The token ids of (role, text) messages and of the header of the assistant's answer. A
        role is system, user or assistant (Llama 3's model card, "prompt format")."""
        ids = [self.bos_id]
        for role, text in messages:
            ids += self.encode_header(role)
            ids += self.encode(text.strip())
            ids.append(self.special_id("<|eot_id|>"))
        return ids + self.encode_header("assistant")

    def encode_header(self, role: str) -> list[int]:
        """The token ids that begin a message of the role."""
        return [
            self.special_id("<|start_header_id|>"),
            *self.encode(role),
            self.special_id("<|end_header_id|>"),
            *self.encode("\n\n"),
        ]

    def special_id(self, name: str) -> int:
        """The id of a special token. Raises ValueError if the vocabulary does not have it."""
        if name not in self.special:
            raise ValueError(f"this vocabulary has no {name}")
        return len(self.ranks) + self.special.index(name)

    def to_bin(self) -> bytes:
        """Always raises ValueError: tokenizer.bin has scores, not ranks."""
        raise ValueError("tokenizer.bin cannot hold a Llama 3 vocabulary; use --format=hf or gguf")


def split_long_runs(text: str) -> Iterator[str]:
    """Split the text so that no part has more than MAX_RUN whitespace or non-whitespace characters
    in a row. Meta's tokenizer splits at the same positions."""
    start = 0
    for match in RUN_PATTERN.finditer(text):
        for cut in range(match.start() + MAX_RUN, match.end(), MAX_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]


def parse_ranks(content: bytes) -> list[bytes] | None:
    """The tokens of a tiktoken file, in the order of their ranks, or None if the content is
    something else. Raises ValueError if the ranks are not 0, 1, 2, ..."""
    if not re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
        return None
    tokens = []
    for number, line in enumerate(content.splitlines()):
        token, _, rank = line.partition(b" ")
        try:
            tokens.append(base64.b64decode(token, validate=True))
        except binascii.Error as error:
            raise ValueError(f"line {number + 1} is not a token in base64") from error
        if rank != b"%d" % number:
            raise ValueError(f"line {number + 1} does not have rank {number}")
    return tokens
