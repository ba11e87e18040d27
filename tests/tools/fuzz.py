"""
Damage models and vocabularies at random and read them. Whatever a file holds, its reader either
refuses it in one sentence that names it, or reads what is there; it does not crash, hang, raise
anything else or fill the memory, and damage that it can notice does not pass for a model.

    python -m tests.tools.fuzz --files=10000
    python -m tests.tools.fuzz --format=gguf --first=1234 --files=1 --keep=damaged

A file is told by the seed, its reader and its number: the second line makes one again, and keeps it.
Reading is done in a process of its own, as a file may end it.
"""

import argparse
import faulthandler
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch

from formats import hugging_face
from formats.lazy_model import from_model
from formats.registry import open_model
from formats.safetensors_file import read_safetensors
from formats.writer import write_model
from model import ModelArgs, Transformer, parameter_shapes
from ops.rope import RopeScaling
from tests.tools.damage import (
    damaged_archive,
    damaged_bytes,
    damaged_gguf,
    damaged_json,
    damaged_safetensors,
    is_zip,
)
from textdata.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    Llama3Tokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    proto_from_pieces,
)

try:
    import resource
except ImportError:  # Windows: the memory is not watched there
    resource = None

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 10.0  # seconds for a file
ALLOWANCE = 300 << 20  # bytes that reading may take on top of what the process has
LONGEST_MESSAGE = 600  # characters
MOST_DEATHS = 20  # of the process on files of one reader, then the rest is left out
TEXT = "Once upon a time, a cria ate 12 café creams. 🦙\n"
WORDS = (
    "he",
    " t",
    " the",
    "in",
    " a",
    "an",
    "on",
    " o",
    "er",
    "re",
    " w",
    "it",
    "ing",
    "nd",
    " and",
)


# The models and vocabularies to damage


def sentencepiece() -> Tokenizer:
    """A vocabulary like Llama 2's, of a few hundred tokens."""
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    words = [word.replace(" ", "▁") for word in (*" abcdefghijklmnopqrstuvwxyz.,!", *WORDS)]
    pieces += [(word, -float(i), NORMAL) for i, word in enumerate(words)]
    return SentencePieceTokenizer(proto_from_pieces(pieces))


def llama3() -> Tokenizer:
    return Llama3Tokenizer(
        [bytes([byte]) for byte in range(256)] + [word.encode() for word in WORDS]
    )


