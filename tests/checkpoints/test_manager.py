import errno
import functools
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch

from checkpoints import manager as keeper_module
from checkpoints.file import load_checkpoint, save_checkpoint
from checkpoints.manager import (
    Keeper,
    load_latest,
    numbered_checkpoints,
    put_older_aside,
    remove_oldest,
    snapshot,
)
from runtime.atomic_files import run_lock
from tests import helpers
from tests.helpers import (
    ROOT,
    TINY_RUN,
    make_checkpoint,
    read_metrics,
    read_until,
    same_training_state,
)

random_model = functools.partial(helpers.random_model, helpers.CHECKPOINT_MODEL, None)


def save_steps(out_dir, steps, count: int) -> str:
    """Checkpoints of these steps written one after another, of which count older ones stay."""
    path, before = str(out_dir / "ckpt.pt"), None
    for step in steps:
        if before is not None:
            put_older_aside(str(out_dir), before, "ckpt.pt", step, keeps=True)
        save_checkpoint(path, make_checkpoint(random_model(), iter_num=step))
        remove_oldest(str(out_dir), step, count)
        before = step
    return path


def cut(path):
    os.truncate(path, os.path.getsize(path) // 2)


def flip(path):
    """Change a bit of a weight, and what the archive says of its content with it."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model"]["norm.weight"].view(torch.int32)[3] ^= 1
    torch.save(checkpoint, path)


def test_a_snapshot_is_of_its_moment_and_keeps_what_is_tied():
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


def test_the_last_few_older_checkpoints_stay(tmp_path):
    save_steps(tmp_path, [5, 10, 15, 20, 20, 25], count=2)
    assert [os.path.basename(path) for path in numbered_checkpoints(str(tmp_path))] == [
        "ckpt_000020.pt",
        "ckpt_000015.pt",
    ]
    assert [load_checkpoint(path)["iter_num"] for path in numbered_checkpoints(str(tmp_path))] == [
        20,
        15,
    ]
    assert load_checkpoint(str(tmp_path / "ckpt.pt"))["iter_num"] == 25


def test_what_only_looks_like_an_older_checkpoint_is_in_nobody_s_way(tmp_path):
    (tmp_path / "ckpt_000001.pt").mkdir()
    save_steps(tmp_path, [5, 10, 15], count=1)
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "ckpt_000001.pt", "ckpt_000010.pt"]


def test_an_older_checkpoint_stays_where_the_file_system_has_no_links(tmp_path, monkeypatch):
    def no_link(*args):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_link)
    save_steps(tmp_path, [5, 10], count=1)
    assert load_checkpoint(str(tmp_path / "ckpt_000005.pt"))["iter_num"] == 5


@pytest.mark.parametrize("damage", [cut, flip, os.remove], ids=["cut", "flip", "remove"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(damage, tmp_path):
    damage(save_steps(tmp_path, [5, 10, 15], count=2))
    said = []
    path, checkpoint = load_latest(str(tmp_path), said.append)
    assert checkpoint["iter_num"] == 10 and path == str(tmp_path / "ckpt_000010.pt")
    assert (
        len(said) == 1
        and f"going on from {path}, which is of step 10" in said[0]
        and "ckpt.pt" in said[0]
    )


def test_where_all_are_damaged_the_newest_is_named_and_where_none_is_there_none_is_found(tmp_path):
    assert load_latest(str(tmp_path)) is None
    save_steps(tmp_path, [5, 10], count=1)
    for path in tmp_path.iterdir():
        cut(path)
    with pytest.raises(ValueError, match=r"/ckpt\.pt: damaged"):
        load_latest(str(tmp_path))


def failing(times: list, done: list):
    """Something that fails as often as times says, with a full disk."""

    def write():
        if times[0]:
            times[0] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "ckpt.pt")
        done.append(threading.current_thread() is not threading.main_thread())

    return write


def test_what_fails_is_told_once_and_tried_again_until_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(keeper_module, "RETRY_SECONDS", 0.0)
    keeper, done, told = Keeper(), [], []
    keeper.keep({str(tmp_path / "ckpt.pt"): failing([2], done)})
    deadline = time.monotonic() + 20
    while not done and time.monotonic() < deadline:
        told += keeper.news()
        time.sleep(0.01)
    keeper.finish()
    assert done == [True] and not keeper.pending
    assert [*told, *keeper.news()] == [
        "ckpt.pt: No space left on device; the run goes on, and tries to save again", "saving works again"
    ]  # fmt: skip


def test_what_cannot_be_written_in_the_end_is_an_error(tmp_path):
    keeper = Keeper()
    keeper.keep({str(tmp_path / "ckpt.pt"): failing([99], [])})
    with pytest.raises(
        ValueError, match=r"ckpt\.pt: No space left on device; not written: .*ckpt\.pt"
    ):
        keeper.finish()


def test_an_error_that_is_not_the_disks_is_raised(tmp_path):
    keeper = Keeper()
    keeper.keep({str(tmp_path / "ckpt.pt"): lambda: int("x")})
    with pytest.raises(ValueError, match="invalid literal"):
        keeper.finish()


def test_what_cannot_be_written_is_in_nobody_s_way(tmp_path):
    (tmp_path / "model.bin").mkdir()
    keeper, path = Keeper(), str(tmp_path / "ckpt.pt")
    writes = {name: lambda name=name: save_checkpoint(name, make_checkpoint(random_model())) for name in
              (str(tmp_path / "model.bin"), path)}  # fmt: skip
    keeper.keep(writes)
    with pytest.raises(ValueError, match=r"not written: \S*/model\.bin$"):
        keeper.finish()
    assert load_checkpoint(path)["iter_num"] == 7


def test_a_later_state_takes_the_place_of_one_that_could_not_be_written(tmp_path):
    keeper, done = Keeper(), []
    keeper.keep(
        {str(tmp_path / "a"): failing([1], []), str(tmp_path / "b"): lambda: done.append("b")}
    )
    keeper.keep({str(tmp_path / "a"): lambda: done.append("a")})
    keeper.finish()
    assert done == ["b", "a"]


@pytest.fixture
def start():
    """start(out_dir, data_dir): a run that does not end by itself before the test, once it takes steps."""
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


def test_a_folder_that_is_deleted_while_the_run_goes_on_is_made_again(start, tmp_path, data_dir):
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
def test_a_run_that_cannot_be_saved_goes_on_and_fails_at_its_end(tmp_path, data_dir):
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
        "the run goes on, and tries to save again" in result.stdout
        and len(read_metrics(tmp_path, "loss")) == 30
    )
    assert "no checkpoint" in result.stderr.splitlines()[-1] and "ckpt.pt" in result.stderr
    assert not [name for name in os.listdir(tmp_path) if name.endswith((".pt", ".partial"))]


def test_processes_beside_one_that_is_refused_end_with_a_sentence_too(tmp_path, data_dir):
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


def test_a_run_in_place_of_a_damaged_checkpoint_is_the_same_run(run_script, tmp_path, data_dir):
    straight, hurt = tmp_path / "straight", tmp_path / "hurt"
    options = (*TINY_RUN, f"--data_dir={data_dir}", "--checkpoint_interval=5", "--max_iters=30")
    assert run_script("train.py", *options, f"--out_dir={straight}").returncode == 0
    shutil.copytree(straight, hurt)
    cut(hurt / "ckpt.pt")
    os.remove(hurt / "best.pt")  # of the same step
    result = run_script("train.py", f"--out_dir={hurt}", "--init_from=auto")
    assert (
        result.returncode == 0
        and f"going on from {hurt}/ckpt_000025.pt, which is of step 25" in result.stdout
    )
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
