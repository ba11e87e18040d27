"""Ctrl-C while the last checkpoint is being written."""

import signal
import subprocess
import sys
import time

import pytest

from checkpoints.latest import load_latest
from runtime.atomic_files import run_lock
from tests.helpers import TINY_RUN
from tests.processes import ROOT, read_until

# train.py with writes that take WRITE_SECONDS each.
WRITE_SECONDS = 2.0
SLOW_TRAIN = f"""
import sys, time, torch
sys.path.insert(0, {str(ROOT)!r})
import train
save = torch.save
def slow_save(content, file):
    print("writing", file.name, flush=True)
    file.write(b"begun")
    file.flush()
    time.sleep({WRITE_SECONDS})
    file.seek(0)
    save(content, file)
torch.save = slow_save
train.run_main(train.main)
"""


@pytest.fixture
def last_save(data_dir, tmp_path):
    """A run that was interrupted once and is now writing its last checkpoint."""
    command = [sys.executable, "-c", SLOW_TRAIN, *TINY_RUN, "--eval_interval=1000000"]
    command += ["--max_iters=1000000", "--checkpoint_interval=0"]
    process = subprocess.Popen(
        [*command, f"--data_dir={data_dir}", f"--out_dir={tmp_path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    output = read_until(process, "| loss ")
    process.send_signal(signal.SIGINT)
    for _ in range(2 - output.count("ckpt.pt.")):  # the first is of step 0
        read_until(process, "ckpt.pt.")
    yield process
    process.kill()


def test_second_interrupt_completes_the_file_being_written(last_save, tmp_path):
    """Python 3.11 marks a thread as ended when Ctrl-C interrupts the wait for it: the lock was
    released while it wrote, a .partial file stayed, and some processes ended in SIGABRT."""
    last_save.send_signal(signal.SIGINT)
    time.sleep(WRITE_SECONDS / 4)
    with pytest.raises(ValueError, match="another process is writing here"), run_lock(tmp_path):
        pass
    _, errors = last_save.communicate(timeout=30)
    assert last_save.returncode == 130 and "Traceback" not in errors, errors
    assert "completing the file being written" in errors and "interrupted" in errors
    assert not list(tmp_path.glob("*.partial*"))
    assert load_latest(str(tmp_path)).checkpoint["iter_num"] > 0


def test_third_interrupt_ends_at_once_and_leaves_a_whole_state(last_save, tmp_path):
    for _ in range(2):
        last_save.send_signal(signal.SIGINT)
        time.sleep(WRITE_SECONDS / 8)
    start = time.monotonic()
    _, errors = last_save.communicate(timeout=30)
    assert last_save.returncode == 130 and "Traceback" not in errors, errors
    assert time.monotonic() - start < WRITE_SECONDS / 2
    with run_lock(tmp_path):
        assert load_latest(str(tmp_path)).checkpoint["iter_num"] == 0
