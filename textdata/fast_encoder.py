"""
Encode texts faster than SentencePiece, with a cache from words to token ids.

This is exact if no token continues after a space and the space itself is a token: byte-pair
encoding merges neighbors only into tokens of the vocabulary, so it never merges across the end of a
word. (Adjacent unknown characters become one unknown token, but a space separates two words.)
"""

import re
from collections.abc import Iterator, Sequence
from typing import TypeGuard

import numpy as np

from textdata.corpus import DocumentChunk, cut_position
from textdata.tokenizer import NORMAL, USER_DEFINED, SentencePieceTokenizer, Tokenizer

MAX_CACHED_WORDS = 2**18  # the most frequent words come early
MAX_WORD_LENGTH = 40  # characters; longer words are not cached
SEPARABLE_PART = 2**16  # characters; a longer text is encoded in parts, to bound memory
MAX_PART = 2**20  # characters of a part without single spaces, or if words cannot be separated
SINGLE_SPACE = re.compile(r"(?<=\S) (?=\S)")
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
        self.encode = tokenizer.encode
        self.dtype = dtype

    def __missing__(self, word: str) -> bytes:
        ids = np.array(self.encode(word), self.dtype).tobytes()
        if len(word) <= MAX_WORD_LENGTH and len(self) < MAX_CACHED_WORDS:
            self[word] = ids
        return ids


class Encoder:
    """Encodes documents to the bytes of a token shard, word by word if the vocabulary allows it.

    The tokens of a document in parts have its text: a tokenizer that puts a space before a text
    puts none before a part that continues a document."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype):
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.words = WordCache(tokenizer, dtype) if is_word_separable(tokenizer) else None
        is_sentencepiece = isinstance(tokenizer, SentencePieceTokenizer)
        self.adds_space = is_sentencepiece and tokenizer.has_dummy_prefix

    def encode(self, chunks: Sequence[DocumentChunk], num_threads: int = 1) -> list[bytes]:
        """The bytes of each chunk's token ids, without BOS and EOS. The threads encode the texts
        that cannot be encoded word by word."""
        part_size = MAX_PART if self.words is None else SEPARABLE_PART
        encoded = [
            [self.encode_words(part) for part in split_chunk(chunk, part_size)] for chunk in chunks
        ]
        others = [part for parts in encoded for part in parts if isinstance(part, DocumentChunk)]
        ids_of_others = self.encode_texts(others, num_threads)
        return [
            b"".join(
                self.to_bytes(next(ids_of_others)) if isinstance(part, DocumentChunk) else part
                for part in parts
            )
            for parts in encoded
        ]

    def encode_words(self, part: DocumentChunk) -> bytes | DocumentChunk:
        """The bytes of the part's token ids. If it must be encoded as a whole, the part: adjacent
        spaces may be one token."""
        if self.adds_space and not part.starts_document and part.text.startswith(" "):
            part = DocumentChunk(part.text[1:], True)  # the tokenizer puts the space back
        if self.words is None or not part.starts_document:
            return part
        words = part.text.split(" ")
        return part if "" in words else b"".join(map(self.words.__getitem__, words))

    def encode_texts(self, parts: list[DocumentChunk], num_threads: int) -> Iterator[list[int]]:
        """Yield the token ids of each part, encoded as a whole."""
        first = [part.text for part in parts if part.starts_document]
        others = [part.text for part in parts if not part.starts_document]
        ids_of_first = iter(self.tokenizer.encode_batch(first, num_threads))
        ids_of_others: Iterator[list[int]] = iter(())
        if others:
            ids_of_others = iter(self.tokenizer.without_prefix.encode_batch(others, num_threads))
        for part in parts:
            yield next(ids_of_first if part.starts_document else ids_of_others)

    def to_bytes(self, ids: list[int]) -> bytes:
        """The token ids as they are stored in a shard."""
        return np.array(ids, self.dtype).tobytes()


def split_chunk(chunk: DocumentChunk, size: int) -> Iterator[DocumentChunk]:
    """Split the chunk at single spaces between words, each part as soon as it has size characters.
    A part without such a space ends after MAX_PART characters."""
    text, starts_document = chunk
    start = 0
    while len(text) - start > size:
        match = SINGLE_SPACE.search(text, start + size, start + MAX_PART)
        if match is None and len(text) - start <= MAX_PART:
            break
        if match:
            end = match.start()
        else:
            end = start + cut_position(text[start : start + MAX_PART], MAX_PART)
        yield DocumentChunk(text[start:end], starts_document)
        start = end
        starts_document = False
    yield DocumentChunk(text[start:], starts_document)
