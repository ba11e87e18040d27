"""
train.py as its users run it: the real command on a tiny model.
"""

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import model as model_module
import train as train_module
from checkpoints.file import load_checkpoint
from formats import llama2c
from model import ModelArgs, Transformer
from runtime.atomic_files import run_lock
from tests.helpers import TINY_RUN, load_model, read_metrics, same_tensors, same_training_state
from tests.processes import ROOT, run_ranks, train_on_ranks
from textdata.token_shards import TokenDataset
from training.monitor import check_against_cpu
from training.resume import find_checkpoint


@pytest.fixture
def train(run_script, data_dir):
    def run(*args, **options):
        result = run_script("train.py", f"--data_dir={data_dir}", *args, **options)
        assert "Traceback" not in result.stderr
        return result

    return run


def test_run_leaves_all_documented_files(train, tmp_path):
    result = train(*TINY_RUN, "--max_iters=40", f"--out_dir={tmp_path}", "--sample_interval=40")
    assert result.returncode == 0, result.stderr
    assert "a sample after 40 steps" in result.stdout
    assert read_metrics(tmp_path, "val_loss")[-1] < read_metrics(tmp_path, "val_loss")[0] - 1
    assert (
        all(math.isfinite(loss) for loss in read_metrics(tmp_path, "loss"))
        and len(read_metrics(tmp_path, "loss")) == 40
    )
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    left = {
        "ckpt.pt",
        "ckpt_000020.pt",
        "ckpt_000040.pt",
        "best.pt",
        "model.bin",
        "metrics.jsonl",
        "loss.png",
        ".lock",
    }
    left |= {"tokenizer.model", "tokenizer.bin"}
    assert set(os.listdir(tmp_path)) == left
    best, checkpoint = load_model(str(tmp_path / "best.pt"))
    assert checkpoint["best_val_loss"] == min(read_metrics(tmp_path, "val_loss"))
    assert same_tensors(
        best.state_dict(), llama2c.read(str(tmp_path / "model.bin")).load().state_dict()
    )


@pytest.mark.parametrize(
    "choices",
    [["--dtype=float32"], ["--dtype=bfloat16"], ["--optimizer=muon", "--lr_schedule=wsd"]],
    ids=["float32", "bfloat16", "muon and wsd"],
)
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(train, tmp_path, choices):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    options = (*TINY_RUN, *choices, "--dropout=0.2", "--max_iters=40", "--keep_checkpoints=9")
    assert train(*options, f"--out_dir={straight}").returncode == 0
    resumed.mkdir()
    shutil.copy(straight / "ckpt_000020.pt", resumed / "ckpt.pt")
    assert train("--init_from=resume", f"--out_dir={resumed}").returncode == 0
    assert same_training_state(straight / "ckpt.pt", resumed / "ckpt.pt")
    assert read_metrics(straight, "loss")[20:] == read_metrics(resumed, "loss")
    assert read_metrics(straight, "val_loss")[1:] == read_metrics(resumed, "val_loss")


def test_batches_and_processes_do_not_change_the_result(train, data_dir, tmp_path):
    options = (*TINY_RUN, f"--data_dir={data_dir}", "--max_iters=20")
    runs = {name: tmp_path / name for name in ("accumulated", "whole", "two processes")}
    assert train(*options, f"--out_dir={runs['accumulated']}").returncode == 0
    whole = ("--batch_size=8", "--gradient_accumulation_steps=1")
    assert train(*options, *whole, f"--out_dir={runs['whole']}").returncode == 0
    train_on_ranks(2, *options, f"--out_dir={runs['two processes']}")
    losses, norms = (
        {name: read_metrics(folder, key) for name, folder in runs.items()}
        for key in ("loss", "grad_norm")
    )
    assert len(losses["whole"]) == 20
    for name in ("whole", "two processes"):
        assert losses[name] == pytest.approx(losses["accumulated"], abs=1e-5)
        assert norms[name] == pytest.approx(norms["accumulated"], abs=1e-4)


