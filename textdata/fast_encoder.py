"""
Text to the bytes of its token ids, faster than SentencePiece itself: a word that was cut into tokens
before is looked up.

That is exact for a vocabulary in which no token goes on beyond a space, and a space is a token:
byte-pair encoding merges neighbours into tokens of the vocabulary, so nothing is ever merged across
the end of a word. (Unknown characters side by side are one unknown token, but the space that begins
each word stands between those of two words.)
"""

import re

import numpy as np
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from textdata.tokenizer import SentencePieceTokenizer, Tokenizer

Piece = ModelProto.SentencePiece
MOST_WORDS = 2**18  # remembered; the most frequent ones come early
LONGEST_WORD = 40  # characters of a word worth remembering
KNOWN = (Piece.NORMAL, Piece.USER_DEFINED)  # kinds of pieces that a text is cut into


def is_word_separable(tokenizer: Tokenizer) -> bool:
    """Whether every word of a text gets the tokens that it would get alone."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return False
    if not tokenizer.is_bpe or not tokenizer.has_dummy_prefix or tokenizer.normalizes:
        return False
    has_space = any(piece == "▁" and kind in KNOWN for piece, _, kind in tokenizer.pieces)
    return has_space and not any(re.search("[^▁]▁| ", piece) for piece, _, _ in tokenizer.pieces)


class WordCache(dict):
    """From a word to the bytes of its ids; one that is missing is encoded, and remembered."""

    def __init__(self, tokenizer: SentencePieceTokenizer, dtype: np.dtype):
        self.encode, self.dtype = tokenizer.processor.encode, dtype

    def __missing__(self, word: str) -> bytes:
        ids = np.array(self.encode(word), self.dtype).tobytes()
        if len(word) <= LONGEST_WORD and len(self) < MOST_WORDS:
            self[word] = ids
        return ids


class Encoder:
    """Encodes texts for a shard of dtype ids."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype):
        self.tokenizer, self.dtype = tokenizer, dtype
        self.words = WordCache(tokenizer, dtype) if is_word_separable(tokenizer) else None

    def encode(self, texts: list[str], num_threads: int = 1) -> list[bytes]:
        """The bytes of each text's ids, without begin or end of text. The threads are for the texts
        that are not taken word by word."""
        by_word = [self.encode_words(text) for text in texts]
        others = [text for text, ids in zip(texts, by_word, strict=True) if ids is None]
        encoded = iter(self.tokenizer.encode_batch(others, num_threads))
        return [
            np.array(next(encoded), self.dtype).tobytes() if ids is None else ids for ids in by_word
        ]

    def encode_words(self, text: str) -> bytes | None:
        """None where words do not do: spaces side by side may be one token, and ▁ is one of them."""
        words = text.split(" ")
        if self.words is None or "" in words or "▁" in text:
            return None
        return b"".join(map(self.words.__getitem__, words))
