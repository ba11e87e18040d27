"""
Text to tokens, in stages:

    python tinystories.py download       fetch and unpack TinyStories (arXiv 2305.07759), 1.6 GB
    python tinystories.py synthesize     or write synthetic stories, where there is no network
    python tinystories.py train_vocab    learn a vocabulary from the text
    python tinystories.py pretokenize    turn the text into token shards for train.py

train_vocab and pretokenize take your own text with --input=FILE_OR_FOLDER. With many files on many
machines, torchrun ... tinystories.py pretokenize divides the files among its processes.
Each stage has its own options: python tinystories.py pretokenize --help
"""

import contextlib
import glob
import json
import multiprocessing
import os
import random
import signal
import sys
import tarfile
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Literal

import requests
from tqdm import tqdm

from atomic import only_writer, write_atomically
from configurator import configure, print_overrides, refuse, run_script
from corpus import find_files, read_pieces
from dataset import META_FILE, ShardWriter, split_point, token_dtype, tokens_folder, write_meta
from distributed import World, join_world, leave_world, lost_processes_in_words
from download import download, plain_reason, unpack
from tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer, train_sentencepiece
from words import Encoder

ARCHIVE = "TinyStories_all_data.tar.gz"
STORIES = "TinyStories_all_data"
STORIES_PER_SHARD = 5000
VOCAB_CHARACTERS = 100_000_000  # of text to learn a vocabulary from
LONGEST_WAIT = 7 * 24 * 3600.0  # seconds that a process waits for those that have more to do
BATCH_CHARACTERS = 2**20  # of text handed to SentencePiece at a time


@dataclass(frozen=True)
class Download:
    """Fetch TinyStories and unpack it; run again to go on with an interrupted download."""

    data_dir: str = "data"  # where the archive and the folder TinyStories_all_data go
    url: str = f"https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/{ARCHIVE}"  # the archive


@dataclass(frozen=True)
class Synthesize:
    """Write synthetic stories, from a grammar, in TinyStories' own JSON format."""

    num_stories: int = 20_000  # how many stories
    seed: int = 1337  # the same seed writes the same stories
    data_dir: str = "data/synthetic"  # where the shards go

    def problems(self):
        if self.num_stories < 1:
            yield f"--num_stories={self.num_stories}: must be at least 1"


@dataclass(frozen=True)
class TrainVocab:
    """Learn a vocabulary of byte pairs, DATA_DIR/tokSIZE.model and .bin."""

    vocab_size: int = 4096  # tokens, 259 of them fixed: three control tokens and the bytes
    input: str = ""  # a .txt, .json or .jsonl file or a folder of them; TinyStories if empty
    data_dir: str = ""  # where the vocabulary goes; data, or data/NAME for an input of that name
    separator: str = ""  # between the documents of .txt files; blank lines if empty, \n is a line break

    def problems(self):
        if not 260 <= self.vocab_size <= 2**31:
            yield f"--vocab_size={self.vocab_size}: must be at least 260, the bytes and control tokens take 259"


@dataclass(frozen=True)
class Pretokenize:
    """Turn text into token shards, in parallel; what is done and unchanged is left as it is."""

    vocab_source: Literal["custom", "llama2"] = "custom"  # our own vocabulary, or Llama 2's tokenizer.model
    vocab_size: int = 4096  # of our own vocabulary, which is learned first if it is missing
    tokenizer: str = ""  # a tokenizer.model or tokenizer.bin to use; needed with --vocab_source=llama2
    input: str = ""  # a .txt, .json or .jsonl file or a folder of them; TinyStories if empty
    data_dir: str = ""  # where the tokens go; data, or data/NAME for an input of that name
    separator: str = ""  # between the documents of .txt files; blank lines if empty, \n is a line break
    val_fraction: float = 0.05  # the end of each file that validates (TinyStories: its first shard)
    num_workers: int = 0  # processes; 0: as many as there are cores

    def problems(self):
        yield from TrainVocab.problems(self)
        if not 0 < self.val_fraction < 1:
            yield f"--val_fraction={self.val_fraction}: must be above 0 and below 1"
        if self.num_workers < 0:
            yield f"--num_workers={self.num_workers}: must be 0 or more"
        if self.vocab_source == "llama2" and not self.tokenizer:
            yield "--vocab_source=llama2: say where Llama 2's tokenizer.model is with --tokenizer=PATH"


