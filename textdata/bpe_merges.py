"""
What byte-pair encodings of different libraries have in common: GPT-2's byte-level alphabet, and the
ordered merges that scores (SentencePiece) or ranks (tiktoken) imply.

A token of bytes is written in GPT-2's alphabet: one printable character for each byte.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from textdata.sentencepiece_tokenizer import NORMAL

Text = TypeVar("Text", str, bytes)

# GPT-2's byte-level alphabet


def bytes_to_unicode() -> list[str]:
    """The character for each byte: itself for printable Latin-1, from U+0100 on for the others."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


BYTE_TO_UNICODE = bytes_to_unicode()
UNICODE_TO_BYTE = {character: byte for byte, character in enumerate(BYTE_TO_UNICODE)}


def to_byte_unicode(token: bytes) -> str:
    """Write bytes in the byte-level alphabet."""
    return "".join(BYTE_TO_UNICODE[byte] for byte in token)


def from_byte_unicode(text: str) -> bytes:
    """The bytes of a text in the byte-level alphabet. Raises ValueError for other characters."""
    if not UNICODE_TO_BYTE.keys() >= set(text):
        raise ValueError(f"{text[:50]!r} is not in the byte-level alphabet")
    return bytes(UNICODE_TO_BYTE[character] for character in text)


# Merges


def sentencepiece_merges(pieces: Sequence[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Every pair of pieces that joins to a normal piece.

    The order is by (-score of the joined piece, id of the left piece, id of the right piece).
    """
    ids = {text: i for i, (text, _, piece_type) in enumerate(pieces) if piece_type == NORMAL}
    pairs = joining_pairs(ids, [-score for _, score, _ in pieces])
    return [(pieces[left][0], pieces[right][0]) for left, right in pairs]


def rank_merges(ranks: list[bytes]) -> list[tuple[str, str]]:
    """Every pair of tokens that joins to a token.

    The order is by (rank of the joined token, rank of the left token, rank of the right token).
    """
    names = [to_byte_unicode(token) for token in ranks]
    pairs = joining_pairs({token: rank for rank, token in enumerate(ranks)}, range(len(ranks)))
    return [(names[left], names[right]) for left, right in pairs]


def joining_pairs(ids: Mapping[Text, int], order: Sequence[float]) -> list[tuple[int, int]]:
    """The ids of every two tokens that join to a token: (left, right), sorted by the order of the
    joined token, then by left and right.

    Args:
        ids: the id of each token.
        order: a number for each id; the lowest is merged first.
    """
    merges = []
    for token, i in ids.items():
        for split in range(1, len(token)):
            left, right = ids.get(token[:split]), ids.get(token[split:])
            if left is not None and right is not None:
                merges.append((order[i], left, right))
    return [(left, right) for _, left, right in sorted(merges)]
