"""
Text files to token shards, in parallel over processes and machines.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import Synchronized

from tqdm import tqdm

from runtime.distributed import DistContext
from textdata.corpus import CorpusReport, DocumentChunk, format_report, read_documents
from textdata.fast_encoder import Encoder
from textdata.shard_jobs import (
    Job,
    ShardEntry,
    ShardRecord,
    count_files,
    earlier_shards,
    finished_record,
    job_size,
    remove_stale_files,
    write_record,
)
from textdata.token_shards import ShardWriter, token_dtype, train_val_cut, write_meta
from textdata.tokenizer import Tokenizer, load_folder_tokenizer

BATCH_CHARACTERS = 2**20  # of text encoded at a time
POLL_INTERVAL = 0.2  # seconds between updates of the progress bar

worker_bytes_read: "Synchronized[int]"  # in a worker process: bytes read by all workers


def initial_meta(vocab_source: str, tokenizer: Tokenizer) -> dict:
    """The content of meta.json before the first shard."""
    return {
        "vocab_source": vocab_source,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_hash": tokenizer.hash,
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "complete": False,
        "shards": [],
    }


def pretokenize(
    jobs: list[Job],
    folder: str,
    meta: dict,
    num_workers: int,
    dist_ctx: DistContext,
    report: CorpusReport,
) -> None:
    """Run the jobs that are not finished yet, write meta.json and print what was read.

    Args:
        jobs: all jobs of the data set, the same in every process.
        folder: the folder of token shards, with tokenizer.model.
        meta: the content of meta.json without shards.
        num_workers: worker processes of this process.
        dist_ctx: the processes that divide the jobs.
        report: what was left out when the files were listed.

    Raises ValueError for text that cannot be read, no text at all or a killed worker.
    """
    shards_before = earlier_shards(folder)
    pending = [job for job in jobs if finished_record(folder, job) is None]
    dist_ctx.barrier()  # every process has read the records before one changes them
    if dist_ctx.is_main:
        if num_unchanged := len(jobs) - len(pending):
            print(f"{num_unchanged} of {len(jobs)} shard(s) unchanged since the last time")
        write_meta(folder, meta | {"shards": shards_before})
    run_jobs(pending[dist_ctx.rank :: dist_ctx.size], folder, num_workers, dist_ctx.is_main)
    dist_ctx.barrier()
    if dist_ctx.is_main:
        entries = collect_entries(folder, jobs, report)
        if not any(entry["tokens"] for entry in entries):
            raise ValueError(
                f"there is no text to tokenize: {count_files(jobs)} file(s) without a document, "
                f"{jobs[0]['sources'][0].path} first; give another --input"
            )
        remove_stale_files(folder, jobs, shards_before)
        write_complete_meta(folder, meta, entries, report)


def collect_entries(folder: str, jobs: list[Job], report: CorpusReport) -> list[ShardEntry]:
    """The entries of all shards. What the jobs read is added to the report."""
    entries = []
    for job in jobs:
        record = finished_record(folder, job)
        if record is None or record.entry is None:
            raise ValueError(f"{folder}: {job['file']} is missing; run pretokenize again")
        entries.append(record.entry)
        report.add(record.report)
    return entries


def write_complete_meta(
    folder: str, meta: dict, entries: list[ShardEntry], report: CorpusReport
) -> None:
    """Write the complete meta.json and print its numbers."""
    tokens = {
        "train": sum(entry["train"][1] - entry["train"][0] for entry in entries),
        "val": sum(entry["val"][1] - entry["val"][0] for entry in entries),
    }
    numbers = {"files": report.num_files, "documents": report.num_documents, "tokens": tokens}
    write_meta(folder, meta | {"shards": entries, "complete": True} | numbers)
    print(format_report(report))
    print(
        f"{folder}: {tokens['train']:,} tokens to train on, {tokens['val']:,} to validate, "
        f"{len(entries)} shard(s)"
    )


def run_jobs(jobs: list[Job], folder: str, num_workers: int, show_progress: bool) -> None:
    """Run the jobs with num_workers processes under one progress bar. With fewer jobs than workers,
    each uses several threads. The first failure ends the run."""
    num_processes = min(num_workers, len(jobs))
    num_threads = max(1, num_workers // max(1, num_processes))
    bar = tqdm(
        disable=None if show_progress else True,
        total=sum(map(job_size, jobs)),
        unit="B",
        unit_scale=True,
        desc="tokenizing",
    )
    with bar:
        if num_processes < 2:
            for job in jobs:
                run_job(job, folder, num_threads, bar.update)
        else:
            run_in_pool(jobs, folder, num_processes, num_threads, bar)


def run_in_pool(
    jobs: list[Job], folder: str, num_processes: int, num_threads: int, bar: tqdm
) -> None:
    """Run the jobs in worker processes, each with num_threads threads."""
    context = multiprocessing.get_context("spawn")
    bytes_read = context.Value("q", 0)
    pool = ProcessPoolExecutor(num_processes, context, init_worker, (bytes_read,))
    try:
        with ignore_interrupts():  # until the workers have set their own handler
            running = {pool.submit(run_in_worker, job, folder, num_threads) for job in jobs}
        while running:
            ended, running = wait(running, POLL_INTERVAL, FIRST_COMPLETED)
            bar.update(bytes_read.value - bar.n)
            for future in ended:
                future.result()
    except BrokenProcessPool:
        raise ValueError(
            "a worker was killed (out of memory?); try fewer with --num_workers=1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def ignore_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C in this process, and in processes that it starts meanwhile."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def init_worker(bytes_read: "Synchronized[int]") -> None:
    """Prepare a worker process. It ends without a traceback on Ctrl-C, and when its parent ends."""
    global worker_bytes_read
    worker_bytes_read = bytes_read
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """Wait for the parent process to end, in whatever way, and end this process."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    os._exit(1)


