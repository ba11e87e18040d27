import hashlib
import random
import re

import pytest

from textdata.synthetic import PLOTS, expand_choices, story

GOLDEN_SHA256 = "b540286267700911b09561dfe7321ff7f060a626f416211fb940ea1228e24341"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(1)
    return [story(rng) for _ in range(3000)]


def test_the_stories_never_change():
    """A mechanical rename once changed a word inside a template."""
    rng = random.Random(7)
    written = "".join(story(rng) for _ in range(1000))
    assert hashlib.sha256(written.encode()).hexdigest() == GOLDEN_SHA256


def test_the_same_seed_gives_the_same_stories():
    one, other = random.Random(7), random.Random(7)
    assert [story(one) for _ in range(50)] == [story(other) for _ in range(50)]


def test_stories_leave_the_global_random_state_alone():
    state = random.getstate()
    story(random.Random(7))
    assert random.getstate() == state


def test_stories_are_ascii_and_tidy(texts):
    for text in texts:
        assert text.isascii() and text == text.strip()
        assert re.fullmatch(r"[\x20-\x7e]+(\n\n[\x20-\x7e]+)*", text)
        assert "  " not in text


def test_every_choice_is_expanded(texts):
    assert not [text for text in texts if re.search(r"[\[\]|{}<>_]", text)]


def test_stories_are_distinct(texts):
    assert len(set(texts)) > 0.999 * len(texts)


def test_quotes_are_balanced_in_every_paragraph(texts):
    for paragraph in (paragraph for text in texts for paragraph in text.split("\n\n")):
        marks = list(re.finditer('"', f" {paragraph} "))
        assert len(marks) % 2 == 0, paragraph
        for number, mark in enumerate(marks):
            before, after = mark.string[mark.start() - 1], mark.string[mark.end()]
            opens, closes = before == " " and after != " ", before in ".!?," and after == " "
            assert (opens, closes) == (number % 2 == 0, number % 2 == 1), paragraph


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.__name__)
def test_every_plot_gives_short_stories_of_whole_sentences(plot):
    rng = random.Random(2)
    for _ in range(100):
        text = expand_choices(rng, plot(rng))
        assert 80 <= len(text.split()) <= 220
        assert re.search(r'[.!?]"?$', text)
        unquoted = re.sub(r'"[^"]*"', '""', text)
        assert not re.search(r"[.!?] [a-z]", unquoted), text  # a sentence without a capital
        assert not re.search(r"[,;:.!?]{2}| [,.!?]|\ba [aeio]|\ban [^aeiou]", text), text


def test_the_vocabulary_is_small(texts):
    words = {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}
    assert 400 < len(words) < 1000
