import itertools

import pytest

from generation.streaming import TextStream, generate, request_index, serialize_streams
from tests.helpers import EXPORT_MODEL, random_model
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


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_streamed_text_is_the_whole_text(count, tokenizer):
    """Past the context, of several samples at once, and with the same tokens as alone."""
    model = random_model(EXPORT_MODEL, 0.3, max_seq_len=count // 2)
    prompts = ["Once", "", "Zoë saw"]
    options = dict(max_new_tokens=count, min_new_tokens=count // 2, num_samples=2, top_p=0.9)
    results = []
    for batch_size in (1, 4):
        chunks = list(generate(model, tokenizer, prompts, batch_size=batch_size, **options))
        keys = sorted({(chunk.prompt, chunk.sample) for chunk in chunks})
        completions = [[c for c in chunks if (c.prompt, c.sample) == key] for key in keys]
        for (prompt, _), completion in zip(keys, completions, strict=True):
            ids = tokenizer.encode(prompts[prompt], bos=True)
            tokens = [chunk.token for chunk in completion[:-1]]
            whole = TextStream(tokenizer, ids).prompt_text + "".join(c.text for c in completion)
            assert whole == tokenizer.decode([*ids, *tokens])
            assert completion[-1].token is None
            assert completion[-1].finish == ("length" if len(tokens) == count else "stop")
        assert len(completions) == 6
        results.append(completions)
        assert list(serialize_streams(chunks, 2)) == [c for part in completions for c in part]
    assert results[0] == results[1]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_stop_strings_and_banned_strings_of_generated_text(batch_size, tokenizer):
    """A stop string ends one completion of a batch; the others continue as if alone."""
    model = random_model(EXPORT_MODEL, 0.3)
    options = dict(max_new_tokens=60, min_new_tokens=60, batch_size=batch_size)

    def texts(**more) -> list[str]:
        texts = ["", "", ""]
        for chunk in generate(model, tokenizer, ["Once", "Tom", ""], **options | more):
            texts[chunk.prompt] += chunk.text
        return texts

    unstopped = texts()
    stop = unstopped[1][20:24]
    expected = [text.split(stop)[0] for text in unstopped]
    assert expected[1] != unstopped[1] and expected[0] == unstopped[0]
    assert texts(stop=[stop]) == expected
    banned = ["e", "an"]
    assert all(any(string in text for string in banned) for text in unstopped)
    assert not any(string in text for text in texts(bad_words=banned) for string in banned)


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
