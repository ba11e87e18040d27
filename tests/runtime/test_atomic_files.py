import os
import signal
import subprocess
import sys

import pytest

from runtime import atomic_files as atomic
from runtime.atomic_files import AtomicFile, run_lock, write_atomically
from tests.processes import ROOT


def test_a_file_is_written_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a.bin"
    write_atomically(str(path), b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a.bin"]


def test_the_old_content_is_there_until_the_new_is_whole(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with AtomicFile(str(path)) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(
    "error", [ValueError("wrong"), OSError(28, "No space left on device"), KeyboardInterrupt()]
)
def test_a_failure_while_writing_keeps_the_old_content(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), AtomicFile(str(path)) as file:
        file.write(b"half of the n")
        raise error
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_to_flush_or_rename_keeps_the_old_content(tmp_path, monkeypatch, step):
    def fail(*args):
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    monkeypatch.setattr(atomic.os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(str(path), b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


def test_the_content_is_flushed_to_disk_before_the_rename(tmp_path, monkeypatch):
    """Renamed first, a power cut can leave an empty file under the good name."""
    steps, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        atomic.os, "fsync", lambda descriptor: (steps.append("flush"), fsync(descriptor))
    )
    monkeypatch.setattr(
        atomic.os, "replace", lambda *paths: (steps.append("rename"), replace(*paths))
    )
    write_atomically(str(tmp_path / "a.bin"), b"new")
    assert steps[:2] == ["flush", "rename"]


def test_a_missing_folder_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(str(tmp_path / "missing" / "a.bin"), b"new")


def test_a_path_without_a_folder_is_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_atomically("a.bin", b"new")
    assert os.listdir() == ["a.bin"]


HOLD_LOCK = """
import sys
from runtime.atomic_files import run_lock
with run_lock(sys.argv[1]):
    print("holding", flush=True)
    input()
"""


def hold(folder) -> subprocess.Popen:
    """Another process that is the folder's writer until it gets a line or is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "holding\n"
    return process


@pytest.mark.skipif(atomic.fcntl is None, reason="this system has no flock")
@pytest.mark.parametrize("end", ["done", "killed"])
def test_a_second_process_is_refused_until_the_first_ends(tmp_path, end):
    folder = tmp_path / "deep" / "out"
    with hold(folder) as process:
        with (
            pytest.raises(ValueError, match="out: another process is writing here"),
            run_lock(str(folder)),
        ):
            pass
        if end == "killed":
            process.send_signal(signal.SIGKILL)
        else:
            process.stdin.write("\n")
            process.stdin.close()
        process.wait(20)
    with run_lock(str(folder)):
        pass


@pytest.mark.skipif(atomic.fcntl is None, reason="this system has no flock")
def test_a_failing_writer_releases_the_lock(tmp_path):
    with pytest.raises(KeyError), run_lock(str(tmp_path)):
        raise KeyError("a bug")
    with hold(tmp_path) as process:
        process.communicate("\n", timeout=20)
    assert process.returncode == 0


def test_locks_create_folders_and_are_independent(tmp_path):
    with (
        run_lock(str(tmp_path / "a")),
        run_lock(str(tmp_path / "a" / "b")),
        run_lock(str(tmp_path / "c")),
    ):
        assert (tmp_path / "a" / "b").is_dir() and (tmp_path / "c").is_dir()


def test_locking_a_file_is_an_oserror(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError), run_lock(str(tmp_path / "file")):
        pass


def test_a_lock_that_is_a_pipe_is_refused(tmp_path):
    """Opening it waited for a reader."""
    os.mkfifo(tmp_path / ".lock")
    with (
        pytest.raises(ValueError, match=r"\.lock: is not a file; remove it"),
        run_lock(str(tmp_path)),
    ):
        pass
