"""
Text to token ids and back. SentencePieceTokenizer: a vocabulary of our own, Llama 2's
tokenizer.model, or llama2.c's tokenizer.bin. Llama3Tokenizer: Llama 3's ranks, with its special
tokens and chat format.

The identity of a vocabulary in data and checkpoints is its hash: of tokenizer.bin, which holds the
pieces and scores, all that a byte-pair encoder needs; or of the ranks.
"""

import base64
import binascii
import codecs
import functools
import hashlib
import io
import itertools
import os
import re
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import sentencepiece
import tiktoken
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

UNKNOWN_ID, BOS_ID, EOS_ID = 0, 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(
    1, 7
)  # kinds of pieces, as SentencePiece has them
LARGEST_FILE = 1 << 28  # bytes of a vocabulary
MAX_TRAINING_LINE = 4096  # bytes; SentencePiece leaves out longer lines, so we cut them


class Tokenizer:
    """What all vocabularies share. content is what a tokenizer.model file of theirs holds; bos_id
    and eos_id begin and end a text; stop_ids end a generated one."""

    content: bytes
    vocab_size: int
    bos_id: int
    eos_id: int
    stop_ids: frozenset[int]
    has_dummy_prefix = False  # whether a space is put before each text
    token_bytes: list[bytes]  # what each token adds to the text; nothing for control tokens
    hash: str

    @functools.cached_property
    def byte_counts(self) -> np.ndarray:
        """Bytes of text behind each token id (V,), so that they sum to the length of the text.
        A beginning of text counts -1 for the space that is put before the text."""
        counts = np.array([len(token) for token in self.token_bytes], dtype=np.int64)
        counts[self.bos_id] = -1 if self.has_dummy_prefix else 0
        return counts

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


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. content is that of a tokenizer.model file, a protocol buffer."""

    def __init__(self, content: bytes):
        self.content = content
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.vocab_size = self.processor.vocab_size()
        self.bos_id = self.processor.bos_id()
        self.eos_id = self.processor.eos_id()
        self.stop_ids = frozenset({self.bos_id, self.eos_id})
        # SentencePiece puts a space before each text, so that a first word is spelled like any other.
        self.has_dummy_prefix = self.processor.id_to_piece(
            self.processor.encode("a")[0]
        ).startswith("▁")

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
    def pieces(self) -> list[tuple[str, float, int]]:
        """Every token's piece, with ▁ for a space, its score and its kind."""
        pieces = sentencepiece_model_pb2.ModelProto.FromString(self.content).pieces
        return [(piece.piece, piece.score, piece.type) for piece in pieces]

    @functools.cached_property
    def normalizes(self) -> bool:
        """Whether it normalizes a text before it cuts it into tokens: other programs do not."""
        normalizer = sentencepiece_model_pb2.ModelProto.FromString(self.content).normalizer_spec
        return bool(normalizer.precompiled_charsmap) or normalizer.remove_extra_whitespaces

    @functools.cached_property
    def is_bpe(self) -> bool:
        trainer = sentencepiece_model_pb2.ModelProto.FromString(self.content).trainer_spec
        return trainer.model_type == sentencepiece_model_pb2.TrainerSpec.BPE

    @functools.cached_property
    def hash(self) -> str:
        further = (
            b"" if self.has_dummy_prefix else b"no prefix"
        )  # what tokenizer.bin takes for granted
        return hashlib.sha256(
            self.pieces_as_bin() + further + (b"" if self.is_bpe else b"no BPE")
        ).hexdigest()

    def encode(self, text: str, bos: bool = False) -> list[int]:
        return [self.bos_id] * bos + self.processor.encode(text)

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[list[int]]:
        return self.processor.encode(texts, num_threads=num_threads)

    def to_bin(self) -> bytes:
        """The content of llama2.c's tokenizer.bin. Raises ValueError for a vocabulary that its readers
        would take for another."""
        if not self.is_bpe:
            raise ValueError(
                "tokenizer.bin is read as byte-pair encoding, and this vocabulary is of another kind"
            )
        if not self.has_dummy_prefix or (self.bos_id, self.eos_id) != (BOS_ID, EOS_ID):
            raise ValueError(
                "tokenizer.bin's readers begin a text with a space and with token 1, and end it with 2"
            )
        return self.pieces_as_bin()

    def pieces_as_bin(self) -> bytes:
        """The longest length, then each token's score, length and bytes, little-endian; begin and end
        of text as \\n<s>\\n and \\n</s>\\n."""
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


