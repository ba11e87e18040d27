import json
import random
import re

import pytest
from sentencepiece import sentencepiece_model_pb2

from textdata.tokenizer import SentencePieceTokenizer, load_tokenizer


def test_decoding_returns_the_text(tokenizer, texts):
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text, bos=True)) == text
        assert tokenizer.decode([*tokenizer.encode(text, bos=True), tokenizer.eos_id]) == text


def test_no_document_of_a_stream_begins_with_a_space(tokenizer):
    ids = tokenizer.encode("One.", bos=True) + tokenizer.encode("Two.", bos=True)
    assert tokenizer.decode(ids) == "One.Two."


def test_streamed_text_never_has_half_a_character(tokenizer, texts):
    for text in texts:
        ids = tokenizer.encode(text, bos=True)
        pieces = list(tokenizer.decode_stream(iter(ids)))
        assert "".join(pieces) == text and len(pieces) == len(ids) + 1
        assert not any("\ufffd" in piece for piece in pieces)


def test_every_token_is_streamed_immediately(tokenizer):
    def draw():
        for token in tokenizer.encode("Once upon"):
            drawn.append(token)
            yield token

    drawn = []
    stream = tokenizer.decode_stream(draw())
    for count in (1, 2):
        next(stream)
        assert len(drawn) == count


def test_invalid_utf8_becomes_replacement_characters(tokenizer):
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


def test_byte_counts_without_a_dummy_prefix(tokenizer):
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.content)
    model.normalizer_spec.add_dummy_prefix = False
    bare = SentencePieceTokenizer(model.SerializeToString())
    for text in ("Once upon a time", " a", "naïve 🦙"):
        ids = bare.encode(text, bos=True)
        assert bare.decode(ids) == text
        assert bare.byte_counts[ids].sum() == len(text.encode())


def test_a_truncated_model_is_refused_wherever_it_ends(tokenizer, tmp_path):
    path = tmp_path / "cut.model"
    for length in range(0, len(tokenizer.content), 37):
        path.write_bytes(tokenizer.content[:length])
        with pytest.raises(ValueError, match=r"cut\.model: neither a SentencePiece model"):
            load_tokenizer(str(path))


def test_a_truncated_bin_is_refused_wherever_its_last_token_ends(tokenizer, tmp_path):
    content = tokenizer.to_bin()
    path = tmp_path / "cut.bin"
    last_token = 8 + len(tokenizer.processor.id_to_piece(511).replace("▁", " ").encode())
    for missing in range(1, last_token):
        path.write_bytes(content[:-missing])
        with pytest.raises(ValueError, match=r"cut\.bin: neither"):
            load_tokenizer(str(path))


@pytest.mark.parametrize("suffix", ["model", "bin"])
def test_a_damaged_file_is_refused_or_another_vocabulary(tokenizer, tmp_path, suffix):
    whole = tokenizer.content if suffix == "model" else tokenizer.to_bin()
    rng = random.Random(3)
    path = tmp_path / f"damaged.{suffix}"
    refused = 0
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
def test_a_file_of_another_format_is_refused(tmp_path, content):
    path = tmp_path / "other.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.model: "):
        load_tokenizer(str(path))


@pytest.mark.parametrize(
    "merge, found",
    [
        ("a b c", "'a b c'"),
        ("ab", "'ab'"),
        (["a"], "a list of 1 item"),
        (["a", "b", "c"], "a list of 3 items"),
        ({"a": 0, "b": 1}, "a dict of 2 items"),
        (7, "7"),
    ],
)
def test_a_damaged_merge_of_a_tokenizer_json_is_named(tmp_path, merge, found):
    """The message was Python's: too many values to unpack (expected 2)."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "<s>": 3}, "merges": [merge]}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": model}))
    reason = f"{path}: a merge in it is {found}, not two tokens"
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        load_tokenizer(str(path))


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"{", "Expecting property name"),
        (b'{"model": {"vocab": {"a": 0', "Expecting "),
        (b'{"model": "\xff"}', "it is not UTF-8 text"),
    ],
)
def test_a_damaged_tokenizer_json_is_called_so(tmp_path, content, reason):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"tokenizer\.json: not a tokenizer\.json \({reason}"):
        load_tokenizer(str(path))


def test_a_folder_or_device_is_no_vocabulary(tmp_path):
    for path in (str(tmp_path), "/dev/zero"):
        with pytest.raises(ValueError, match=f"^{path}: not a file; name a tokenizer.model"):
            load_tokenizer(path)


def test_a_missing_file_raises_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_tokenizer(str(tmp_path / "missing.model"))


def test_a_vocabulary_without_bos_is_refused(tokenizer, tmp_path):
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.content)
    model.trainer_spec.bos_id = -1
    model.pieces[1].piece = "<other>"
    (tmp_path / "no_bos.model").write_bytes(model.SerializeToString())
    with pytest.raises(
        ValueError, match=r"no_bos\.model: this vocabulary has no BOS and EOS tokens"
    ):
        load_tokenizer(str(tmp_path / "no_bos.model"))