def random_model(tokenizer: Tokenizer, **overrides) -> Transformer:
    """A small model; its rows are long enough for all matrices to be quantized."""
    sizes = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=32, max_seq_len=16)
    generator = torch.Generator().manual_seed(0)
    model = Transformer(ModelArgs(**sizes, vocab_size=tokenizer.vocab_size, **overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


def write_seed(
    folder: str, name: str, kind: str, vocabulary=sentencepiece, dtype: str = "auto", **overrides
):
    tokenizer = vocabulary()
    model = from_model(random_model(tokenizer, **overrides), tokenizer=tokenizer)
    write_model(model, os.path.join(folder, name), kind, dtype)


def write_sharded(folder: str):
    with mock.patch.object(hugging_face, "SHARD_SIZE", 60_000):
        write_seed(folder, "", "hf", llama3, **UNTIED, **SCALED)


def write_pytorch(folder: str):
    """The older kind of folder, its weights as PyTorch itself writes them."""
    write_seed(folder, "", "hf", **UNTIED)
    whole = os.path.join(folder, "model.safetensors")
    tensors = {name: tensor.read() for name, tensor in read_safetensors(whole).items()}
    torch.save(tensors, os.path.join(folder, "pytorch_model.bin"))
    os.remove(whole)


def write_two_shards(folder: str):
    """Meta's folder for two processes: Llama 2's, which cuts the embedding by columns."""
    write_seed(folder, "", "meta", **UNTIED)
    whole = torch.load(os.path.join(folder, "consolidated.00.pth"), weights_only=True)
    for number in range(2):
        shard = {}
        for name, tensor in whole.items():
            axis = int(name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight")))
            shard[name] = tensor.chunk(2, axis)[number].clone() if tensor.dim() == 2 else tensor
        torch.save(shard, os.path.join(folder, f"consolidated.{number:02d}.pth"))


def write_vocabulary(folder: str, name: str, vocabulary):
    tokenizer = vocabulary()
    content = tokenizer.to_bin() if name.endswith(".bin") else tokenizer.content
    Path(folder, name).write_bytes(content)


def write_tokenizer_json(folder: str, vocabulary):
    write_seed(folder, "", "hf", vocabulary)
    os.remove(os.path.join(folder, "tokenizer.model"))


# Reading all there is


class Reading(NamedTuple):
    args: ModelArgs | None
    tensors: dict[str, torch.Tensor]
    tokenizer_hash: str | None
    build: Callable = lambda: None  # the model to run


def used(tokenizer: Tokenizer | None) -> str | None:
    """The hash of a vocabulary, once it has cut a text and put it together again."""
    if tokenizer is None:
        return None
    ids = tokenizer.encode(TEXT, bos=True)
    assert {tokenizer.bos_id, tokenizer.eos_id, *ids} <= set(range(tokenizer.vocab_size)), (
        "an id of no token"
    )
    tokenizer.decode(ids)
    return tokenizer.hash


def read_whole_model(path: str) -> Reading:
    model = open_model(path)
    tensors = {name: model.read(name) for name in model.names()}
    return Reading(model.args, tensors, used(model.read_tokenizer()), model.load)


def read_vocabulary(path: str, load=load_tokenizer) -> Reading:
    return Reading(None, {}, used(load(path)))


@dataclass(frozen=True)
class Reader:
    """How to make a good file or folder, and to read it."""

    name: str
    write: Callable[[str], None]  # into an empty folder
    files: tuple[str, ...]  # patterns of those to damage, often what is there often
    target: str = ""  # what is read, in that folder; nothing: the folder itself
    reach: int = 0  # values that one changed byte may change; none where a sum guards them
    read: Callable[[str], Reading] = read_whole_model


def model_reader(name: str, kind: str, target: str, files=(), reach: int = 0, **options) -> Reader:
    write = partial(write_seed, name=target, kind=kind, **options)
    return Reader(name, write, files or (target,), target, reach)


def vocabulary_reader(name: str, vocabulary) -> Reader:
    return Reader(
        name,
        partial(write_vocabulary, name=name, vocabulary=vocabulary),
        (name,),
        name,
        0,
        read_vocabulary,
    )


def json_reader(name: str, vocabulary) -> Reader:
    read = partial(read_vocabulary, load=hugging_face.read_tokenizer)
    return Reader(
        name, partial(write_tokenizer_json, vocabulary=vocabulary), ("tokenizer.json",), read=read
    )


GROUP = 32  # of Q8_0, as dim and hidden_dim have it
UNTIED = dict(tie_embeddings=False)
SCALED = dict(rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64))
HF_FILES = ("*.safetensors", "*.safetensors", "config.json", "tokenizer.model")
META_FILES = ("consolidated.*",) * 4 + ("params.json", "tokenizer.model")
READERS = (
    model_reader("ckpt", "ckpt", "ckpt.pt"),
    model_reader("v0", "v0", "v0.bin", reach=1, **UNTIED),
    model_reader("v1", "v1", "v1.bin", reach=1, **UNTIED),
    model_reader("v2", "v2", "v2.bin", reach=GROUP),
    model_reader("hf", "hf", "", HF_FILES, reach=1, **UNTIED),
    Reader("hf-shards", write_sharded, (*HF_FILES, "*.index.json"), reach=1),
    Reader("hf-bin", write_pytorch, ("pytorch_model.bin",) * 4 + ("config.json",)),
    model_reader("meta", "meta", "", META_FILES),
    Reader("meta-shards", write_two_shards, META_FILES),
    model_reader("gguf", "gguf", "model.gguf", reach=1, **UNTIED),
    model_reader(
        "gguf-q8_0", "gguf", "model.gguf", reach=GROUP, vocabulary=llama3, dtype="q8_0", **SCALED
    ),
    vocabulary_reader("tokenizer.model", sentencepiece),
    vocabulary_reader("tokenizer.bin", sentencepiece),
    vocabulary_reader("tokenizer.tiktoken", llama3),
    json_reader("tokenizer.json-sentencepiece", sentencepiece),
    json_reader("tokenizer.json-llama3", llama3),
)


# One file


class Damage(NamedTuple):
    file: str
    content: bytes | str | None  # None: no such file; a folder where it is no bytes
    reach: float  # how many values of the tensors may be others now


def damage(rng: random.Random, reader: Reader, originals: dict[str, bytes]) -> Damage:
    """One of the files, damaged. In folders, it may be gone as a whole."""
    pattern = rng.choice(reader.files)
    file = rng.choice([name for name in sorted(originals) if fnmatch(name, pattern)])
    content = originals[file]
    if len(originals) > 1 and rng.random() < 0.04:
        return Damage(file, rng.choice((None, b"", "folder")), 0)
    if file.endswith(".json"):
        return Damage(
            file, rng.choice((damaged_json, damaged_json, damaged_bytes))(rng, content), 0
        )
    if rng.random() < 0.35:
        if content.startswith(b"GGUF"):
            return Damage(file, damaged_gguf(rng, content), 0)
        if is_zip(content):  # what it says now has right sums
            return Damage(file, damaged_archive(rng, content), math.inf)
        if file.endswith(".safetensors"):
            return Damage(file, damaged_safetensors(rng, content), math.inf)
    damaged = damaged_bytes(rng, content)
    return Damage(
        file,
        damaged,
        0 if file.startswith("tokenizer") else reader.reach * count_changed(content, damaged),
    )


def count_changed(before: bytes, after: bytes) -> int:
    shorter = min(len(before), len(after))
    a, b = (np.frombuffer(part, np.uint8, shorter) for part in (before, after))
    return int(np.count_nonzero(a != b)) + abs(len(before) - len(after))


class Verdict(NamedTuple):
    """outcome: refused, equal (to what was written), changed or failed; cause: what failures have in
    common; detail: what else is known of one."""

    reader: str
    number: int
    outcome: str
    cause: str = ""
    detail: str = ""


class Hang(BaseException):
    """No Exception, so that no reader takes it for damage."""


def hang(*_):
    raise Hang("not done in time")


class Bench:
    """A good file or folder of a reader, to damage and to read."""

    def __init__(self, reader: Reader, folder: str, keep: str | None = None):
        self.reader, self.folder, self.keep = reader, os.path.join(folder, reader.name), keep
        os.makedirs(self.folder)
        reader.write(self.folder)
        self.path = os.path.join(self.folder, reader.target).rstrip(os.sep)
        self.originals = {
            name: Path(self.folder, name).read_bytes() for name in set(os.listdir(self.folder))
        }
        self.expected = reader.read(self.path)

    def damaged(self, seed: int, number: int) -> Damage:
        return damage(
            random.Random(f"{seed} {self.reader.name} {number}"), self.reader, self.originals
        )

    def verdict(self, seed: int, number: int, limit: float) -> Verdict:
        damaged = self.damaged(seed, number)
        path = Path(self.folder, damaged.file)
        put(path, damaged.content)
        if self.keep:
            shutil.copytree(self.folder, os.path.join(self.keep, f"{self.reader.name}-{number}"))
        try:
            return Verdict(self.reader.name, number, *self.attempt(damaged, limit))
        finally:
            put(path, self.originals[damaged.file])

    def attempt(self, damaged: Damage, limit: float) -> tuple[str, ...]:
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            reading = self.reader.read(self.path)
            if reading.args != self.expected.args:
                reading.build()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # Hang is no Exception, nor are Rust's panics
            complaint = complaint_about(error, self.path)
            return (
                ("failed", f"{complaint} ({place_of(error)})", told(error))
                if complaint
                else ("refused",)
            )
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        changed, wrong = self.compare(reading, damaged)
        return ("failed", wrong, damaged.file) if wrong else ("changed" if changed else "equal",)

    def compare(self, reading: Reading, damaged: Damage) -> tuple[bool, str]:
        """Whether something else was read than what was written, and what is wrong with it."""
        args, expected = reading.args, self.expected
        shapes = dict(parameter_shapes(args)) if args else {}
        reordered = args and (args.n_heads, args.kv_heads) != (
            expected.args.n_heads,
            expected.args.kv_heads,
        )
        values = 0  # that differ
        for name, tensor in reading.tensors.items():
            if (
                tuple(tensor.shape) != shapes[name]
                or not tensor.is_floating_point()
                or not tensor.isfinite().all()
            ):
                return True, f"a tensor of another shape or kind passed ({tensor.dtype})"
            values += differing(
                tensor, expected.tensors.get(name), reordered and damaged.file == "config.json"
            )
        if values > damaged.reach:
            return True, "more values changed than the damage reaches"
        if args != expected.args and is_zip(self.originals[damaged.file]) and damaged.reach == 0:
            return True, "another architecture passed in spite of the sums"
        other_tokenizer = reading.tokenizer_hash != expected.tokenizer_hash
        if (
            other_tokenizer
            and not fnmatch(damaged.file, "tok*")
            and not fnmatch(damaged.file, "*.gguf")
        ):
            return True, "another vocabulary was read, but its file is what it was"
        return bool(values or other_tokenizer or args != expected.args), ""


def put(path: Path, content: bytes | str | None):
    """Make path this file, a folder or nothing."""
    if path.is_dir():
        path.rmdir()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.unlink(missing_ok=True)
        if content is not None:
            path.mkdir()


def differing(tensor: torch.Tensor, expected: torch.Tensor | None, reordered: bool) -> int:
    """How many values are not the same, bit for bit. reordered: rows may stand in another order,
    as another number of heads turns in another way."""
    if expected is None or tensor.shape != expected.shape:
        return tensor.numel()
    a, b = (part.numpy().view(np.uint32).ravel() for part in (tensor.float(), expected.float()))
    count = np.count_nonzero(a != b)
    return int(count if not (count and reordered) else np.count_nonzero(np.sort(a) != np.sort(b)))


def complaint_about(error: BaseException, path: str) -> str:
    """What is wrong with an exception, if it is no good refusal."""
    message, cause = str(error), error
    if not isinstance(error, (ValueError, OSError)):
        return type(error).__name__
    if not message:
        return f"{type(error).__name__} without a word"
    if not message.isprintable():  # more than a line, or what makes a terminal do things
        return f"{type(error).__name__} that does not print as one line"
    if len(message) >= LONGEST_MESSAGE:
        return f"{type(error).__name__} too long to read"
    if path not in message:
        return f"{type(error).__name__} that does not name the file"
    while cause:  # a reader that takes everything for damage takes this, too
        if (
            isinstance(cause, MemoryError)
            or "allocate memory" in str(cause)
            or "bad_alloc" in str(cause)
        ):
            return "refused only where the memory ended"
        cause = cause.__cause__ or cause.__context__
    return ""


def place_of(error: BaseException) -> str:
    """The last line of ours that ran."""
    frames = [(Path(frame.filename), frame) for frame in traceback.extract_tb(error.__traceback__)]
    path, frame = [(path, frame) for path, frame in frames if path.is_relative_to(ROOT)][-1]
    return f"{path.relative_to(ROOT)}:{frame.lineno} in {frame.name}"


def told(error: BaseException) -> str:
    """The end of its traceback, and the message, with no line broken by it."""
    frames = "".join(traceback.format_tb(error.__traceback__)[-3:])
    return f"{frames}{type(error).__name__}: {str(error)[:300]!r}"


# Many files, in a process of its own


def limit_memory():
    """Let the process grow by no more than ALLOWANCE from here on, where the system can."""
    if resource is None or not os.path.exists("/proc/self/statm"):
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ALLOWANCE, hard))


