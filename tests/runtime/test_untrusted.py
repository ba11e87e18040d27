import pytest

from runtime.untrusted import clip, describe_keys, describe_value

SHARED: list = [1]
for _ in range(60):
    SHARED = [SHARED, SHARED]


class Loud(str):
    def __repr__(self) -> str:
        raise AssertionError("printed")


@pytest.mark.parametrize(
    "value, expected",
    [
        (None, "None"),
        (1.5, "1.5"),
        (True, "True"),
        (7, "7"),
        ("a\nb", "'a\\nb'"),
        (SHARED, "a list of 2 items"),
        ({"a": SHARED}, "a dict of 1 item"),
        ((SHARED,), "a tuple of 1 item"),
        (10**5000, "a number of 16610 bits"),
        (Loud("x"), "'x'"),
        (object(), "a object"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_is_described_on_one_short_line(value, expected):
    """Printing nested shared lists hung."""
    assert describe_value(value) == expected


def test_long_texts_and_many_keys_are_cut():
    assert len(describe_value("x" * 10**6)) < 110
    assert describe_keys({n: SHARED for n in range(9)}) == "0, 1, 2, 3, 4, …"
    assert describe_keys({"a": 1}) == "'a'" and clip("abc", 2) == "ab…"
    assert clip("a\nb\x7f") == "a�b�"