def run_download(config: Download):
    folder = os.path.join(config.data_dir, STORIES)
    archive = os.path.join(config.data_dir, ARCHIVE)
    with only_writer(config.data_dir):
        if os.path.isdir(folder):
            return print(f"{folder} is there already; delete it to download again")
        try:
            if not os.path.exists(archive):
                download(config.url, archive)
            unpack(archive, folder)
        except (requests.RequestException, ConnectionError) as error:
            raise ValueError(
                f"cannot download {config.url} ({plain_reason(error)}); "
                "without network, python tinystories.py synthesize writes stories to train on"
            ) from error
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{archive} does not unpack ({error}); delete it and download again") from error
    print(f"{folder}: {len(glob.glob(os.path.join(folder, '*.json')))} shards; next: python tinystories.py pretokenize")


def run_synthesize(config: Synthesize):
    from synthetic import story

    bar = tqdm(disable=None, total=config.num_stories, unit="story", desc="synthesizing")
    with only_writer(config.data_dir), bar:
        for shard, first in enumerate(range(0, config.num_stories, STORIES_PER_SHARD)):
            rng = random.Random(f"{config.seed} {shard}")
            count = min(STORIES_PER_SHARD, config.num_stories - first)
            records = [{"story": story(rng), "source": "synthetic, from cria's grammar"} for _ in range(count)]
            path = os.path.join(config.data_dir, f"synthetic{shard:02d}.json")
            write_atomically(path, json.dumps(records).encode())
            bar.update(count)
        for path in glob.glob(os.path.join(glob.escape(config.data_dir), "synthetic[0-9]*.json")):
            if int(os.path.basename(path)[len("synthetic") : -len(".json")]) > shard:  # of a larger set before
                os.remove(path)
    print(f"next: python tinystories.py pretokenize --input={config.data_dir}")


def find_input(config) -> tuple[list[str], str]:
    """The text files to read and the folder to write to."""
    path = os.path.abspath(config.input)
    name = os.path.basename(path) if os.path.isdir(path) else os.path.splitext(os.path.basename(path))[0]
    data_dir = config.data_dir or (os.path.join("data", name) if config.input else "data")
    stories = config.input or os.path.join(data_dir, STORIES)
    if not config.input and not os.path.isdir(stories):
        raise ValueError(
            f"{stories} is not there: run python tinystories.py download, or synthesize where there is no "
            "network, or name your own text with --input=FILE_OR_FOLDER"
        )
    return find_files(stories), data_dir


def separator_of(config) -> str:
    return config.separator.replace("\\n", "\n").replace("\\t", "\t")


def run_train_vocab(config: TrainVocab):
    files, data_dir = find_input(config)
    with only_writer(data_dir):
        learn_vocabulary(files, data_dir, config.vocab_size, separator_of(config))


