import errno
import functools
import os
import threading
import time

import pytest

from checkpoints import background_writer
from checkpoints.background_writer import BackgroundWriter
from checkpoints.file import load_checkpoint, save_checkpoint
from tests import helpers
from tests.helpers import make_checkpoint

random_model = functools.partial(helpers.random_model, helpers.CHECKPOINT_MODEL, None)


def failing_job(num_failures: list[int], threads: list):
    """A job that fails with a full disk num_failures[0] times, then notes the thread it runs in."""

    def job():
        if num_failures[0]:
            num_failures[0] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "ckpt.pt")
        threads.append(threading.current_thread())

    return job


def test_failed_write_is_reported_once_and_retried_until_written(tmp_path, monkeypatch):
    monkeypatch.setattr(background_writer, "RETRY_SECONDS", 0.0)
    writer = BackgroundWriter()
    threads, messages = [], []
    writer.submit({str(tmp_path / "ckpt.pt"): failing_job([2], threads)})
    deadline = time.monotonic() + 20
    while not threads and time.monotonic() < deadline:
        messages += writer.poll()
        time.sleep(0.01)
    writer.flush()
    assert len(threads) == 1 and threads[0] is not threading.main_thread()
    assert not writer.pending
    assert [*messages, *writer.poll()] == [
        "ckpt.pt: No space left on device; training continues, the save is retried",
        "saving works again",
    ]


def test_write_that_fails_until_the_end_is_an_error(tmp_path):
    writer = BackgroundWriter()
    writer.submit({str(tmp_path / "ckpt.pt"): failing_job([99], [])})
    message = r"ckpt\.pt: No space left on device; not written: .*ckpt\.pt"
    with pytest.raises(ValueError, match=message):
        writer.flush()


def test_error_other_than_of_the_disk_is_raised(tmp_path):
    writer = BackgroundWriter()
    writer.submit({str(tmp_path / "ckpt.pt"): lambda: int("x")})
    with pytest.raises(ValueError, match="invalid literal"):
        writer.flush()


def test_one_failed_job_does_not_stop_the_others(tmp_path):
    (tmp_path / "model.bin").mkdir()
    writer, path = BackgroundWriter(), str(tmp_path / "ckpt.pt")
    names = [str(tmp_path / "model.bin"), path]
    checkpoint = make_checkpoint(random_model())
    writer.submit({name: functools.partial(save_checkpoint, name, checkpoint) for name in names})
    with pytest.raises(ValueError, match=r"not written: \S*/model\.bin$"):
        writer.flush()
    assert load_checkpoint(path)["iter_num"] == 7


def test_later_job_replaces_a_pending_one_for_its_path(tmp_path):
    writer, done = BackgroundWriter(), []
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    writer.submit({a: failing_job([1], []), b: lambda: done.append("b")})
    writer.submit({a: lambda: done.append("a")})
    writer.flush()
    assert done == ["b", "a"]


def test_join_waits_until_the_thread_has_ended():
    """It waited until the jobs were done; the thread went on for some instants."""
    writer = BackgroundWriter()
    started = set(threading.enumerate())
    for _ in range(20):
        writer.submit({"a": lambda: None})
        writer.join()
        assert set(threading.enumerate()) <= started and writer.is_idle


def test_thread_that_cannot_start_leaves_the_writer_idle(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    writer = BackgroundWriter()
    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            writer.submit({"a": lambda: None})
    writer.join()
    writer.flush()
    assert writer.is_idle
