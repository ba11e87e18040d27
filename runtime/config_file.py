"""
Config files: plain assignments whose values may use arithmetic and earlier names.

An expression is evaluated node by node instead of by eval, so that the size of every intermediate
value is limited: 9**9**9 or "x" * 10**12 is refused, not computed.
"""

import ast
import difflib
import operator
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from runtime.untrusted import clip

MAX_FILE_SIZE = 1 << 20  # characters
MAX_BITS = 4096  # of a whole number
MAX_TEXT = 100_000  # characters
BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitOr: operator.or_,
    ast.BitAnd: operator.and_,
    ast.BitXor: operator.xor,
}
UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Invert: operator.invert,
    ast.Not: operator.not_,
}
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda item, container: item in container,
    ast.NotIn: lambda item, container: item not in container,
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
            yield f"{line}: cannot work out {clip(target.id)}: {error}"
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
    """The value of an expression of constants, operators, lists and variables.

    Raises ValueError for any other syntax, for an unknown name and for a value that is too large;
    ArithmeticError and TypeError as Python does; RecursionError if it is nested too deeply."""
    evaluate_node = EVALUATORS.get(type(node))
    if evaluate_node is None:
        raise ValueError(
            f"{clip(ast.unparse(node))!r} is more than arithmetic with constants and earlier names"
        )
    return evaluate_node(node, variables)


def evaluate_constant(node: ast.Constant, variables: dict[str, Any]) -> Any:
    """The value of a constant."""
    return check_size(node.value)


def evaluate_name(node: ast.Name, variables: dict[str, Any]) -> Any:
    """The value of a variable."""
    if node.id not in variables:
        raise ValueError(f"{clip(node.id)} is not set above{did_you_mean(node.id, variables)}")
    return variables[node.id]


def evaluate_unary(node: ast.UnaryOp, variables: dict[str, Any]) -> Any:
    """The value of an operator with one operand."""
    return UNARY[type(node.op)](evaluate(node.operand, variables))


def evaluate_condition(node: ast.IfExp, variables: dict[str, Any]) -> Any:
    """The value of `a if test else b`."""
    branch = node.body if evaluate(node.test, variables) else node.orelse
    return evaluate(branch, variables)


def evaluate_fstring(node: ast.JoinedStr, variables: dict[str, Any]) -> str:
    """The text of an f-string."""
    return check_size("".join(evaluate(part, variables) for part in node.values))


def evaluate_list(node: ast.List | ast.Tuple, variables: dict[str, Any]) -> tuple[Any, ...]:
    """The items of a list. Raises ValueError for a list of lists."""
    items = tuple(evaluate(item, variables) for item in node.elts)
    if any(isinstance(item, tuple) for item in items):
        raise ValueError("a list holds numbers and texts only")
    return items


def evaluate_chain(node: ast.expr, variables: dict[str, Any]) -> Any:
    """The value of a binary operation. A long sum, nested to the left, takes no deep recursion."""
    operations: list[ast.BinOp] = []
    while isinstance(node, ast.BinOp):
        operations.append(node)
        node = node.left
    value = evaluate(node, variables)
    for operation in reversed(operations):
        value = apply(operation.op, value, evaluate(operation.right, variables))
    return value


def apply(op: ast.operator, left: Any, right: Any) -> Any:
    """The result of a binary operator on numbers or texts. Raises ValueError if it is too large."""
    if type(op) not in BINARY or not all(isinstance(x, int | float | str) for x in (left, right)):
        raise TypeError("only numbers and texts can be combined")
    if isinstance(left, str) and isinstance(op, ast.Mod):
        raise TypeError("% does not work with a text; use f'{name}'")
    if is_too_large(op, left, right):
        raise ValueError("the result is too large")
    return check_size(BINARY[type(op)](left, right))


def is_too_large(op: ast.operator, left: Any, right: Any) -> bool:
    """Whether the result of an operator would have more than MAX_BITS bits or MAX_TEXT
    characters; only for the operators that could take long."""
    if isinstance(op, ast.Mult) and isinstance(left, str) != isinstance(right, str):
        text, count = (left, right) if isinstance(left, str) else (right, left)
        return isinstance(count, int) and len(text) * count > MAX_TEXT
    if not (isinstance(left, int) and isinstance(right, int)):
        return False
    if isinstance(op, ast.Pow):
        return left.bit_length() * right > MAX_BITS
    return isinstance(op, ast.LShift) and left.bit_length() + right > MAX_BITS


def check_size(value: Any) -> Any:
    """The value. Raises ValueError if it is too large."""
    is_long = isinstance(value, int) and value.bit_length() > MAX_BITS
    if is_long or (isinstance(value, str) and len(value) > MAX_TEXT):
        raise ValueError("the result is too large")
    return value


def evaluate_boolean(node: ast.BoolOp, variables: dict[str, Any]) -> Any:
    """The value of a chain of `and` or `or`, which ends at the first operand that decides it."""
    value: Any = None
    for operand in node.values:
        value = evaluate(operand, variables)
        if bool(value) is isinstance(node.op, ast.Or):
            break
    return value


def evaluate_comparison(node: ast.Compare, variables: dict[str, Any]) -> bool:
    """The value of a chain of comparisons."""
    left = evaluate(node.left, variables)
    for op, operand in zip(node.ops, node.comparators, strict=True):
        right = evaluate(operand, variables)
        if not COMPARISONS[type(op)](left, right):
            return False
        left = right
    return True


def format_value(node: ast.FormattedValue, variables: dict[str, Any]) -> str:
    """The text of a value in an f-string. Raises ValueError for a width of many digits."""
    value = evaluate(node.value, variables)
    spec = "" if node.format_spec is None else evaluate(node.format_spec, variables)
    if re.search(r"\d{4}", spec):
        raise ValueError(f"the format {clip(spec)!r} is too wide")
    conversions: dict[int, Callable[[Any], Any]] = {ord("r"): repr, ord("s"): str, ord("a"): ascii}
    return format(conversions.get(node.conversion, lambda same: same)(value), spec)


EVALUATORS: dict[type[ast.expr], Callable[[Any, dict[str, Any]], Any]] = {
    ast.Constant: evaluate_constant,
    ast.Name: evaluate_name,
    ast.BinOp: evaluate_chain,
    ast.UnaryOp: evaluate_unary,
    ast.BoolOp: evaluate_boolean,
    ast.Compare: evaluate_comparison,
    ast.IfExp: evaluate_condition,
    ast.List: evaluate_list,
    ast.Tuple: evaluate_list,
    ast.JoinedStr: evaluate_fstring,
    ast.FormattedValue: format_value,
}


def did_you_mean(name: str, names: Collection[str]) -> str:
    """', did you mean X?' with the most similar of the known names, or '' if none is similar."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f", did you mean {close[0]}?" if close else ""