def run_in_worker(job: Job, folder: str, num_threads: int) -> None:
    """run_job in a worker process, with the counter that all workers share."""
    run_job(job, folder, num_threads, add_bytes_read)


def add_bytes_read(num_bytes: int) -> None:
    """Add to the counter that all workers share."""
    with worker_bytes_read.get_lock():
        worker_bytes_read.value += num_bytes


def run_job(job: Job, folder: str, num_threads: int, on_progress: Callable[[int], object]) -> None:
    """Write the shard of the job and its record. on_progress is called with the number of bytes
    read since the last call."""
    encoder = load_encoder(folder, job["tokenizer_hash"])
    path = os.path.join(folder, job["file"])
    report = CorpusReport()
    write_record(folder, ShardRecord(job, None, 0, report))
    with ShardWriter(path, encoder.tokenizer.vocab_size) as writer:
        for batch in batches_of_text(read_sources(job, on_progress, report)):
            write_batch(writer, encoder, batch, num_threads)
    cut = train_val_cut(path, writer.dtype, encoder.tokenizer.bos_id, job["val_fraction"])
    entry = ShardEntry(
        file=job["file"],
        tokens=writer.num_tokens,
        train=[0, cut],
        val=[cut, writer.num_tokens],
    )
    write_record(folder, ShardRecord(job, entry, os.path.getsize(path), report))


@functools.lru_cache(maxsize=1)
def load_encoder(folder: str, tokenizer_hash: str) -> Encoder:
    """The encoder of the folder's vocabulary, which has this hash. Its word cache serves all jobs
    of a process."""
    tokenizer = load_folder_tokenizer(folder)
    if tokenizer.hash != tokenizer_hash:
        raise ValueError(
            f"the vocabulary in {folder} changed while text was tokenized; run pretokenize again"
        )
    return Encoder(tokenizer, token_dtype(tokenizer.vocab_size))


def read_sources(
    job: Job, on_progress: Callable[[int], object], report: CorpusReport
) -> Iterator[DocumentChunk]:
    """Yield the documents of all files of the job."""
    for source in job["sources"]:
        progress = ByteProgress(on_progress)
        yield from read_documents(
            source.path, job["separator"], progress, report, job["text_field"]
        )


class ByteProgress:
    """Converts positions in a file to the number of bytes since the last position."""

    def __init__(self, on_progress: Callable[[int], object]) -> None:
        self.on_progress = on_progress
        self.position = 0

    def __call__(self, position: int) -> None:
        self.on_progress(position - self.position)
        self.position = position


def batches_of_text(chunks: Iterator[DocumentChunk]) -> Iterator[list[DocumentChunk]]:
    """Group the chunks into batches of a little more than BATCH_CHARACTERS."""
    batch = []
    num_characters = 0
    for chunk in chunks:
        batch.append(chunk)
        num_characters += len(chunk.text)
        if num_characters > BATCH_CHARACTERS:
            yield batch
            batch = []
            num_characters = 0
    yield batch


def write_batch(
    writer: ShardWriter, encoder: Encoder, batch: list[DocumentChunk], num_threads: int
) -> None:
    """Append the tokens of the chunks to the shard, with BOS before each document."""
    encoded = encoder.encode(batch, num_threads)
    for chunk, ids in zip(batch, encoded, strict=True):
        if chunk.starts_document:
            writer.write([encoder.tokenizer.bos_id])
        writer.write_bytes(ids)
