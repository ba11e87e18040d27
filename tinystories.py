"""
Text to tokens, in stages:

    python tinystories.py download       download and unpack TinyStories (arXiv 2305.07759), 1.6 GB
    python tinystories.py synthesize     or write synthetic stories, if there is no network
    python tinystories.py train_vocab    learn a vocabulary from the text
    python tinystories.py pretokenize    convert the text to token shards for train.py

train_vocab and pretokenize read your own text with --input=FILE_OR_FOLDER. With many files on many
machines, torchrun ... tinystories.py pretokenize divides the files among its processes.
Each stage has its own options: python tinystories.py pretokenize --help
"""

import contextlib
import glob
import json
import os
import random
import re
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import requests
from tqdm import tqdm

from configurator import configure, exit_with_errors, print_overrides, run_main
from runtime.atomic_files import run_lock, write_atomically
from runtime.distributed import init_distributed, shutdown_distributed, translate_dist_errors
from textdata.corpus import CorpusReport, format_skipped
from textdata.download import download, plain_reason, unpack
from textdata.input_files import find_files
from textdata.pretokenize import initial_meta, pretokenize
from textdata.prompts import unescape
from textdata.shard_jobs import check_same_text, list_jobs
from textdata.synthetic import story
from textdata.text_files import file_format, without_gz
from textdata.token_shards import token_dir
from textdata.tokenizer import load_folder_tokenizer
from textdata.vocabulary import find_or_learn_vocabulary, install_tokenizer, learn_vocabulary

DATASET = "TinyStories_all_data"
ARCHIVE = f"{DATASET}.tar.gz"
STORIES_PER_SHARD = 5000
SYNTHETIC_SOURCE = "synthetic, from cria's grammar"  # the source of every synthetic record
MAX_WAIT = 7 * 24 * 3600.0  # seconds that a process waits for processes with more to tokenize


@dataclass(frozen=True)
class Download:
    """Download TinyStories and unpack it. Run it again to resume an interrupted download."""

    data_dir: str = "data"  # folder for the archive and the folder TinyStories_all_data
    # URL of the archive
    url: str = f"https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/{ARCHIVE}"


@dataclass(frozen=True)
class Synthesize:
    """Write synthetic stories from a grammar, in TinyStories' JSON format."""

    num_stories: int = 20_000  # number of stories
    seed: int = 1337  # the same seed writes the same stories
    data_dir: str = "data/synthetic"  # folder for the shards

    def validate(self) -> Iterator[str]:
        if self.num_stories < 1:
            yield f"--num_stories={self.num_stories}: must be at least 1"


@dataclass(frozen=True)
class TrainVocab:
    """Learn a byte-pair vocabulary and write DATA_DIR/tokSIZE.model and .bin."""

    vocab_size: int = 4096  # tokens; 259 are fixed: three special tokens and the bytes
    # a .txt, .json, .jsonl, .csv or .parquet file or a folder of them; TinyStories if empty
    input: str = ""
    data_dir: str = ""  # folder for the vocabulary; data, or data/NAME for an input NAME
    # text between the documents of .txt files, where \n is a line break,
    # by default <|endoftext|> if it begins or ends a line of a file, else blank lines
    separator: str = ""
    text_field: str = ""  # field or column with the text of a record; "text" or "story" if empty

    def validate(self) -> Iterator[str]:
        yield from vocab_size_problems(self.vocab_size)


