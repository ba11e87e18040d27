import json
import re
import shutil
import types

import pytest
import torch

from checkpoints.file import load_checkpoint
from runtime.distributed import DistContext
from tests.helpers import TINY_RUN, same_training_state
from textdata.loader import epoch_index
from textdata.token_shards import TokenDataset
from training import monitor
from training.state import TrainState

SPIKED = "--skip_spikes=1.05"  # so low that it is met


@pytest.fixture
def train(run_script, data_dir):
    return lambda *args: run_script("train.py", f"--data_dir={data_dir}", *args)


def fake_run(norms, skip_spikes=3.0, messages=None, records=()) -> types.SimpleNamespace:
    """A run at step 7 with these recent gradient norms and metrics."""
    return types.SimpleNamespace(
        config=types.SimpleNamespace(skip_spikes=skip_spikes),
        state=TrainState(iter_num=7, recent_grad_norms=list(norms)),
        log=(messages if messages is not None else []).append,
        dist_ctx=DistContext(),
        metrics=types.SimpleNamespace(records=list(records)),
        first_nonfinite_step=torch.tensor(-1),
    )


def test_gradient_norm_far_above_the_median_is_skipped_and_logged():
    messages = []
    run = fake_run([1.0] * 30, messages=messages)
    assert not monitor.should_skip_step(run, torch.tensor(2.9)) and not messages
    assert monitor.should_skip_step(run, torch.tensor(3.1))
    assert messages == ["step 7: skipped, gradient norm 3.1, recent median 1"]
    assert run.state.recent_grad_norms[-2:] == [pytest.approx(2.9), pytest.approx(3.1)]


def test_no_step_is_skipped_without_option_or_history():
    run = fake_run([1.0] * 30, skip_spikes=0.0)
    assert not monitor.should_skip_step(run, torch.tensor(1e9))
    run = fake_run([1.0] * (monitor.MIN_HISTORY - 1))
    assert not monitor.should_skip_step(run, torch.tensor(1e9))


def test_nonfinite_norms_do_not_enter_the_history():
    run = fake_run([1.0] * 30)
    monitor.should_skip_step(run, torch.tensor(float("nan")))
    monitor.should_skip_step(run, torch.tensor(float("inf")))
    assert len(run.state.recent_grad_norms) == 30


def test_loss_spike_is_logged():
    messages = []
    run = fake_run([], messages=messages, records=[{"loss": 2.0}] * 30)
    monitor.log_spikes(run, loss=9.0)
    assert not messages
    monitor.log_spikes(run, loss=30.0)
    assert messages == ["step 7: loss 30 is 15 times the recent median"]


def test_only_the_first_nonfinite_step_is_recorded():
    run = fake_run([])
    for step, norm in ((3, 1.0), (4, float("inf")), (5, float("nan"))):
        run.state.iter_num = step
        monitor.record_first_nonfinite(run, torch.tensor(norm))
    assert int(run.first_nonfinite_step) == 4


def test_a_resumed_run_skips_the_same_updates(train, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    whole = train(
        *TINY_RUN, SPIKED, "--max_iters=60", f"--out_dir={straight}", "--keep_checkpoints=9"
    )
    assert whole.stdout.count("skipped, gradient norm") > 2, whole.stdout
    resumed.mkdir()
    shutil.copy(straight / "ckpt_000040.pt", resumed / "ckpt.pt")
    rest = train("--init_from=resume", f"--out_dir={resumed}")
    skips_of = lambda text: re.findall(r"step ([45]\d): skipped", text)
    assert skips_of(rest.stdout) == skips_of(whole.stdout) != []
    assert same_training_state(straight / "ckpt.pt", resumed / "ckpt.pt")


def test_a_step_can_be_looked_at_again(train, tmp_path, token_folder):
    """Its sequences are those that the run read, its loss and gradient those that the run had."""
    options = (*TINY_RUN, "--max_iters=40", "--keep_checkpoints=9", f"--out_dir={tmp_path}")
    assert train(*options).returncode == 0
    (tmp_path / "ckpt_000020.pt").replace(tmp_path / "ckpt.pt")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    result = train("--init_from=resume", f"--out_dir={tmp_path}", "--debug_step=20")
    assert result.returncode == 0 and result.stderr == ""
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = next(r for r in map(json.loads, lines) if r["iter"] == 20 and "loss" in r)
    loss, norm = map(
        float, re.search(r"^loss (\S+), gradient norm (\S+);", result.stdout, re.M).groups()
    )
    assert loss == pytest.approx(record["loss"], rel=1e-5) and norm == pytest.approx(
        record["grad_norm"], rel=1e-4
    )
    windows = TokenDataset(token_folder, "train", 32)
    config = load_checkpoint(str(tmp_path / "ckpt.pt"))["config"]
    for position in range(20 * 8, 21 * 8):
        path, start, _ = windows.locate(epoch_index(position, len(windows), config["seed"]))
        assert re.search(rf"^ *{position}  {re.escape(path)}:{start}  loss", result.stdout, re.M)


def test_nan_loss_names_step_sequence_and_debug_command(train, tmp_path):
    blown_up = (
        "--learning_rate=1e30",
        "--grad_clip=0",
        "--warmup_iters=0",
        "--max_iters=9",
        f"--out_dir={tmp_path}",
    )
    blown_up += ("--log_interval=6",)  # at which it is noticed, later than it happens
    result = train(*TINY_RUN, *blown_up)
    step, first = map(
        int, re.search(r"step (\d+), which reads from sequence (\d+) on", result.stderr).groups()
    )
    assert (
        result.returncode == 1
        and 0 < step < 6
        and first == step * 8
        and f"--debug_step={step}" in result.stderr
    )
    again = train(*TINY_RUN, *blown_up, f"--debug_step={step}", "--init_from=auto")
    assert (
        again.returncode == 0
        and f"step {step} reads sequences {first} to {first + 7}" in again.stdout
    )