# How Llama 3 cuts a text into words before it looks for tokens in them.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_NUM_SPECIAL = 256
LLAMA3_NAMED_SPECIAL = {  # places after the last rank; all other special tokens are reserved
    **{
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        4: "<|finetune_right_pad_id|>",
        6: "<|start_header_id|>",
    },
    **{7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>"},
}
LLAMA3_LONGEST_RUN = 25_000  # the encoder's time and stack grow with the square of an unbroken run


def llama3_special_tokens() -> list[str]:
    numbers = itertools.count()
    named = LLAMA3_NAMED_SPECIAL
    return [
        named.get(i) or f"<|reserved_special_token_{next(numbers)}|>"
        for i in range(LLAMA3_NUM_SPECIAL)
    ]


class Llama3Tokenizer(Tokenizer):
    """Byte-pair encoding by rank, as tiktoken does it. ranks: the bytes of each token in the order
    of their ids, every single byte among them; special: the names of the tokens that follow.
    Raises ValueError where that is not so."""

    def __init__(self, ranks: list[bytes], special: list[str] | None = None):
        special = llama3_special_tokens() if special is None else special
        by_bytes = {token: rank for rank, token in enumerate(ranks)}
        by_name = {name: len(ranks) + i for i, name in enumerate(special)}
        if len(by_bytes) < len(ranks) or len(by_name) < len(special):
            raise ValueError("a token is there twice")
        if not all(bytes([byte]) in by_bytes for byte in range(256)) or b"" in by_bytes:
            raise ValueError("not every byte is a token")
        if not {"<|begin_of_text|>", "<|end_of_text|>"} <= by_name.keys():
            raise ValueError("no <|begin_of_text|> and <|end_of_text|>")
        self.ranks, self.special = ranks, special
        self.encoding = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=by_bytes, special_tokens=by_name
        )
        self.vocab_size = len(ranks) + len(special)
        self.bos_id, self.eos_id = by_name["<|begin_of_text|>"], by_name["<|end_of_text|>"]
        stops = ("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
        self.stop_ids = frozenset(by_name[name] for name in stops if name in by_name)

    @property
    def has_custom_special_tokens(self) -> bool:
        """Whether it has other special tokens than Llama 3, of which content says nothing."""
        return self.special != llama3_special_tokens()

    @functools.cached_property
    def content(self) -> bytes:
        """A line for each rank: the token in base 64, and its number."""
        return b"".join(
            base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(self.ranks)
        )

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        return self.ranks + [b""] * len(self.special)

    @functools.cached_property
    def hash(self) -> str:
        return hashlib.sha256(
            self.content + repr(self.special).encode() * self.has_custom_special_tokens
        ).hexdigest()

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """The ids of the text. The name of a special token in it is text like any other."""
        ids = [self.bos_id] * bos
        for part in split_long_runs(text):
            ids += self.encoding.encode_ordinary(part)
        return ids

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[list[int]]:
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(self.encode, texts))

    def encode_chat(self, messages: list[tuple[str, str]]) -> list[int]:
        """The ids of a dialogue of (role, text), role being system, user or assistant, up to where
        the assistant's answer begins (Llama 3's model card, "prompt format")."""
        ids = [self.bos_id]
        for role, text in messages:
            ids += [*self.header(role), *self.encode(text.strip()), self.special_id("<|eot_id|>")]
        return ids + self.header("assistant")

    def header(self, role: str) -> list[int]:
        return [
            *(
                self.special_id("<|start_header_id|>"),
                *self.encode(role),
                self.special_id("<|end_header_id|>"),
            ),
            *self.encode("\n\n"),
        ]

    def special_id(self, name: str) -> int:
        """The id of a special token. Raises ValueError where the vocabulary has none of that name."""
        if name not in self.special:
            raise ValueError(f"this vocabulary has no {name}")
        return len(self.ranks) + self.special.index(name)

    def to_bin(self) -> bytes:
        raise ValueError(
            "tokenizer.bin has no place for a Llama 3 vocabulary; use --format=hf or gguf"
        )


