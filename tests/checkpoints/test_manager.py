import functools
import os
import shutil
import subprocess
import sys

import pytest
import torch

from checkpoints import manager as manager_module
from checkpoints.file import load_checkpoint
from checkpoints.latest import load_latest
from checkpoints.manager import CheckpointManager
from checkpoints.snapshot import snapshot
from runtime.atomic_files import run_lock
from runtime.distributed import DistContext
from tests import helpers
from tests.helpers import TINY_RUN, make_checkpoint, read_metrics, same_training_state
from tests.processes import ROOT, read_until

random_model = functools.partial(helpers.random_model, helpers.CHECKPOINT_MODEL, None)


def make_manager(out_dir, keep_checkpoints=1, **options) -> CheckpointManager:
    """The manager of an unsharded run in this folder."""
    options = {"run_files": {"tokenizer.model": b"x"}} | options
    manager = CheckpointManager(str(out_dir), keep_checkpoints, DistContext(), **options)
    manager.write_run_files()
    return manager


def save_steps(out_dir, steps, keep_checkpoints: int, best_step: int | None = None) -> None:
    """Save random models as the checkpoints of these steps, one after another."""
    manager = make_manager(out_dir, keep_checkpoints)
    for step in steps:
        model = random_model()
        state = make_checkpoint(model, iter_num=step)
        manager.save(state, model.args, best=step == best_step)
        manager.flush()
    assert manager.last_saved_step == steps[-1]
    os.remove(out_dir / "tokenizer.model")


def checkpoint_steps(out_dir) -> dict[str, int]:
    """The step of every checkpoint file in a folder, by its name."""
    names = sorted(name for name in os.listdir(out_dir) if name.endswith(".pt"))
    return {name: load_checkpoint(str(out_dir / name))["iter_num"] for name in names}


def test_snapshot_does_not_change_with_the_model_and_keeps_ties():
    model = random_model()
    weights = model.state_dict()
    weights["output.weight"] = weights["tok_embeddings.weight"]
    state = snapshot({"model": weights, "more": [1, ("a", torch.ones(2))]})
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        model.tok_embeddings.weight.add_(1)
    assert all(torch.equal(state["model"][name], weight) for name, weight in before.items())
    assert state["model"]["output.weight"] is state["model"]["tok_embeddings.weight"]
    assert state["more"][0] == 1 and torch.equal(state["more"][1][1], torch.ones(2))


def test_latest_and_the_last_few_older_checkpoints_stay(tmp_path):
    save_steps(tmp_path, [5, 10, 15, 20, 20, 25], keep_checkpoints=2)
    assert checkpoint_steps(tmp_path) == {
        "ckpt.pt": 25,
        "ckpt_000015.pt": 15,
        "ckpt_000020.pt": 20,
        "ckpt_000025.pt": 25,
    }
    assert os.path.samefile(tmp_path / "ckpt.pt", tmp_path / "ckpt_000025.pt")


def test_without_older_checkpoints_only_the_latest_stays(tmp_path):
    save_steps(tmp_path, [5, 10], keep_checkpoints=0)
    assert checkpoint_steps(tmp_path) == {"ckpt.pt": 10, "ckpt_000010.pt": 10}


def test_folder_with_the_name_of_a_checkpoint_does_not_disturb(tmp_path):
    (tmp_path / "ckpt_000001.pt").mkdir()
    save_steps(tmp_path, [5, 10, 15], keep_checkpoints=1)
    assert sorted(os.listdir(tmp_path)) == [
        "ckpt.pt",
        "ckpt_000001.pt",
        "ckpt_000010.pt",
        "ckpt_000015.pt",
    ]


def test_kill_between_write_and_link_loses_no_checkpoint(tmp_path, monkeypatch):
    save_steps(tmp_path, [5], keep_checkpoints=1)

    def killed(source, target):
        raise RuntimeError("killed")

    with monkeypatch.context() as context:
        context.setattr(manager_module, "link_checkpoint", killed)
        with pytest.raises(RuntimeError, match="killed"):
            save_steps(tmp_path, [10], keep_checkpoints=1)
    assert checkpoint_steps(tmp_path) == {"ckpt.pt": 10, "ckpt_000005.pt": 5}
    assert load_latest(str(tmp_path)).checkpoint["iter_num"] == 10


def test_best_state_is_written_before_the_latest(tmp_path, monkeypatch):
    """The latest records how good the best is."""
    written = []
    save = manager_module.save_checkpoint

    def recorded(path, state):
        written.append(os.path.basename(path))
        save(path, state)

    monkeypatch.setattr(manager_module, "save_checkpoint", recorded)
    manager, model = make_manager(tmp_path), random_model()
    manager.export_best = lambda args, weights: recorded(str(tmp_path / "model.bin"), state)
    state = make_checkpoint(model)
    manager.save(make_checkpoint(model), model.args, best=True)
    manager.flush()
    assert written == ["best.pt", "model.bin", "ckpt.pt"]
    manager.save(make_checkpoint(model), model.args, best=False)
    manager.flush()
    assert written[3:] == ["ckpt.pt"]


