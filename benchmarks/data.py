"""
The speed of turning text into tokens, and tokens into batches.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from benchmarks.records import path_problems
from benchmarks.timing import largest_resident_size
from textdata import synthetic
from textdata.corpus import read_documents
from textdata.input_files import find_files
from textdata.loader import training_batches
from textdata.token_shards import TokenDataset, token_dir, token_dtype, write_meta
from textdata.tokenizer import load_tokenizer, train_sentencepiece

SAMPLE_CHARS = 4 * 2**20  # of text to learn the vocabulary from, and to encode with SentencePiece
SYNTHETIC_TEXTS = 20_000
NUM_BATCHES = 500
POLL_INTERVAL = 0.02  # seconds between looks at a process's memory
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@dataclass(frozen=True)
class DataBench:
    """Measure pretokenizing one JSON shard (tokens per second, memory) and reading a batch."""

    # the text, repeated until the shard is full: a file or folder; empty: synthetic stories
    input: str = ""
    megabytes: int = 150  # size of the shard
    vocab_size: int = 1024  # learned from the text; synthetic stories have words for about 2000
    rounds: int = 3  # repetitions of each measurement
    json: str = ""  # also write the records to this file

    def validate(self) -> Iterator[str]:
        for name in ("megabytes", "rounds"):
            if getattr(self, name) < 1:
                yield f"--{name}={getattr(self, name)}: must be 1 or more"
        if self.vocab_size < 1:
            yield f"--vocab_size={self.vocab_size}: must be 1 or more"
        yield from path_problems(self.json)


class Pretokenization(NamedTuple):
    """One run of tinystories.py pretokenize."""

    tokens_per_second: float
    peak_memory: int  # bytes


def measure_pretokenizing(config: DataBench) -> list[dict]:
    """Measure the whole command tinystories.py pretokenize, and SentencePiece alone. Prints the
    figures and returns the records."""
    with tempfile.TemporaryDirectory(prefix="cria-bench-") as folder:
        texts = load_texts(config)
        shard = os.path.join(folder, "shard.json")
        tokenizer_path = os.path.join(folder, "tokenizer.model")
        with open(tokenizer_path, "wb") as file:
            file.write(train_sentencepiece(limit_chars(texts, SAMPLE_CHARS), config.vocab_size))
        write_shard(shard, texts, config.megabytes * 10**6)
        single: list[float] = []
        batched: list[float] = []
        runs: list[Pretokenization] = []
        for number in range(config.rounds):
            data_dir = os.path.join(folder, f"round{number}")
            runs.append(run_pretokenize(shard, tokenizer_path, data_dir, config.vocab_size))
            single.append(sentencepiece_rate(tokenizer_path, texts, threads=0))
            batched.append(sentencepiece_rate(tokenizer_path, texts, threads=os.cpu_count() or 1))
    words = len({word for text in texts for word in text.split(" ")})
    print(f"{len(texts):,} texts with {words:,} distinct words, repeated to {config.megabytes} MB")
    cria = [run.tokens_per_second for run in runs]
    rates = {"one by one": single, "a list at a time": batched, "cria": cria}
    records = [report_rate(name, values) for name, values in rates.items()]
    peak = max(run.peak_memory for run in runs)
    print(
        f"pretokenize, cria: peak memory {peak / 2**20:,.0f} MB "
        f"for a shard of {config.megabytes} MB"
    )
    records[-1]["ratio_to_plain"] = statistics.median(cria) / statistics.median(single)
    records[-1]["peak_memory_bytes"] = peak
    return records


def report_rate(name: str, rates: list[float]) -> dict:
    """Print the tokens per second of one way to pretokenize; returns the record."""
    rate = statistics.median(rates)
    spread = f"{min(rates) / 1e6:.2f} to {max(rates) / 1e6:.2f}"
    print(f"pretokenize, {name}: {rate / 1e6:.2f} M tokens/s ({spread})")
    return {"preset": "data", "variant": f"pretokenize {name}", "tokens_per_second": rate}


def load_texts(config: DataBench) -> list[str]:
    """The documents in --input, or synthetic stories. Raises ValueError if there is no text."""
    if not config.input:
        rng = random.Random(0)
        return [synthetic.story(rng) for _ in range(SYNTHETIC_TEXTS)]
    texts = [chunk.text for file in find_files(config.input) for chunk in read_documents(file)]
    if not texts:
        raise ValueError(f"--input={config.input}: there is no text in it")
    return texts


def limit_chars(texts: list[str], limit: int) -> Iterator[str]:
    """Yield texts until they have more than limit characters."""
    remaining = limit
    for text in texts:
        yield text
        remaining -= len(text)
        if remaining < 0:
            return


def write_shard(path: str, texts: list[str], size: int) -> None:
    """Write texts in turn, in TinyStories' JSON format, until the file has size bytes."""
    with open(path, "w", encoding="utf-8") as file:
        written = file.write("[")
        number = 0
        while written < size:  # json.dumps writes ASCII: a character is a byte
            separator = ", " if number else ""
            record = json.dumps({"story": texts[number % len(texts)]})
            written += file.write(separator + record)
            number += 1
        file.write("]")


