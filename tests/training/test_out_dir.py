import functools
import json
import os
import shutil
import types

import pytest

from checkpoints.file import load_checkpoint, save_checkpoint
from checkpoints.latest import load_latest, read_step
from checkpoints.manager import CheckpointManager
from checkpoints.sharded import write_single_rank
from formats.model_metadata import ModelMetadata
from runtime.distributed import DistContext
from tests import helpers
from tests.helpers import make_checkpoint, small_llama3_tokenizer
from train import TrainConfig
from training.metrics import MetricsLogger
from training.out_dir import (
    adopt_checkpoint,
    archive_previous_run,
    lock_out_dir,
    prepare_out_dir,
    remove_partial_files,
    repair_out_dir,
)
from training.resume import StartPoint
from training.state import TrainState

random_model = functools.partial(helpers.random_model, helpers.CHECKPOINT_MODEL, None)


def save_step(path, step: int) -> str:
    save_checkpoint(str(path), make_checkpoint(random_model(), iter_num=step))
    return str(path)


def test_resumed_checkpoint_gets_a_name_with_its_step(tmp_path):
    """A checkpoint of llama2.c, or of an earlier version, has the name ckpt.pt only."""
    start = StartPoint(path=save_step(tmp_path / "ckpt.pt", 5))
    adopt_checkpoint(str(tmp_path), start, step=5)
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "ckpt_000005.pt"]
    assert os.path.samefile(tmp_path / "ckpt.pt", tmp_path / "ckpt_000005.pt")


def test_best_checkpoint_as_fallback_becomes_the_latest(tmp_path):
    start = StartPoint(path=save_step(tmp_path / "best.pt", 5))
    adopt_checkpoint(str(tmp_path), start, step=5)
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "ckpt.pt", "ckpt_000005.pt"]


def test_damaged_checkpoints_are_renamed_and_none_is_removed(tmp_path):
    for name, step in (("ckpt.pt", 10), ("ckpt_000010.pt", 10), ("ckpt_000005.pt", 5)):
        save_step(tmp_path / name, step)
    damaged = [str(tmp_path / "ckpt.pt"), str(tmp_path / "ckpt_000010.pt")]
    start = StartPoint(path=str(tmp_path / "ckpt_000005.pt"), damaged=damaged)
    adopt_checkpoint(str(tmp_path), start, step=5)
    assert sorted(os.listdir(tmp_path)) == [
        "ckpt.damaged",
        "ckpt.pt",
        "ckpt_000005.pt",
        "ckpt_000010.damaged",
    ]
    assert load_checkpoint(str(tmp_path / "ckpt.pt"))["iter_num"] == 5


@pytest.mark.parametrize("copy", [os.link, shutil.copy, shutil.move])
def test_return_to_an_older_step_archives_later_checkpoints(copy, tmp_path, capsys):
    """Someone made an older checkpoint ckpt.pt: the later steps run again."""
    for step in (5, 10, 15):
        save_step(tmp_path / f"ckpt_{step:06d}.pt", step)
    save_step(tmp_path / "best.pt", 15)
    (tmp_path / "model.bin").touch()
    copy(tmp_path / "ckpt_000005.pt", tmp_path / "ckpt.pt")
    adopt_checkpoint(str(tmp_path), StartPoint(path=str(tmp_path / "ckpt.pt")), step=5)
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "ckpt_000005.pt", "previous1"]
    archived = ["best.pt", "ckpt_000010.pt", "ckpt_000015.pt", "model.bin"]
    assert sorted(os.listdir(tmp_path / "previous1")) == archived
    assert "moved 2 checkpoint(s) of steps after 5" in capsys.readouterr().out


def test_best_checkpoint_written_just_before_a_kill_stays(tmp_path):
    """best.pt is written before ckpt.pt: killed in between, it is of the later step."""
    save_step(tmp_path / "best.pt", 10)
    start = StartPoint(path=save_step(tmp_path / "ckpt.pt", 5))
    adopt_checkpoint(str(tmp_path), start, step=5)
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "ckpt.pt", "ckpt_000005.pt"]


def test_damaged_latest_checkpoint_of_the_other_form_is_renamed(tmp_path):
    (tmp_path / "ckpt.dcp").mkdir()
    (tmp_path / "ckpt.dcp" / "run.pt").write_bytes(b"damaged")
    start = StartPoint(path=save_step(tmp_path / "ckpt.pt", 10))
    adopt_checkpoint(str(tmp_path), start, step=10)
    assert sorted(os.listdir(tmp_path)) == ["ckpt.damaged.dcp", "ckpt.pt", "ckpt_000010.pt"]


