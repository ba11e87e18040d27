"""A resumed run never replaces the best model by a worse one."""

import errno
import math
import os
import shutil
import types

import pytest
import torch

from checkpoints.file import load_checkpoint, save_checkpoint
from checkpoints.latest import BestRecord, read_best_record
from runtime.distributed import DistContext
from tests import helpers
from tests.checkpoints.test_latest import cut, flip
from tests.checkpoints.test_manager import checkpoint_steps, make_manager
from tests.helpers import TINY_RUN, make_checkpoint, random_model
from textdata.token_shards import TokenDataset
from train import TrainConfig
from training.best_model import is_comparable, restore_best, update_best
from training.out_dir import archive_previous_run
from training.state import TrainState

WORSE = ("--max_iters=22", "--learning_rate=3", "--decay_lr=False", "--grad_clip=0")


@pytest.fixture(scope="module")
def finished(run_script, data_dir, tmp_path_factory):
    """The folder of a run of 20 steps whose last state is its best."""
    out_dir = tmp_path_factory.mktemp("finished")
    options = (*TINY_RUN, "--max_iters=20", f"--data_dir={data_dir}", f"--out_dir={out_dir}")
    assert run_script("train.py", *options).returncode == 0
    assert read_best_record(str(out_dir / "best.pt")).step == 20
    return out_dir


