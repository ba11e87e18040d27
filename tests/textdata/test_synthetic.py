import random
import re

import pytest

from textdata.synthetic import PLOTS, story


@pytest.fixture(scope="module")
def told() -> list[str]:
    rng = random.Random(1)
    return [story(rng) for _ in range(3000)]


def test_the_same_seed_tells_the_same_stories():
    one, other = random.Random(7), random.Random(7)
    assert [story(one) for _ in range(50)] == [story(other) for _ in range(50)]


def test_stories_touch_no_random_numbers_but_their_own():
    state = random.getstate()
    story(random.Random(7))
    assert random.getstate() == state


def test_stories_are_ascii_and_tidy(told):
    for text in told:
        assert text.isascii() and text == text.strip()
        assert re.fullmatch(r"[\x20-\x7e]+(\n\n[\x20-\x7e]+)*", text)
        assert "  " not in text


def test_no_choice_is_left_open(told):
    assert not [text for text in told if re.search(r"[\[\]|{}<>_]", text)]


def test_stories_are_distinct(told):
    assert len(set(told)) > 0.999 * len(told)


def test_quotes_open_and_close_in_turn_in_every_paragraph(told):
    for paragraph in (paragraph for text in told for paragraph in text.split("\n\n")):
        marks = list(re.finditer('"', f" {paragraph} "))
        assert len(marks) % 2 == 0, paragraph
        for number, mark in enumerate(marks):
            before, after = mark.string[mark.start() - 1], mark.string[mark.end()]
            opens, closes = before == " " and after != " ", before in ".!?," and after == " "
            assert (opens, closes) == (number % 2 == 0, number % 2 == 1), paragraph


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.__name__)
def test_every_plot_tells_small_stories_of_whole_sentences(plot):
    rng = random.Random(2)
    for _ in range(100):
        text = plot(rng)
        assert 80 <= len(text.split()) <= 220
        assert re.search(r'[.!?]"?$', text)
        assert not re.search(r"[.!?] [a-z]", re.sub(r'"[^"]*"', '""', text)), (
            text
        )  # a sentence begins small
        assert not re.search(r"[,;:.!?]{2}| [,.!?]|\ba [aeio]|\ban [^aeiou]", text), text


def test_the_vocabulary_is_small(told):
    words = {word for text in told for word in re.findall(r"[a-z]+", text.lower())}
    assert 400 < len(words) < 1000
