"""
How fast text becomes tokens, and tokens become batches.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import numpy as np

from benchmarks.timing import largest_resident_size
from textdata.corpus import find_files, read_documents
from textdata.loader import training_batches
from textdata.synthetic import story
from textdata.token_shards import TokenDataset, token_dir, token_dtype, write_meta
from textdata.tokenizer import load_tokenizer, train_sentencepiece

TO_LEARN_FROM = 4 * 2**20  # characters


@dataclass(frozen=True)
class DataBench:
    """Tokens per second and memory of pretokenizing one JSON shard, and the time of a batch."""

    input: str = (
        ""  # text to repeat until the shard is full, a file or folder; empty: synthetic stories
    )
    megabytes: int = 150  # size of the shard
    vocab_size: int = 1024  # learned from the text; synthetic stories have words for about 2000
    rounds: int = 3  # how often it is done
    json: str = ""  # also write the records here

    def validate(self):
        for name in ("megabytes", "rounds"):
            if getattr(self, name) < 1:
                yield f"--{name}={getattr(self, name)}: must be 1 or more"
        if self.vocab_size < 1:
            yield f"--vocab_size={self.vocab_size}: must be 1 or more"
        yield from path_problems(self.json)


def path_problems(path: str):
    """Why records could not be written there."""
    folder = os.path.dirname(path) or "."
    if path and not os.path.isdir(folder):
        yield f"--json={path}: there is no folder {folder}"
    elif path and (os.path.isdir(path) or not os.access(folder, os.W_OK)):
        yield f"--json={path}: a file cannot be written there"


def pretokenizing(config: DataBench) -> list[dict]:
    """Print and return the figures of python tinystories.py pretokenize, the whole command, beside
    those of SentencePiece alone."""
    records = []
    with tempfile.TemporaryDirectory(prefix="cria-bench-") as folder:
        stories = distinct_stories(config)
        shard, tokenizer_path = (
            os.path.join(folder, "shard.json"),
            os.path.join(folder, "tokenizer.model"),
        )
        with open(tokenizer_path, "wb") as file:
            file.write(train_sentencepiece(take(stories, TO_LEARN_FROM), config.vocab_size))
        write_shard(shard, stories, config.megabytes * 10**6)
        ours, plain, at_once, peaks = [], [], [], []
        for round in range(config.rounds):
            rate, peak = run_pretokenize(config, folder, shard, tokenizer_path, round)
            ours.append(rate)
            peaks.append(peak)
            plain.append(sentencepiece_alone(tokenizer_path, stories, 0))
            at_once.append(sentencepiece_alone(tokenizer_path, stories, os.cpu_count()))
    words = len({word for text in stories for word in text.split(" ")})
    print(
        f"{len(stories):,} stories with {words:,} distinct words, repeated to {config.megabytes} MB"
    )
    for name, rates in (("one by one", plain), ("a list at a time", at_once), ("ours", ours)):
        rate = statistics.median(rates)
        print(
            f"pretokenize, {name}: {rate / 1e6:.2f} M tokens/s ({min(rates) / 1e6:.2f} to {max(rates) / 1e6:.2f})"
        )
        records.append(
            {"preset": "data", "variant": f"pretokenize {name}", "tokens_per_second": rate}
        )
    print(
        f"pretokenize, ours: peak memory {max(peaks) / 2**20:,.0f} MB for a shard of {config.megabytes} MB"
    )
    records[-1] |= {"ratio_to_plain": statistics.median(ours) / statistics.median(plain)}
    records[-1] |= {"peak_memory_bytes": max(peaks)}
    return records


def distinct_stories(config: DataBench) -> list[str]:
    if config.input:
        stories = [
            piece.text for file in find_files(config.input) for piece in read_documents(file)
        ]
        if not stories:
            raise ValueError(f"--input={config.input}: there is no text in it")
        return stories
    rng = random.Random(0)
    return [story(rng) for _ in range(20_000)]


def take(texts: list[str], characters: int):
    for text in texts:
        yield text
        characters -= len(text)
        if characters < 0:
            return


def write_shard(path: str, stories: list[str], size: int):
    """TinyStories' own format: a list of records with the text under story."""
    with open(path, "w", encoding="utf-8") as file:
        file.write("[")
        number = 0
        while file.tell() < size:
            file.write(
                (", " if number else "") + json.dumps({"story": stories[number % len(stories)]})
            )
            number += 1
        file.write("]")


def run_pretokenize(
    config: DataBench, folder: str, shard: str, tokenizer: str, round: int
) -> tuple[float, int]:
    """Tokens per second of the whole command, and its peak memory in bytes."""
    data_dir = os.path.join(folder, f"round{round}")
    command = [
        sys.executable,
        "tinystories.py",
        "pretokenize",
        f"--input={shard}",
        f"--tokenizer={tokenizer}",
    ]
    command += [f"--data_dir={data_dir}", f"--vocab_size={config.vocab_size}"]
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None:
        peak = max(peak, largest_resident_size(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise ValueError(f"pretokenize failed: {process.stdout.read().decode().strip()}")
    took = time.perf_counter() - began
    with open(os.path.join(token_dir(data_dir, "custom", config.vocab_size), "meta.json")) as file:
        return sum(json.load(file)["tokens"].values()) / took, peak


def sentencepiece_alone(tokenizer_path: str, stories: list[str], threads: int) -> float:
    """Tokens per second of SentencePiece over some stories, one after the other or, with threads, as
    a list; reading and writing are not counted."""
    tokenizer = load_tokenizer(tokenizer_path)
    some = list(take(stories, TO_LEARN_FROM))
    began = time.perf_counter()
    encoded = tokenizer.encode_batch(some, threads) if threads else map(tokenizer.encode, some)
    return sum(map(len, encoded)) / (time.perf_counter() - began)


def sampling(config: DataBench, batch_size: int, seq_len: int, step_seconds: float) -> list[dict]:
    """Print and return what a batch costs beside the training step that uses it."""
    with tempfile.TemporaryDirectory(prefix="cria-bench-") as folder:
        windows = random_windows(folder, config.vocab_size, seq_len)
        batches = training_batches(windows, 0, batch_size, range(0, 10**9, batch_size))
        times = []
        for _ in range(500):
            began = time.perf_counter()
            next(batches)
            times.append(time.perf_counter() - began)
    seconds = statistics.median(times)
    share = seconds / step_seconds
    print(
        f"a batch of {batch_size} x {seq_len} tokens: {seconds * 1e3:.2f} ms, {share:.2%} of the "
        f"{step_seconds * 1e3:.0f} ms of a step (15M), and a thread of its own reads it"
    )
    return [
        {
            "preset": "15M",
            "variant": "sampler",
            "seconds_per_batch": seconds,
            "share_of_step": share,
        }
    ]


def random_windows(
    folder: str, vocab_size: int, seq_len: int, tokens: int = 20_000_000
) -> TokenDataset:
    """Windows over a shard of random tokens."""
    dtype = token_dtype(vocab_size)
    np.random.default_rng(0).integers(vocab_size, size=tokens).astype(dtype).tofile(
        os.path.join(folder, "00000.bin")
    )
    shard = {"file": "00000.bin", "tokens": tokens, "train": [0, tokens], "val": [tokens, tokens]}
    write_meta(
        folder,
        {
            "vocab_size": vocab_size,
            "tokenizer_hash": "none",
            "dtype": dtype.str,
            "complete": True,
            "shards": [shard],
        },
    )
    return TokenDataset(folder, "train", seq_len)
