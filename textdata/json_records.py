"""
Read the records of JSON files as a stream: objects one after another, or in arrays.

A record is decoded as soon as it is complete. The text of a record that is too large to be decoded
as a whole, or too deeply nested, is read in pieces.
"""

import json
import re
from collections.abc import Iterable, Iterator

from textdata.records import LargeRecord, record_text, replace_surrogates, text_fields

MAX_DECODED = 2**22  # characters of a record that is decoded as a whole
MAX_ESCAPE = 12  # characters of the longest escape sequence, a surrogate pair
MAX_NAME = 2**16  # characters of a field name in a large record

SEPARATORS = re.compile(r"\s*,?\s*")
WHITESPACE = re.compile(r"\s*")
NO_BRACKETS = re.compile(r'[^"{}\[\]]*+')
SCALAR = re.compile(r"[-+.\w]*+")
# The escape sequence of the first half of a surrogate pair, and any that begins with \u.
HIGH_SURROGATE = r"\\u[dD][89abAB][0-9a-fA-F]{2}"
UNICODE_ESCAPE = r"\\u[0-9a-fA-F]{4}"
# The text of a string, up to its end or to an escape sequence that is not complete.
STRING_TEXT = re.compile(
    rf'(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|{HIGH_SURROGATE}(?:{UNICODE_ESCAPE}|(?=[^\\]|\\[^u]))'
    rf"|(?!{HIGH_SURROGATE}){UNICODE_ESCAPE})*+"
)
# A value for the first character of each type but numbers.
EXAMPLE_VALUES: dict[str, object] = {'"': "", "n": None, "t": True, "f": False, "[": [], "{": {}}
# Long numbers raise an error if they are converted to int, and numbers are never text.
DECODER = json.JSONDecoder(parse_int=float)


class JsonBuffer:
    """The part of a JSON text that was read and not used yet."""

    def __init__(self, blocks: Iterable[str]) -> None:
        self.blocks = iter(blocks)
        self.text = ""
        self.position = 0  # of the next character

    @property
    def num_left(self) -> int:
        """The number of characters from the position on."""
        return len(self.text) - self.position

    def read_more(self) -> bool:
        """Read at least as much as is left, so that repeated calls take linear time. Returns
        whether there was more."""
        parts = [self.text[self.position :]]
        num_missing = max(1, len(parts[0]))
        while num_missing > 0 and (block := next(self.blocks, "")):
            parts.append(block)
            num_missing -= len(block)
        self.text = "".join(parts)
        self.position = 0
        return len(parts) > 1

    def skip(self, pattern: re.Pattern[str]) -> str:
        """Skip what the pattern matches, also where it continues in the next block. Returns the
        character after it, "" at the end."""
        while True:
            match = pattern.match(self.text, self.position)
            assert match is not None, "the patterns match the empty string"
            self.position = match.end()
            if self.num_left:
                return self.text[self.position]
            if not self.read_more():
                return ""


def read_json(blocks: Iterable[str]) -> Iterator[object]:
    """Yield the records of a .json or .jsonl file, for iter_record_text.

    A file may hold several arrays, and records without an array. Raises ValueError with the number
    of a record that is not whole.
    """
    buffer = JsonBuffer(blocks)
    in_array = False
    num_records = 0
    while character := buffer.skip(SEPARATORS):
        if character == ("]" if in_array else "["):
            in_array = not in_array
            buffer.position += 1
            continue
        num_records += 1
        yield read_record(buffer, num_records)
    if in_array:
        raise ValueError(f"the file is cut off after record {num_records:,}")


def read_record(buffer: JsonBuffer, number: int) -> object:
    """The record at the position of the buffer: decoded, or a LargeJsonRecord."""
    while True:
        try:
            record, buffer.position = DECODER.raw_decode(buffer.text, buffer.position)
            return record
        except RecursionError:
            break
        except json.JSONDecodeError as error:
            if buffer.num_left > MAX_DECODED:
                break
            if not buffer.read_more():
                raise damaged_record(number, error.msg.removesuffix(" starting at")) from None
    if buffer.text[buffer.position] != "{":
        raise ValueError(f"record {number:,} is not an object with text")
    return LargeJsonRecord(buffer)


def damaged_record(number: int, reason: str) -> ValueError:
    """The error for a record that is not JSON."""
    return ValueError(f"record {number:,} is not whole JSON: {reason}")


class LargeJsonRecord(LargeRecord):
    """A JSON object whose text is read from the buffer in pieces."""

    def __init__(self, buffer: JsonBuffer) -> None:
        self.buffer = buffer
        self.number = 0

    def iter_text(self, number: int, text_field: str) -> Iterator[str]:
        """Yield the text of the object in pieces. Arguments and errors: as of record_text, which
        are raised at the end of the object."""
        self.number = number
        self.buffer.position += 1  # after the opening brace
        fields: dict[str, object] = {}
        while self.buffer.skip(WHITESPACE) != "}":
            name = self.read_name()
            character = self.buffer.skip(WHITESPACE)
            fields[name] = EXAMPLE_VALUES.get(character, 0.0)
            if character == '"' and name in text_fields(text_field):
                fields[name] = ""
                for piece in self.read_string():
                    fields[name] = fields[name] or piece.strip()[:1]
                    yield piece
            else:
                self.skip_value()
            if self.buffer.skip(WHITESPACE) == ",":
                self.buffer.position += 1
            elif self.buffer.skip(WHITESPACE) != "}":
                raise damaged_record(number, "a comma or the end of the object is missing")
        self.buffer.position += 1
        record_text(fields, number, text_field)

    def read_name(self) -> str:
        """Read the name of a field and the colon after it."""
        name = ""
        for piece in self.read_string():
            name += piece
            if len(name) > MAX_NAME:
                raise damaged_record(self.number, "the name of a field is too long")
        if self.buffer.skip(WHITESPACE) != ":":
            raise damaged_record(self.number, "a colon is missing after the name of a field")
        self.buffer.position += 1
        return name

    def read_string(self) -> Iterator[str]:
        """Yield the text of the string at the position of the buffer in pieces."""
        buffer = self.buffer
        if buffer.skip(WHITESPACE) != '"':
            raise damaged_record(self.number, "a string is missing")
        buffer.position += 1
        while True:
            match = STRING_TEXT.match(buffer.text, buffer.position)
            assert match is not None, "the pattern matches the empty string"
            buffer.position = match.end()
            yield replace_surrogates(json.loads(f'"{match[0]}"'))
            if buffer.num_left and buffer.text[buffer.position] == '"':
                break
            if buffer.num_left > MAX_ESCAPE:
                raise damaged_record(self.number, "a string has an invalid character or escape")
            if not buffer.read_more():
                raise damaged_record(self.number, "a string has no end")
        buffer.position += 1

    def skip_value(self) -> None:
        """Skip the value at the position of the buffer."""
        depth = 0
        while True:
            character = self.buffer.skip(NO_BRACKETS if depth else WHITESPACE)
            if character == '"':
                for _ in self.read_string():
                    pass
            elif character and character in "{[":
                depth += 1
                self.buffer.position += 1
            elif depth and character and character in "}]":
                depth -= 1
                self.buffer.position += 1
            elif depth or not re.match(r"[-\w]", character):
                raise damaged_record(self.number, "a value is missing")
            else:
                self.buffer.skip(SCALAR)
            if not depth:
                return