@dataclass(frozen=True)
class Pretokenize:
    """Convert text to token shards, in parallel. Shards of unchanged files are kept."""

    # a vocabulary learned from the text, or Llama 2's tokenizer.model
    vocab_source: Literal["custom", "llama2"] = "custom"
    vocab_size: int = 4096  # of the custom vocabulary, which is learned first if it is missing
    # an existing tokenizer.model or tokenizer.bin; required with --vocab_source=llama2
    tokenizer: str = ""
    # a .txt, .json, .jsonl, .csv or .parquet file or a folder of them; TinyStories if empty
    input: str = ""
    data_dir: str = ""  # folder for the tokens; data, or data/NAME for an input NAME
    # text between the documents of .txt files, where \n is a line break,
    # by default <|endoftext|> if it begins or ends a line of a file, else blank lines
    separator: str = ""
    text_field: str = ""  # field or column with the text of a record; "text" or "story" if empty
    # fraction of each shard, at its end, for validation (TinyStories: its first file);
    # a file of 4 MB is a shard, smaller files are packed
    val_fraction: float = 0.05
    num_workers: int = 0  # worker processes; 0: as many as CPU cores

    def validate(self) -> Iterator[str]:
        yield from vocab_size_problems(self.vocab_size)
        if not 0 < self.val_fraction < 1:
            yield f"--val_fraction={self.val_fraction}: must be above 0 and below 1"
        if self.num_workers < 0:
            yield f"--num_workers={self.num_workers}: must be 0 or more"
        if self.vocab_source == "llama2" and not self.tokenizer:
            yield (
                "--vocab_source=llama2: say where Llama 2's tokenizer.model is "
                "with --tokenizer=PATH"
            )


def vocab_size_problems(vocab_size: int) -> Iterator[str]:
    """Yield the problem with --vocab_size, if there is one."""
    if not 260 <= vocab_size <= 2**31:
        yield (
            f"--vocab_size={vocab_size}: must be at least 260, "
            "the bytes and control tokens take 259"
        )


def run_download(config: Download) -> None:
    """Download TinyStories to DATA_DIR/TinyStories_all_data."""
    folder = os.path.join(config.data_dir, DATASET)
    archive = os.path.join(config.data_dir, ARCHIVE)
    with run_lock(config.data_dir):
        if os.path.isdir(folder):
            return print(f"{folder} exists already; delete it to download again")
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
    num_shards = len(glob.glob(os.path.join(folder, "*.json")))
    print(f"{folder}: {num_shards} shards; next: python tinystories.py pretokenize")


def run_synthesize(config: Synthesize) -> None:
    """Write DATA_DIR/synthetic00.json and so on, with STORIES_PER_SHARD stories each."""
    bar = tqdm(disable=None, total=config.num_stories, unit="story", desc="synthesizing")
    with run_lock(config.data_dir), bar:
        starts = range(0, config.num_stories, STORIES_PER_SHARD)
        for shard, start in enumerate(starts):
            rng = random.Random(f"{config.seed} {shard}")
            count = min(STORIES_PER_SHARD, config.num_stories - start)
            records = [{"story": story(rng), "source": SYNTHETIC_SOURCE} for _ in range(count)]
            path = os.path.join(config.data_dir, f"synthetic{shard:02d}.json")
            write_atomically(path, json.dumps(records).encode())
            bar.update(count)
        remove_stale_shards(config.data_dir, len(starts))
    print(f"next: python tinystories.py pretokenize --input={config.data_dir}")


def remove_stale_shards(data_dir: str, num_shards: int) -> None:
    """Remove the shards that an earlier, larger run wrote."""
    for name in os.listdir(data_dir):
        match = re.fullmatch(r"synthetic(\d{2,})\.json", name)
        path = os.path.join(data_dir, name)
        if match and int(match[1]) >= num_shards and is_synthetic(path):
            os.remove(path)


def is_synthetic(path: str) -> bool:
    """Whether the last record of the file is synthetic."""
    end = json.dumps([{"source": SYNTHETIC_SOURCE}]).removeprefix("[{").encode()
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - len(end)))
        return file.read() == end


def run_train_vocab(config: TrainVocab) -> None:
    """Learn a vocabulary from the input."""
    report = CorpusReport()
    files, data_dir = find_input(config, report)
    with run_lock(data_dir):
        learn_vocabulary(
            files, data_dir, config.vocab_size, unescape(config.separator), config.text_field
        )
    for line in format_skipped(report.skipped):
        print(line)