def test_latest_folder_restored_from_a_killed_swap_is_relinked(tmp_path):
    """ckpt.dcp of step 5 came back from .partial.old while the run resumed from step 10."""
    for name, step in (("ckpt.dcp", 5), ("ckpt_000010.dcp", 10)):
        file = load_checkpoint(save_step(tmp_path / "file.pt", step))
        write_single_rank(file, str(tmp_path / name))
    os.remove(tmp_path / "file.pt")
    start = StartPoint(path=str(tmp_path / "ckpt_000010.dcp"))
    adopt_checkpoint(str(tmp_path), start, step=10)
    assert read_step(str(tmp_path / "ckpt.dcp")) == 10


def test_older_latest_checkpoint_of_the_other_form_keeps_its_step(tmp_path):
    """A run that resumes with FSDP, and then without, has a ckpt.dcp and a ckpt.pt."""
    file = load_checkpoint(save_step(tmp_path / "file.pt", 5))
    write_single_rank(file, str(tmp_path / "ckpt.dcp"))
    os.remove(tmp_path / "file.pt")
    start = StartPoint(path=save_step(tmp_path / "ckpt.pt", 10))
    adopt_checkpoint(str(tmp_path), start, step=10)
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "ckpt_000005.dcp", "ckpt_000010.pt"]


def test_files_of_an_earlier_run_are_archived_and_others_stay(tmp_path):
    for name in ("ckpt.pt", "ckpt_000005.pt", "best.pt", "metrics.jsonl", "notes.txt"):
        (tmp_path / name).touch()
    archive_previous_run(str(tmp_path), {})
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "previous1"]
    archive_previous_run(str(tmp_path), {})
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "previous1"]


def test_model_bin_alone_is_archived_too(tmp_path):
    """A new run overwrote the best model of a folder without checkpoints."""
    (tmp_path / "model.bin").touch()
    archive_previous_run(str(tmp_path), {})
    assert os.listdir(tmp_path / "previous1") == ["model.bin"]


RUN_FILES = ("ckpt.pt", "ckpt_000005.pt", "best.pt", "best_000002.pt", "model.bin", "metrics.jsonl")


@pytest.mark.parametrize("moved", range(len(RUN_FILES) + 1))
def test_archiving_that_was_killed_is_completed(moved, tmp_path, monkeypatch):
    """After a kill, --init_from=auto resumed from the files of the earlier run that were left."""
    for name in RUN_FILES:
        (tmp_path / name).write_text(name)
    rename = os.rename
    calls = []

    def killed(source, target):
        if len(calls) == moved:
            raise KeyboardInterrupt
        calls.append(source)
        rename(source, target)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(os, "rename", killed)
        archive_previous_run(str(tmp_path), {})
    repair_out_dir(str(tmp_path))
    assert os.listdir(tmp_path) == ["previous1"] and load_latest(str(tmp_path)) is None
    assert sorted(os.listdir(tmp_path / "previous1")) == sorted(RUN_FILES)


def test_unfinished_archive_does_not_take_later_files(tmp_path, capsys):
    """They would overwrite those of the same name."""
    (tmp_path / "previous1.partial").mkdir()
    (tmp_path / "previous1.partial" / "ckpt.pt").write_text("earlier")
    (tmp_path / "ckpt.pt").write_text("later")
    repair_out_dir(str(tmp_path))
    assert (tmp_path / "ckpt.pt").read_text() == "later"
    assert (tmp_path / "previous1" / "ckpt.pt").read_text() == "earlier"
    output = capsys.readouterr().out  # it was "moved the earlier run"
    assert "moved" not in output and "those of a later run stay" in output


def test_completed_archive_is_reported(tmp_path, capsys):
    (tmp_path / "previous1.partial").mkdir()
    (tmp_path / "previous1.partial" / "ckpt.pt").write_text("moved before")
    (tmp_path / "best.pt").write_text("left")
    repair_out_dir(str(tmp_path))
    assert "moved the earlier run" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "previous1")) == ["best.pt", "ckpt.pt"]


def test_partial_files_of_a_killed_run_are_removed(tmp_path):
    names = ("ckpt_000005.pt.12.partial", "ckpt.pt.12.partial", "model.bin.12.partial")
    for name in (*names, "mine.partial", "ckpt.pt"):
        (tmp_path / name).touch()
    remove_partial_files(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "mine.partial"]


