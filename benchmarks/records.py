"""
The JSON file with the figures of a benchmark, for --json.
"""

import json
import os
from collections.abc import Iterator

from runtime.atomic_files import write_atomically


def path_problems(path: str) -> Iterator[str]:
    """Yield the reason why --json=path cannot be written, if there is one."""
    folder = os.path.dirname(path) or "."
    if path and not os.path.isdir(folder):
        yield f"--json={path}: there is no folder {folder}"
    elif path and (os.path.isdir(path) or not os.access(folder, os.W_OK)):
        yield f"--json={path}: a file cannot be written there"


def write_records(path: str, records: list[dict]) -> None:
    """Write the records of a benchmark as JSON, if path is not empty."""
    if path:
        write_atomically(path, (json.dumps(records, indent=1) + "\n").encode())