def test_deleted_folder_is_made_again_with_all_its_files(tmp_path):
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    manager, model = make_manager(out_dir), random_model()
    manager.save(make_checkpoint(model), model.args, best=True)
    manager.flush()
    assert not manager.is_best_lost()
    shutil.rmtree(out_dir)
    assert manager.is_best_lost()
    manager.save(make_checkpoint(model, iter_num=8), model.args, best=True)
    manager.flush()
    assert checkpoint_steps(out_dir) == {"best.pt": 8, "ckpt.pt": 8, "ckpt_000008.pt": 8}
    assert (out_dir / "tokenizer.model").read_bytes() == b"x"


def test_weights_with_nan_are_never_written(tmp_path):
    manager, model = make_manager(tmp_path), random_model()
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    manager.save(make_checkpoint(model), model.args, best=True)
    with pytest.raises(ValueError, match="not written"):
        manager.flush()
    assert checkpoint_steps(tmp_path) == {}


@pytest.fixture
def start():
    """start(out_dir, data_dir): a long run, once it takes steps; it is killed after the test."""
    started = []
    yield lambda *args: started.append(begin(*args)) or started[-1]
    for process in started:
        process.kill()


def begin(out_dir, data_dir, *options) -> subprocess.Popen:
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        f"--data_dir={data_dir}",
        f"--out_dir={out_dir}",
        *TINY_RUN,
    ]
    command += ["--checkpoint_interval=1", "--max_iters=1000000", "--decay_lr=False", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    read_until(process, " | loss ")
    return process


@pytest.mark.slow
def test_a_folder_that_is_deleted_is_made_again(start, tmp_path, data_dir):
    process = start(tmp_path / "out", data_dir)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)  # a file may have come meanwhile
    for _ in range(100):
        read_until(process, " | loss ")
    process.terminate()
    said, errors = process.communicate()
    assert process.returncode == 0 and "Traceback" not in errors, errors
    step = load_checkpoint(str(tmp_path / "out/ckpt.pt"))["iter_num"]
    assert (
        f"stopped after step {step}" in said and len(read_metrics(tmp_path / "out", "loss")) == step
    )
    assert {"tokenizer.model", "tokenizer.bin", "best.pt", "model.bin"} <= set(
        os.listdir(tmp_path / "out")
    )


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit there")
def test_a_run_that_cannot_be_saved_fails_at_its_end(tmp_path, data_dir):
    """Files may not grow beyond what a checkpoint takes, as on a full disk."""
    import resource

    command = [
        sys.executable,
        str(ROOT / "train.py"),
        f"--data_dir={data_dir}",
        f"--out_dir={tmp_path}",
        *TINY_RUN,
    ]
    command += ["--checkpoint_interval=1", "--max_iters=30"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=120)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert (
        "training continues, the save is retried" in result.stdout
        and len(read_metrics(tmp_path, "loss")) == 30
    )
    assert "no checkpoint" in result.stderr.splitlines()[-1] and "ckpt.pt" in result.stderr
    assert not [name for name in os.listdir(tmp_path) if name.endswith((".pt", ".partial"))]


def test_ranks_end_with_a_sentence_if_one_is_refused(tmp_path, data_dir):
    with run_lock(str(tmp_path)):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
        ]
        command += [
            str(ROOT / "train.py"),
            f"--data_dir={data_dir}",
            f"--out_dir={tmp_path}",
            *TINY_RUN,
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    ours = result.stderr.partition("torch/distributed/elastic/multiprocessing/api.py")[
        0
    ]  # then torchrun's own
    assert (
        "rank 0: " in ours and "another process is writing here" in ours and "Traceback" not in ours
    )


def test_a_run_with_a_damaged_checkpoint_ends_the_same(run_script, tmp_path, data_dir):
    straight, hurt = tmp_path / "straight", tmp_path / "hurt"
    options = (*TINY_RUN, f"--data_dir={data_dir}", "--checkpoint_interval=5", "--max_iters=30")
    assert run_script("train.py", *options, f"--out_dir={straight}").returncode == 0
    shutil.copytree(straight, hurt)
    os.truncate(hurt / "ckpt.pt", 1000)
    os.remove(hurt / "ckpt_000030.pt")  # copied, no longer a link
    os.remove(hurt / "best.pt")  # of the same step
    result = run_script("train.py", f"--out_dir={hurt}", "--init_from=auto")
    assert result.returncode == 0 and f"using {hurt}/ckpt_000025.pt, of step 25" in result.stdout
    assert (
        same_training_state(straight / "ckpt.pt", hurt / "ckpt.pt")
        and (hurt / "ckpt.damaged").exists()
    )


def test_auto_begins_a_run_and_goes_on_with_it(run_script, tmp_path, data_dir):
    options = (
        "--init_from=auto",
        f"--data_dir={data_dir}",
        f"--out_dir={tmp_path}",
        "--max_iters=3",
    )
    for _ in range(2):
        result = run_script("train.py", *options, *TINY_RUN)
        assert result.returncode == 0, result.stderr
    assert "previous1" not in os.listdir(tmp_path) and len(read_metrics(tmp_path, "loss")) == 3
