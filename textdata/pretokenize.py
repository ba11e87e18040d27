"""
Text to token shards, in parallel.
"""

import contextlib
import glob
import json
import multiprocessing
import os
import signal
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from runtime.atomic_files import write_atomically
from runtime.distributed import DistContext
from textdata.corpus import read_documents
from textdata.fast_encoder import Encoder
from textdata.token_shards import META_FILE, ShardWriter, train_val_cut, write_meta
from textdata.tokenizer import load_tokenizer

BATCH_CHARACTERS = 2**20  # of text handed to SentencePiece at a time


def pretokenize(jobs: list[dict], folder: str, meta: dict, num_workers: int, dist_ctx: DistContext):
    """Run the jobs that are not done yet, each process its share of them, recording each as it ends;
    meta.json is complete only after the last."""
    done = {json.dumps(shard["job"]): shard for shard in finished_shards(folder)}
    finished = [done[json.dumps(job)] for job in jobs if json.dumps(job) in done]
    waiting = [job for job in jobs if json.dumps(job) not in done]
    others = {shard["job"]["source"] for shard in done.values()} - {job["source"] for job in jobs}
    if others and len(others) == len(done):
        raise ValueError(
            f"{folder} holds the tokens of another text, {min(others)}: give another --data_dir"
        )
    dist_ctx.barrier()  # until all know what is done
    if dist_ctx.is_main:
        if finished:
            print(f"{len(finished)} of {len(jobs)} file(s) unchanged since the last time")
        write_meta(folder, meta | {"shards": finished})
    own = []

    def record(shard):
        own.append(shard)
        if dist_ctx.is_main:
            write_meta(folder, meta | {"shards": finished + own})
        else:
            part = json.dumps({"dtype": meta["dtype"], "shards": own})
            write_atomically(os.path.join(folder, f"part{dist_ctx.rank}.json"), part.encode())

    run_jobs(waiting[dist_ctx.rank :: dist_ctx.size], folder, num_workers, record, dist_ctx.is_main)
    dist_ctx.barrier()
    if dist_ctx.is_main:
        recorded = {json.dumps(shard["job"]): shard for shard in finished_shards(folder)}
        finalize_metadata(folder, meta, [recorded[json.dumps(job)] for job in jobs])


def finalize_metadata(folder: str, meta: dict, shards: list[dict]):
    """Write the whole meta.json, and remove what is of files that are gone or of an interrupted run."""
    for name in set(os.listdir(folder)) - {shard["file"] for shard in shards}:
        if name.endswith((".bin", ".partial")):
            os.remove(os.path.join(folder, name))
    tokens = {split: sum(s[split][1] - s[split][0] for s in shards) for split in ("train", "val")}
    write_meta(folder, meta | {"shards": shards, "complete": True, "tokens": tokens})
    for path in rank_metadata_files(folder):
        os.remove(path)
    print(
        f"{folder}: {tokens['train']:,} tokens to train on, {tokens['val']:,} to validate, {len(shards)} shard(s)"
    )


def rank_metadata_files(folder: str) -> list[str]:
    """What processes but the first have recorded."""
    return glob.glob(os.path.join(glob.escape(folder), "part*.json"))


def finished_shards(folder: str) -> list[dict]:
    """The shards of an earlier run, or of this one so far, that are still whole."""
    found = []
    for record in (os.path.join(folder, META_FILE), *rank_metadata_files(folder)):
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
                init_worker(bytes_read)
                record(
                    tokenize_file(
                        job, folder, threads, lambda: bar.update(bytes_read.value - bar.n)
                    )
                )
            return
        pool = ProcessPoolExecutor(workers, context, init_worker, (bytes_read, True))
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
                    raise ValueError(
                        "a worker was killed (out of memory?); try fewer with --num_workers=1"
                    ) from None


def init_worker(counter, in_worker: bool = False):
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
        for piece in read_documents(job["source"], job["separator"], progress):
            batch.append(piece)
            characters += len(piece.text)
            if characters > BATCH_CHARACTERS:
                write_batch(writer, encoder, batch, num_threads)
                batch, characters = [], 0
        write_batch(writer, encoder, batch, num_threads)
    cut = train_val_cut(path, writer.dtype, tokenizer.bos_id, job["val_fraction"])
    return {
        "file": job["file"],
        "tokens": writer.tokens,
        "train": [0, cut],
        "val": [cut, writer.tokens],
        "job": job,
    }


def write_batch(writer: ShardWriter, encoder: Encoder, batch: list, num_threads: int):
    encoded = encoder.encode([piece.text for piece in batch], num_threads)
    for piece, ids in zip(batch, encoded, strict=True):
        if piece.starts_document:
            writer.write([encoder.tokenizer.bos_id])
        writer.write_bytes(ids)
