import io
import random

import numpy as np
import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from textdata import fast_encoder
from textdata.fast_encoder import Encoder, is_word_separable
from textdata.tokenizer import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
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
    encoded = encoder.encode(texts)
    assert encoder.encode(texts) == encoded  # now from the cache
    return [np.frombuffer(ids, dtype).tolist() for ids in encoded]


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_token_ids_equal_those_of_sentencepiece(tokenizer, stories, dtype):
    assert is_word_separable(tokenizer)
    texts = stories + odd_texts(3000)
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
        + odd_texts(1000)
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
    texts = stories[:50] + odd_texts(300)
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
    texts = ["é 中", "a é 中 b", *odd_texts(300)]
    assert not is_word_separable(tokenizer)
    assert encode_texts(tokenizer, texts) == tokenizer.processor.encode(texts)


def test_the_word_cache_is_limited(tokenizer, stories, monkeypatch):
    monkeypatch.setattr(fast_encoder, "MAX_CACHED_WORDS", 20)
    monkeypatch.setattr(fast_encoder, "MAX_WORD_LENGTH", 5)
    encoder = Encoder(tokenizer, np.dtype("<u2"))
    ids = [np.frombuffer(content, "<u2").tolist() for content in encoder.encode(stories)]
    assert ids == tokenizer.processor.encode(stories)
    assert len(encoder.words) == 20 and max(map(len, encoder.words)) <= 5