def fake_run(out_dir, init_from: str, step: int = 0) -> types.SimpleNamespace:
    """What prepare_out_dir uses of a run."""
    manager = CheckpointManager(str(out_dir), 1, DistContext(), {"tokenizer.model": b"x"})
    return types.SimpleNamespace(
        config=types.SimpleNamespace(out_dir=str(out_dir), init_from=init_from, wandb_log=False),
        state=TrainState(iter_num=step),
        model=random_model(),
        metadata=None,
        tokenizer=None,
        metrics=MetricsLogger(str(out_dir)),
        checkpoints=manager,
        path=lambda name: os.path.join(out_dir, name),
    )


def test_new_run_archives_what_a_killed_replacement_left(tmp_path):
    """The old ckpt.dcp came back from .partial.old into the folder of the new run."""
    file = load_checkpoint(save_step(tmp_path / "file.pt", 5))
    write_single_rank(file, str(tmp_path / "ckpt.dcp.12.partial.old"))
    os.remove(tmp_path / "file.pt")
    save_step(tmp_path / "ckpt_000005.pt.12.partial", 5)
    repair_out_dir(str(tmp_path))
    prepare_out_dir(fake_run(tmp_path, "scratch"), StartPoint())
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "previous1", "tokenizer.model"]
    assert os.listdir(tmp_path / "previous1") == ["ckpt.dcp"]


@pytest.mark.parametrize(
    "vocab_size, changes, reason",
    [
        (512, {"metadata": ModelMetadata(stop_ids=(350,))}, "ends a text with token 350"),
        (576, {}, "576 embeddings and 512 tokens"),
        (None, {"tokenizer": small_llama3_tokenizer()}, "tokenizer.bin cannot hold"),
        (512, {}, None),
    ],
)
def test_run_says_why_it_writes_no_model_bin(
    vocab_size, changes, reason, tokenizer, tmp_path, capsys
):
    """Only an architecture that model.bin cannot store was reported."""
    run = fake_run(tmp_path, "scratch")
    vars(run).update({"tokenizer": tokenizer, **changes})
    run.model = random_model(vocab_size=vocab_size or run.tokenizer.vocab_size)
    prepare_out_dir(run, StartPoint())
    printed = capsys.readouterr().out
    assert ("no model.bin is written: " in printed) is (reason is not None)
    assert (reason or "") in printed


def test_resumed_run_finds_a_complete_folder(tmp_path):
    records = [{"iter": step, "loss": 1.0} for step in range(8)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "model.bin.12.partial").touch()
    start = StartPoint(path=save_step(tmp_path / "ckpt.pt", 5))
    run = fake_run(tmp_path, "resume", step=5)
    repair_out_dir(str(tmp_path))
    prepare_out_dir(run, start)
    names = ["ckpt.pt", "ckpt_000005.pt", "metrics.jsonl", "tokenizer.model"]
    assert sorted(os.listdir(tmp_path)) == names
    assert [record["iter"] for record in run.metrics.records] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("file", ["config.json", "params.json"])
@pytest.mark.parametrize("init_from", ["scratch", "auto", "the folder"])
def test_folder_of_a_pretrained_model_is_refused(file, init_from, tmp_path):
    """A run overwrote its tokenizer.json and tokenizer_config.json."""
    for name in (file, "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("its own")
    options = TrainConfig(out_dir=str(tmp_path), init_from=init_from)
    with pytest.raises(ValueError, match=rf"{file}.*give another --out_dir"), lock_out_dir(options):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted([file, "tokenizer.json", "tokenizer_config.json"])


@pytest.mark.parametrize("init_from", ["resume", "auto"])
def test_run_resumes_beside_a_file_named_config_json(init_from, tmp_path):
    (tmp_path / "config.json").touch()
    save_step(tmp_path / "ckpt.pt", 5)
    with lock_out_dir(TrainConfig(out_dir=str(tmp_path), init_from=init_from)):
        pass


def test_different_tokenizer_in_the_folder_is_moved(tmp_path):
    """It was overwritten if the folder had no checkpoint."""
    (tmp_path / "tokenizer.model").write_bytes(b"y")
    prepare_out_dir(fake_run(tmp_path, "scratch"), StartPoint())
    assert (tmp_path / "tokenizer.model").read_bytes() == b"x"
    assert (tmp_path / "previous1" / "tokenizer.model").read_bytes() == b"y"


def test_equal_tokenizer_in_the_folder_stays(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    prepare_out_dir(fake_run(tmp_path, "scratch"), StartPoint())
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "tokenizer.model"]