def run_pretokenize(config: Pretokenize) -> None:
    """Convert the input to token shards in DATA_DIR/tokSIZE or DATA_DIR/llama2."""
    dist_ctx, _ = init_distributed("cpu", MAX_WAIT)  # torchrun's processes divide the files
    report = CorpusReport()
    files, data_dir = find_input(config, report)
    folder = token_dir(data_dir, config.vocab_source, config.vocab_size)
    with contextlib.ExitStack() as stack:
        stack.enter_context(translate_dist_errors("for a week"))
        if dist_ctx.is_main:
            stack.enter_context(run_lock(data_dir))
            stack.enter_context(run_lock(folder))
            check_same_text(folder, files)
            prepare_tokenizer(config, files, data_dir, folder)
        dist_ctx.barrier()
        tokenizer = load_folder_tokenizer(folder)
        fractions = val_fractions(config, len(files))
        separator = unescape(config.separator)
        jobs = list_jobs(files, tokenizer, separator, fractions, config.text_field)
        meta = initial_meta(config.vocab_source, tokenizer)
        num_workers = config.num_workers or default_num_workers()
        pretokenize(jobs, folder, meta, num_workers, dist_ctx, report)
        shutdown_distributed()
    if dist_ctx.is_main:
        vocab = f"--vocab_source={config.vocab_source} --vocab_size={tokenizer.vocab_size}"
        print(f"next: python train.py --data_dir={data_dir} {vocab}")


def prepare_tokenizer(config: Pretokenize, files: list[str], data_dir: str, folder: str) -> None:
    """Write FOLDER/tokenizer.model: --tokenizer, or the custom vocabulary, learned if missing."""
    path = config.tokenizer or find_or_learn_vocabulary(
        files, data_dir, config.vocab_size, unescape(config.separator), config.text_field
    )
    install_tokenizer(path, folder, config.vocab_size if config.vocab_source == "custom" else None)


def find_input(config: TrainVocab | Pretokenize, report: CorpusReport) -> tuple[list[str], str]:
    """The text files to read and the folder to write to. The report lists files left out."""
    data_dir = config.data_dir or default_data_dir(config.input)
    source = config.input or os.path.join(data_dir, DATASET)
    if not config.input and not os.path.isdir(source):
        raise ValueError(
            f"{source} does not exist: run python tinystories.py download, or synthesize if there "
            "is no network, or name your own text with --input=FILE_OR_FOLDER"
        )
    files = find_files(source, config.text_field, report)
    is_txt = [file_format(file) == ".txt" for file in files]
    if config.separator and not any(is_txt):
        raise ValueError(
            f"--separator={config.separator}: separates the documents of .txt files, and {source} "
            "has none; each record is a document"
        )
    if config.text_field and all(is_txt):
        details = "".join(f"; {line}" for line in format_skipped(report.skipped))
        raise ValueError(
            f"--text_field={config.text_field}: names the field of the text in records and tables, "
            f"but only .txt files are read from {source}{details}"
        )
    return files, data_dir


def default_data_dir(source: str) -> str:
    """data/NAME for a file NAME.txt or a folder NAME; data for TinyStories."""
    if not source:
        return "data"
    path = os.path.abspath(source)
    name = os.path.basename(path)
    if not os.path.isdir(path):
        name = os.path.splitext(without_gz(name))[0]
    return os.path.join("data", name)


def val_fractions(config: Pretokenize, num_files: int) -> list[float]:
    """For each file, the fraction of its shard that validates: all of TinyStories' first file and
    none of the others, or --val_fraction for any other text."""
    if not config.input and num_files > 1:
        return [1.0] + [0.0] * (num_files - 1)
    return [config.val_fraction] * num_files


def default_num_workers() -> int:
    """This process's part of the CPU cores of its machine."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


STAGES: dict[str, tuple[type, Callable[[Any], None]]] = {
    "download": (Download, run_download),
    "synthesize": (Synthesize, run_synthesize),
    "train_vocab": (TrainVocab, run_train_vocab),
    "pretokenize": (Pretokenize, run_pretokenize),
}


def main(argv: list[str] | None = None) -> None:
    """Run the stage that the first argument names, with the options that follow."""
    argv = sys.argv[1:] if argv is None else argv
    stage = argv[0] if argv else "--help"
    if stage in ("-h", "--help"):
        return print((__doc__ or "").strip())
    if stage not in STAGES:
        exit_with_errors(f"{stage}: the stage must come first and be one of {', '.join(STAGES)}")
    config_class, run = STAGES[stage]
    config: Any
    config, overrides = configure(config_class, argv[1:], program=f"tinystories.py {stage}")
    print_overrides(config, overrides)
    run(config)


if __name__ == "__main__":
    run_main(main)
