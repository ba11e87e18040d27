import os
import subprocess
import sys
from pathlib import Path

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
