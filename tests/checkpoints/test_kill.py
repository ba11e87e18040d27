"""
kill -9 at random moments of a run that checkpoints after every step: nothing is lost.

CRIA_KILLS=20 python -m pytest tests/checkpoints/test_kill.py kills oftener.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoints.file import load_checkpoint
from tests.helpers import TINY_RUN, same_training_state
from tests.processes import ROOT

KILLS = int(os.environ.get("CRIA_KILLS", "2"))
STEPS = 60 * KILLS  # too many for one life, so that every kill hits


def start(out_dir: Path, data_dir: str) -> subprocess.Popen:
    """A run from its beginning, or from its checkpoint if it has one, once it is taking steps."""
    options = (
        ["--init_from=resume"] if (out_dir / "ckpt.pt").exists() else [*TINY_RUN, "--dropout=0.1"]
    )
    options += [f"--data_dir={data_dir}", f"--out_dir={out_dir}", f"--max_iters={STEPS}"]
    options += ["--checkpoint_interval=1", "--eval_interval=25"]
    command = [sys.executable, str(ROOT / "train.py"), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if " | loss " in line:
            return process
    raise AssertionError(process.stderr.read())


@pytest.mark.slow
def test_run_killed_repeatedly_ends_with_the_same_weights(tmp_path, data_dir):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(undisturbed, data_dir).communicate()[1] == ""
    rng = random.Random(0)
    reached = []
    for _ in range(KILLS):
        process = start(killed, data_dir)
        time.sleep(rng.uniform(0, 0.6))  # the moment is what is random here
        assert process.poll() is None, "the run ended before it was killed"
        process.kill()
        process.communicate()
        if (killed / "ckpt.pt").exists():
            reached.append(load_checkpoint(str(killed / "ckpt.pt"))["iter_num"])
    assert reached == sorted(reached) and reached[-1] > 0
    process = start(killed, data_dir)
    process.communicate()
    assert process.returncode == 0
    assert same_training_state(undisturbed / "ckpt.pt", killed / "ckpt.pt")
    assert same_training_state(undisturbed / "best.pt", killed / "best.pt")
