import random
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

FOREIGN = (
    "Naïve façades – “quoted” … 日本語のテキスト、and 中文; Ελληνικά, Русский, العربية, हिन्दी. "
    "Flags 🇯🇵, a family 👩‍👩‍👧 and a llama 🦙!\tTabs\n\nand  several   spaces    , 1234567890 "
    "e\u0301 \u00a0 \u200b \ufeff {x: [1, 2]} <s> </s> <0x41> \\n \x00 \x7f"
)


def slices(text: str, count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    starts = [rng.randrange(len(text)) for _ in range(count)]
    return [text[start : start + rng.randrange(1, 200)] for start in starts]


@pytest.fixture(scope="session")
def texts(stories) -> list[str]:
    """Random slices of stories and of many scripts, and what is odd about spaces."""
    odd = ["", " ", "  ", "\n", " a", "  a", "a ", "\n a", "a", "\t", "日", "🦙", " 🦙"]
    return [*odd, *slices("\n".join(stories), 500, 1), *slices(FOREIGN * 3, 500, 2)]


@pytest.fixture(scope="session")
def tokenizer_bin(tokenizer, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("bin") / "tokenizer.bin"
    path.write_bytes(tokenizer.to_bin())
    return str(path)


def test_the_vocabulary_has_the_asked_size_and_llama_s_special_tokens(tokenizer):
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


def test_decoding_gives_the_text_back(tokenizer, texts):
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text, bos=True)) == text
        assert tokenizer.decode([*tokenizer.encode(text, bos=True), tokenizer.eos_id]) == text


def test_each_document_of_a_stream_begins_without_a_space(tokenizer):
    ids = tokenizer.encode("One.", bos=True) + tokenizer.encode("Two.", bos=True)
    assert tokenizer.decode(ids) == "One.Two."


def test_streamed_text_equals_the_whole_and_never_shows_half_a_character(tokenizer, texts):
    for text in texts:
        ids = tokenizer.encode(text, bos=True)
        pieces = list(tokenizer.decode_stream(iter(ids)))
        assert "".join(pieces) == text and len(pieces) == len(ids) + 1
        assert not any("\ufffd" in piece for piece in pieces)


def test_every_token_is_streamed_as_soon_as_it_is_drawn(tokenizer):
    def draw():
        for token in tokenizer.encode("Once upon"):
            drawn.append(token)
            yield token

    drawn = []
    stream = tokenizer.decode_stream(draw())
    for count in (1, 2):
        next(stream)
        assert len(drawn) == count


def test_bytes_that_are_no_utf8_become_replacement_characters(tokenizer):
    llama = [tokenizer.processor.piece_to_id(f"<0x{byte:02X}>") for byte in "🦙".encode()]
    assert tokenizer.decode(llama) == "🦙"
    assert tokenizer.decode(llama[:2]) == "\ufffd"
    assert tokenizer.decode([*llama[:2], *tokenizer.encode("x")]) == "\ufffd x"
    assert list(tokenizer.decode_stream(llama)) == ["", "", "", "🦙", ""]


def test_byte_counts_sum_to_the_length_of_the_text(tokenizer, texts):
    for text in filter(None, texts):
        assert tokenizer.byte_counts[tokenizer.encode(text, bos=True)].sum() == len(text.encode())
    together = [token for text in filter(None, texts) for token in tokenizer.encode(text, bos=True)]
    assert tokenizer.byte_counts[together].sum() == sum(len(text.encode()) for text in texts)
    assert tokenizer.byte_counts[tokenizer.eos_id] == 0


def test_byte_counts_of_a_vocabulary_that_puts_no_space_before_the_text(tokenizer):
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.content)
    model.normalizer_spec.add_dummy_prefix = False
    bare = SentencePieceTokenizer(model.SerializeToString())
    for text in ("Once upon a time", " a", "naïve 🦙"):
        ids = bare.encode(text, bos=True)
        assert bare.decode(ids) == text
        assert bare.byte_counts[ids].sum() == len(text.encode())


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


def test_tokenizer_bin_encodes_as_the_model_it_came_from(tokenizer, tokenizer_bin, texts):
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


def test_the_hash_of_another_vocabulary_is_another(tokenizer, stories):
    assert SentencePieceTokenizer(train_sentencepiece(stories[:200], 512)).hash != tokenizer.hash


def test_the_same_texts_give_the_same_vocabulary(tokenizer, stories):
    assert SentencePieceTokenizer(train_sentencepiece(stories, 512)).hash == tokenizer.hash


def test_digits_stand_alone_and_spaces_are_kept(stories):
    years = ["In 1984 there were 1984 of them   indented"] * 100
    tokenizer = SentencePieceTokenizer(train_sentencepiece([*stories, *years], 600))
    pieces = [tokenizer.processor.id_to_piece(token) for token in tokenizer.encode("in 1984")]
    assert pieces[-4:] == ["1", "9", "8", "4"]
    assert tokenizer.decode(tokenizer.encode("   a  b ")) == "   a  b "


