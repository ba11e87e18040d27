import itertools

import pytest

from generation.streaming import TextStream, generate, request_index
from textdata.tokenizer import Tokenizer


def truncate_at_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """By definition: up to the stop string that is complete first; of several, the longest."""
    for end in range(len(text) + 1):
        if starts := [end - len(stop) for stop in stops if text[:end].endswith(stop)]:
            return text[: min(starts)], True
    return text, False


class ListTokenizer(Tokenizer):
    """A vocabulary of these strings. Every prompt is the first one."""

    def __init__(self, texts):
        self.token_bytes = [text.encode() for text in texts]
        self.bos_id = None

    def encode(self, text, bos):
        return [0]


def stream_tokens(texts, stops):
    """All text that a stream emits for these tokens, and whether it ended before the last."""
    stream = TextStream(ListTokenizer(["", *texts]), [0], stop_strings=stops)
    emitted = ""
    for token in [*range(1, len(texts) + 1), None]:
        emitted += stream.push(token)
        if stream.stopped_by_string:
            return emitted + stream.push(None), True
    return emitted, False


@pytest.mark.parametrize(
    "text, stops",
    [
        ("Once upon a time. The end", ["The end"]),
        ("Once upon a time.", ["The end"]),
        ("aaab", ["aab"]),
        ("ababac", ["abac", "xx"]),
        ("one\n\ntwo\n\nthree", ["\n\n"]),
        ("so he said", ["said", "he s", "aid"]),
        ("The en", ["The end"]),
        ("nothing stops", []),
        ("", ["x"]),
        ("xyz", ["x", "xyz"]),
    ],
)
def test_a_stop_string_ends_the_text_in_any_tokenization(text, stops):
    """nanoGPT #36: and nothing of the stop string is emitted before it is known to be one."""
    expected = truncate_at_stop(text, stops)
    assert stream_tokens(text, stops) == expected  # one character per token
    for first, second in itertools.combinations(range(len(text) + 1), 2):
        texts = [text[:first], text[first:second], "", text[second:]]
        assert stream_tokens(texts, stops) == expected


def test_different_prompts_and_samples_have_different_random_draws():
    arguments = [("Once", 0), ("Tom", 0), ("Once", 1), ("Once", 0)]
    *indices, again = [request_index(prompt, sample) for prompt, sample in arguments]
    assert len(set(indices)) == 3 and again == indices[0]


INVALID = [
    dict(prompts="Once"),
    dict(stop="the"),
    dict(bad_words=[""]),
    dict(num_samples=0),
    dict(temperature=-1),
]


@pytest.mark.parametrize("invalid", INVALID)
def test_generate_refuses_invalid_arguments(invalid, tokenizer):
    with pytest.raises(ValueError, match=next(iter(invalid))):
        next(generate(None, tokenizer, **dict(prompts=["Once"]) | invalid))
