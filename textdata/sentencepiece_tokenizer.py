"""
SentencePiece tokenizers: Llama 2's tokenizer.model, llama2.c's tokenizer.bin, new vocabularies.

The hash of a byte-pair vocabulary is that of its tokenizer.bin, which holds the pieces and scores.
"""

import functools
import hashlib
import io
import os
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from textdata.base_tokenizer import Tokenizer

# protobuf creates these classes at import, so the stubs do not know them.
ModelProto = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]
BPE = sentencepiece_model_pb2.TrainerSpec.BPE  # type: ignore[attr-defined]

UNKNOWN_ID = 0
BOS_ID = 1
EOS_ID = 2

# Piece types, as in sentencepiece_model.proto.
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6

MAX_TRAINING_LINE = 4096  # bytes; SentencePiece leaves out longer lines, so they are split
SPACE_SIGN = "▁"  # U+2581, which stands for a space in a vocabulary
RESERVED_CHARACTER = "\u2585"  # SentencePiece leaves out lines with it, so it is replaced


class Piece(NamedTuple):
    """A token of a SentencePiece model. A space in its text is written ▁ (U+2581)."""

    text: str
    score: float
    type: int


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, from the content of a tokenizer.model file (a protocol buffer).

    It encodes as the library does, with one exception: the library reads ▁ (U+2581) in a text as a
    space. Here ▁ becomes its three bytes, as in llama2.c, or the unknown token if the vocabulary
    has no bytes.
    """

    def __init__(self, content: bytes):
        self.content = content
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.vocab_size = self.processor.vocab_size()
        self.bos_id = self.processor.bos_id()
        self.eos_id = self.processor.eos_id()
        self.stop_ids = frozenset({self.bos_id, self.eos_id})
        # With a space before each text, a first word gets the same tokens as any other.
        model = ModelProto.FromString(content)
        self.has_dummy_prefix = (
            model.normalizer_spec.add_dummy_prefix
            and not model.trainer_spec.treat_whitespace_as_suffix
        )

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        sp = self.processor
        return [
            b"" if sp.is_control(i)
            else " ⁇ ".encode() if sp.is_unknown(i)
            else bytes([int(sp.id_to_piece(i)[3:5], 16)]) if sp.is_byte(i)
            else sp.id_to_piece(i).replace("▁", " ").encode()
            for i in range(self.vocab_size)
        ]  # fmt: skip

    @functools.cached_property
    def pieces(self) -> list[Piece]:
        """All pieces, in the order of their token ids."""
        pieces = ModelProto.FromString(self.content).pieces
        return [Piece(piece.piece, piece.score, piece.type) for piece in pieces]

    @functools.cached_property
    def normalizes(self) -> bool:
        """Whether encoding normalizes the text first. Other formats cannot represent that."""
        normalizer = ModelProto.FromString(self.content).normalizer_spec
        return bool(normalizer.precompiled_charsmap) or normalizer.remove_extra_whitespaces

    @functools.cached_property
    def is_bpe(self) -> bool:
        """Whether the model is byte-pair encoding, not a unigram language model."""
        return ModelProto.FromString(self.content).trainer_spec.model_type == BPE

    @functools.cached_property
    def hash(self) -> str:
        """The SHA-256 of tokenizer.bin and of the properties that tokenizer.bin cannot hold."""
        suffix = b"" if self.has_dummy_prefix else b"no prefix"
        suffix += b"" if self.is_bpe else b"no BPE"
        return hashlib.sha256(self.pieces_as_bin() + suffix).hexdigest()

    @functools.cached_property
    def without_prefix(self) -> "SentencePieceTokenizer":
        model = ModelProto.FromString(self.content)
        model.normalizer_spec.add_dummy_prefix = False
        return SentencePieceTokenizer(model.SerializeToString())

    def encode(self, text: str, bos: bool = False) -> list[int]:
        encode = self._encode_space_signs if SPACE_SIGN in text else self.processor.encode
        return [self.bos_id] * bos + encode(text)

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[list[int]]:
        if any(SPACE_SIGN in text for text in texts):
            return [self.encode(text) for text in texts]
        return self.processor.encode(texts, num_threads=num_threads)

    def _encode_space_signs(self, text: str) -> list[int]:
        """The token ids of a text with ▁."""
        first, *others = text.split(SPACE_SIGN)
        continuation = self.without_prefix.processor
        if self.has_dummy_prefix and not first:
            ids = continuation.encode(" ")
        else:
            ids = self.processor.encode(first)
        for encoded in continuation.encode(others):
            ids += self.space_sign_ids + encoded
        return ids

    @functools.cached_property
    def space_sign_ids(self) -> list[int]:
        """The token ids of ▁ as text."""
        sp = self.processor
        ids = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SIGN.encode()]
        return ids if all(map(sp.is_byte, ids)) else [sp.unk_id()]

    def to_bin(self) -> bytes:
        """The content of llama2.c's tokenizer.bin. Raises ValueError for a vocabulary that its
        readers would misinterpret."""
        if not self.is_bpe:
            raise ValueError(
                "tokenizer.bin is read as byte-pair encoding, but this vocabulary is not"
            )
        if not self.has_dummy_prefix or (self.bos_id, self.eos_id) != (BOS_ID, EOS_ID):
            raise ValueError(
                "readers of tokenizer.bin begin a text with a space and token 1 and end it with "
                "token 2, but this vocabulary differs"
            )
        return self.pieces_as_bin()

    def pieces_as_bin(self) -> bytes:
        """The length of the longest piece, then each token's score, length and bytes, all
        little-endian. BOS and EOS are written as \\n<s>\\n and \\n</s>\\n."""
        sp = self.processor
        special = {self.bos_id: "\n<s>\n", self.eos_id: "\n</s>\n"}
        pieces = [
            special.get(i, sp.id_to_piece(i)).replace("▁", " ").encode()
            for i in range(self.vocab_size)
        ]
        tokens = (
            struct.pack("<fI", sp.get_score(i), len(piece)) + piece
            for i, piece in enumerate(pieces)
        )
        return struct.pack("<I", max(map(len, pieces))) + b"".join(tokens)


def parse_sentencepiece(content: bytes) -> SentencePieceTokenizer:
    """The tokenizer of the content of a tokenizer.model or a tokenizer.bin. Raises ValueError,
    RuntimeError or DecodeError for anything else."""
    bin_pieces = parse_tokenizer_bin(content)
    if bin_pieces is not None:
        content = proto_from_bin(bin_pieces)
    if not ModelProto.FromString(content).pieces:
        raise ValueError("no pieces")
    tokenizer = SentencePieceTokenizer(content)
    tokenizer.hash  # noqa: B018  decodes every piece, which raises an error if it is not text
    return tokenizer


def parse_tokenizer_bin(content: bytes) -> list[tuple[float, bytes]] | None:
    """The (score, bytes) pairs of a tokenizer.bin, or None if the content is something else."""
    pieces = []
    position = 4
    longest = 0
    while position + 8 <= len(content):
        score, length = struct.unpack_from("<fI", content, position)
        position += 8 + length
        longest = max(longest, length)
        pieces.append((score, content[position - length : position]))
    is_complete = position == len(content) and len(pieces) >= 3
    return pieces if is_complete and struct.unpack_from("<I", content)[0] >= longest else None


def proto_from_bin(bin_pieces: list[tuple[float, bytes]]) -> bytes:
    """A SentencePiece byte-pair model that encodes as llama2.c does with a tokenizer.bin."""
    pieces = []
    for score, content in bin_pieces:
        text = content.decode("utf-8").replace(" ", "▁")
        is_byte = re.fullmatch(r"<0x[0-9A-F]{2}>", text)
        pieces.append(Piece(text, score, BYTE if is_byte else NORMAL))
    pieces[UNKNOWN_ID] = Piece("<unk>", pieces[UNKNOWN_ID].score, UNKNOWN)
    pieces[BOS_ID] = Piece("<s>", pieces[BOS_ID].score, CONTROL)
    pieces[EOS_ID] = Piece("</s>", pieces[EOS_ID].score, CONTROL)
    return proto_from_pieces(pieces)


def proto_from_pieces(
    pieces: Sequence[tuple[str, float, int]],
    bos: str = "<s>",
    eos: str = "</s>",
    has_dummy_prefix: bool = True,
) -> bytes:
    """The tokenizer.model of a byte-pair vocabulary that does not normalize text.

    Args:
        pieces: the text, score and type of each token, in the order of their ids.
        bos: the text of the piece that begins a document.
        eos: the text of the piece that ends a document.
        has_dummy_prefix: whether encoding puts a space before each text.
    """
    model: Any = ModelProto()
    for text, score, piece_type in pieces:
        model.pieces.add(piece=text, score=score, type=piece_type)
    model.trainer_spec.model_type = BPE
    model.trainer_spec.vocab_size = len(pieces)
    model.trainer_spec.byte_fallback = any(piece_type == BYTE for _, _, piece_type in pieces)
    model.trainer_spec.bos_piece = bos
    model.trainer_spec.eos_piece = eos
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = has_dummy_prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """Learn a byte-pair vocabulary as Llama 2's; returns the content of its tokenizer.model.

    Unknown characters fall back to bytes and every digit is one token. Text is not normalized and
    spaces are kept, so that llama.cpp gives the same tokens. Raises ValueError if there is too
    little text, with the largest vocabulary that works. An exception of texts is raised unchanged.
    """
    model = io.BytesIO()
    lines = ErrorKeepingIterator(split_training_lines(texts))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=0.99995,
            max_sentence_length=MAX_TRAINING_LINE,
            unk_surface=r" ⁇ ",
            num_threads=os.cpu_count(),
            minloglevel=2,
        )
    except RuntimeError as error:
        if lines.error is not None:
            raise lines.error from None
        reason = explain_training_failure(str(error))
        raise ValueError(f"--vocab_size={vocab_size}: {reason}") from error
    return model.getvalue()


class ErrorKeepingIterator(Iterator[str]):
    """Iterates over lines and keeps the exception that ends them. SentencePiece replaces every
    exception of its iterator, Ctrl-C included, by a RuntimeError with lines of source code."""

    def __init__(self, lines: Iterator[str]):
        self.lines = lines
        self.error: BaseException | None = None

    def __next__(self) -> str:
        try:
            return next(self.lines)
        except StopIteration:
            raise
        except BaseException as error:
            self.error = error
            raise


def split_training_lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of the texts. A line longer than MAX_TRAINING_LINE is split between characters."""
    step = MAX_TRAINING_LINE // 4  # a character takes up to 4 bytes
    for text in texts:
        for line in text.replace(RESERVED_CHARACTER, " ").splitlines():
            for start in range(0, len(line), step):
                yield line[start : start + step]


def explain_training_failure(message: str) -> str:
    """SentencePiece's error message in plain English, with the vocabulary size that works."""
    if too_large := re.search(r"value <= (\d+)", message):
        return (
            "the text is too short for so many tokens; "
            f"the largest that works is --vocab_size={too_large[1]}"
        )
    if required := re.search(r"\d+ vs (\d+)", message):
        return (
            "the text has so many distinct characters that it takes "
            f"at least --vocab_size={required[1]}"
        )
    return "there is no text to learn from" if "sentences_.empty" in message else message
