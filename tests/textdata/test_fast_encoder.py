import io
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import pre_tokenizers

from tests.helpers import small_llama3_tokenizer
from tests.hf_folders import byte_level, metaspace
from tests.processes import ROOT
from textdata import fast_encoder
from textdata.corpus import DocumentChunk
from textdata.fast_encoder import Encoder, is_word_separable, split_chunk
from textdata.tokenizer import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
)

# Adjacent spaces, other whitespace, digits, the sign for a space, text that looks like a control
# token and characters that no vocabulary has.
# fmt: off
PARTS = [
    "a", "the", "dog", ".", "1", "23", " ", " ", "  ", "\n", "\n\n", "\t", "▁", "▁the", "é", "中",
    "😀", "<s>", "\u00a0", "\u2028", "\x00", "n't", "Lily", chr(34),
]
# fmt: on


def odd_texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(PARTS, k=draw.randint(1, 30))) for _ in range(count)]


def encode_texts(tokenizer, texts: list[str], dtype="<u2") -> list[list[int]]:
    encoder = Encoder(tokenizer, np.dtype(dtype))
    chunks = [DocumentChunk(text, True) for text in texts]
    encoded = encoder.encode(chunks)
    assert encoder.encode(chunks) == encoded  # now from the cache
    return [np.frombuffer(ids, dtype).tolist() for ids in encoded]


def encode_in_parts(tokenizer, parts: list[str], threads: int = 1) -> list[int]:
    """The token ids of a document that was split into these parts."""
    chunks = [DocumentChunk(part, number == 0) for number, part in enumerate(parts)]
    encoded = Encoder(tokenizer, np.dtype("<u4")).encode(chunks, threads)
    return np.frombuffer(b"".join(encoded), "<u4").tolist()


def without_space_signs(texts: list[str]) -> list[str]:
    """The texts that SentencePiece does not change."""
    return [text for text in texts if "▁" not in text]


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_token_ids_equal_those_of_sentencepiece(tokenizer, stories, dtype):
    assert is_word_separable(tokenizer)
    texts = stories + without_space_signs(odd_texts(3000))
    assert encode_texts(tokenizer, texts, dtype) == tokenizer.processor.encode(texts)


@pytest.mark.parametrize("name", ["tok512.bin", "llama2_tokenizer.model"])
def test_token_ids_of_real_vocabularies_equal_those_of_sentencepiece(shared, stories, name):
    tokenizer = load_tokenizer(shared(f"models/{name}"))
    assert is_word_separable(tokenizer)
    with open(shared("data/tinyshakespeare.txt"), encoding="utf-8") as file:
        play = file.read()
    texts = (
        [play[start : start + 500] for start in range(0, len(play), 500)]
        + stories
        + without_space_signs(odd_texts(1000))
    )
    assert encode_texts(tokenizer, texts) == tokenizer.processor.encode(texts)


def train(texts, **options) -> SentencePieceTokenizer:
    """A vocabulary like that of train_sentencepiece, but for the options."""
    model = io.BytesIO()
    settings = dict(
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    settings |= options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **settings
    )
    return SentencePieceTokenizer(model.getvalue())


@pytest.mark.parametrize(
    "options",
    [
        dict(split_by_whitespace=False, vocab_size=1000),
        dict(user_defined_symbols=["once upon"]),
        dict(model_type="unigram", vocab_size=350),
        dict(normalization_rule_name="nmt_nfkc"),
        dict(remove_extra_whitespaces=True),
        dict(add_dummy_prefix=False),
        dict(treat_whitespace_as_suffix=True),
    ],
    ids=lambda options: next(iter(options)),
)
def test_vocabularies_with_tokens_across_words_use_sentencepiece(stories, options):
    tokenizer = train(stories, **options)
    assert not is_word_separable(tokenizer)
    texts = stories[:50] + without_space_signs(odd_texts(300))
    assert encode_texts(tokenizer, texts) == tokenizer.processor.encode(texts)


