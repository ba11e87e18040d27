"""
The speed of the command that a person types: sample.py, from the start of its process.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

SCRIPT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "sample.py")
# With the options that the README recommends.
COMMAND = 'python sample.py --start="Once upon a time" --temperature=0.8 --top_p=0.9'


class TokenTimes(NamedTuple):
    """What a run of sample.py took, in seconds from the start of its process."""

    first: float  # until the first token
    last: float  # until the last one
    num_tokens: int


def run_sample_command(command: list[str], threads: int, cache: str = "") -> TokenTimes:
    """Run a command that prints sample.py's events.

    Args:
        cache: folder of the compiled code; if empty, the user's.
    """
    start_time = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    environment |= {"XDG_CACHE_HOME": cache} if cache else {}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors)
        with process:
            assert process.stdout, "it is a pipe"
            times = [
                time.perf_counter() - start_time
                for line in process.stdout
                if json.loads(line)["token"] is not None
            ]
        if process.returncode or not times:
            errors.seek(0)
            reason = errors.read().decode(errors="replace").strip()
            raise ValueError(f"sample.py, status {process.returncode}: {reason or 'no token'}")
    return TokenTimes(times[0], times[-1], len(times))


def measure_command(
    settings: dict[str, Any], folder: str, device: str, runs: int
) -> Iterator[dict[str, Any]]:
    """Measure sample.py with the checkpoint in folder; prints the table and yields its records.

    The runs with an empty cache folder and those with the user's, which has compiled code, take
    turns.

    Args:
        settings: preset and threads.
    """
    options = [*shlex.split(COMMAND)[2:], "--format=events", f"--device={device}"]
    command = [sys.executable, SCRIPT, f"--out_dir={folder}", *options]
    with tempfile.TemporaryDirectory(prefix="cria-bench-cache-") as empty_cache:
        caches = {"nothing compiled": empty_cache, "compiled before": ""}
        if device == "mps":
            del caches["compiled before"]
        times: dict[str, list[TokenTimes]] = {name: [] for name in caches}
        for _ in range(runs):
            for name, cache in caches.items():
                times[name].append(run_sample_command(command, settings["threads"], cache))
    print(f"\n{settings['preset']}, threads: {settings['threads']}: {COMMAND}\n")
    print("| seconds from the start of the process | first token | last token | tokens |")
    print("|---|---:|---:|---:|")
    for name, results in times.items():
        first = statistics.median(result.first for result in results)
        last = statistics.median(result.last for result in results)
        count = results[0].num_tokens
        print(f"| {name} | {first:.2f} | {last:.2f} | {count} |", flush=True)
        record = {"variant": f"sample.py, {name}", "batch": 1, "num_tokens": count}
        yield settings | record | {"seconds_to_first": first, "seconds_to_last": last}