@pytest.mark.slow
def test_muon_trains_alike_on_any_number_of_ranks(train, data_dir, tmp_path):
    """Less closely than AdamW: rounding in its bfloat16 products amplifies differences."""
    options = (*TINY_RUN, f"--data_dir={data_dir}", "--max_iters=20", "--optimizer=muon")
    assert train(*options, f"--out_dir={tmp_path / 'one'}").returncode == 0
    train_on_ranks(2, *options, f"--out_dir={tmp_path / 'two'}")
    assert (
        read_metrics(tmp_path / "one", "loss")[-1] < read_metrics(tmp_path / "one", "loss")[0] - 1
    )
    assert read_metrics(tmp_path / "two", "loss") == pytest.approx(
        read_metrics(tmp_path / "one", "loss"), abs=1e-2
    )


def test_resuming_with_another_optimizer_is_refused_with_what_to_do(train, tmp_path):
    assert train(*TINY_RUN, "--max_iters=2", f"--out_dir={tmp_path}").returncode == 0
    result = train("--init_from=resume", "--optimizer=muon", f"--out_dir={tmp_path}")
    assert (
        result.returncode == 1
        and "are adamw's" in result.stderr
        and "--init_from=" in result.stderr
    )
    assert train("--init_from=resume", "--optimizer=adamw", f"--out_dir={tmp_path}").returncode == 0


@pytest.mark.slow
def test_dropout_is_the_same_on_any_number_of_processes(train, data_dir, tmp_path):
    options = (*TINY_RUN, f"--data_dir={data_dir}", "--max_iters=5", "--dropout=0.3")
    assert train(*options, f"--out_dir={tmp_path / 'one'}").returncode == 0
    train_on_ranks(2, *options, f"--out_dir={tmp_path / 'two'}")
    assert read_metrics(tmp_path / "two", "loss") == pytest.approx(
        read_metrics(tmp_path / "one", "loss"), abs=1e-5
    )


def test_steps_that_do_not_divide_among_the_processes_are_refused(data_dir, tmp_path):
    for result in run_ranks(
        "train.py", 3, *TINY_RUN, f"--data_dir={data_dir}", f"--out_dir={tmp_path}"
    ):
        assert result.returncode == 1 and "give a multiple of 3" in result.stderr


def test_nan_stops_the_run_and_keeps_a_good_checkpoint(train, tmp_path):
    assert train(*TINY_RUN, "--max_iters=20", f"--out_dir={tmp_path}").returncode == 0
    blown_up = ("--learning_rate=1e30", "--grad_clip=0", "--decay_lr=False", "--max_iters=60")
    result = train(
        "--init_from=resume", f"--out_dir={tmp_path}", *blown_up, "--checkpoint_interval=1"
    )
    assert result.returncode == 1 and "ckpt.pt of step 2" in result.stderr
    kept = load_checkpoint(str(tmp_path / "ckpt.pt"))
    assert all(weight.isfinite().all() for weight in kept["model"].values())


DIVERGING = (
    *TINY_RUN,
    "--learning_rate=1e30",
    "--warmup_iters=0",
    "--grad_clip=0",
    "--eval_interval=3",
    "--log_interval=50",
    "--checkpoint_interval=0",
    "--max_iters=60",
)


def test_nan_at_an_evaluation_names_the_step(train, tmp_path):
    """With log_interval above eval_interval the error named the first weight with NaN only."""
    result = train(*DIVERGING, f"--out_dir={tmp_path}")
    assert result.returncode == 1
    assert (
        "step 1, which reads from sequence 8 on: the validation loss after it is" in result.stderr
    )
    assert "ckpt.pt of step 0 is intact" in result.stderr and "--debug_step=1" in result.stderr


