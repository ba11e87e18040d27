"""Limits on the shape of the code: arguments, nesting, length of functions, literals."""

import ast
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.source_files import CODE, read

MAX_ARGUMENTS = 6  # without self and cls
MAX_NESTING = 3
MAX_LINES = 50  # from the line of `def`
MAX_LINES_P90 = 25  # the 90th percentile over all functions

Function = ast.FunctionDef | ast.AsyncFunctionDef
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)


def functions_in(tree: ast.AST) -> Iterator[Function]:
    """All functions and methods, nested ones included."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def count_arguments(function: Function) -> int:
    """The number of arguments; as in ruff, self, cls, *args and **kwargs do not count."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in named)


def count_lines(function: Function) -> int:
    """The number of lines from `def` to the end, decorators not counted."""
    return function.end_lineno - function.lineno + 1


def nesting(node: ast.AST) -> int:
    """The depth of blocks in a function. elif adds none; a nested function has its own depth."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef | ast.Lambda):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        adds_one = isinstance(child, BLOCKS) and not is_elif
        deepest = max(deepest, nesting(child) + adds_one)
    return deepest


def unpacked_literals(tree: ast.AST) -> Iterator[ast.AST]:
    """Displays and calls that unpack a literal: f(**{"a": 1}), [*(1, 2)]."""
    literals = (ast.Tuple, ast.List, ast.Set, ast.Dict)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            unpacked = [keyword.value for keyword in node.keywords if keyword.arg is None]
            unpacked += [arg.value for arg in node.args if isinstance(arg, ast.Starred)]
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            unpacked = [value for key, value in pairs if key is None]
        elif isinstance(node, ast.List | ast.Tuple | ast.Set):
            unpacked = [item.value for item in node.elts if isinstance(item, ast.Starred)]
        else:
            continue
        yield from (value for value in unpacked if isinstance(value, literals))


def unrelated_assignments(tree: ast.AST) -> Iterator[ast.Assign]:
    """Assignments of several values at once with a new container or a constant among others:
    a, b = [], []; a, b = 0, f(). Constants alone (a, b = 0, 1) are allowed."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)):
            continue
        if not isinstance(node.targets[0], ast.Tuple):
            continue  # a tuple as one value
        values = node.value.elts
        constants = sum(is_constant(value) for value in values)
        if any(map(is_empty_container, values)) or 0 < constants < len(values):
            yield node


def is_constant(node: ast.expr) -> bool:
    """Whether a value is a literal number, string, True, False or None; -1 too."""
    return isinstance(node.operand if isinstance(node, ast.UnaryOp) else node, ast.Constant)


def is_empty_container(node: ast.expr) -> bool:
    """Whether a value is [], {} or ()."""
    if isinstance(node, ast.Dict):
        return not node.keys
    return isinstance(node, ast.List | ast.Tuple) and not node.elts


def problems_in(path: Path, text: str) -> list[str]:
    """What a file does beyond the limits, one sentence each with its line."""
    tree = ast.parse(text)
    problems = []
    for function in functions_in(tree):
        start = f"{path}:{function.lineno}: {function.name}"
        if (count := count_arguments(function)) > MAX_ARGUMENTS:
            problems.append(f"{start} has {count} arguments, more than {MAX_ARGUMENTS}")
        if (depth := nesting(function)) > MAX_NESTING:
            problems.append(f"{start} nests {depth} blocks, more than {MAX_NESTING}")
        if (lines := count_lines(function)) > MAX_LINES:
            problems.append(f"{start} has {lines} lines, more than {MAX_LINES}")
    for node in unpacked_literals(tree):
        problems.append(f"{path}:{node.lineno}: unpacks a literal inside a call or display")
    for node in unrelated_assignments(tree):
        problems.append(f"{path}:{node.lineno}: assigns unrelated values in one statement")
    return problems


def test_the_code_keeps_to_the_limits():
    problems = [problem for path in CODE for problem in problems_in(path, read(path))]
    assert not problems, f"{len(problems)} problems\n" + "\n".join(problems)


def test_nine_of_ten_functions_have_at_most_25_lines():
    functions = [
        (count_lines(function), f"{path}:{function.lineno}: {function.name}")
        for path in CODE
        for function in functions_in(ast.parse(read(path)))
    ]
    functions.sort(reverse=True)
    allowed = len(functions) - math.ceil(0.9 * len(functions))  # that may be longer
    longer = [f"{name} has {lines} lines" for lines, name in functions if lines > MAX_LINES_P90]
    message = f"{len(longer)} functions are longer than {MAX_LINES_P90} lines, {allowed} may be\n"
    assert len(longer) <= allowed, message + "\n".join(longer)


FOUR_DEEP = """
def f():
    for a in b:
        if a:
            pass
        elif b:
            with c:
                try:
                    pass
                finally:
                    pass
"""


@pytest.mark.parametrize(
    "text, problem",
    [
        ("def f(self, a, b, c, d, e, *args, f, g): pass", "has 7 arguments"),
        (FOUR_DEEP, "nests 4 blocks"),
        ("def f():\n" + "    x = 1\n" * 50, "has 51 lines"),
        ("f(**{'a': 1})", "unpacks a literal"),
        ("[*(1, 2), 3]", "unpacks a literal"),
        ("{**{'a': 1}, 'b': 2}", "unpacks a literal"),
        ("a, b = [], []", "assigns unrelated values"),
        ("a, b = f(), {}", "assigns unrelated values"),
        ("a, b = -1, c", "assigns unrelated values"),
    ],
)
def test_a_violation_is_found(text, problem):
    (found,) = problems_in(Path("a.py"), text)
    assert problem in found


@pytest.mark.parametrize(
    "text",
    [
        "class A:\n    def f(self, a, b, c, d, e, f): pass",
        "def f():\n" + "    x = 1\n" * 49,
        "def f():\n    if a: pass\n    elif b: pass\n    elif c: pass\n    elif d: pass",
        "f(*args, **options)\n[*values, 1]\n{**options}",
        "a, b = b, a\na, b = 0, -1\na, b = f(1), f(2)\na, b = c\na = b, []",
    ],
)
def test_code_within_the_limits_passes(text):
    assert problems_in(Path("a.py"), text) == []
