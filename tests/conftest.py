"""
Fixtures that several test files use: synthetic stories, a tokenizer and tokens made from them,
scripts, and a web server.

Session fixtures are made once per worker and only read: a test that changes files copies them.
"""

import os
import random
import signal
import threading
from collections.abc import Callable

import pytest
import torch

from runtime.atomic_files import write_atomically
from tests.helpers import VOCAB_SIZE, write_tinystories_shard
from tests.http_server import FaultyServer
from tests.processes import ROOT, Result, run_in_process, run_process
from textdata.synthetic import story
from textdata.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from tinystories import Pretokenize, run_pretokenize

torch.set_num_threads(1)  # tests run side by side
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the commands we start
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # their threads do not spin while they wait
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


@pytest.fixture(scope="session")
def run_script(tmp_path_factory) -> Callable[..., Result]:
    """run_script("train.py", "--max_iters=3") runs a script, in an empty folder if no cwd is given.

    With env={...} the script runs in a new process, as imports may depend on the environment."""

    def run(script: str, *args: object, cwd=None, env=None, **options) -> Result:
        folder = cwd or tmp_path_factory.mktemp("cwd")
        if env is not None:
            return run_process(script, *args, cwd=folder, env=env, **options)
        return run_in_process(script, *args, cwd=folder, **options)

    return run


@pytest.fixture(scope="session")
def shared():
    """shared("models/tok512.bin") is the path of that file in ../shared; skips if it is missing."""

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
