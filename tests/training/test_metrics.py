import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from training import metrics as metrics_module
from training.metrics import MetricsLogger, read_records

DRAW = """
from training.metrics import MetricsLogger
metrics = MetricsLogger({!r})
metrics.open(0)
metrics.write(iter=0, loss=2.0)
metrics.plot_loss()
metrics.plot_loss()
print("on")
"""


def test_settings_matplotlib_rejects_cost_the_plot_only(tmp_path):
    """They ended a training run at its first evaluation."""
    command = [sys.executable, "-c", DRAW.format(str(tmp_path))]
    environment = os.environ | {"MPLBACKEND": "nonsense"}
    root = Path(__file__).parent.parent.parent
    result = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (0, "on\n"), result.stderr
    assert result.stderr.count("no plot of the loss") == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "loss.png").exists() and (tmp_path / "metrics.jsonl").exists()


DAMAGED = {
    "deep lists": '{"iter": 1, "loss": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "a text": '{"iter": 1, "loss": "low"}',
    "a list": '{"iter": 1, "loss": [1, 2]}',
    "a truth value": '{"iter": 1, "loss": true}',
    "a number of 5,000 digits": '{"iter": 1, "loss": ' + "9" * 5000 + "}",
    "a step of 5,000 digits": '{"iter": ' + "9" * 5000 + ', "loss": 1}',
    "a step that is a fraction": '{"iter": 1.5, "loss": 1}',
    "a step that is a truth value": '{"iter": true, "loss": 1}',
    "no record": "[1]",
    "no JSON": "loss 3.5",
}


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_left_out_with_a_message(tmp_path, capsys, line):
    """Deep lists and texts were a traceback at resume, and a long number did not name the file."""
    path = tmp_path / "metrics.jsonl"
    good = [{"iter": 0, "loss": 3.5}, {"iter": 2, "val_loss": None}]
    lines = [json.dumps(good[0]), DAMAGED[line], json.dumps(good[1])]
    path.write_text("\n".join(lines) + "\n")
    metrics = MetricsLogger(str(tmp_path))
    metrics.open(10)
    metrics.plot_loss()
    metrics.file.close()
    assert metrics.records == good
    printed = capsys.readouterr().out
    assert printed == f"{path}: left out 1 damaged line(s), the first is line 2\n"


def test_what_is_no_finite_number_becomes_null(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iter": 1, "loss": NaN}\n{"iter": 2, "loss": 1' + "0" * 400 + '}\n{"iter"')
    assert read_records(str(path)) == [{"iter": 1, "loss": None}, {"iter": 2, "loss": None}]
    assert not capsys.readouterr().out  # a last line that was cut off is usual


def test_a_pipe_as_metrics_is_refused(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"metrics.jsonl: is not a file"):
        MetricsLogger(str(tmp_path)).open(0)


def test_deleted_file_is_written_again_with_all_records(tmp_path):
    """A run ended without metrics.jsonl, although its records were in memory."""
    metrics = MetricsLogger(str(tmp_path))
    metrics.open(0)
    metrics.write(iter=0, loss=2.0)
    os.remove(tmp_path / "metrics.jsonl")
    metrics.write(iter=1, loss=1.0)
    metrics.flush()
    metrics.write(iter=2, loss=0.5)
    assert [record["iter"] for record in read_records(metrics.path)] == [0, 1, 2]


def test_file_deleted_during_a_rewrite_does_not_begin_empty(tmp_path, monkeypatch):
    metrics = MetricsLogger(str(tmp_path))
    metrics.open(0)
    metrics.write(iter=0, loss=2.0)
    os.remove(metrics.path)
    with monkeypatch.context() as context:
        context.setattr(metrics_module, "write_atomically", lambda path, content: None)
        metrics.flush()
    metrics.write(iter=1, loss=1.0)
    metrics.flush()
    assert [record["iter"] for record in read_records(metrics.path)] == [0, 1]
