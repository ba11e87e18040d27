"""
Text to the bytes of its token ids, faster than SentencePiece itself: a word that was cut into tokens
before is looked up.

That is exact for a vocabulary in which no token goes on beyond a space: byte-pair encoding merges
neighbours into tokens of the vocabulary, so nothing is ever merged across the end of a word, and
what happens in one word changes nothing in another.
"""

import re

import numpy as np

from tokenizer import SentencePieceTokenizer, Tokenizer

MOST_WORDS = 2**18  # remembered; the most frequent ones come early
LONGEST_WORD = 40  # characters of a word worth remembering


def cuts_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether every word of a text gets the tokens that it would get alone."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return False
    if not tokenizer.is_bpe or not tokenizer.has_dummy_prefix or tokenizer.changes_text:
        return False
    pieces = [piece for piece, _, _ in tokenizer.pieces]
    return "▁" in pieces and not any(re.search("[^▁]▁| ", piece) for piece in pieces)


class Words(dict):
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
        self.words = Words(tokenizer, dtype) if cuts_at_spaces(tokenizer) else None

    def encode(self, texts: list[str], num_threads: int = 1) -> list[bytes]:
        """The bytes of each text's ids, without begin or end of text."""
        if self.words is None:
            encoded = self.tokenizer.encode_batch(texts, num_threads)
            return [np.array(ids, self.dtype).tobytes() for ids in encoded]
        return list(map(self.encode_words, texts))

    def encode_words(self, text: str) -> bytes:
        words = text.split(" ")
        if "" in words or "▁" in text:  # spaces side by side, which may be one token; ▁ is one of them
            return np.array(self.tokenizer.encode(text), self.dtype).tobytes()
        return b"".join(map(self.words.__getitem__, words))
