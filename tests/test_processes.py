"""The helpers of tests/processes.py, and one real process per script."""

import os
import random
import signal
import subprocess
import sys
import warnings

import pytest
import torch

from tests.processes import ROOT, TookTooLong, run_in_process, run_process

SCRIPTS = ["train.py", "sample.py", "export.py", "tinystories.py", "bench.py"]

CHANGES_EVERYTHING = """
import os, random, signal, sys, warnings
import torch

def main(argv=None):
    os.chdir("/")
    os.environ["CRIA_TEST"] = "1"
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(3)
    torch.set_float32_matmul_precision("medium")
    torch.manual_seed(99)
    random.seed(99)
    warnings.simplefilter("error")
    sys.stdout.reconfigure(errors="replace")
    sys.stdout.buffer.write("café\\n".encode())
    sys.stdout.buffer.flush()
    print(*sys.argv[1:], sys.stdin.read())
    sys.stdin = sys.stdout = sys.argv = None
"""

RAISES = """
def main(argv=None):
    raise {error}
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """script(text) is the name of a script with this text, which run_in_process finds."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str) -> str:
        (tmp_path / "cria_test_script.py").write_text(text)
        sys.modules.pop("cria_test_script", None)
        return "cria_test_script.py"

    yield write
    sys.modules.pop("cria_test_script", None)


def process_state() -> dict:
    return {
        "cwd": os.getcwd(),
        "environment": dict(os.environ),
        "handler": signal.getsignal(signal.SIGTERM),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "torch": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "filters": list(warnings.filters),
        "streams": (sys.stdin, sys.stdout, sys.stderr, sys.argv),
    }


def test_a_script_in_this_process_leaves_nothing_changed(script, tmp_path):
    name = script(CHANGES_EVERYTHING)
    before = process_state()
    result = run_in_process(name, "--a=1", cwd=tmp_path, stdin="typed")
    assert result.stdout == "café\n--a=1 typed\n" and result.returncode == 0, result.stderr
    assert process_state() == before


@pytest.mark.parametrize(
    "error, status, message",
    [
        ("ValueError('wrong')", 1, "cria_test_script.py: wrong\n"),
        ("KeyboardInterrupt", 130, "cria_test_script.py: interrupted\n"),
        ("SystemExit(3)", 3, ""),
        ("SystemExit('stop')", 1, "stop\n"),
        ("SystemExit", 0, ""),
        ("TypeError('bug')", 1, "TypeError: bug\n"),
    ],
)
def test_errors_have_the_status_of_a_process(script, error, status, message):
    result = run_in_process(script(RAISES.format(error=error)))
    assert result.returncode == status and result.stderr.endswith(message)


def test_a_script_that_does_not_end_is_stopped(script):
    name = script("import time\ndef main(argv=None): time.sleep(60)\n")
    with pytest.raises(TookTooLong):
        run_in_process(name, timeout=0.1)


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_starts_as_a_process(name):
    result = run_process(name, "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert name in result.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_closed_standard_output_is_refused(tmp_path):
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, str(ROOT / "sample.py")]
    result = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 1 and result.stderr == "sample.py: standard output is closed\n"
