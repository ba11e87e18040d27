"""
Encode texts faster than SentencePiece, with a cache from words to token ids.

This is exact if no token continues after a space and the space itself is a token: byte-pair
encoding merges neighbors only into tokens of the vocabulary, so it never merges across the end of a
word. (Adjacent unknown characters become one unknown token, but a space separates two words.)
"""

import re
from typing import TypeGuard

import numpy as np

from textdata.tokenizer import NORMAL, USER_DEFINED, SentencePieceTokenizer, Tokenizer

MAX_CACHED_WORDS = 2**18  # the most frequent words come early
MAX_WORD_LENGTH = 40  # characters; longer words are not cached
TEXT_PIECE_TYPES = (NORMAL, USER_DEFINED)  # types of the pieces that text is split into


def is_word_separable(tokenizer: Tokenizer) -> TypeGuard[SentencePieceTokenizer]:
    """Whether each word of a text gets the same tokens as the word alone."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return False
    if not tokenizer.is_bpe or not tokenizer.has_dummy_prefix or tokenizer.normalizes:
        return False
    has_space = any(
        piece.text == "▁" and piece.type in TEXT_PIECE_TYPES for piece in tokenizer.pieces
    )
    return has_space and not any(re.search("[^▁]▁| ", piece.text) for piece in tokenizer.pieces)


class WordCache(dict[str, bytes]):
    """Maps a word to the bytes of its token ids. A missing word is encoded and then cached."""

    def __init__(self, tokenizer: SentencePieceTokenizer, dtype: np.dtype):
        super().__init__()
        self.encode = tokenizer.processor.encode
        self.dtype = dtype

    def __missing__(self, word: str) -> bytes:
        ids = np.array(self.encode(word), self.dtype).tobytes()
        if len(word) <= MAX_WORD_LENGTH and len(self) < MAX_CACHED_WORDS:
            self[word] = ids
        return ids


class Encoder:
    """Encodes texts to the bytes of a token shard, word by word if the vocabulary allows it."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype):
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.words = WordCache(tokenizer, dtype) if is_word_separable(tokenizer) else None

    def encode(self, texts: list[str], num_threads: int = 1) -> list[bytes]:
        """The bytes of each text's token ids, without BOS and EOS. The threads encode the texts
        that cannot be encoded word by word."""
        by_word = [self.encode_words(text) for text in texts]
        others = [text for text, ids in zip(texts, by_word, strict=True) if ids is None]
        encoded = iter(self.tokenizer.encode_batch(others, num_threads))
        return [
            np.array(next(encoded), self.dtype).tobytes() if ids is None else ids for ids in by_word
        ]

    def encode_words(self, text: str) -> bytes | None:
        """The bytes of the text's token ids, or None if it must be encoded as a whole: adjacent
        spaces may be one token, and ▁ is encoded as a space."""
        words = text.split(" ")
        if self.words is None or "" in words or "▁" in text:
            return None
        return b"".join(map(self.words.__getitem__, words))
