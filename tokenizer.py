"""
Text to token ids and back, with SentencePiece: a vocabulary of our own, Llama 2's
tokenizer.model, or llama2.c's tokenizer.bin.

tokenizer.bin holds the pieces and their scores, all that a byte-pair encoder needs; it is what
the C programs read, and its SHA-256 is the identity of a vocabulary in data and checkpoints.
"""

import codecs
import functools
import hashlib
import io
import os
import re
import struct
from collections.abc import Iterable, Iterator

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

UNKNOWN_ID, BOS_ID, EOS_ID = 0, 1, 2
MAX_TRAINING_LINE = 4096  # bytes; SentencePiece leaves out longer lines, so we cut them


class Tokenizer:
    """A SentencePiece model. proto is the content of a tokenizer.model file, as bytes."""

    def __init__(self, proto: bytes):
        self.proto = proto
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.vocab_size = self.processor.vocab_size()
        self.bos_id = self.processor.bos_id()
        self.eos_id = self.processor.eos_id()
        # SentencePiece puts a space before each text, so that a first word is spelled like any other.
        self.has_dummy_prefix = self.processor.id_to_piece(self.processor.encode("a")[0]).startswith("▁")

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """What each token adds to the text: nothing for control tokens, a space for ▁."""
        sp = self.processor
        return [
            b"" if sp.is_control(i)
            else " ⁇ ".encode() if sp.is_unknown(i)
            else bytes([int(sp.id_to_piece(i)[3:5], 16)]) if sp.is_byte(i)
            else sp.id_to_piece(i).replace("▁", " ").encode()
            for i in range(self.vocab_size)
        ]  # fmt: skip

    @functools.cached_property
    def byte_counts(self) -> np.ndarray:
        """Bytes of text behind each token id (V,), so that they sum to the length of the text.
        A beginning of text counts -1 for the space that is put before the text."""
        counts = np.array([len(token) for token in self.token_bytes], dtype=np.int64)
        counts[self.bos_id] = -1 if self.has_dummy_prefix else 0
        return counts

    @functools.cached_property
    def hash(self) -> str:
        return hashlib.sha256(self.to_bin()).hexdigest()

    def encode(self, text: str, bos: bool = False) -> list[int]:
        return [self.bos_id] * bos + self.processor.encode(text)

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[list[int]]:
        return self.processor.encode(texts, num_threads=num_threads)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield a piece of text for every id, joined equal to the whole text: a character whose
        bytes are not complete yet is held back, bytes that are no UTF-8 become U+FFFD."""
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        at_start = self.has_dummy_prefix
        for token in ids:
            added = self.token_bytes[token]
            if at_start and added:
                added, at_start = added.removeprefix(b" "), False
            at_start = at_start or (token == self.bos_id and self.has_dummy_prefix)
            yield utf8.decode(added)
        yield utf8.decode(b"", final=True)

    def to_bin(self) -> bytes:
        """The content of llama2.c's tokenizer.bin: the longest length, then each token's score,
        length and bytes, little-endian; begin and end of text as \\n<s>\\n and \\n</s>\\n."""
        sp = self.processor
        special = {self.bos_id: "\n<s>\n", self.eos_id: "\n</s>\n"}
        pieces = [special.get(i, sp.id_to_piece(i)).replace("▁", " ").encode() for i in range(self.vocab_size)]
        tokens = (struct.pack("<fI", sp.get_score(i), len(piece)) + piece for i, piece in enumerate(pieces))
        return struct.pack("<I", max(map(len, pieces))) + b"".join(tokens)


def load_tokenizer(path: str) -> Tokenizer:
    """Read a tokenizer.model or tokenizer.bin, told apart by their content. Raises ValueError
    for a file that is neither, OSError for one that cannot be read."""
    with open(path, "rb") as file:
        content = file.read()
    pieces = parse_tokenizer_bin(content)
    try:
        proto = content if pieces is None else proto_from_pieces(pieces)
        if not sentencepiece_model_pb2.ModelProto.FromString(proto).pieces:
            raise ValueError("no pieces")
        tokenizer = Tokenizer(proto)
        tokenizer.hash  # noqa: B018  reads every piece, which must be text
    except (DecodeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: neither a SentencePiece model nor a tokenizer.bin") from error
    if tokenizer.bos_id < 0 or tokenizer.eos_id < 0:
        raise ValueError(f"{path}: this vocabulary has no begin and end of text, so it cannot mark documents")
    return tokenizer


def parse_tokenizer_bin(content: bytes) -> list[tuple[float, bytes]] | None:
    """The (score, piece) pairs of a tokenizer.bin, or None if that is not what content is."""
    pieces, position, longest = [], 4, 0
    while position + 8 <= len(content):
        score, length = struct.unpack_from("<fI", content, position)
        position += 8 + length
        longest = max(longest, length)
        pieces.append((score, content[position - length : position]))
    is_whole = position == len(content) and len(pieces) >= 3
    return pieces if is_whole and struct.unpack_from("<I", content)[0] >= longest else None


def proto_from_pieces(pieces: list[tuple[float, bytes]]) -> bytes:
    """A SentencePiece byte-pair model that encodes as llama2.c does with a tokenizer.bin."""
    model = sentencepiece_model_pb2.ModelProto()
    Piece = model.SentencePiece
    names = {UNKNOWN_ID: ("<unk>", Piece.UNKNOWN), BOS_ID: ("<s>", Piece.CONTROL), EOS_ID: ("</s>", Piece.CONTROL)}
    for i, (score, content) in enumerate(pieces):
        text = content.decode("utf-8").replace(" ", "▁")
        is_byte = re.fullmatch(r"<0x[0-9A-F]{2}>", text)
        piece, kind = names.get(i, (text, Piece.BYTE if is_byte else Piece.NORMAL))
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    model.trainer_spec.vocab_size = len(pieces)
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """The tokenizer.model of a byte-pair vocabulary learned from texts, Llama 2's way: unknown
    characters fall back to bytes, digits stand alone. Text is taken as it is (no normalization,
    no spaces removed), so that llama.cpp tokenizes the same. Raises ValueError, naming the
    largest vocabulary that works, where the texts are too few."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_lines(texts),
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
        raise ValueError(f"--vocab_size={vocab_size}: {explain_training_failure(str(error))}") from error
    return model.getvalue()


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of the texts; long ones in slices, cut between characters."""
    step = MAX_TRAINING_LINE // 4  # a character takes up to 4 bytes
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), step):
                yield line[start : start + step]


def explain_training_failure(message: str) -> str:
    if too_large := re.search(r"value <= (\d+)", message):
        return f"the text is too short for so many tokens; the largest that works is --vocab_size={too_large[1]}"
    if required := re.search(r"\d+ vs (\d+)", message):
        return f"the text has so many distinct characters that it takes at least --vocab_size={required[1]}"
    return "there is no text to learn from" if "sentences_.empty" in message else message