@pytest.mark.parametrize("space_type", [UNKNOWN, CONTROL, UNUSED])
def test_a_vocabulary_without_a_space_token_uses_sentencepiece(stories, space_type):
    """Without it, unknown characters of neighboring words become one unknown token."""
    model = ModelProto.FromString(train(stories, byte_fallback=False).content)
    space = next(piece for piece in model.pieces if piece.piece == "▁")
    space.type = space_type
    if space_type == UNKNOWN:
        model.pieces[0].type = NORMAL  # there may be one unknown token only
    tokenizer = SentencePieceTokenizer(model.SerializeToString())
    texts = ["é 中", "a é 中 b", *without_space_signs(odd_texts(300))]
    assert not is_word_separable(tokenizer)
    assert encode_texts(tokenizer, texts) == tokenizer.processor.encode(texts)


def test_the_word_cache_is_limited(tokenizer, stories, monkeypatch):
    monkeypatch.setattr(fast_encoder, "MAX_CACHED_WORDS", 20)
    monkeypatch.setattr(fast_encoder, "MAX_WORD_LENGTH", 5)
    encoder = Encoder(tokenizer, np.dtype("<u2"))
    encoded = encoder.encode([DocumentChunk(story, True) for story in stories])
    ids = [np.frombuffer(content, "<u2").tolist() for content in encoded]
    assert ids == tokenizer.processor.encode(stories)
    assert len(encoder.words) == 20 and max(map(len, encoder.words)) <= 5


def test_the_sign_for_a_space_is_kept_as_text(tokenizer):
    """SentencePiece reads U+2581 as a space, so the corpus lost it without a word."""
    texts = [text for text in odd_texts(2000) if "▁" in text]
    texts += ["▁", "▁▁", " ▁", "▁ ", "a▁b", "a ▁ b", "▁the end▁", "▁" * 50]
    assert [tokenizer.decode(ids) for ids in encode_texts(tokenizer, texts)] == texts


@pytest.mark.parametrize("options", [dict(model_type="unigram", vocab_size=350), dict()])
def test_the_sign_for_a_space_takes_its_three_bytes(stories, options):
    tokenizer = train(stories, **options)
    (ids,) = encode_texts(tokenizer, ["the▁dog"])
    assert [tokenizer.processor.id_to_piece(token) for token in ids if token < 259] == [
        "<0xE2>",
        "<0x96>",
        "<0x81>",
    ]
    assert tokenizer.decode(ids) == "the▁dog"


def test_without_bytes_the_sign_for_a_space_is_unknown(stories):
    """It is then as any other character that is not in the vocabulary."""
    tokenizer = train(stories, byte_fallback=False)
    (ids,) = encode_texts(tokenizer, ["the▁dog"])
    assert tokenizer.decode(ids) == "the ⁇ dog"


def test_a_prompt_gets_the_tokens_of_the_shards(tokenizer, stories):
    """Prompts and scored texts read U+2581 as a space, and shards did not."""
    texts = [text for text in odd_texts(2000) if "▁" in text]
    for encoder in (tokenizer, train(stories, add_dummy_prefix=False)):
        ids = [encoder.encode(text) for text in texts]
        assert [encoder.decode(tokens) for tokens in ids] == texts
        assert encoder.encode_batch(texts, 2) == encode_texts(encoder, texts) == ids
        assert encoder.encode_prompt("a▁b") == [encoder.bos_id, *encoder.encode("a▁b")]


# What puts a space before a text, or removes one, in a tokenizer.json.
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
STRIP = {"type": "Strip", "strip_left": True, "strip_right": True}
NFC = {"type": "NFC"}
PREFIXES = {
    "prepend": ([PREPEND, REPLACE], None),
    "prepend alone": ([PREPEND], METASPACE | {"prepend_scheme": "never"}),
    "strip": ([STRIP, PREPEND, REPLACE], None),
    "always": ([NFC], METASPACE | {"prepend_scheme": "always"}),
    "first": ([NFC], METASPACE | {"prepend_scheme": "first", "split": True}),
    "older": ([], {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}),
    "nested": (
        [{"type": "Sequence", "normalizers": [PREPEND]}, REPLACE],
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}]},
    ),
}


