import errno
import functools
import os

import pytest
import torch

from checkpoints import latest as latest_module
from checkpoints.file import load_checkpoint, save_checkpoint
from checkpoints.latest import (
    latest_path,
    load_latest,
    numbered_checkpoints,
    read_best_record,
    read_step,
    step_path,
)
from checkpoints.links import link_checkpoint
from checkpoints.sharded import write_single_rank
from tests import helpers
from tests.checkpoints.test_manager import checkpoint_steps, save_steps
from tests.helpers import make_checkpoint

random_model = functools.partial(helpers.random_model, helpers.CHECKPOINT_MODEL, None)


def cut(path):
    """Keep the first half of a file."""
    os.truncate(path, os.path.getsize(path) // 2)


def flip(path):
    """Change one bit of a weight, and the archive's own checksum with it, in the same file."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model"]["norm.weight"].view(torch.int32)[3] ^= 1
    torch.save(checkpoint, path)


@pytest.mark.parametrize("damage", [cut, flip, os.remove], ids=["cut", "flip", "remove"])
def test_damaged_latest_checkpoint_falls_back_to_the_previous_step(damage, tmp_path):
    """ckpt.pt and ckpt_000015.pt are one file: what damages the one damages the other."""
    save_steps(tmp_path, [5, 10, 15], keep_checkpoints=2)
    damage(tmp_path / "ckpt.pt")
    if damage is os.remove:
        os.remove(tmp_path / "ckpt_000015.pt")
    messages = []
    found = load_latest(str(tmp_path), messages.append)
    assert found.checkpoint["iter_num"] == 10
    assert found.path == str(tmp_path / "ckpt_000010.pt")
    assert len(messages) == 1
    assert "ckpt.pt" in messages[0] and f"using {found.path}, of step 10" in messages[0]


def test_fallback_goes_by_step_and_not_by_modification_time(tmp_path):
    """In a folder copied without times, a run resumed from best.pt of step 0."""
    save_steps(tmp_path, [5, 10, 15], keep_checkpoints=2, best_step=5)
    cut(tmp_path / "ckpt.pt")
    os.utime(tmp_path / "best.pt", (2e9, 2e9))
    assert load_latest(str(tmp_path), lambda text: None).path == str(tmp_path / "ckpt_000010.pt")


@pytest.mark.parametrize("later", ["ckpt.pt", "ckpt.dcp"])
def test_file_and_folder_are_compared_by_step(later, tmp_path):
    """In a folder copied without times, the modification times say nothing."""
    file_step = 10 if later == "ckpt.pt" else 5
    save_checkpoint(
        str(tmp_path / "x.pt"), make_checkpoint(random_model(), iter_num=15 - file_step)
    )
    write_single_rank(load_checkpoint(str(tmp_path / "x.pt")), str(tmp_path / "ckpt.dcp"))
    os.remove(tmp_path / "x.pt")
    save_checkpoint(str(tmp_path / "ckpt.pt"), make_checkpoint(random_model(), iter_num=file_step))
    for time in (1e9, 2e9):
        os.utime(tmp_path / "ckpt.pt", (time, time))
        os.utime(tmp_path / "ckpt.dcp" / "run.pt", (3e9 - time, 3e9 - time))
        assert latest_path(str(tmp_path)) == str(tmp_path / later)
        assert load_latest(str(tmp_path)).checkpoint["iter_num"] == 10


def test_unreadable_latest_beside_another_is_reported(tmp_path):
    save_steps(tmp_path, [5, 10], keep_checkpoints=1)
    (tmp_path / "ckpt.dcp").mkdir()
    (tmp_path / "ckpt.dcp" / "run.pt").write_bytes(b"damaged")
    messages = []
    found = load_latest(str(tmp_path), messages.append)
    assert found.checkpoint["iter_num"] == 10 and found.damaged == [str(tmp_path / "ckpt.dcp")]
    assert "ckpt.dcp" in messages[0]


def test_best_checkpoint_of_a_later_step_is_the_fallback(tmp_path):
    save_steps(tmp_path, [5, 10, 15], keep_checkpoints=2, best_step=15)
    cut(tmp_path / "ckpt.pt")
    assert load_latest(str(tmp_path), lambda text: None).path == str(tmp_path / "best.pt")


def test_if_all_are_damaged_the_latest_is_named(tmp_path):
    assert load_latest(str(tmp_path)) is None
    save_steps(tmp_path, [5, 10], keep_checkpoints=1)
    for path in tmp_path.iterdir():
        cut(path)
    with pytest.raises(ValueError, match=r"/ckpt\.pt: damaged"):
        load_latest(str(tmp_path))


def test_numbered_checkpoints_come_latest_first_and_ignore_other_names(tmp_path):
    for name in ("ckpt_000005.pt", "ckpt_000010.pt", "ckpt_x.pt", "ckpt.pt", "ckpt_000007.pt.1"):
        (tmp_path / name).touch()
    (tmp_path / "ckpt_000020.dcp").mkdir()
    (tmp_path / "ckpt_000030.pt").mkdir()  # a folder with a file's name
    names = [os.path.basename(path) for path in numbered_checkpoints(str(tmp_path))]
    assert names == ["ckpt_000020.dcp", "ckpt_000010.pt", "ckpt_000005.pt"]
    assert step_path("out/ckpt.pt", 5) == "out/ckpt_000005.pt"


def test_link_to_the_same_file_leaves_no_partial_file(tmp_path):
    """A rename between two links to one file does nothing and leaves both (POSIX)."""
    source, target = tmp_path / "a.pt", tmp_path / "b.pt"
    source.write_bytes(b"x")
    for _ in range(2):
        link_checkpoint(str(source), str(target))
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "b.pt"]
    assert os.path.samefile(source, target)


def test_checkpoints_are_copied_where_links_do_not_work(tmp_path, monkeypatch):
    def no_link(*args):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_link)
    save_steps(tmp_path, [5, 10], keep_checkpoints=1)
    assert checkpoint_steps(tmp_path) == {"ckpt.pt": 10, "ckpt_000010.pt": 10, "ckpt_000005.pt": 5}
    assert not os.path.samefile(tmp_path / "ckpt.pt", tmp_path / "ckpt_000010.pt")


def test_checkpoint_without_step_in_its_name_is_loaded(tmp_path):
    save_checkpoint(str(tmp_path / "ckpt.pt"), make_checkpoint(random_model(), iter_num=3))
    assert load_latest(str(tmp_path)).checkpoint["iter_num"] == 3


def test_checkpoint_overwritten_in_place_counts_by_its_content(tmp_path):
    """cp ckpt_000005.pt ckpt.pt writes into the file that ckpt_000015.pt is a link to."""
    save_steps(tmp_path, [5, 10, 15], keep_checkpoints=2)
    (tmp_path / "ckpt.pt").write_bytes((tmp_path / "ckpt_000005.pt").read_bytes())
    assert read_step(str(tmp_path / "ckpt_000015.pt")) == 5
    os.remove(tmp_path / "ckpt.pt")
    assert load_latest(str(tmp_path), lambda text: None).path == str(tmp_path / "ckpt_000010.pt")


def test_only_one_intact_checkpoint_is_loaded(tmp_path, monkeypatch):
    save_steps(tmp_path, [5, 10, 15], keep_checkpoints=2, best_step=5)
    os.remove(tmp_path / "ckpt.pt")
    loaded = []
    load = latest_module.load_checkpoint
    monkeypatch.setattr(latest_module, "load_checkpoint", lambda p: loaded.append(p) or load(p))
    found = load_latest(str(tmp_path), lambda text: None)
    assert loaded == [found.path] == [str(tmp_path / "ckpt_000015.pt")]


def test_step_of_an_unreadable_checkpoint_is_minus_one(tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(b"no archive")
    (tmp_path / "ckpt.dcp").mkdir()
    assert read_step(str(tmp_path / "ckpt.pt")) == read_step(str(tmp_path / "ckpt.dcp")) == -1


@pytest.mark.parametrize("read", [read_step, read_best_record])
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ESTALE])
def test_transient_error_is_not_taken_for_damage(number, read, tmp_path, monkeypatch):
    """A good checkpoint was renamed to best.damaged."""

    def fail(*args, **options):
        raise OSError(number, os.strerror(number))

    save_steps(tmp_path, [5], keep_checkpoints=1)
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(OSError) as raised:
        read(str(tmp_path / "ckpt.pt"))
    assert raised.value.errno == number and raised.value.filename == str(tmp_path / "ckpt.pt")


def test_with_an_intact_latest_no_other_file_is_opened(tmp_path, monkeypatch):
    save_steps(tmp_path, [5, 10], keep_checkpoints=1)
    monkeypatch.setattr(latest_module, "read_step", lambda path: pytest.fail(f"opened {path}"))
    assert load_latest(str(tmp_path)).path == str(tmp_path / "ckpt.pt")
