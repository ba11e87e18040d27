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
import os
import random
import sys
import tarfile
from dataclasses import dataclass
from typing import Literal

import requests
from tqdm import tqdm

from configurator import configure, exit_with_errors, print_overrides, run_main
from runtime.atomic_files import run_lock, write_atomically
from runtime.distributed import init_distributed, shutdown_distributed, translate_dist_errors
from textdata.corpus import find_files, read_documents
from textdata.download import download, plain_reason, unpack
from textdata.pretokenize import pretokenize
from textdata.token_shards import token_dir, token_dtype
from textdata.tokenizer import (
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
)

ARCHIVE = "TinyStories_all_data.tar.gz"
STORIES = "TinyStories_all_data"
STORIES_PER_SHARD = 5000
VOCAB_CHARACTERS = 100_000_000  # of text to learn a vocabulary from
LONGEST_WAIT = 7 * 24 * 3600.0  # seconds that a process waits for those that have more to do


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

    def validate(self):
        if self.num_stories < 1:
            yield f"--num_stories={self.num_stories}: must be at least 1"


@dataclass(frozen=True)
class TrainVocab:
    """Learn a vocabulary of byte pairs, DATA_DIR/tokSIZE.model and .bin."""

    vocab_size: int = 4096  # tokens, 259 of them fixed: three control tokens and the bytes
    input: str = ""  # a .txt, .json or .jsonl file or a folder of them; TinyStories if empty
    data_dir: str = ""  # where the vocabulary goes; data, or data/NAME for an input of that name
    separator: str = (
        ""  # between the documents of .txt files; blank lines if empty, \n is a line break
    )

    def validate(self):
        if not 260 <= self.vocab_size <= 2**31:
            yield f"--vocab_size={self.vocab_size}: must be at least 260, the bytes and control tokens take 259"


@dataclass(frozen=True)
class Pretokenize:
    """Turn text into token shards, in parallel; what is done and unchanged is left as it is."""

    vocab_source: Literal["custom", "llama2"] = (
        "custom"  # our own vocabulary, or Llama 2's tokenizer.model
    )
    vocab_size: int = 4096  # of our own vocabulary, which is learned first if it is missing
    tokenizer: str = (
        ""  # a tokenizer.model or tokenizer.bin to use; needed with --vocab_source=llama2
    )
    input: str = ""  # a .txt, .json or .jsonl file or a folder of them; TinyStories if empty
    data_dir: str = ""  # where the tokens go; data, or data/NAME for an input of that name
    separator: str = (
        ""  # between the documents of .txt files; blank lines if empty, \n is a line break
    )
    val_fraction: float = 0.05  # the end of each file that validates (TinyStories: its first shard)
    num_workers: int = 0  # processes; 0: as many as there are cores

    def validate(self):
        yield from TrainVocab.validate(self)
        if not 0 < self.val_fraction < 1:
            yield f"--val_fraction={self.val_fraction}: must be above 0 and below 1"
        if self.num_workers < 0:
            yield f"--num_workers={self.num_workers}: must be 0 or more"
        if self.vocab_source == "llama2" and not self.tokenizer:
            yield "--vocab_source=llama2: say where Llama 2's tokenizer.model is with --tokenizer=PATH"


def run_download(config: Download):
    folder = os.path.join(config.data_dir, STORIES)
    archive = os.path.join(config.data_dir, ARCHIVE)
    with run_lock(config.data_dir):
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
            raise ValueError(
                f"{archive} does not unpack ({error}); delete it and download again"
            ) from error
    print(
        f"{folder}: {len(glob.glob(os.path.join(folder, '*.json')))} shards; next: python tinystories.py pretokenize"
    )


