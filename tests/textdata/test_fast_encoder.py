import io
import random

import numpy as np
import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from textdata import fast_encoder as words
from textdata.fast_encoder import Encoder, is_word_separable
from textdata.tokenizer import SentencePieceTokenizer, load_tokenizer

# Spaces side by side and at the ends, other white space, digits, the space's own sign, what looks
# like a control token, characters that no vocabulary has.
PARTS = [
    "a",
    "the",
    "dog",
    ".",
    "1",
    "23",
    " ",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "▁",
    "▁the",
    "é",
    "中",
    "😀",
    "<s>",
]
PARTS += ["\u00a0", "\u2028", "\x00", "n't", "Lily", chr(34)]


def odd_texts(count: int, seed=0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(PARTS, k=draw.randint(1, 30))) for _ in range(count)]


def encoded(tokenizer, texts: list[str], dtype="<u2") -> list[list[int]]:
    encoder = Encoder(tokenizer, np.dtype(dtype))
    once, twice = encoder.encode(texts), encoder.encode(texts)  # from the words remembered, too
    assert once == twice
    return [np.frombuffer(ids, dtype).tolist() for ids in once]


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_ids_are_sentencepieces_own(tokenizer, stories, dtype):
    assert is_word_separable(tokenizer)
    texts = stories + odd_texts(3000)
    assert encoded(tokenizer, texts, dtype) == tokenizer.processor.encode(texts)


@pytest.mark.parametrize("name", ["tok512.bin", "llama2_tokenizer.model"])
def test_with_real_vocabularies_too(shared, stories, name):
    tokenizer = load_tokenizer(shared(f"models/{name}"))
    assert is_word_separable(tokenizer)
    with open(shared("data/tinyshakespeare.txt"), encoding="utf-8") as file:
        play = file.read()
    texts = (
        [play[start : start + 500] for start in range(0, len(play), 500)]
        + stories
        + odd_texts(1000)
    )
    assert encoded(tokenizer, texts) == tokenizer.processor.encode(texts)


def learned(texts, **options) -> SentencePieceTokenizer:
    model = io.BytesIO()
    settings = dict(
        model_type="bpe", vocab_size=400, byte_fallback=True, normalization_rule_name="identity"
    )
    settings |= (
        dict(remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2)
        | options
    )
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
def test_a_vocabulary_whose_tokens_may_depend_on_more_than_a_word_is_left_to_sentencepiece(
    stories, options
):
    tokenizer = learned(stories, **options)
    assert not is_word_separable(tokenizer)
    texts = stories[:50] + odd_texts(300)
    assert encoded(tokenizer, texts) == tokenizer.processor.encode(texts)


@pytest.mark.parametrize("kind", [2, 3, 5], ids=["unknown", "control", "unused"])
def test_a_vocabulary_whose_space_is_no_token_is_left_to_sentencepiece(stories, kind):
    """Without it, unknown characters of neighbouring words are joined into one unknown token."""
    model = ModelProto.FromString(learned(stories, byte_fallback=False).content)
    space = next(piece for piece in model.pieces if piece.piece == "▁")
    space.type = kind
    if kind == 2:
        model.pieces[0].type = 1  # there may be one unknown token only
    tokenizer = SentencePieceTokenizer(model.SerializeToString())
    texts = ["é 中", "a é 中 b", *odd_texts(300)]
    assert not is_word_separable(tokenizer)
    assert encoded(tokenizer, texts) == tokenizer.processor.encode(texts)


def test_no_more_is_remembered_than_a_limit(tokenizer, stories, monkeypatch):
    monkeypatch.setattr(words, "MOST_WORDS", 20)
    monkeypatch.setattr(words, "LONGEST_WORD", 5)
    encoder = Encoder(tokenizer, np.dtype("<u2"))
    found = [np.frombuffer(ids, "<u2").tolist() for ids in encoder.encode(stories)]
    assert found == tokenizer.processor.encode(stories)
    assert len(encoder.words) == 20 and max(map(len, encoder.words)) <= 5
