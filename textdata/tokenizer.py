"""
Tokenizers: the interface, SentencePiece's (Llama 2, llama2.c and new vocabularies), Llama 3's and
Hugging Face's, and load_tokenizer, which reads any of them from a file.
"""

import os
import stat
from typing import TypeVar

from google.protobuf.message import DecodeError

from runtime.lfs import require_content
from textdata.base_tokenizer import Tokenizer
from textdata.hf_tokenizer import HuggingFaceTokenizer
from textdata.llama3_tokenizer import LLAMA3_PATTERN, Llama3Tokenizer, parse_ranks
from textdata.sentencepiece_tokenizer import (
    BOS_ID,
    BYTE,
    CONTROL,
    EOS_ID,
    NORMAL,
    UNKNOWN,
    UNKNOWN_ID,
    UNUSED,
    USER_DEFINED,
    Piece,
    SentencePieceTokenizer,
    parse_sentencepiece,
    proto_from_pieces,
    train_sentencepiece,
)
from textdata.tokenizer_json import parse_tokenizer_json

__all__ = [
    "BOS_ID",
    "BYTE",
    "CONTROL",
    "EOS_ID",
    "LLAMA3_PATTERN",
    "NORMAL",
    "UNKNOWN",
    "UNKNOWN_ID",
    "UNUSED",
    "USER_DEFINED",
    "HuggingFaceTokenizer",
    "Llama3Tokenizer",
    "Piece",
    "SentencePieceTokenizer",
    "Tokenizer",
    "find_tokenizer_file",
    "load_folder_tokenizer",
    "load_tokenizer",
    "proto_from_pieces",
    "require_bos_eos",
    "train_sentencepiece",
]

MAX_FILE_SIZE = 1 << 28  # bytes
# Names of a tokenizer's file; where a folder has several, the first counts.
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer.bin")

AnyTokenizer = TypeVar("AnyTokenizer", bound=Tokenizer)


def load_tokenizer(path: str) -> Tokenizer:
    """Read a tokenizer.model (SentencePiece's or Llama 3's), a tokenizer.bin or a tokenizer.json.
    The format is detected from the content. Raises ValueError for another file, OSError if reading
    fails."""
    content = read_vocabulary(path)
    try:
        if content.lstrip().startswith(b"{"):
            return parse_tokenizer_json(content, os.path.dirname(path))
        return require_bos_eos(parse_tokenizer(content))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_vocabulary(path: str) -> bytes:
    """The content of a tokenizer's file. Raises ValueError if it is not a file, is too large or is
    a pointer of Git LFS; OSError if reading fails."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # reading a device may never end
        raise ValueError(
            f"{path}: not a file; name a tokenizer.model, tokenizer.bin or tokenizer.json"
        )
    if status.st_size > MAX_FILE_SIZE:
        raise ValueError(f"{path}: too large for a vocabulary")
    require_content(path)
    with open(path, "rb") as file:
        return file.read()


def find_tokenizer_file(folder: str) -> str | None:
    """The path of the tokenizer in a folder, None if there is none."""
    paths = [os.path.join(folder, name) for name in TOKENIZER_FILES]
    return next(filter(os.path.isfile, paths), None)


def load_folder_tokenizer(folder: str) -> Tokenizer:
    """Load the tokenizer of a folder of tokens. Raises ValueError or OSError as load_tokenizer."""
    path = find_tokenizer_file(folder)
    return load_tokenizer(path or os.path.join(folder, TOKENIZER_FILES[0]))


def parse_tokenizer(content: bytes) -> Tokenizer:
    """The tokenizer of the content of a tokenizer.model or a tokenizer.bin. Raises ValueError for
    anything else."""
    try:
        ranks = parse_ranks(content)
        return parse_sentencepiece(content) if ranks is None else Llama3Tokenizer(ranks)
    except (DecodeError, RuntimeError, ValueError) as error:
        raise ValueError(
            "neither a SentencePiece model, nor a tokenizer.bin, nor Llama 3's ranks, nor a "
            "tokenizer.json"
        ) from error


def require_bos_eos(tokenizer: AnyTokenizer) -> AnyTokenizer:
    """The tokenizer. Raises ValueError if it has no BOS or no EOS token."""
    if tokenizer.bos_id < 0 or tokenizer.eos_id < 0:
        raise ValueError("this vocabulary has no BOS and EOS tokens, so it cannot mark documents")
    return tokenizer