def run_synthesize(config: Synthesize):
    from textdata.synthetic import story

    bar = tqdm(disable=None, total=config.num_stories, unit="story", desc="synthesizing")
    with run_lock(config.data_dir), bar:
        for shard, first in enumerate(range(0, config.num_stories, STORIES_PER_SHARD)):
            rng = random.Random(f"{config.seed} {shard}")
            count = min(STORIES_PER_SHARD, config.num_stories - first)
            records = [
                {"story": story(rng), "source": "synthetic, from cria's grammar"}
                for _ in range(count)
            ]
            path = os.path.join(config.data_dir, f"synthetic{shard:02d}.json")
            write_atomically(path, json.dumps(records).encode())
            bar.update(count)
        for path in glob.glob(os.path.join(glob.escape(config.data_dir), "synthetic[0-9]*.json")):
            if (
                int(os.path.basename(path)[len("synthetic") : -len(".json")]) > shard
            ):  # of a larger set before
                os.remove(path)
    print(f"next: python tinystories.py pretokenize --input={config.data_dir}")


def find_input(config) -> tuple[list[str], str]:
    """The text files to read and the folder to write to."""
    path = os.path.abspath(config.input)
    name = (
        os.path.basename(path)
        if os.path.isdir(path)
        else os.path.splitext(os.path.basename(path))[0]
    )
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
    with run_lock(data_dir):
        learn_vocabulary(files, data_dir, config.vocab_size, separator_of(config))


def learn_vocabulary(files: list[str], data_dir: str, vocab_size: int, separator: str) -> str:
    """Write DATA_DIR/tokSIZE.model and .bin, learned from the beginning of every file; returns
    the path of the first."""
    path = os.path.join(data_dir, f"tok{vocab_size}.model")
    print(f"learning {vocab_size} tokens from {len(files)} file(s) ...")
    texts = (
        text
        for file in files
        for text in head_of_corpus(file, separator, VOCAB_CHARACTERS // len(files))
    )
    tokenizer = SentencePieceTokenizer(train_sentencepiece(texts, vocab_size))
    write_atomically(path, tokenizer.content)
    write_atomically(path.removesuffix("model") + "bin", tokenizer.to_bin())
    print(f"wrote {path} and tok{vocab_size}.bin")
    return path


def head_of_corpus(file: str, separator: str, characters: int):
    for text, _ in read_documents(file, separator):
        yield text
        characters -= len(text)
        if characters < 0:
            return


def run_pretokenize(config: Pretokenize):
    dist_ctx, _ = init_distributed(
        "cpu", LONGEST_WAIT
    )  # torchrun's processes take the files in turn
    files, data_dir = find_input(config)
    folder = token_dir(data_dir, config.vocab_source, config.vocab_size)
    with contextlib.ExitStack() as stack:
        stack.enter_context(translate_dist_errors("for a week"))
        if dist_ctx.is_main:
            stack.enter_context(run_lock(data_dir))
            stack.enter_context(run_lock(folder))
            prepare_tokenizer(config, files, data_dir, folder)
        dist_ctx.barrier()
        tokenizer = load_tokenizer(os.path.join(folder, "tokenizer.model"))
        jobs = list_jobs(config, files, folder, tokenizer)
        meta = {
            "vocab_source": config.vocab_source,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_hash": tokenizer.hash,
            "dtype": token_dtype(tokenizer.vocab_size).str,
            "complete": False,
            "shards": [],
        }
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        pretokenize(
            jobs, folder, meta, config.num_workers or max(1, os.cpu_count() // here), dist_ctx
        )
        shutdown_distributed()
    if dist_ctx.is_main:
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


def list_jobs(
    config: Pretokenize, files: list[str], folder: str, tokenizer: Tokenizer
) -> list[dict]:
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


STAGES = {
    "download": (Download, run_download),
    "synthesize": (Synthesize, run_synthesize),
    "train_vocab": (TrainVocab, run_train_vocab),
    "pretokenize": (Pretokenize, run_pretokenize),
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    stage = argv[0] if argv else "--help"
    if stage in ("-h", "--help"):
        return print(__doc__.strip())
    if stage not in STAGES:
        exit_with_errors(f"{stage}: the stage must come first and be one of {', '.join(STAGES)}")
    config_class, run = STAGES[stage]
    config, overrides = configure(config_class, argv[1:], program=f"tinystories.py {stage}")
    print_overrides(config, overrides)
    run(config)


if __name__ == "__main__":
    run_main(main)