def test_all_ranks_name_the_step_of_nan(data_dir, tmp_path):
    """Rank 1 said that nothing was saved."""
    options = (*DIVERGING, f"--data_dir={data_dir}", f"--out_dir={tmp_path}")
    first, second = run_ranks("train.py", 2, *options)
    for result in (first, second):
        assert result.returncode == 1 and "step 1, which reads from sequence 8" in result.stderr
    assert "ckpt.pt of step 0 is intact" in first.stderr and "nothing is saved" not in second.stderr


def test_resuming_a_complete_run_keeps_its_checkpoint(train, tmp_path):
    """It was written again with the peak learning rate, and no line said that it was complete."""
    assert train(*TINY_RUN, "--max_iters=20", f"--out_dir={tmp_path}").returncode == 0
    names = ("ckpt.pt", "ckpt_000020.pt", "best.pt", "model.bin", "metrics.jsonl")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    result = train("--init_from=resume", f"--out_dir={tmp_path}")
    assert result.returncode == 0 and "the run is complete at step 20" in result.stdout
    assert {name: (tmp_path / name).read_bytes() for name in names} == before


def test_state_saved_again_keeps_its_learning_rate(train, tmp_path):
    """A resumed run that evaluates first writes best.pt before its first step."""
    assert train(*TINY_RUN, "--max_iters=20", f"--out_dir={tmp_path}").returncode == 0
    rates = lambda: [g["lr"] for g in load_checkpoint(best)["optimizer"]["param_groups"]]
    best = str(tmp_path / "best.pt")
    before = rates()
    os.remove(best)
    os.remove(tmp_path / "model.bin")
    assert train("--init_from=resume", f"--out_dir={tmp_path}").returncode == 0
    assert rates() == before and before[0] < 1e-2


def test_checkpoints_are_looked_for_under_the_lock(train, tmp_path, monkeypatch):
    """A second process read the older checkpoint while the first still saved, then overwrote the
    newer one."""
    looks = []

    def locked_find(config):
        with pytest.raises(ValueError, match="another process"), run_lock(config.out_dir):
            pass
        looks.append(config.out_dir)
        return find_checkpoint(config)

    monkeypatch.setattr(train_module, "find_checkpoint", locked_find)
    options = (*TINY_RUN, "--max_iters=1", f"--out_dir={tmp_path}")
    for init_from in ("auto", "resume"):
        assert train(*options, f"--init_from={init_from}").returncode == 0
    assert len(looks) == 2
    monkeypatch.setattr(train_module, "find_checkpoint", lambda config: pytest.fail("looked"))
    with run_lock(str(tmp_path)):
        result = train(*options, "--init_from=auto")
    assert result.returncode == 1 and "another process is writing here" in result.stderr


def test_resuming_nothing_leaves_no_folder(train, tmp_path):
    result = train("--init_from=resume", f"--out_dir={tmp_path / 'typo'}")
    assert result.returncode == 1 and "there is no checkpoint" in result.stderr
    assert not (tmp_path / "typo").exists()


def test_float16_overflow_skips_the_step_and_lowers_the_scale(train, tmp_path):
    options = (*TINY_RUN, "--dtype=float16", "--max_iters=3", "--checkpoint_interval=1")
    assert train(*options, f"--out_dir={tmp_path}").returncode == 0
    before = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    del before["sha256"]  # of what was written
    before["scaler"]["scale"] = 2.0**100
    torch.save(before, tmp_path / "ckpt.pt")
    assert train("--init_from=resume", "--max_iters=4", f"--out_dir={tmp_path}").returncode == 0
    after = load_checkpoint(str(tmp_path / "ckpt.pt"))
    assert after["iter_num"] == 4 and after["scaler"]["scale"] == 2.0**99
    assert same_tensors(before["model"], after["model"])


