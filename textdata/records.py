"""
The text of a record: a JSON object, or a row of a table.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

TEXT_FIELDS = ("text", "story")  # where the text is, unless --text_field names the field
MAX_NAMES = 8  # field names in a message
MAX_NAME_LENGTH = 40  # characters
TYPE_NAMES = {
    bool: "true or false",
    bytes: "binary data",
    dict: "an object",
    float: "a number",
    int: "a number",
    list: "a list",
    str: "a string",
    type(None): "null",
}


class MissingTextField(ValueError):
    """A record has no field for the text."""


class LargeRecord(ABC):
    """A record that is too large to hold in memory."""

    @abstractmethod
    def iter_text(self, number: int, text_field: str) -> Iterator[str]:
        """Yield the text of the record in pieces. number: as of record_text."""


def text_fields(text_field: str) -> tuple[str, ...]:
    """The fields that may hold the text, given --text_field."""
    return (text_field,) if text_field else TEXT_FIELDS


def quote_fields(text_field: str) -> str:
    """text_fields for a message."""
    return " or ".join(f'"{name}"' for name in text_fields(text_field))


def iter_record_text(record: object, number: int, text_field: str) -> Iterable[str]:
    """The text of a record in pieces. Arguments and errors: as of record_text."""
    if isinstance(record, LargeRecord):
        return record.iter_text(number, text_field)
    return [record_text(record, number, text_field)]


def record_text(record: object, number: int, text_field: str) -> str:
    """The text of a record; "" if it is empty or null.

    Args:
        record: a dict from field names to values; anything else is refused.
        number: of the record in its file, from 1.
        text_field: the field with the text; "text" or "story" if empty.

    Raises MissingTextField if the record has no such field, ValueError if it has text in both
    fields or anything other than text.
    """
    names = text_fields(text_field)
    if not isinstance(record, dict):
        raise MissingTextField(
            f"record {number:,} is {type_name(record)}, not an object with text under "
            f"{quote_fields(text_field)}"
        )
    present = [name for name in names if name in record]
    if not present:
        raise MissingTextField(
            f"record {number:,} has no field {quote_fields(text_field)}{describe_fields(record)}"
        )
    with_text = [name for name in present if has_text(record[name])]
    if len(with_text) > 1:
        raise ValueError(
            f"record {number:,} has text under {' and under '.join(map(repr, with_text))}; "
            f"choose with --text_field={with_text[0]} or --text_field={with_text[1]}"
        )
    if with_text:
        return replace_surrogates(record[with_text[0]])
    for name in present:
        if not isinstance(record[name], str | None):
            raise ValueError(
                f'record {number:,} has {type_name(record[name])} under "{name}", not text'
            )
    return ""


def has_text(value: object) -> bool:
    """Whether the value is a string with more than whitespace."""
    return isinstance(value, str) and not (value == "" or value.isspace())


def type_name(value: object) -> str:
    """The type of a value of JSON or Parquet in plain English."""
    return TYPE_NAMES.get(type(value), f"a value of type {type(value).__name__}")


def describe_fields(record: dict) -> str:
    """The end of a message about a missing field: the fields that there are."""
    if not record:
        return ""
    names = [repr(str(name)[:MAX_NAME_LENGTH]) for name in list(record)[:MAX_NAMES]]
    more = ", ..." if len(record) > MAX_NAMES else ""
    return f" but {', '.join(names)}{more}; name the field of the text with --text_field"


def replace_surrogates(text: str) -> str:
    """The text with "?" for each half of a surrogate pair, which UTF-8 cannot encode."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
