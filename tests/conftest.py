"""
What the tests share: stories, a vocabulary and tokens made from them, the real commands in
processes of their own, and a web server that misbehaves when told to.

Session fixtures are made once a worker and only read: a test that changes files copies them.
"""

import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import configurator
from checkpoints.file import is_sharded_checkpoint, load_checkpoint
from checkpoints.latest import load_latest
from model import Transformer, parameter_shapes
from runtime.atomic_files import write_atomically
from tests.nursery import CAN_FORK, ROOT, Command, prepare_to_fork
from textdata.synthetic import story
from textdata.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from tinystories import Pretokenize, run_pretokenize
from training.parallel import load_weights

VOCAB_SIZE = 512

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
        write_stories(folder / "stories" / f"data{number:02d}.json", stories[number::2])
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


def write_stories(path: Path, texts: list[str]):
    """A shard in TinyStories' own format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps([{"story": text, "source": "test"} for text in texts]), encoding="utf-8"
    )


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


def wait_for(process: subprocess.Popen, text: str) -> str:
    """What a process says up to the line with this text, or all of it in an AssertionError."""
    said = ""
    for line in process.stdout:
        said += line
        if text in line:
            return said
    raise AssertionError(said + (process.stderr.read() if process.stderr else ""))


def weights_in(path: str) -> dict:
    """A checkpoint's, in one file or in shares."""
    from checkpoints.sharded import gather_full_state, open_sharded

    if is_sharded_checkpoint(path):
        return gather_full_state(open_sharded(path))["model"]
    return load_checkpoint(path)["model"]


def largest_difference(a: Path, b: Path) -> float:
    """Between the weights of two runs' newest checkpoints."""
    a, b = (weights_in(load_latest(str(out_dir), lambda text: None)[0]) for out_dir in (a, b))
    return max((a[name] - b[name]).abs().max().item() for name in a)


def load_model(path: str) -> tuple[Transformer, dict]:
    """The model of a checkpoint, as a run goes on with it, and the checkpoint."""
    checkpoint = load_checkpoint(path)
    model = Transformer.uninitialized(checkpoint["model_args"])
    load_weights(
        model, ((name, checkpoint["model"][name]) for name, _ in parameter_shapes(model.args))
    )
    return model.eval(), checkpoint


@pytest.fixture(scope="session")
def shared():
    """shared("models/tok512.bin") is the path of that file in the folder shared beside the checkout."""

    def find(name: str) -> str:
        path = ROOT.parent / "shared" / name
        if not path.exists():
            pytest.skip(f"../shared/{name} is not there")
        return str(path)

    return find


class Server(http.server.ThreadingHTTPServer):
    """A web server of this machine alone. It answers well, unless told otherwise by:

    statuses       errors (503, 404, ...) to give to the next requests, one each
    cuts           numbers of bytes after which to cut the next answers, one each
    knows_ranges   False: ignore Range and send everything
    etag           None: send none
    extra_length   bytes to announce on top of those that follow
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content: dict[str, bytes] = {}  # what is at /NAME
        self.statuses, self.cuts, self.requests = (
            [],
            [],
            [],
        )  # requests: the headers of those so far
        self.knows_ranges, self.etag, self.extra_length = True, '"one"', 0

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append(self.headers)
        content = server.content.get(self.path.removeprefix("/"))
        if server.statuses or content is None:
            return self.send_error(server.statuses.pop(0) if server.statuses else 404)
        start = 0
        # As Go's server does: an empty If-Range is none.
        if (
            server.knows_ranges
            and "Range" in self.headers
            and self.headers["If-Range"] in (None, "", server.etag)
        ):
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start + server.extra_length))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        stop = start + server.cuts.pop(0) if server.cuts else len(content)
        self.wfile.write(content[start:stop])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