@pytest.fixture
def resume_worse(finished, run_script, tmp_path):
    """resume_worse(options): the folder and output of a resumed run that gets worse."""

    def run(*options):
        out_dir = tmp_path / "out"
        shutil.copytree(finished, out_dir, dirs_exist_ok=True)
        resume = ("--init_from=resume", f"--out_dir={out_dir}", *WORSE)
        result = run_script("train.py", *resume, *options, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert load_checkpoint(str(out_dir / "ckpt.pt"))["iter_num"] == 22
        return out_dir, result.stdout

    return run


def same_bytes(a, b) -> bool:
    return a.read_bytes() == b.read_bytes()


def other_spelling(data_dir: str, tmp_path, name: str) -> str:
    """The path of the same folder, written in another way."""
    if name == "link":
        os.symlink(data_dir, tmp_path / "link")
    spellings = {
        "trailing slash": f"{data_dir}/",
        "dot": f"{os.path.dirname(data_dir)}/./{os.path.basename(data_dir)}",
        "relative": os.path.relpath(data_dir, tmp_path),
        "link": str(tmp_path / "link"),
    }
    return spellings[name]


@pytest.mark.parametrize("name", ["trailing slash", "dot", "relative", "link"])
def test_best_model_survives_another_spelling_of_the_data(
    name, resume_worse, finished, data_dir, tmp_path
):
    """The best loss was forgotten because the strings of --data_dir differ."""
    spelling = other_spelling(data_dir, tmp_path, name)
    out_dir, output = resume_worse(f"--data_dir={spelling}")
    assert same_bytes(out_dir / "best.pt", finished / "best.pt")
    assert same_bytes(out_dir / "model.bin", finished / "model.bin")
    assert "validation windows" not in output


def test_best_model_survives_half_the_batch_size(resume_worse, finished):
    """README advises it for less memory; twice the eval_iters then read the same windows."""
    halved = ("--batch_size=1", "--gradient_accumulation_steps=8", "--eval_iters=4")
    out_dir, _ = resume_worse(*halved)
    assert same_bytes(out_dir / "best.pt", finished / "best.pt")
    assert same_bytes(out_dir / "model.bin", finished / "model.bin")


@pytest.mark.parametrize("option", ["--eval_iters=3", "--batch_size=1"])
def test_other_windows_keep_the_earlier_best_beside(option, resume_worse, finished):
    accumulation = ("--gradient_accumulation_steps=8",) if "batch" in option else ()
    out_dir, output = resume_worse(option, *accumulation)
    assert same_bytes(out_dir / "best_000020.pt", finished / "best.pt")
    assert same_bytes(out_dir / "model_000020.bin", finished / "model.bin")
    new, earlier = (read_best_record(str(folder / "best.pt")) for folder in (out_dir, finished))
    assert new.eval_hash != earlier.eval_hash and math.isfinite(new.loss)
    assert output.count("the validation windows are not those") == 1
    assert "best_000020.pt" in output and "model_000020.bin" in output


def test_checkpoints_without_a_hash_compare_by_options(data_dir):
    """Those of earlier versions."""
    dataset = TokenDataset(os.path.join(data_dir, "tok512"), "val", 32, include_partial=True)
    config = TrainConfig(data_dir=data_dir, batch_size=2, eval_iters=2)
    run = types.SimpleNamespace(val_dataset=dataset, config=config)
    for saved, expected in (
        ({}, True),  # of llama2.c, which has no such options
        ({"batch_size": 1, "eval_iters": 4, "data_dir": f"{data_dir}/"}, True),
        ({"eval_iters": 3}, False),
        ({"data_dir": "elsewhere"}, False),
        ({"batch_size": "x"}, False),
        ({"data_dir": "\0"}, False),
        ({"data_dir": 3.5}, False),
    ):
        assert is_comparable(run, BestRecord(1.0, "", saved, 5)) == expected, saved


def fake_run(out_dir, loss: float = math.inf, eval_hash: str = "a") -> types.SimpleNamespace:
    """What the functions of best_model use of a run."""
    return types.SimpleNamespace(
        state=TrainState(iter_num=7, best_val_loss=loss),
        dist_ctx=DistContext(),
        checkpoints=make_manager(out_dir),
        config=types.SimpleNamespace(out_dir=str(out_dir)),
        eval_hash=eval_hash,
        log=lambda text: None,
        path=lambda name: os.path.join(out_dir, name),
    )


def save_best(path, loss: float, eval_hash: str = "a", step: int = 7) -> None:
    model = helpers.random_model(helpers.CHECKPOINT_MODEL, None)
    loss = torch.tensor(loss, dtype=torch.float64)
    entries = {"best_val_loss": loss, "eval_hash": eval_hash, "iter_num": step}
    save_checkpoint(str(path), make_checkpoint(model, **entries))


def test_best_loss_is_that_of_the_best_checkpoint(tmp_path):
    """best.pt is written before ckpt.pt: after a kill in between, ckpt.pt has an older loss."""
    save_best(tmp_path / "best.pt", 1.5, step=9)
    save_best(tmp_path / "ckpt.pt", 2.5)
    run = fake_run(tmp_path)
    restore_best(run)
    assert run.state.best_val_loss == 1.5


def test_without_a_best_checkpoint_the_next_evaluation_is_best(tmp_path):
    save_best(tmp_path / "ckpt.pt", 2.5)
    run = fake_run(tmp_path)
    restore_best(run)
    assert run.state.best_val_loss == math.inf and update_best(run, 9.0)


def test_model_bin_alone_has_the_loss_in_the_latest_checkpoint(tmp_path):
    save_best(tmp_path / "ckpt.pt", 2.5)
    (tmp_path / "model.bin").write_bytes(b"best")
    run = fake_run(tmp_path)
    restore_best(run)
    assert run.state.best_val_loss == 2.5 and not update_best(run, 3.0)


@pytest.mark.parametrize("damage", [cut, flip])
def test_damaged_best_checkpoint_is_renamed(damage, tmp_path):
    """The run kept it as its best model, unless it improved."""
    save_best(tmp_path / "best.pt", 1.5)
    damage(tmp_path / "best.pt")
    run = fake_run(tmp_path)
    restore_best(run)
    assert run.state.best_val_loss == math.inf and (tmp_path / "best.damaged").exists()


def test_best_checkpoint_stays_after_a_transient_error(tmp_path, monkeypatch):
    """It was renamed, and an earlier best.damaged was deleted."""

    def fail(*args, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    save_best(tmp_path / "best.pt", 1.5)
    (tmp_path / "best.damaged").write_bytes(b"earlier")
    with monkeypatch.context() as context:
        context.setattr(torch, "load", fail)
        with pytest.raises(OSError, match=r"Input/output error: .*best\.pt"):
            restore_best(fake_run(tmp_path))
    assert (tmp_path / "best.damaged").read_bytes() == b"earlier"
    assert read_best_record(str(tmp_path / "best.pt")).loss == 1.5


def test_kept_best_models_of_one_step_get_different_names(tmp_path):
    """The run returned to an older step and reached the step again."""
    for number in (1, 2):
        save_best(tmp_path / "best.pt", float(number), eval_hash=str(number))
        for _ in range(2):  # the second start finds the name that the first one gave
            restore_best(fake_run(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("best*")) == [
        "best.pt",
        "best_000007.pt",
        "best_000007_2.pt",
    ]
    assert read_best_record(str(tmp_path / "best_000007.pt")).loss == 1.0


def test_kept_model_bin_alone_has_no_step_in_its_name(tmp_path):
    """It got the step of the latest checkpoint, which is not that of the best model."""
    save_best(tmp_path / "ckpt.pt", 2.5, step=9)
    for content in (b"first", b"second"):
        (tmp_path / "model.bin").unlink(missing_ok=True)
        (tmp_path / "model.bin").write_bytes(content)
        for _ in range(2):  # the second start finds the name that the first one gave
            restore_best(fake_run(tmp_path, eval_hash="b"))
    assert (tmp_path / "model_earlier.bin").read_bytes() == b"first"
    assert (tmp_path / "model_earlier_2.bin").read_bytes() == b"second"
    assert not list(tmp_path.glob("model_0*"))
    archive_previous_run(str(tmp_path), {})
    assert os.listdir(tmp_path) == ["previous1"]


@pytest.mark.parametrize("later", [9, 30])
def test_kept_model_bin_has_the_step_of_the_best_checkpoint(later, tmp_path):
    save_best(tmp_path / "best.pt", 1.5)
    save_best(tmp_path / "ckpt.pt", 2.5, step=later)
    (tmp_path / "model.bin").write_bytes(b"best")
    restore_best(fake_run(tmp_path, eval_hash="b"))
    assert {path.name for path in tmp_path.glob("*_*")} == {"best_000007.pt", "model_000007.bin"}


def save(run, best: bool) -> None:
    model = random_model(helpers.CHECKPOINT_MODEL, None)
    loss = torch.tensor(run.state.best_val_loss)
    state = make_checkpoint(model, iter_num=run.state.iter_num, best_val_loss=loss)
    run.checkpoints.save(state, model.args, best)
    run.checkpoints.flush()
    run.state.iter_num += 1


def test_deleted_best_model_is_replaced_by_the_latest_state(tmp_path):
    """Without an improvement after it, the run ended with neither best.pt nor model.bin."""
    run = fake_run(tmp_path)
    run.checkpoints.export_best = lambda args, weights: (tmp_path / "model.bin").write_bytes(b"x")
    save(run, update_best(run, 2.0))
    save(run, update_best(run, 3.0))
    assert checkpoint_steps(tmp_path)["best.pt"] == 7
    os.remove(tmp_path / "best.pt")
    os.remove(tmp_path / "model.bin")
    save(run, update_best(run))
    assert checkpoint_steps(tmp_path)["best.pt"] == 9 and (tmp_path / "model.bin").exists()
    assert run.state.best_val_loss == math.inf and update_best(run, 3.0)


def test_deleted_tokenizer_leaves_the_best_model(tmp_path):
    """The best model was replaced by the latest state: a missing tokenizer counted as a missing
    folder."""
    run = fake_run(tmp_path)
    save(run, update_best(run, 2.0))
    os.remove(tmp_path / "tokenizer.model")
    save(run, update_best(run))
    assert checkpoint_steps(tmp_path) == {
        "best.pt": 7,
        "ckpt.pt": 8,
        "ckpt_000007.pt": 7,
        "ckpt_000008.pt": 8,
    }
    assert (tmp_path / "tokenizer.model").read_bytes() == b"x"


def test_deleted_model_bin_is_written_from_the_best_checkpoint(tmp_path):
    run = fake_run(tmp_path)
    exported = []
    run.checkpoints.export_best = lambda args, weights: exported.append(weights)
    save(run, update_best(run, 2.0))
    save(run, update_best(run))
    best = load_checkpoint(str(tmp_path / "best.pt"))["model"]
    assert len(exported) == 2 and helpers.same_tensors(exported[1], best)