def learn_vocabulary(files: list[str], data_dir: str, vocab_size: int, separator: str) -> str:
    """Write DATA_DIR/tokSIZE.model and .bin, learned from the beginning of every file; returns
    the path of the first."""
    path = os.path.join(data_dir, f"tok{vocab_size}.model")
    print(f"learning {vocab_size} tokens from {len(files)} file(s) ...")
    texts = (text for file in files for text in beginning(file, separator, VOCAB_CHARACTERS // len(files)))
    tokenizer = SentencePieceTokenizer(train_sentencepiece(texts, vocab_size))
    write_atomically(path, tokenizer.content)
    write_atomically(path.removesuffix("model") + "bin", tokenizer.to_bin())
    print(f"wrote {path} and tok{vocab_size}.bin")
    return path


def beginning(file: str, separator: str, characters: int):
    for text, _ in read_pieces(file, separator):
        yield text
        characters -= len(text)
        if characters < 0:
            return


def run_pretokenize(config: Pretokenize):
    world, _ = join_world("cpu", LONGEST_WAIT)  # torchrun's processes take the files in turn
    files, data_dir = find_input(config)
    folder = tokens_folder(data_dir, config.vocab_source, config.vocab_size)
    with contextlib.ExitStack() as stack:
        stack.enter_context(lost_processes_in_words("for a week"))
        if world.is_main:
            stack.enter_context(only_writer(data_dir))
            stack.enter_context(only_writer(folder))
            prepare_tokenizer(config, files, data_dir, folder)
        world.wait()
        tokenizer = load_tokenizer(os.path.join(folder, "tokenizer.model"))
        jobs = plan(config, files, folder, tokenizer)
        meta = {
            "vocab_source": config.vocab_source,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_hash": tokenizer.hash,
            "dtype": token_dtype(tokenizer.vocab_size).str,
            "complete": False,
            "shards": [],
        }
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        pretokenize(jobs, folder, meta, config.num_workers or max(1, os.cpu_count() // here), world)
        leave_world()
    if world.is_main:
        options = f"--data_dir={data_dir} --vocab_source={config.vocab_source} --vocab_size={tokenizer.vocab_size}"
        print(f"next: python train.py {options}")


def prepare_tokenizer(config: Pretokenize, files: list[str], data_dir: str, folder: str):
    """Put the vocabulary to use into the folder of tokens, learned where there is none."""
    path = config.tokenizer or os.path.join(data_dir, f"tok{config.vocab_size}.model")
    if not config.tokenizer and not os.path.exists(path):
        learn_vocabulary(files, data_dir, config.vocab_size, separator_of(config))
    elif not config.tokenizer:
        print(f"with the vocabulary {path}, which is there already; delete it to learn it again")
    tokenizer = load_tokenizer(path)
    if config.vocab_source == "custom" and tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"{path} has {tokenizer.vocab_size} tokens, not --vocab_size={config.vocab_size}; "
            f"give --vocab_size={tokenizer.vocab_size}"
        )
    write_atomically(os.path.join(folder, "tokenizer.model"), tokenizer.content)


def plan(config: Pretokenize, files: list[str], folder: str, tokenizer: Tokenizer) -> list[dict]:
    """One job a file: where it goes, and all that its tokens depend on."""
    jobs = []
    first_validates = not config.input and len(files) > 1
    for number, file in enumerate(files):
        status = os.stat(file)
        jobs.append({
            "source": os.path.abspath(file),
            "size": status.st_size,
            "modified_ns": status.st_mtime_ns,
            "file": f"{number:05d}.bin",
            "tokenizer_hash": tokenizer.hash,
            "separator": separator_of(config),
            "val_fraction": float(number == 0) if first_validates else config.val_fraction,
        })  # fmt: skip
    return jobs


def pretokenize(jobs: list[dict], folder: str, meta: dict, num_workers: int, world: World):
    """Run the jobs that are not done yet, each process its share of them, recording each as it ends;
    meta.json is complete only after the last."""
    done = {json.dumps(shard["job"]): shard for shard in recorded_shards(folder)}
    finished = [done[json.dumps(job)] for job in jobs if json.dumps(job) in done]
    waiting = [job for job in jobs if json.dumps(job) not in done]
    others = {shard["job"]["source"] for shard in done.values()} - {job["source"] for job in jobs}
    if others and len(others) == len(done):
        raise ValueError(f"{folder} holds the tokens of another text, {min(others)}: give another --data_dir")
    world.wait()  # until all know what is done
    if world.is_main:
        if finished:
            print(f"{len(finished)} of {len(jobs)} file(s) unchanged since the last time")
        write_meta(folder, meta | {"shards": finished})
    own = []

    def record(shard):
        own.append(shard)
        if world.is_main:
            write_meta(folder, meta | {"shards": finished + own})
        else:
            part = json.dumps({"dtype": meta["dtype"], "shards": own})
            write_atomically(os.path.join(folder, f"part{world.rank}.json"), part.encode())

    run_jobs(waiting[world.rank :: world.size], folder, num_workers, record, world.is_main)
    world.wait()
    if world.is_main:
        recorded = {json.dumps(shard["job"]): shard for shard in recorded_shards(folder)}
        complete(folder, meta, [recorded[json.dumps(job)] for job in jobs])


def complete(folder: str, meta: dict, shards: list[dict]):
    """Write the whole meta.json, and remove what is of files that are gone or of an interrupted run."""
    for name in set(os.listdir(folder)) - {shard["file"] for shard in shards}:
        if name.endswith((".bin", ".partial")):
            os.remove(os.path.join(folder, name))
    tokens = {split: sum(s[split][1] - s[split][0] for s in shards) for split in ("train", "val")}
    write_meta(folder, meta | {"shards": shards, "complete": True, "tokens": tokens})
    for path in part_files(folder):
        os.remove(path)
    print(f"{folder}: {tokens['train']:,} tokens to train on, {tokens['val']:,} to validate, {len(shards)} shard(s)")


def part_files(folder: str) -> list[str]:
    """What processes but the first have recorded."""
    return glob.glob(os.path.join(glob.escape(folder), "part*.json"))


def recorded_shards(folder: str) -> list[dict]:
    """The shards of an earlier run, or of this one so far, that are still whole."""
    found = []
    for record in (os.path.join(folder, META_FILE), *part_files(folder)):
        try:
            with open(record, encoding="utf-8") as file:
                meta = json.load(file)
            width = int(meta["dtype"][-1])
            paths = [os.path.join(folder, shard["file"]) for shard in meta["shards"]]
            sizes = [os.path.getsize(path) if os.path.exists(path) else -1 for path in paths]
            shards = zip(meta["shards"], sizes, strict=True)
            found += [s for s, size in shards if size == s["tokens"] * width and "job" in s]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def run_jobs(jobs: list[dict], folder: str, num_workers: int, record, shows: bool):
    """Tokenize in parallel under one progress bar. The first failure ends the run."""
    context = multiprocessing.get_context("spawn")
    bytes_read = context.Value("q", 0)
    workers = min(num_workers, len(jobs))
    threads = max(1, num_workers // max(1, workers))
    size, hides = sum(job["size"] for job in jobs), None if shows else True
    bar = tqdm(disable=hides, total=size, unit="B", unit_scale=True, desc="tokenizing")
    with contextlib.ExitStack() as stack:
        stack.enter_context(bar)
        if workers < 2:
            for job in jobs:
                count_bytes(bytes_read)
                record(tokenize_file(job, folder, threads, lambda: bar.update(bytes_read.value - bar.n)))
            return
        pool = ProcessPoolExecutor(workers, context, count_bytes, (bytes_read, True))
        stack.callback(pool.shutdown, cancel_futures=True)
        earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)  # until the workers are ready for it
        try:
            running = {pool.submit(tokenize_file, job, folder, threads) for job in jobs}
        finally:
            signal.signal(signal.SIGINT, earlier)
        while running:
            ended, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            bar.update(bytes_read.value - bar.n)
            for future in ended:
                try:
                    record(future.result())
                except BrokenProcessPool:
                    raise ValueError("a worker was killed (out of memory?); try fewer with --num_workers=1") from None


def count_bytes(counter, in_worker: bool = False):
    """Have tokenize_file count what it reads here. A worker ends silently with Ctrl-C, and with
    its parent, however that dies."""
    global bytes_read
    bytes_read = counter
    if in_worker:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        parent = multiprocessing.parent_process()
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def tokenize_file(job: dict, folder: str, num_threads: int, on_progress=lambda: None) -> dict:
    """Write the job's shard; returns its entry for meta.json."""
    tokenizer = load_tokenizer(os.path.join(folder, "tokenizer.model"))
    path = os.path.join(folder, job["file"])
    position = 0

    def progress(now):
        nonlocal position
        with bytes_read.get_lock():
            bytes_read.value += now - position
        position = now
        on_progress()

    with ShardWriter(path, tokenizer.vocab_size) as writer:
        encoder = Encoder(tokenizer, writer.dtype)
        batch, characters = [], 0
        for piece in read_pieces(job["source"], job["separator"], progress):
            batch.append(piece)
            characters += len(piece.text)
            if characters > BATCH_CHARACTERS:
                write_batch(writer, encoder, batch, num_threads)
                batch, characters = [], 0
        write_batch(writer, encoder, batch, num_threads)
    cut = split_point(path, writer.dtype, tokenizer.bos_id, job["val_fraction"])
    return {"file": job["file"], "tokens": writer.tokens, "train": [0, cut], "val": [cut, writer.tokens], "job": job}


def write_batch(writer: ShardWriter, encoder: Encoder, batch: list, num_threads: int):
    encoded = encoder.encode([piece.text for piece in batch], num_threads)
    for piece, ids in zip(batch, encoded, strict=True):
        if piece.starts_document:
            writer.write([encoder.tokenizer.bos_id])
        writer.write_bytes(ids)


STAGES = {
    "download": (Download, run_download),
    "synthesize": (Synthesize, run_synthesize),
    "train_vocab": (TrainVocab, run_train_vocab),
    "pretokenize": (Pretokenize, run_pretokenize),
}


def main():
    stage = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if stage in ("-h", "--help"):
        return print(__doc__.strip())
    if stage not in STAGES:
        refuse(f"{stage}: the stage must come first and be one of {', '.join(STAGES)}")
    config_class, run = STAGES[stage]
    config, given = configure(config_class, sys.argv[2:], program=f"tinystories.py {stage}")
    print_overrides(config, given)
    run(config)


if __name__ == "__main__":
    run_script(main)