def read_many(connection, log: str, jobs: list, seed: int, limit: float, keep: str | None):
    """Send a verdict for every number of every reader."""
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 2)  # libraries write there about each damaged file
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, hang)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(log)) as folder:
        for reader, numbers in jobs:
            if resource is not None:
                resource.setrlimit(
                    resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2
                )
            bench = Bench(reader, folder, keep)
            limit_memory()
            for number in numbers:
                connection.send(bench.verdict(seed, number, limit))


def fuzz(
    readers: Iterable[Reader], numbers: range, seed=0, limit=LIMIT, keep: str | None = None
) -> Iterator[Verdict]:
    """The verdict on every file. The process that reads is started again where a file ended it."""
    jobs, deaths = [(reader, numbers) for reader in readers], Counter()
    with tempfile.TemporaryDirectory() as folder:
        while jobs:
            last = None
            for last in verdicts_of(jobs, os.path.join(folder, "log"), seed, limit, keep):
                yield last
            jobs = left_after(jobs, last)
            deaths[last.reader] += 1
            if deaths[last.reader] == MOST_DEATHS and jobs and jobs[0][0].name == last.reader:
                yield Verdict(
                    last.reader, jobs[0][1][0], "failed", "died so often that the rest is left out"
                )
                jobs = jobs[1:]


