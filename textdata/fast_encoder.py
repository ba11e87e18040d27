"""
Encode texts faster than SentencePiece, with a cache from words to token ids.

This is exact if no token continues after a space and the space itself is a token: byte-pair
encoding merges neighbors only into tokens of the vocabulary, so it never merges across the end of a
word. (Adjacent unknown characters become one unknown token, but a space separates two words.)
"""

import functools
import re
from collections.abc import Iterator, Sequence
from typing import TypeGuard

import numpy as np
import sentencepiece

from textdata.corpus import DocumentChunk, cut_position
from textdata.sentencepiece_tokenizer import ModelProto
from textdata.tokenizer import NORMAL, USER_DEFINED, SentencePieceTokenizer, Tokenizer

MAX_CACHED_WORDS = 2**18  # the most frequent words come early
MAX_WORD_LENGTH = 40  # characters; longer words are not cached
SEPARABLE_PART = 2**16  # characters; a longer text is encoded in parts, to bound memory
MAX_PART = 2**20  # characters of a part without single spaces, or if words cannot be separated
SPACE_SIGN = "▁"  # U+2581, which stands for a space in a vocabulary
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
        self.encode = tokenizer.processor.encode
        self.dtype = dtype

    def __missing__(self, word: str) -> bytes:
        ids = np.array(self.encode(word), self.dtype).tobytes()
        if len(word) <= MAX_WORD_LENGTH and len(self) < MAX_CACHED_WORDS:
            self[word] = ids
        return ids


class Encoder:
    """Encodes documents to the bytes of a token shard, word by word if the vocabulary allows it.

    The tokens have the text of the document. SentencePiece alone does not ensure that: it puts a
    space before every text, even if the text continues a document, and it reads ▁ (U+2581) as a
    space. Here ▁ becomes its three bytes, or the unknown token if the vocabulary has no bytes."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype):
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.words = WordCache(tokenizer, dtype) if is_word_separable(tokenizer) else None

    def encode(self, chunks: Sequence[DocumentChunk], num_threads: int = 1) -> list[bytes]:
        """The bytes of each chunk's token ids, without BOS and EOS. The threads encode the texts
        that cannot be encoded word by word."""
        part_size = MAX_PART if self.words is None else SEPARABLE_PART
        encoded = [
            [self.encode_part(part) for part in split_chunk(chunk, part_size)] for chunk in chunks
        ]
        texts = [part for parts in encoded for part in parts if isinstance(part, str)]
        ids_of_texts = iter(self.tokenizer.encode_batch(texts, num_threads))
        return [
            b"".join(
                self.to_bytes(next(ids_of_texts)) if isinstance(part, str) else part
                for part in parts
            )
            for parts in encoded
        ]

    def encode_part(self, part: DocumentChunk) -> bytes | str:
        """The bytes of the part's token ids, or the text to encode with the tokenizer."""
        tokenizer = self.tokenizer
        text = part.text
        if not isinstance(tokenizer, SentencePieceTokenizer):
            return text
        if SPACE_SIGN in text:
            return self.encode_space_signs(tokenizer, part)
        if tokenizer.has_dummy_prefix and not part.starts_document:
            if not text.startswith(" "):
                return self.to_bytes(self.without_prefix.encode(text))
            text = text[1:]  # the tokenizer puts the space back
        return self.encode_words(text)

    def encode_words(self, text: str) -> bytes | str:
        """The bytes of the text's token ids, or the text if it must be encoded as a whole: adjacent
        spaces may be one token."""
        words = text.split(" ")
        if self.words is None or "" in words:
            return text
        return b"".join(map(self.words.__getitem__, words))

    def encode_space_signs(self, tokenizer: SentencePieceTokenizer, part: DocumentChunk) -> bytes:
        """The bytes of the token ids of a text with ▁."""
        first, *others = part.text.split(SPACE_SIGN)
        if not (part.starts_document and tokenizer.has_dummy_prefix):
            ids = self.without_prefix.encode(first)
        elif first:
            ids = tokenizer.encode(first)
        else:
            ids = self.without_prefix.encode(" ")
        for encoded in self.without_prefix.encode(others):
            ids += self.space_sign_ids + encoded
        return self.to_bytes(ids)

    def to_bytes(self, ids: list[int]) -> bytes:
        """The token ids as they are stored in a shard."""
        return np.array(ids, self.dtype).tobytes()

    @functools.cached_property
    def without_prefix(self) -> sentencepiece.SentencePieceProcessor:
        """The SentencePiece model without a space before each text."""
        model = ModelProto.FromString(self.tokenizer.content)
        model.normalizer_spec.add_dummy_prefix = False
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

    @functools.cached_property
    def space_sign_ids(self) -> list[int]:
        """The token ids of ▁ as text."""
        processor = self.without_prefix
        ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SIGN.encode()]
        return ids if all(map(processor.is_byte, ids)) else [processor.unk_id()]


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
