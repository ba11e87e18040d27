import pytest

from textdata import llama3_tokenizer
from textdata.llama3_tokenizer import llama3_special_tokens, parse_ranks, split_long_runs
from textdata.tokenizer import Llama3Tokenizer, load_tokenizer

BYTES = [bytes([byte]) for byte in range(256)]
RANKS = [*BYTES, b"he", b"ll", b"hell", b"hello", b" w"]
TEXT = "hello world, naïve 🦙 <|eot_id|>"


@pytest.fixture(scope="module")
def llama3() -> Llama3Tokenizer:
    return Llama3Tokenizer(RANKS)


def test_text_is_encoded_by_rank_and_decoded(llama3):
    assert llama3.encode("hello w", bos=True) == [llama3.bos_id, 259, 260]
    assert llama3.decode(llama3.encode(TEXT, bos=True)) == TEXT
    assert llama3.encode_batch([TEXT, ""], num_threads=2) == [llama3.encode(TEXT), []]
    assert llama3.byte_counts[llama3.encode(TEXT, bos=True)].sum() == len(TEXT.encode())


def test_special_tokens_follow_the_ranks(llama3):
    assert llama3.vocab_size == len(RANKS) + 256
    assert llama3.bos_id == len(RANKS) and llama3.eos_id == len(RANKS) + 1
    assert llama3.special_id("<|eot_id|>") == len(RANKS) + 9
    assert llama3.special_id("<|reserved_special_token_0|>") == len(RANKS) + 2
    assert len(set(llama3_special_tokens())) == 256
    with pytest.raises(ValueError, match=r"this vocabulary has no <\|im_end\|>"):
        llama3.special_id("<|im_end|>")


def test_a_chat_ends_with_the_header_of_the_assistant(llama3):
    ids = llama3.encode_chat([("user", " hello ")])
    begin, end, eot = (
        llama3.special_id(f"<|{name}|>") for name in ("start_header_id", "end_header_id", "eot_id")
    )
    breaks = llama3.encode("\n\n")
    user = [begin, *llama3.encode("user"), end, *breaks, 259, eot]
    assistant = [begin, *llama3.encode("assistant"), end, *breaks]
    assert ids == [llama3.bos_id, *user, *assistant]


def test_the_file_of_ranks_round_trips(llama3, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(llama3.content)
    loaded = load_tokenizer(str(tmp_path / "tokenizer.model"))
    assert isinstance(loaded, Llama3Tokenizer) and loaded.ranks == RANKS
    assert loaded.hash == llama3.hash


def test_other_special_tokens_change_the_hash(llama3):
    custom = Llama3Tokenizer(RANKS, [*llama3.special[:-1], "<|im_end|>"])
    assert custom.has_custom_special_tokens and not llama3.has_custom_special_tokens
    assert custom.hash != llama3.hash and custom.content == llama3.content


@pytest.mark.parametrize(
    "ranks, reason",
    [
        ([*BYTES, b"a"], "a token occurs twice"),
        (BYTES[1:], "not every byte is a token"),
        ([*BYTES, b""], "not every byte is a token"),
    ],
)
def test_impossible_ranks_are_refused(ranks, reason):
    with pytest.raises(ValueError, match=reason):
        Llama3Tokenizer(ranks)


@pytest.mark.parametrize(
    "content, reason",
    [(b"YQ== 0\nYg== 2\n", "line 2 does not have rank 1"), (b"YQ== 0\nY 1\n", "line 2 is not a")],
)
def test_a_damaged_file_of_ranks_is_refused(content, reason):
    with pytest.raises(ValueError, match=reason):
        parse_ranks(content)


def test_long_runs_are_split(monkeypatch):
    """The encoder overflows its stack on very long runs."""
    monkeypatch.setattr(llama3_tokenizer, "MAX_RUN", 3)
    assert list(split_long_runs("ab abcdefg      x")) == ["ab abc", "def", "g   ", "   x"]


def test_tokenizer_bin_is_refused(llama3):
    with pytest.raises(ValueError, match=r"tokenizer\.bin cannot hold a Llama 3 vocabulary"):
        llama3.to_bin()