def left_after(jobs: list, last: Verdict) -> list:
    """The jobs behind the file of a verdict."""
    at = [reader.name for reader, _ in jobs].index(last.reader)
    reader, numbers = jobs[at]
    rest = numbers[numbers.index(last.number) + 1 :]
    return ([(reader, rest)] if rest else []) + jobs[at + 1 :]


def verdicts_of(
    jobs: list, log: str, seed: int, limit: float, keep: str | None
) -> Iterator[Verdict]:
    """The verdicts of one process; the last is that it died where it did."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(
        target=read_many, args=(there, log, jobs, seed, limit, keep), daemon=True
    )
    process.start()
    there.close()
    try:
        for reader, numbers in jobs:
            for number in numbers:
                try:
                    cause = "" if here.poll(60 + 2 * limit) else "the process hangs"
                    verdict = None if cause else here.recv()
                except EOFError:
                    process.join()
                    cause = f"the process died ({process.exitcode})"
                if cause:
                    tail = Path(log).read_bytes()[-1500:].decode("utf-8", "replace")
                    assert process.exitcode != 1, f"the fuzz itself failed:\n{tail}"
                    yield Verdict(reader.name, number, "failed", cause, tail)
                    return
                yield verdict
    finally:
        process.kill()
        process.join()


# The command


def report(
    readers: list[Reader], numbers: range, seed: int, limit: float, keep: str | None
) -> list[Verdict]:
    """Print a line for each reader as it is done; returns the failures."""
    print(
        f"{'reader':28}{'files':>8}{'refused':>9}{'equal':>8}{'changed':>9}{'failed':>8}{'seconds':>9}"
    )
    failures, start, counts, name = [], time.time(), Counter(), ""

    def print_line():
        cells = (
            counts.total(),
            *(counts[outcome] for outcome in ("refused", "equal", "changed", "failed")),
        )
        widths = (8, 9, 8, 9, 8)
        print(
            f"{name:28}"
            + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)),
            end="",
        )
        print(f"{time.time() - start:>9.0f}", flush=True)

    for verdict in fuzz(readers, numbers, seed, limit, keep):
        if name not in ("", verdict.reader):
            print_line()
            start, counts = time.time(), Counter()
        name = verdict.reader
        counts[verdict.outcome] += 1
        if verdict.outcome == "failed":
            failures.append(verdict)
    print_line()
    return failures


def explain(failures: list[Verdict]) -> str:
    """The failures by their cause, with the first files and the story of one."""
    causes: dict[str, list[Verdict]] = {}
    for failure in failures:
        causes.setdefault(failure.cause, []).append(failure)
    lines = []
    for cause, group in causes.items():
        files = ", ".join(f"{failure.reader} {failure.number}" for failure in group[:8])
        lines.append(f"\n{cause}: {len(group)}, {files}\n{group[0].detail}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.fuzz", description="Read files that were damaged at random."
    )
    parser.add_argument("--files", type=int, default=1000, help="how many for each reader")
    parser.add_argument("--seed", type=int, default=0, help="other files for another seed")
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--format", default="", help="readers whose names begin so; all, if empty")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for a file")
    parser.add_argument("--keep", help="a folder in which to leave the damaged files")
    options = parser.parse_args()
    readers = [reader for reader in READERS if reader.name.startswith(options.format)]
    if not readers or options.files < 1:
        parser.error(
            f"--format: one of {', '.join(reader.name for reader in READERS)}; --files: at least 1"
        )
    numbers = range(options.first, options.first + options.files)
    failures = report(readers, numbers, options.seed, options.limit, options.keep)
    print(explain(failures))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