def run_pretokenize(
    shard: str, tokenizer_path: str, data_dir: str, vocab_size: int
) -> Pretokenization:
    """Run the whole command on one shard. Raises ValueError if it fails."""
    command = [sys.executable, "tinystories.py", "pretokenize", f"--input={shard}"]
    command += [f"--tokenizer={tokenizer_path}", f"--data_dir={data_dir}"]
    command.append(f"--vocab_size={vocab_size}")
    peak = 0
    started = time.perf_counter()
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        while process.poll() is None:
            peak = max(peak, largest_resident_size(process.pid))
            time.sleep(POLL_INTERVAL)
        assert process.stdout is not None, "stdout is a pipe"
        if process.returncode:
            raise ValueError(f"pretokenize failed: {process.stdout.read().decode().strip()}")
    seconds = time.perf_counter() - started
    with open(os.path.join(token_dir(data_dir, "custom", vocab_size), "meta.json")) as file:
        num_tokens = sum(json.load(file)["tokens"].values())
    return Pretokenization(num_tokens / seconds, peak)


def sentencepiece_rate(tokenizer_path: str, texts: list[str], threads: int) -> float:
    """Tokens per second of SentencePiece alone, without reading and writing: text by text
    (threads=0), or a list of texts with so many threads."""
    tokenizer = load_tokenizer(tokenizer_path)
    sample = list(limit_chars(texts, SAMPLE_CHARS))
    started = time.perf_counter()
    encoded = tokenizer.encode_batch(sample, threads) if threads else map(tokenizer.encode, sample)
    return sum(map(len, encoded)) / (time.perf_counter() - started)


def measure_batches(
    vocab_size: int, batch_size: int, seq_len: int, step_seconds: float
) -> list[dict]:
    """Measure reading a batch, beside a training step of step_seconds. Prints the figures and
    returns the records."""
    with tempfile.TemporaryDirectory(prefix="cria-bench-") as folder:
        dataset = random_dataset(folder, vocab_size, seq_len)
        batches = training_batches(dataset, 0, batch_size, range(0, 10**9, batch_size))
        times = []
        for _ in range(NUM_BATCHES):
            started = time.perf_counter()
            next(batches)
            times.append(time.perf_counter() - started)
    seconds = statistics.median(times)
    fraction = seconds / step_seconds
    print(
        f"a batch of {batch_size} x {seq_len} tokens: {seconds * 1e3:.2f} ms, {fraction:.2%} of "
        f"the {step_seconds * 1e3:.0f} ms of a step (15M); a separate thread reads it"
    )
    record = {"preset": "15M", "variant": "sampler", "seconds_per_batch": seconds}
    return [record | {"share_of_step": fraction}]


def random_dataset(
    folder: str, vocab_size: int, seq_len: int, tokens: int = 20_000_000
) -> TokenDataset:
    """The training windows of a shard of random tokens."""
    dtype = token_dtype(vocab_size)
    values = np.random.default_rng(0).integers(vocab_size, size=tokens).astype(dtype)
    values.tofile(os.path.join(folder, "00000.bin"))
    shard = {"file": "00000.bin", "tokens": tokens, "train": [0, tokens], "val": [tokens, tokens]}
    meta = {
        "vocab_size": vocab_size,
        "tokenizer_hash": "none",
        "dtype": dtype.str,
        "complete": True,
        "shards": [shard],
    }
    write_meta(folder, meta)
    return TokenDataset(folder, "train", seq_len)
