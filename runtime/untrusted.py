"""
Short descriptions of values that come from a file of unknown origin, for error messages.

Such a value can be nested without end or be printed as billions of characters. Nothing of a value
is printed before its type is known.
"""

import itertools

MAX_LENGTH = 100  # characters of a text, digits of a number
MAX_KEYS = 5  # keys of a dictionary that are listed


def describe_value(value: object) -> str:
    """A value as a short text on one line, in bounded time: simple values as Python writes them,
    of others their type and number of items."""
    if value is None or isinstance(value, bool | float | complex):
        return repr(value)
    if isinstance(value, str | bytes):
        return clip(repr(value[: MAX_LENGTH + 1]))
    if isinstance(value, int):
        is_short = value.bit_length() <= 3 * MAX_LENGTH  # a digit has 3.3 bits
        return str(value) if is_short else f"a number of {value.bit_length()} bits"
    if isinstance(value, dict | list | tuple | set):
        return f"a {type(value).__name__} of {len(value)} item{'s' * (len(value) != 1)}"
    return f"a {type(value).__name__}"


def describe_keys(mapping: dict) -> str:
    """The first keys of a dictionary, separated by commas."""
    keys = [describe_value(key) for key in itertools.islice(mapping, MAX_KEYS)]
    return ", ".join([*keys, "…"] if len(mapping) > MAX_KEYS else keys)


def clip(text: str, max_length: int = MAX_LENGTH) -> str:
    """A text on one line, cut to a length. An ellipsis shows the cut; � replaces characters that
    cannot be printed."""
    cut = text[:max_length]
    printable = "".join(character if character.isprintable() else "�" for character in cut)
    return printable if len(text) <= max_length else f"{printable}…"
