"""What makes an exception a good refusal of a damaged file."""

import traceback
from collections.abc import Iterator
from pathlib import Path

from tests.processes import ROOT

MAX_MESSAGE_LENGTH = 600  # characters


def problem_with_refusal(error: BaseException, path: str) -> str:
    """What is wrong with an exception; '' for a good refusal."""
    name, message = type(error).__name__, str(error)
    if not isinstance(error, (ValueError, OSError)):
        return name
    if not message:
        return f"{name} without a word"
    if not message.isprintable():  # several lines, or control characters for the terminal
        return f"{name} that does not print as one line"
    if len(message) >= MAX_MESSAGE_LENGTH:
        return f"{name} too long to read"
    if path not in message:
        return f"{name} that does not name the file"
    if any(is_out_of_memory(cause) for cause in causes_of(error)):
        return "refused only where the memory ended"
    return ""


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and all that led to it."""
    while error:
        yield error
        error = error.__cause__ or error.__context__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception reports a lack of memory."""
    message = str(error)
    is_allocation = "allocate memory" in message or "bad_alloc" in message
    return isinstance(error, MemoryError) or is_allocation


def last_frame(error: BaseException) -> str:
    """The last line of this repository that ran."""
    frames = [(Path(frame.filename), frame) for frame in traceback.extract_tb(error.__traceback__)]
    path, frame = [(path, frame) for path, frame in frames if path.is_relative_to(ROOT)][-1]
    return f"{path.relative_to(ROOT)}:{frame.lineno} in {frame.name}"


def describe(error: BaseException) -> str:
    """The end of the traceback, and the message on one line."""
    frames = "".join(traceback.format_tb(error.__traceback__)[-3:])
    return f"{frames}{type(error).__name__}: {str(error)[:300]!r}"
