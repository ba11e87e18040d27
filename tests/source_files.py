"""The repository's own Python files, for the tests that read them."""

from pathlib import Path

from tests.processes import ROOT

IGNORED_FOLDERS = {"data", "out", "wandb"}  # written by runs


def list_files() -> list[Path]:
    """All Python files, relative to the root."""
    paths = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    return sorted(path for path in paths if not is_ignored(path))


def is_ignored(path: Path) -> bool:
    """Whether a path is in a hidden folder or in one that runs write to."""
    return path.parts[0] in IGNORED_FOLDERS or any(part.startswith(".") for part in path.parts)


def read(path: Path) -> str:
    """The text of a file, given relative to the root."""
    return (ROOT / path).read_text(encoding="utf-8")


FILES = list_files()
CODE = [path for path in FILES if path.parts[0] != "tests"]
TESTS = [path for path in FILES if path.name.startswith("test_")]
