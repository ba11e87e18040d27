"""
The interface of all tokenizers.
"""

import codecs
import functools
from collections.abc import Iterable, Iterator

import numpy as np


class Tokenizer:
    """Converts text to token ids and back. Subclasses override what raises NotImplementedError.

    A vocabulary is identified by its hash in token shards and checkpoints. bos_id and eos_id mark
    the beginning and end of a text. A token in stop_ids ends a generated text.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    stop_ids: frozenset[int]
    add_bos = True  # whether a prompt begins with BOS
    has_dummy_prefix = False  # whether the tokenizer puts a space before each text

    @functools.cached_property
    def content(self) -> bytes:
        """The content of its tokenizer.model file."""
        raise NotImplementedError

    @functools.cached_property
    def files(self) -> dict[str, bytes]:
        """Name and content of the files that load_tokenizer reads it from, the main one first."""
        return {"tokenizer.model": self.content}

    @property
    def without_prefix(self) -> "Tokenizer":
        """The tokenizer of a text that continues another: it puts no space before the text."""
        return self

    @functools.cached_property
    def hash(self) -> str:
        """The SHA-256, in hexadecimal, of everything that encoding depends on."""
        raise NotImplementedError

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each token adds to the text; none for control tokens."""
        raise NotImplementedError

    @property
    def unused_ids(self) -> list[int]:
        """The ids below vocab_size without a token."""
        return []

    @property
    def min_embeddings(self) -> int:
        """The fewest embeddings of a model: 1 + the largest id that encoding gives."""
        return self.vocab_size

    def ids_without_token(self, num_embeddings: int) -> list[int]:
        """The ids without a token among a model's embeddings, such as those that pad a matrix."""
        return [*self.unused_ids, *range(self.vocab_size, num_embeddings)]

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """The token ids of the text, with bos_id before them if bos."""
        raise NotImplementedError

    def encode_prompt(self, text: str) -> list[int]:
        """The token ids of a prompt, with bos_id before them if add_bos; for no text, bos_id."""
        return self.encode(text, bos=self.add_bos or not text)

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[list[int]]:
        """The token ids of each text, encoded in parallel."""
        raise NotImplementedError

    def to_bin(self) -> bytes:
        """The content of llama2.c's tokenizer.bin. Raises ValueError if that cannot represent the
        vocabulary."""
        raise NotImplementedError

    @functools.cached_property
    def byte_counts(self) -> np.ndarray:
        """The number of bytes that each token adds to the text, (vocab_size,) int64. BOS counts -1
        if the tokenizer puts a space before the text, so that the sum is the length of the text."""
        counts = np.array([len(token) for token in self.token_bytes], dtype=np.int64)
        counts[self.bos_id] = -1 if self.has_dummy_prefix else 0
        return counts

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the token ids. Bytes that are not UTF-8 become U+FFFD."""
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text that each token completes, and a last string for incomplete bytes. The
        joined strings equal decode(ids)."""
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        at_start = self.has_dummy_prefix
        for token in ids:
            added = self.token_bytes[token]
            if at_start and added:
                added = added.removeprefix(b" ")
                at_start = False
            at_start = at_start or (token == self.bos_id and self.has_dummy_prefix)
            yield utf8.decode(added)
        yield utf8.decode(b"", final=True)