def test_interrupted_run_saves_and_resumes(train, data_dir, tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert train(*TINY_RUN, "--max_iters=120", f"--out_dir={straight}").returncode == 0
    for number, step in ((signal.SIGINT, 10), (signal.SIGTERM, 60)):
        interrupt(stopped, data_dir, number, step)
    assert train("--init_from=resume", f"--out_dir={stopped}").returncode == 0
    assert same_training_state(straight / "ckpt.pt", stopped / "ckpt.pt")
    assert read_metrics(straight, "loss") == read_metrics(stopped, "loss")


def interrupt(out_dir: Path, data_dir, number: signal.Signals, step: int):
    """Let a run of 120 steps begin, or go on, and interrupt it at this step."""
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *TINY_RUN,
        "--max_iters=120",
        "--checkpoint_interval=0",
    ]
    process = subprocess.Popen(
        [*command, f"--data_dir={data_dir}", f"--out_dir={out_dir}", "--init_from=auto"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith(f"{step} |"):
            process.send_signal(number)
            break
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "--init_from=resume" in rest and "Traceback" not in errors
    assert step < load_checkpoint(str(out_dir / "ckpt.pt"))["iter_num"] < 120


def test_a_checkpoint_of_llama2c_goes_on_here(train, tmp_path):
    assert train(*TINY_RUN, "--max_iters=4", f"--out_dir={tmp_path}").returncode == 0
    ours = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    theirs = {key: ours[key] for key in ("optimizer", "model_args", "iter_num", "best_val_loss")}
    theirs["model"] = {f"_orig_mod.{name}": weight for name, weight in ours["model"].items()}
    known = (
        "data_dir",
        "batch_size",
        "max_seq_len",
        "vocab_source",
        "vocab_size",
        "gradient_accumulation_steps",
    )
    theirs["config"] = {name: ours["config"][name] for name in known} | {
        "device": "cuda",
        "wandb_log": False,
    }
    torch.save(theirs, tmp_path / "ckpt.pt")
    result = train(
        "--init_from=resume",
        "--max_iters=5",
        "--compile=False",
        "--eval_iters=1",
        f"--out_dir={tmp_path}",
    )
    assert result.returncode == 0, result.stderr
    assert load_checkpoint(str(tmp_path / "ckpt.pt"))["iter_num"] == 5


def test_resuming_refuses_another_architecture_but_accepts_another_spelling(train, tmp_path):
    assert train(*TINY_RUN, "--max_iters=2", f"--out_dir={tmp_path}").returncode == 0
    result = train("--init_from=resume", "--dim=64", "--n_kv_heads=4", f"--out_dir={tmp_path}")
    assert (
        result.returncode == 1 and "--dim=64" in result.stderr and "--n_kv_heads=4" in result.stderr
    )
    same = ("--dim=32", "--hidden_dim=96", "--max_iters=3")
    assert train("--init_from=resume", *same, f"--out_dir={tmp_path}").returncode == 0


def test_new_run_archives_the_earlier_one(train, tmp_path):
    assert train(*TINY_RUN, "--max_iters=1", f"--out_dir={tmp_path}").returncode == 0
    earlier = (tmp_path / "ckpt.pt").read_bytes()
    assert train(*TINY_RUN, "--max_iters=2", f"--out_dir={tmp_path}").returncode == 0
    assert (tmp_path / "previous1" / "ckpt.pt").read_bytes() == earlier
    assert load_checkpoint(str(tmp_path / "ckpt.pt"))["iter_num"] == 2


def test_eval_only_writes_nothing_and_repeats_the_loss(train, tmp_path):
    everything = ("--eval_iters=0", "--batch_size=64", "--gradient_accumulation_steps=1")
    assert train(*TINY_RUN, *everything, "--max_iters=1", f"--out_dir={tmp_path}").returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result = train("--init_from=resume", "--eval_only=True", f"--out_dir={tmp_path}")
    assert (
        result.returncode == 0
        and f"val loss {read_metrics(tmp_path, 'val_loss')[-1]:.4f}" in result.stdout
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_recomputing_trains_the_same_model(train, run_script, data_dir, tmp_path, monkeypatch):
    kept, recomputed = tmp_path / "kept", tmp_path / "recomputed"
    options = (*TINY_RUN, "--dropout=0.2", "--max_iters=3", f"--data_dir={data_dir}")
    assert train(*options, f"--out_dir={kept}").returncode == 0
    blocks, recompute = [], model_module.checkpoint

    def count(block, *inputs, **how):
        blocks.append(block)
        return recompute(block, *inputs, **how)

    monkeypatch.setattr(model_module, "checkpoint", count)
    status, _, errors = run_script(
        "train.py", *options, "--activation_checkpointing=True", f"--out_dir={recomputed}"
    )
    assert status == 0, errors
    assert len(blocks) == 3 * 4 * 2  # steps, micro-batches, blocks
    assert same_training_state(kept / "ckpt.pt", recomputed / "ckpt.pt")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile takes a C++ compiler")
def test_a_compiled_run_saves_plain_names_and_trains_alike(train, tmp_path):
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    assert train(*TINY_RUN, "--max_iters=5", f"--out_dir={plain}").returncode == 0
    result = train(
        *TINY_RUN, "--max_iters=5", "--compile=True", f"--out_dir={compiled}", timeout=300
    )
    assert result.returncode == 0 and "cannot compile" not in result.stdout
    assert read_metrics(compiled, "loss") == pytest.approx(read_metrics(plain, "loss"), abs=1e-4)
    assert load_model(str(compiled / "ckpt.pt"))


def test_a_machine_that_cannot_compile_trains_all_the_same(train, tmp_path):
    without_compiler = {
        "CXX": "/nonexistent/compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    options = (*TINY_RUN, "--max_iters=2", "--compile=True", f"--out_dir={tmp_path / 'out'}")
    result = train(*options, env=without_compiler)
    assert result.returncode == 0 and result.stdout.count("cannot compile here") == 1
    assert len(read_metrics(tmp_path / "out", "loss")) == 2


def test_wandb_gets_metrics_if_enabled(train, tmp_path):
    (tmp_path / "wandb.py").write_text(
        "def init(**options): print('wandb init', options['project'], options['config']['dim'])\n"
        "def log(figures, step): print('wandb log', step, *figures)\n"
    )
    options = (*TINY_RUN, "--max_iters=1", "--wandb_log=True", f"--out_dir={tmp_path}")
    result = train(*options, env={"PYTHONPATH": str(tmp_path)})
    assert "wandb init cria 32" in result.stdout and "wandb log 0 loss" in result.stdout


def test_wandb_that_cannot_start_leaves_the_earlier_run(train, tmp_path):
    """Without a key, wandb's traceback came after the earlier run had been moved aside."""
    out_dir = tmp_path / "out"
    assert train(*TINY_RUN, "--max_iters=1", f"--out_dir={out_dir}").returncode == 0
    before = sorted(os.listdir(out_dir))
    options = (*TINY_RUN, "--max_iters=1", "--wandb_log=True", f"--out_dir={out_dir}")
    (tmp_path / "wandb.py").write_text(
        "def init(**options): raise RuntimeError('No API key configured.\\nLog in.')\n"
    )
    result = train(*options, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "wandb cannot start (No API key configured.); run wandb login" in result.stderr
    assert sorted(os.listdir(out_dir)) == before


@pytest.mark.parametrize("is_right", [True, False])
def test_device_that_differs_from_the_cpu_is_refused(token_folder, is_right):
    class Model(Transformer):
        def cpu(self):  # the copy that the device is compared with
            if not is_right:
                torch.nn.init.normal_(self.output.weight)
            return self

    model = Model(ModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=512, max_seq_len=16))
    run = SimpleNamespace(
        model=model,
        device="cpu",
        val_dataset=TokenDataset(token_folder, "val", 16, include_partial=True),
    )
    with (
        contextlib.nullcontext()
        if is_right
        else pytest.raises(ValueError, match="where the CPU computes")
    ):
        check_against_cpu(run)