def test_long_lines_are_learned_from_too():
    """SentencePiece leaves out lines above 4192 bytes: a text without line breaks would teach nothing."""
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
def test_a_small_corpus_is_told_the_largest_vocabulary_and_that_one_works(texts, asked):
    with pytest.raises(
        ValueError, match=rf"--vocab_size={asked}: .*too short.* --vocab_size=\d+$"
    ) as error:
        train_sentencepiece(texts, asked)
    largest = int(re.search(r"\d+$", str(error.value))[0])
    assert SentencePieceTokenizer(train_sentencepiece(texts, largest)).vocab_size == largest < asked
    with pytest.raises(ValueError):
        train_sentencepiece(texts, largest + 1)


def test_too_small_a_vocabulary_is_told_the_smallest_and_that_one_works():
    texts = ["".join(map(chr, range(0x4E00, 0x4E00 + 300)))]
    with pytest.raises(
        ValueError, match=r"--vocab_size=300: .*at least --vocab_size=\d+$"
    ) as error:
        train_sentencepiece(texts, 300)
    smallest = int(re.search(r"\d+$", str(error.value))[0])
    assert SentencePieceTokenizer(train_sentencepiece(texts, smallest)).vocab_size == smallest


@pytest.mark.parametrize("texts", [[], [""], ["\n\n"]])
def test_no_text_is_told(texts):
    with pytest.raises(ValueError, match="--vocab_size=512: there is no text to learn from"):
        train_sentencepiece(texts, 512)


def test_a_truncated_model_is_refused_wherever_it_ends(tokenizer, tmp_path):
    path = tmp_path / "cut.model"
    for length in range(0, len(tokenizer.content), 37):
        path.write_bytes(tokenizer.content[:length])
        with pytest.raises(ValueError, match=r"cut\.model: neither a SentencePiece model"):
            load_tokenizer(str(path))


def test_a_truncated_bin_is_refused_wherever_its_last_token_ends(tokenizer, tmp_path):
    content, path = tokenizer.to_bin(), tmp_path / "cut.bin"
    last_token = 8 + len(tokenizer.processor.id_to_piece(511).replace("▁", " ").encode())
    for missing in range(1, last_token):
        path.write_bytes(content[:-missing])
        with pytest.raises(ValueError, match=r"cut\.bin: neither"):
            load_tokenizer(str(path))


@pytest.mark.parametrize("kind", ["model", "bin"])
def test_a_damaged_file_never_does_worse_than_being_refused(tokenizer, tmp_path, kind):
    whole = tokenizer.content if kind == "model" else tokenizer.to_bin()
    rng, path, refused = random.Random(3), tmp_path / f"damaged.{kind}", 0
    for _ in range(200):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            damaged = load_tokenizer(str(path))
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)
        else:
            assert damaged.hash != tokenizer.hash or damaged.content != tokenizer.content
    assert refused > 50


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"\0" * 1000, b"Once upon a time\n" * 50, b"\x80\x02}q", b"PK\x03"]
)
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "other.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.model: "):
        load_tokenizer(str(path))


def test_a_missing_file_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_tokenizer(str(tmp_path / "missing.model"))


def test_a_vocabulary_without_a_begin_of_text_is_refused(tokenizer, tmp_path):
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.content)
    model.trainer_spec.bos_id = -1
    model.pieces[1].piece = "<other>"
    (tmp_path / "no_bos.model").write_bytes(model.SerializeToString())
    with pytest.raises(
        ValueError, match=r"no_bos\.model: this vocabulary has no begin and end of text"
    ):
        load_tokenizer(str(tmp_path / "no_bos.model"))


def test_llama2_c_s_own_tokenizer_bin_is_read_and_written_byte_for_byte(shared):
    path = shared("models/tok512.bin")
    with open(path, "rb") as file:
        content = file.read()
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == 512 and tokenizer.to_bin() == content
    text = "Once upon a time, there was a little girl named Lily. Naïve 🦙!"
    assert tokenizer.decode(tokenizer.encode(text, bos=True)) == text


def test_llama_2_s_tokenizer_model_survives_its_bin(shared, tmp_path, texts):
    tokenizer = load_tokenizer(shared("models/llama2_tokenizer.model"))
    assert tokenizer.vocab_size == 32000 and tokenizer.to_bin() == golden_bin(tokenizer.content)
    assert tokenizer.encode("Hello world", bos=True) == [1, 15043, 3186]
    (tmp_path / "tokenizer.bin").write_bytes(tokenizer.to_bin())
    from_bin = load_tokenizer(str(tmp_path / "tokenizer.bin"))
    assert from_bin.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert from_bin.hash == tokenizer.hash
    for text in filter(None, texts):
        assert tokenizer.byte_counts[tokenizer.encode(text, bos=True)].sum() == len(text.encode())