def split_long_runs(text: str) -> Iterator[str]:
    """The text in parts, so that in none of them more than LLAMA3_LONGEST_RUN characters follow
    each other all blank or all not blank. Meta's code cuts at the same places."""
    start, run = 0, re.compile(r"\s+|\S+")
    for match in run.finditer(text):
        for cut in range(match.start() + LLAMA3_LONGEST_RUN, match.end(), LLAMA3_LONGEST_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]


def load_tokenizer(path: str) -> Tokenizer:
    """Read a tokenizer.model or tokenizer.bin, told apart by their content. Raises ValueError
    for a file that is neither, OSError for one that cannot be read."""
    if os.path.exists(path) and not os.path.isfile(
        path
    ):  # a folder; or a device, which would never end
        raise ValueError(f"{path}: not a file; name a tokenizer.model or tokenizer.bin")
    if os.path.exists(path) and os.path.getsize(path) > LARGEST_FILE:
        raise ValueError(f"{path}: too large for a vocabulary")
    with open(path, "rb") as file:
        content = file.read()
    try:
        ranks = parse_ranks(content)
        tokenizer = tokenizer_from(content) if ranks is None else Llama3Tokenizer(ranks)
    except (DecodeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path}: neither a SentencePiece model, nor a tokenizer.bin, nor Llama 3's ranks"
        ) from error
    try:
        return require_bos_eos(tokenizer)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def require_bos_eos(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer. Raises ValueError where it has no tokens to begin and end a text."""
    if tokenizer.bos_id < 0 or tokenizer.eos_id < 0:
        raise ValueError(
            "this vocabulary has no begin and end of text, so it cannot mark documents"
        )
    return tokenizer


def tokenizer_from(content: bytes) -> SentencePieceTokenizer:
    """The SentencePiece tokenizer of a tokenizer.model's or a tokenizer.bin's content."""
    bin_pieces = parse_tokenizer_bin(content)
    content = content if bin_pieces is None else proto_from_bin(bin_pieces)
    if not sentencepiece_model_pb2.ModelProto.FromString(content).pieces:
        raise ValueError("no pieces")
    tokenizer = SentencePieceTokenizer(content)
    tokenizer.hash  # noqa: B018  reads every piece, which must be text
    return tokenizer


def parse_ranks(content: bytes) -> list[bytes] | None:
    """The tokens of a tiktoken file by rank, or None if that is not what content is. Raises
    ValueError for one whose ranks are not 0, 1, 2, ..."""
    if not re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
        return None
    tokens = []
    for number, line in enumerate(content.splitlines()):
        token, _, rank = line.partition(b" ")
        try:
            tokens.append(base64.b64decode(token, validate=True))
        except binascii.Error as error:
            raise ValueError(f"line {number + 1} is not a token in base 64") from error
        if rank != b"%d" % number:
            raise ValueError(f"line {number + 1} has not rank {number}")
    return tokens


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


def proto_from_bin(bin_pieces: list[tuple[float, bytes]]) -> bytes:
    """A SentencePiece byte-pair model that encodes as llama2.c does with a tokenizer.bin."""
    pieces, names = (
        [],
        {UNKNOWN_ID: ("<unk>", UNKNOWN), BOS_ID: ("<s>", CONTROL), EOS_ID: ("</s>", CONTROL)},
    )
    for i, (score, content) in enumerate(bin_pieces):
        text = content.decode("utf-8").replace(" ", "▁")
        piece, kind = names.get(
            i, (text, BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", text) else NORMAL)
        )
        pieces.append((piece, score, kind))
    return proto_from_pieces(pieces)


def proto_from_pieces(
    pieces: list[tuple[str, float, int]],
    bos: str = "<s>",
    eos: str = "</s>",
    has_dummy_prefix: bool = True,
) -> bytes:
    """The tokenizer.model of a byte-pair vocabulary that takes text as it is, from each token's
    piece, score and kind, and the pieces that begin and end a text."""
    model = sentencepiece_model_pb2.ModelProto()
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    model.trainer_spec.vocab_size = len(pieces)
    model.trainer_spec.byte_fallback = any(kind == BYTE for _, _, kind in pieces)
    model.trainer_spec.bos_piece, model.trainer_spec.eos_piece = bos, eos
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = has_dummy_prefix
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
        raise ValueError(
            f"--vocab_size={vocab_size}: {explain_training_failure(str(error))}"
        ) from error
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
