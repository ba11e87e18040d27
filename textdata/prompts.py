"""
Prompts and lists of strings from the command line, a file or standard input.
"""

import sys


def split_list(strings: str) -> list[str]:
    """The strings of an option in which | separates them."""
    return strings.replace("\\n", "\n").split("|") if strings else []


def parse_ids(numbers: str) -> tuple[int, ...] | None:
    """The token ids of an option in which commas separate them; None if one is not a number."""
    parts = numbers.split(",") if numbers else []
    if not all(part.isascii() and part.strip().isdigit() and len(part) < 12 for part in parts):
        return None
    return tuple(map(int, parts))


def read_prompts(start: str) -> list[str]:
    """The prompts that --start names. Raises ValueError if they are not UTF-8 or missing."""
    if start == "-":
        text = decode_utf8(sys.stdin.buffer.read(), "standard input") if sys.stdin else ""
        if not text:
            raise ValueError("--start=-: standard input is empty; give one prompt per line")
        return text.removesuffix("\n").split("\n")
    if start.startswith("FILE:"):
        return [read_text(start.removeprefix("FILE:"), f"--start={start}")]
    # The command line is UTF-8, whatever the locale is.
    return [start.encode("utf-8", "surrogateescape").decode("utf-8", "replace")]


def read_text(path: str, option: str) -> str:
    """The text of a UTF-8 file. Raises ValueError, naming the option, if it is not UTF-8."""
    with open(path, "rb") as file:
        return decode_utf8(file.read(), option)


def decode_utf8(content: bytes, option: str) -> str:
    """Decode UTF-8, with \\n for each line end. Raises ValueError, naming the option."""
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: not UTF-8 text ({error.reason})") from error
