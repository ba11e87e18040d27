import io
import re

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from textdata.tokenizer import (
    BOS_ID,
    EOS_ID,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)


def test_the_vocabulary_has_its_size_and_llama_2_special_tokens(tokenizer):
    assert (
        (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
        == (512, BOS_ID, EOS_ID)
        == (512, 1, 2)
    )


def test_encoding_and_decoding_equal_sentencepiece(tokenizer, tokenizer_path, texts):
    reference = sentencepiece.SentencePieceProcessor(model_file=tokenizer_path)
    for text in texts:
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.encode(text, bos=True) == [reference.bos_id(), *ids]
        assert tokenizer.decode(ids) == reference.decode(ids)
    assert tokenizer.encode_batch(texts, num_threads=2) == reference.encode(texts)


def golden_bin(proto: bytes) -> bytes:
    """tokenizer.bin as llama2.c writes it, from the fields of the model itself."""
    names = {"<s>": b"\n<s>\n", "</s>": b"\n</s>\n"}
    tokens = []
    for piece in sentencepiece_model_pb2.ModelProto.FromString(proto).pieces:
        content = names.get(piece.piece, piece.piece.replace("\u2581", " ").encode("utf-8"))
        tokens.append((piece.score, content))
    longest = max(len(content) for _, content in tokens)
    scores = [np.array([score], "<f4").tobytes() for score, _ in tokens]
    packed = [
        score + len(text).to_bytes(4, "little") + text
        for score, (_, text) in zip(scores, tokens, strict=True)
    ]
    return longest.to_bytes(4, "little") + b"".join(packed)


def test_tokenizer_bin_has_the_golden_bytes(tokenizer):
    content = tokenizer.to_bin()
    assert content == golden_bin(tokenizer.content)
    begin = (
        b"\0\0\0\0"
        + b"\x05\0\0\0<unk>"
        + b"\0\0\0\0"
        + b"\x05\0\0\0\n<s>\n"
        + b"\0\0\0\0"
        + b"\x06\0\0\0\n</s>\n"
    )
    assert content[4:].startswith(begin + b"\0\0\0\0" + b"\x06\0\0\0<0x00>")
    second_merge = tokenizer.processor.id_to_piece(260).replace("▁", " ").encode()
    assert (
        b"\0\0\x80\xbf" + bytes([len(second_merge), 0, 0, 0]) + second_merge in content
    )  # its score is -1.0


def test_tokenizer_bin_encodes_as_its_model(tokenizer, tokenizer_bin, texts):
    from_bin = load_tokenizer(tokenizer_bin)
    assert from_bin.vocab_size == tokenizer.vocab_size
    assert from_bin.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert [from_bin.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts
    assert (from_bin.byte_counts == tokenizer.byte_counts).all()


def test_the_hash_is_the_same_from_model_and_bin(tokenizer, tokenizer_path, tokenizer_bin):
    assert load_tokenizer(tokenizer_bin).to_bin() == tokenizer.to_bin()
    assert (
        load_tokenizer(tokenizer_bin).hash == load_tokenizer(tokenizer_path).hash == tokenizer.hash
    )


def test_another_vocabulary_has_another_hash(tokenizer, stories):
    assert SentencePieceTokenizer(train_sentencepiece(stories[:200], 512)).hash != tokenizer.hash


def test_the_same_texts_give_the_same_vocabulary(tokenizer, stories):
    assert SentencePieceTokenizer(train_sentencepiece(stories, 512)).hash == tokenizer.hash


def test_digits_are_single_tokens_and_spaces_are_kept(stories):
    years = ["In 1984 there were 1984 of them   indented"] * 100
    tokenizer = SentencePieceTokenizer(train_sentencepiece([*stories, *years], 600))
    pieces = [tokenizer.processor.id_to_piece(token) for token in tokenizer.encode("in 1984")]
    assert pieces[-4:] == ["1", "9", "8", "4"]
    assert tokenizer.decode(tokenizer.encode("   a  b ")) == "   a  b "


def test_long_lines_are_used_for_training():
    """SentencePiece ignores lines above 4192 bytes, so also a text without line breaks."""
    line = " ".join(["a llama"] * 2000)
    tokenizer = SentencePieceTokenizer(train_sentencepiece([line], 270))
    assert tokenizer.processor.piece_to_id("▁llama") != tokenizer.processor.unk_id()


@pytest.mark.parametrize(
    "texts, asked",
    [
        (["hello world"], 4096),
        (["Once upon a time, there was a baby llama. It ate grass all day."] * 150, 4096),  # 10 KB
        (["日本語のテキスト" * 50, "and some English"], 1000),
    ],
)
def test_too_little_text_names_the_largest_vocabulary_that_works(texts, asked):
    with pytest.raises(
        ValueError, match=rf"--vocab_size={asked}: .*too short.* --vocab_size=\d+$"
    ) as error:
        train_sentencepiece(texts, asked)
    largest = int(re.search(r"\d+$", str(error.value))[0])
    assert SentencePieceTokenizer(train_sentencepiece(texts, largest)).vocab_size == largest < asked
    with pytest.raises(ValueError):
        train_sentencepiece(texts, largest + 1)


def test_too_many_characters_name_the_smallest_vocabulary_that_works():
    texts = ["".join(map(chr, range(0x4E00, 0x4E00 + 300)))]
    with pytest.raises(
        ValueError, match=r"--vocab_size=300: .*at least --vocab_size=\d+$"
    ) as error:
        train_sentencepiece(texts, 300)
    smallest = int(re.search(r"\d+$", str(error.value))[0])
    assert SentencePieceTokenizer(train_sentencepiece(texts, smallest)).vocab_size == smallest


@pytest.mark.parametrize("texts", [[], [""], ["\n\n"]])
def test_training_without_text_is_refused(texts):
    with pytest.raises(ValueError, match="--vocab_size=512: there is no text to learn from"):
        train_sentencepiece(texts, 512)


def test_the_tokenizer_bin_of_llama2_c_round_trips(shared):
    path = shared("models/tok512.bin")
    with open(path, "rb") as file:
        content = file.read()
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == 512 and tokenizer.to_bin() == content
    text = "Once upon a time, there was a little girl named Lily. Naïve 🦙!"
    assert tokenizer.decode(tokenizer.encode(text, bos=True)) == text


def test_the_tokenizer_model_of_llama_2_round_trips_as_bin(shared, tmp_path, texts):
    tokenizer = load_tokenizer(shared("models/llama2_tokenizer.model"))
    assert tokenizer.vocab_size == 32000 and tokenizer.to_bin() == golden_bin(tokenizer.content)
    assert tokenizer.encode("Hello world", bos=True) == [1, 15043, 3186]
    (tmp_path / "tokenizer.bin").write_bytes(tokenizer.to_bin())
    from_bin = load_tokenizer(str(tmp_path / "tokenizer.bin"))
    assert from_bin.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert from_bin.hash == tokenizer.hash
    for text in filter(None, texts):
        assert tokenizer.byte_counts[tokenizer.encode(text, bos=True)].sum() == len(text.encode())


def test_a_normalizer_may_delete_a_letter(tmp_path, stories):
    """A vocabulary whose normalizer deletes "a" ended in an IndexError."""
    (tmp_path / "rules.tsv").write_text("61\t\n")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(stories),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_tsv=str(tmp_path / "rules.tsv"),
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(model.getvalue())
    assert tokenizer.encode("a") == [] and tokenizer.has_dummy_prefix
    assert tokenizer.decode(tokenizer.encode("banana")) == "bnn"
