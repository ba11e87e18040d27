import os
import re

import pytest

from runtime.atomic_files import run_lock
from tests.textdata.helpers import (
    VOCAB_SIZE,
    error_lines,
    fill_to_pack_size,
    read_shards,
    run_stage,
)
from textdata import pretokenize as pretokenize_module
from textdata import shard_jobs
from textdata.token_shards import read_meta


@pytest.fixture(autouse=True)
def work_in_tmp_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def one_shard_for_each_file(monkeypatch):
    monkeypatch.setattr(shard_jobs, "PACK_SIZE", 1)


@pytest.mark.slow
def test_a_failed_worker_ends_the_run_and_blocks_training(
    run_script, options, text_folder, tmp_path
):
    """llama2.c goes on without the shard, and training hangs (karpathy/llama2.c #311, #296)."""
    whole = (text_folder / "b.json").read_text()
    (text_folder / "b.json").write_text(whole[: len(whole) // 2])
    fill_to_pack_size(text_folder)
    result = run_script("tinystories.py", "pretokenize", *options, "--num_workers=2", cwd=tmp_path)
    (line,) = (line for line in error_lines(result) if line.startswith("tinystories.py: "))
    assert result.returncode == 1 and "next:" not in result.stdout
    assert re.search(r"texts/b\.json: record \d+ is not whole JSON", line)
    result = run_script("train.py", "--data_dir=out", f"--vocab_size={VOCAB_SIZE}", cwd=tmp_path)
    (line,) = error_lines(result)
    assert result.returncode == 1
    assert "tok512: pretokenizing has not finished; run python tinystories.py" in line


def test_a_failed_file_leaves_a_folder_that_can_resume(options, text_folder):
    whole = (text_folder / "b.json").read_text()
    (text_folder / "b.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"texts/b\.json: record \d+ is not whole JSON"):
        run_stage("pretokenize", *options)
    with pytest.raises(ValueError, match="pretokenizing has not finished"):
        read_meta("out/tok512")
    (text_folder / "b.json").write_text(whole)
    run_stage("pretokenize", *options)
    assert len(read_shards("out/tok512")) == 3


SIGNAL_WHERE_A_FILE_IS_OPENED = """
import os, signal, sys
def hook(event, arguments):
    is_tokenizing = os.path.exists("out/tok512/meta.json")  # before, its first records are read
    if event == "open" and str(arguments[0]).endswith("b.json") and is_tokenizing:
        os.kill(os.getpid(), signal.{signal})
sys.addaudithook(hook)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",  # signal, num_workers, status, sentence
    [
        ("SIGKILL", 2, 1, "a worker was killed (out of memory?); try fewer with --num_workers=1"),
        ("SIGINT", 1, 130, "interrupted"),
    ],
)
def test_a_killed_or_interrupted_run_fails_and_can_resume(
    run_script, options, text_folder, tmp_path, case
):
    """The signal comes when the second of three files is opened, in a worker or in process."""
    fill_to_pack_size(text_folder)
    signal, num_workers, status, sentence = case
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(SIGNAL_WHERE_A_FILE_IS_OPENED.format(signal=signal))
    options = *options, f"--num_workers={num_workers}"
    result = run_script(
        "tinystories.py", "pretokenize", *options, cwd=tmp_path, env={"PYTHONPATH": str(hooks)}
    )
    assert result.returncode == status
    assert f"tinystories.py: {sentence}" in error_lines(result)
    folder = tmp_path / "out" / "tok512"
    assert "00001.bin" not in os.listdir(folder)
    with pytest.raises(ValueError, match="pretokenizing has not finished"):
        read_meta(str(folder))
    run_stage("pretokenize", *options)
    assert len(read_shards(folder)) == 3 and not [
        name for name in os.listdir(folder) if name.endswith(".partial")
    ]


def test_an_interrupted_run_keeps_its_finished_shards(options, monkeypatch):
    def interrupted(path, *args):
        if path.endswith("c.jsonl"):
            raise KeyboardInterrupt
        return read_documents(path, *args)

    read_documents = pretokenize_module.read_documents
    monkeypatch.setattr(pretokenize_module, "read_documents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_stage("pretokenize", *options)
    monkeypatch.setattr(pretokenize_module, "read_documents", read_documents)
    assert "2 of 3 shard(s) unchanged" in run_stage("pretokenize", *options)


def test_a_second_run_in_the_folder_is_refused(options):
    with run_lock("out"), pytest.raises(ValueError, match="out: another process is writing here"):
        run_stage("pretokenize", *options)
    run_stage("pretokenize", *options)