def tokenizer_with_prefix(texts, normalizers, pre_tokenizer) -> HuggingFaceTokenizer:
    """A tokenizer.json with ▁ for a space and these steps. U+2581 is not in its texts."""
    description = json.loads(metaspace(texts).to_str())
    description["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    description["pre_tokenizer"] = pre_tokenizer
    return HuggingFaceTokenizer(description, "<s>", "</s>")


@pytest.mark.parametrize("name", PREFIXES)
@pytest.mark.parametrize("cut", [1, 9, 13, 24, 27])  # a first part ends with a word
def test_a_tokenizer_json_adds_no_space_to_parts(stories, name, cut):
    """Every part of a long document got a space."""
    tokenizer = tokenizer_with_prefix(stories, *PREFIXES[name])
    text = LONG_TEXT.replace("▁", "")
    parts = [text[:cut], text[cut : cut + 7], text[cut + 7 :].rstrip()]
    assert tokenizer.decode(encode_in_parts(tokenizer, parts, 2)) == "".join(parts)


def test_a_byte_level_prefix_is_only_before_the_document(stories):
    """A text in parts has the bytes of the text as a whole."""
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=True)]
    backend = byte_level(stories, steps)
    tokenizer = HuggingFaceTokenizer(json.loads(backend.to_str()), "<|endoftext|>", "<|endoftext|>")
    ids = encode_in_parts(tokenizer, ["one two", " three", "four"])
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode("one two threefour"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are listed on Linux")
def test_a_batch_uses_the_given_number_of_threads(stories, monkeypatch, tmp_path):
    """Each worker process used as many threads as the machine has cores."""
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    path = tmp_path / "tokenizer.json"
    path.write_text(metaspace(stories).to_str())
    code = (
        "import json, os, sys\n"
        "from textdata.hf_tokenizer import HuggingFaceTokenizer\n"
        "tokenizer = HuggingFaceTokenizer(json.load(open(sys.argv[1])), '<s>', '</s>')\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "tokenizer.encode_batch(['one two'] * 100, 7)\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout == "7\n"


def test_parts_of_a_normalizing_vocabulary_keep_their_spaces(stories):
    """A vocabulary that removes extra spaces would remove the first one of a part."""
    tokenizer = train(stories, remove_extra_whitespaces=True)
    ids = encode_in_parts(tokenizer, ["one two", " three", " four"])
    assert tokenizer.decode(ids) == "one two three four"


LONG_TEXT = "Tom saw a big  red ball,\n and\n\nit was\t▁ happy. 日本語のテキスト " * 20


@pytest.mark.parametrize("cut", [1, 8, 9, 13, 14, 15, 24, 25, 26, 40, 41, 42, 43, 47, 52, 500])
@pytest.mark.parametrize("name", ["bpe", "no prefix", "unigram", "llama3"])
def test_a_document_in_parts_keeps_its_text(tokenizer, stories, name, cut):
    """A later part got a space of its own, or lost its first space."""
    tokenizer = {
        "bpe": lambda: tokenizer,
        "no prefix": lambda: train(stories, add_dummy_prefix=False),
        "unigram": lambda: train(stories, model_type="unigram", vocab_size=350),
        "llama3": small_llama3_tokenizer,
    }[name]()
    ids = encode_in_parts(
        tokenizer, [LONG_TEXT[:cut], LONG_TEXT[cut : cut + 7], LONG_TEXT[cut + 7 :]]
    )
    assert tokenizer.decode(ids) == LONG_TEXT


@pytest.mark.parametrize("size", [1, 10, 100])
def test_the_size_of_the_parts_makes_no_difference(tokenizer, monkeypatch, size):
    text = LONG_TEXT.replace("▁", "")
    monkeypatch.setattr(fast_encoder, "SEPARABLE_PART", size)
    assert encode_texts(tokenizer, [text]) == [tokenizer.encode(text)]


def test_a_text_without_spaces_is_encoded_in_bounded_parts(tokenizer, monkeypatch):
    """One line of 300 MB went to SentencePiece as one word."""
    monkeypatch.setattr(fast_encoder, "SEPARABLE_PART", 50)
    monkeypatch.setattr(fast_encoder, "MAX_PART", 100)
    chunk = DocumentChunk("日本語" * 100 + " the end", True)
    parts = list(split_chunk(chunk, 50))
    assert max(len(part.text) for part in parts) <= 100
    assert "".join(part.text for part in parts) == chunk.text
    assert tokenizer.decode(encode_in_parts(tokenizer, [chunk.text])) == chunk.text
