"""
Config files: plain assignments whose values may use arithmetic and earlier names. An f-string may
hold earlier names.

An expression is evaluated node by node instead of by eval, so that the size of every intermediate
value is limited: 9**9**9 or "x" * 10**12 is refused, not computed.
"""

import ast
import difflib
import operator
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from runtime.untrusted import clip

MAX_FILE_SIZE = 1 << 20  # characters
MAX_BITS = 4096  # of a whole number
MAX_TEXT = 100_000  # characters
MAX_NAME = 100  # characters of a name for which a similar one is looked up
BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


class NamedValue(NamedTuple):
    """The value that one line of a config file gives to a name."""

    name: str
    value: Any
    source: str  # file:line


def read_config_file(path: str) -> Iterator[NamedValue | str]:
    """Yield every assignment in a config file, and a message (str) for every problem."""
    try:
        statements = parse_file(path)
    except ValueError as error:
        yield str(error)
        return
    variables: dict[str, Any] = {}
    for statement in statements:
        line = f"{path}:{statement.lineno}"
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        if not (
            isinstance(statement, ast.Assign)
            and len(statement.targets) == 1
            and isinstance(target := statement.targets[0], ast.Name)
        ):
            yield f"{line}: a config file holds plain assignments only: name = value"
            continue
        try:
            variables[target.id] = evaluate(statement.value, variables)
        except (ValueError, ArithmeticError, TypeError, RecursionError) as error:
            is_deep = isinstance(error, RecursionError)
            reason = "it is nested too deeply" if is_deep else str(error)
            yield f"{line}: cannot work out {clip(target.id)}: {reason}"
            continue
        if not target.id.startswith("_"):
            yield NamedValue(target.id, variables[target.id], line)


def parse_file(path: str) -> list[ast.stmt]:
    """The statements of a config file. Raises ValueError if it cannot be read or parsed."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(MAX_FILE_SIZE + 1)
        if len(text) > MAX_FILE_SIZE:
            raise ValueError("it is too long")
        return ast.parse(text).body
    except SyntaxError as error:
        line = f"{path}:{error.lineno}"
        raise ValueError(f"{line}: not a line of Python: {clip(error.msg)}") from None
    except (RecursionError, MemoryError):
        reason = "an expression in it is nested too deeply"
        raise ValueError(f"{path}: cannot read this config file: {reason}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{path}: cannot read this config file: {reason}") from None


# Evaluation


def evaluate(node: ast.expr, variables: dict[str, Any]) -> Any:
    """The value of an expression of constants, arithmetic, lists, f-strings and variables.

    Raises ValueError for any other syntax, for an unknown name and for a value that is too large;
    ArithmeticError and TypeError as Python does; RecursionError if it is nested too deeply."""
    match node:
        case ast.Constant(value=value):
            return check_size(value)
        case ast.Name(id=name):
            if name not in variables:
                raise ValueError(f"{clip(name)} is not set above{did_you_mean(name, variables)}")
            return variables[name]
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in UNARY:
            return UNARY[type(sign)](evaluate(operand, variables))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            return combine(op, evaluate(left, variables), evaluate(right, variables))
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return make_list([evaluate(item, variables) for item in items])
        case ast.JoinedStr(values=parts):
            return join_parts(parts, variables)
    raise ValueError(
        f"{clip(ast.unparse(node))!r} is more than arithmetic with constants and earlier names"
    )


def combine(op: ast.operator, left: Any, right: Any) -> Any:
    """The result of a binary operator on numbers or texts. Raises ValueError if it is too large."""
    if not all(isinstance(operand, int | float | str) for operand in (left, right)):
        raise TypeError("only numbers and texts can be combined")
    if isinstance(left, str) and isinstance(op, ast.Mod):
        raise TypeError("% does not work with a text; use f'{name}'")
    if is_too_large(op, left, right):
        raise ValueError("the result is too large")
    return check_size(BINARY[type(op)](left, right))


def is_too_large(op: ast.operator, left: Any, right: Any) -> bool:
    """Whether a product of a text has more than MAX_TEXT characters, or a power more than MAX_BITS
    bits. Other results are computed before their size is checked."""
    if isinstance(op, ast.Mult) and isinstance(left, str) != isinstance(right, str):
        text, count = (left, right) if isinstance(left, str) else (right, left)
        return isinstance(count, int) and len(text) * count > MAX_TEXT
    if isinstance(op, ast.Pow) and isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * right > MAX_BITS
    return False


def check_size(value: Any) -> Any:
    """The value. Raises ValueError if it is too large."""
    is_long = isinstance(value, int) and value.bit_length() > MAX_BITS
    if is_long or (isinstance(value, str) and len(value) > MAX_TEXT):
        raise ValueError("the result is too large")
    return value


def make_list(items: list[Any]) -> tuple[Any, ...]:
    """The items of a list. Raises ValueError for a list of lists."""
    if any(isinstance(item, tuple) for item in items):
        raise ValueError("a list holds numbers and texts only")
    return tuple(items)


def join_parts(parts: list[ast.expr], variables: dict[str, Any]) -> str:
    """The text of an f-string of names: f"out/{name}". Raises ValueError for any other f-string and
    for a text that is too large, before it is joined."""
    texts: list[str] = []
    length = 0
    for part in parts:
        match part:
            case ast.Constant(value=value):
                pass
            case ast.FormattedValue(value=ast.Name() as name, conversion=-1, format_spec=None):
                value = evaluate(name, variables)
            case _:
                raise ValueError("an f-string holds earlier names only, such as f'out/{name}'")
        if isinstance(value, tuple):
            raise ValueError("an f-string holds numbers and texts only")
        texts.append(str(value))
        length += len(texts[-1])
        if length > MAX_TEXT:
            raise ValueError("the result is too large")
    return "".join(texts)


def did_you_mean(name: str, names: Collection[str]) -> str:
    """', did you mean X?' with the most similar of the known names, or '' if none is similar. Long
    names are left out: the time to compare two names grows with the square of their length."""
    short = [known for known in names if len(known) <= MAX_NAME]
    close = difflib.get_close_matches(name, short, n=1) if len(name) <= MAX_NAME else []
    return f", did you mean {close[0]}?" if close else ""
