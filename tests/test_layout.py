"""The layout of the repository: which folder may import which, no circles, no long files."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.processes import ROOT
from tests.source_files import CODE, FILES, read

# Folders and files at the root, each with those that it may import besides itself.
ALLOWED: dict[str, set[str]] = {
    "configurator": {"runtime"},
    "runtime": set(),
    "ops": set(),
    "config": set(),
    "model": {"ops"},
    "textdata": {"runtime"},
    "checkpoints": {"runtime", "ops", "model"},
    "formats": {"checkpoints", "textdata", "runtime", "ops", "model"},
    "training": {"formats", "checkpoints", "textdata", "ops", "runtime", "model"},
    "generation": {"formats", "textdata", "ops", "runtime", "model"},
}
SCRIPTS = {"train", "sample", "export", "tinystories"}
ALLOWED |= {script: ALLOWED.keys() - {"config"} for script in SCRIPTS}
UNRESTRICTED = {"bench", "benchmarks", "tests"}

ROOT_FILES = {f"{name}.py" for name in (*SCRIPTS, "bench", "model", "configurator")}
MAX_LINES = 400


class Import(NamedTuple):
    """One import statement's module and line."""

    module: str
    line: int
    only_for_types: bool  # inside `if TYPE_CHECKING:`


def imports_in(path: Path, text: str) -> Iterator[Import]:
    """Every imported module of a file, including imports inside functions.

    `from a import b` gives a.b, as b may be a module."""
    tree = ast.parse(text)
    typing_blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    type_imports = {id(node) for block in typing_blocks for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = path.parts[: len(path.parts) - node.level] if node.level else ()
            base = ".".join((*parents, *([node.module] if node.module else [])))
            modules = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (Import(module, node.lineno, id(node) in type_imports) for module in modules)


def layer_of(path: Path) -> str:
    """The folder at the root that holds a file, or the name of a file at the root."""
    return path.parts[0].removesuffix(".py")


def forbidden_imports(path: Path, text: str) -> list[str]:
    """The imports of a file that the table does not allow, one sentence each."""
    layer, known = layer_of(path), ALLOWED.keys() | UNRESTRICTED
    if layer in UNRESTRICTED:
        return []
    if layer not in ALLOWED:
        return [f"{path}: {layer} is missing in the table of tests/test_layout.py"]
    problems = []
    for module, line, _ in imports_in(path, text):
        imported = module.partition(".")[0]
        if imported in known and imported not in ALLOWED[layer] | {layer}:
            problems.append(f"{path}:{line}: {layer} may not import {module}")
    return problems


def file_of(module: str) -> Path | None:
    """The file of ours that defines a module, or a name in a module."""
    parts = module.split(".")
    for length in (len(parts), len(parts) - 1):
        base = Path(*parts[:length]) if length else None
        if base and (ROOT / base).with_suffix(".py").is_file():
            return base.with_suffix(".py")
    for length in (len(parts), len(parts) - 1):
        base = Path(*parts[:length]) if length else None
        if base and (ROOT / base / "__init__.py").is_file():
            return base / "__init__.py"
    return None


def find_circle(graph: dict[Path, set[Path]]) -> list[Path]:
    """The files of one circular import, the first repeated at the end; empty if there is none."""
    finished: set[Path] = set()

    def visit(path: Path, trail: list[Path]) -> list[Path]:
        if path in trail:
            return [*trail[trail.index(path) :], path]
        if path in finished:
            return []
        for imported in sorted(graph.get(path, ())):
            if circle := visit(imported, [*trail, path]):
                return circle
        finished.add(path)
        return []

    return next((circle for path in graph if (circle := visit(path, []))), [])


def test_imports_follow_the_table():
    problems = [problem for path in FILES for problem in forbidden_imports(path, read(path))]
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize(
    "path, text",
    [
        ("ops/rope.py", "import model"),
        ("ops/rope.py", "def f():\n    from model import Transformer"),
        ("training/optim.py", "from generation import engine"),
        ("generation/engine.py", "import training.optim as optim"),
        ("train.py", "if True:\n    import sample"),
        ("textdata/corpus.py", "from formats.gguf import write"),
        ("elsewhere/new.py", ""),
    ],
)
def test_a_forbidden_import_is_found(path, text):
    assert len(forbidden_imports(Path(path), text)) == 1


@pytest.mark.parametrize(
    "path, text",
    [
        ("ops/rope.py", "import torch\nfrom ops import attention"),
        ("bench.py", "import train"),
        ("train.py", "from training.optim import make_optimizer"),
    ],
)
def test_an_allowed_import_passes(path, text):
    assert forbidden_imports(Path(path), text) == []


def test_no_file_imports_itself_through_others():
    """Imports only for types do not count: they never run."""
    graph = {}
    for path in CODE:
        found = imports_in(path, read(path))
        targets = {file_of(module) for module, _, only_for_types in found if not only_for_types}
        graph[path] = {target for target in targets if target not in (None, path)}
    circle = find_circle(graph)
    assert not circle, " -> ".join(map(str, circle))


def test_a_circle_is_found():
    a, b, c = Path("a.py"), Path("b.py"), Path("c.py")
    assert find_circle({a: {b}, b: {c}, c: {a}}) == [a, b, c, a]
    assert find_circle({a: {b, c}, b: {c}, c: set()}) == []


def test_the_root_holds_the_scripts_and_nothing_else():
    assert {path.name for path in ROOT.glob("*.py")} == ROOT_FILES


def test_no_file_is_longer_than_400_lines():
    """Test files do not count."""
    lengths = {
        path: len(read(path).splitlines()) for path in FILES if not path.name.startswith("test_")
    }
    too_long = [f"{path}: {lines} lines" for path, lines in lengths.items() if lines > MAX_LINES]
    assert not too_long, "\n" + "\n".join(too_long)


def test_imports_print_nothing_and_start_no_thread():
    modules = [".".join(path.with_suffix("").parts) for path in CODE if path.parts[0] != "config"]
    code = "import importlib, sys, threading\n"
    code += "for name in sys.argv[1:]: importlib.import_module(name.removesuffix('.__init__'))\n"
    code += "assert threading.active_count() == 1, threading.enumerate()\n"
    command = [sys.executable, "-c", code, *modules]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
