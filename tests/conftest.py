"""
What the tests share: stories, a vocabulary and tokens made from them, the real commands in
processes of their own, and a web server that misbehaves when told to.

Session fixtures are made once a worker and only read: a test that changes files copies them.
"""

import os
import random
import signal
import subprocess
import sys
import threading

import pytest
import torch

import configurator
from runtime.atomic_files import write_atomically
from tests.helpers import ROOT, VOCAB_SIZE, write_tinystories_shard
from tests.http_server import FaultyServer
from tests.nursery import CAN_FORK, Command, prepare_to_fork
from textdata.synthetic import story
from textdata.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from tinystories import Pretokenize, run_pretokenize

torch.set_num_threads(1)  # tests run side by side
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the commands we start
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
os.environ.pop("CRIA_TRACEBACK", None)
# A shell starts background jobs deaf to Ctrl-C, and the commands that we start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def stories() -> list[str]:
    """300 synthetic stories, the same in every run."""
    rng = random.Random(1337)
    return [story(rng) for _ in range(300)]


@pytest.fixture(scope="session")
def tokenizer_path(stories, tmp_path_factory) -> str:
    """A tokenizer.model of 512 tokens, learned from the stories."""
    path = str(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    write_atomically(path, train_sentencepiece(stories, VOCAB_SIZE))
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def data_dir(stories, tokenizer_path, tmp_path_factory) -> str:
    """What train.py takes as --data_dir with --vocab_size=512: two shards of tokens in tok512."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(2):
        write_tinystories_shard(folder / "stories" / f"data{number:02d}.json", stories[number::2])
    run_pretokenize(
        Pretokenize(
            vocab_size=VOCAB_SIZE,
            tokenizer=tokenizer_path,
            input=str(folder / "stories"),
            data_dir=str(folder),
            val_fraction=0.1,
            num_workers=1,
        )
    )
    return str(folder)


@pytest.fixture(scope="session")
def token_folder(data_dir) -> str:
    """The folder of shards and meta.json in data_dir."""
    return os.path.join(data_dir, f"tok{VOCAB_SIZE}")


@pytest.fixture(scope="session", autouse=CAN_FORK)
def forks():
    prepare_to_fork()


@pytest.fixture(scope="session")
def run_script(tmp_path_factory):
    """run_script("train.py", "--max_iters=3", cwd=..., env=..., timeout=120) runs the real command,
    in an empty folder if none is named, without standard input; returns its CompletedProcess. As a fork,
    unless with env: what is imported may depend on that."""

    def run(script, *args, cwd=None, env=None, timeout=120) -> subprocess.CompletedProcess:
        folder = str(cwd or tmp_path_factory.mktemp("cwd"))
        return Command(
            script, [*map(str, args)], folder, os.environ | (env or {}), forks=not env
        ).end(timeout)

    return run


@pytest.fixture
def run_here(monkeypatch, capsys):
    """run_here(sample, "--seed=1", ...) runs a script's main() in this process; returns (status,
    standard output, standard error)."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [os.path.basename(script.__file__), *arguments])
        status = 0
        try:
            configurator.run_main(script.main)
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def shared():
    """shared("models/tok512.bin") is the path of that file in the folder shared beside the checkout."""

    def find(name: str) -> str:
        path = ROOT.parent / "shared" / name
        if not path.exists():
            pytest.skip(f"../shared/{name} is not there")
        return str(path)

    return find


@pytest.fixture
def server():
    with FaultyServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
