"""
Text files to token shards, in parallel over processes and machines.

Each file becomes one shard. What its tokens depend on, the job, is recorded in meta.json, so that a
later run tokenizes only what changed.
"""

import contextlib
import glob
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import Synchronized
from typing import TypedDict

from tqdm import tqdm

from runtime.atomic_files import write_atomically
from runtime.distributed import DistContext
from textdata.corpus import DocumentChunk, read_documents
from textdata.fast_encoder import Encoder
from textdata.token_shards import META_FILE, ShardWriter, token_dtype, train_val_cut, write_meta
from textdata.tokenizer import Tokenizer, load_folder_tokenizer

BATCH_CHARACTERS = 2**20  # of text encoded at a time
POLL_INTERVAL = 0.2  # seconds between updates of the progress bar

worker_bytes_read: "Synchronized[int]"  # in a worker process: bytes read by all workers


class Job(TypedDict):
    """One file to tokenize, and everything that its tokens depend on."""

    source: str  # path of the text file
    size: int  # bytes of the text file
    modified_ns: int  # its modification time
    file: str  # name of the shard
    tokenizer_hash: str
    separator: str
    val_fraction: float


class ShardEntry(TypedDict):
    """The entry of a shard in meta.json."""

    file: str
    tokens: int
    train: list[int]  # start and stop
    val: list[int]
    job: Job


def list_jobs(
    files: list[str], tokenizer: Tokenizer, separator: str, val_fractions: list[float]
) -> list[Job]:
    """A job for each file, with the fraction of its tokens that validates."""
    jobs = []
    for number, (file, val_fraction) in enumerate(zip(files, val_fractions, strict=True)):
        status = os.stat(file)
        job = Job(
            source=os.path.abspath(file),
            size=status.st_size,
            modified_ns=status.st_mtime_ns,
            file=f"{number:05d}.bin",
            tokenizer_hash=tokenizer.hash,
            separator=separator,
            val_fraction=val_fraction,
        )
        jobs.append(job)
    return jobs


def job_key(job: Job) -> str:
    """A string that is equal for equal jobs."""
    return json.dumps(job)


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
    jobs: list[Job], folder: str, meta: dict, num_workers: int, dist_ctx: DistContext
) -> None:
    """Run the jobs that are not finished yet, and write meta.json.

    Args:
        jobs: all files of the data set, the same in every process.
        folder: the folder of token shards, with tokenizer.model.
        meta: the content of meta.json without shards.
        num_workers: worker processes of this process.
        dist_ctx: the processes that divide the jobs.

    Raises ValueError for text that cannot be read, a killed worker, or a folder of other tokens.
    """
    finished_before = finished_shards(folder)
    check_same_text(folder, jobs, finished_before)
    finished = [finished_before[job_key(job)] for job in jobs if job_key(job) in finished_before]
    pending = [job for job in jobs if job_key(job) not in finished_before]
    dist_ctx.barrier()  # every process has read meta.json before the main process changes it
    if dist_ctx.is_main:
        if finished:
            print(f"{len(finished)} of {len(jobs)} file(s) unchanged since the last time")
        write_meta(folder, meta | {"shards": finished})
    recorder = ShardRecorder(folder, meta, finished, dist_ctx)
    rank_jobs = pending[dist_ctx.rank :: dist_ctx.size]
    run_jobs(rank_jobs, folder, num_workers, recorder.record, dist_ctx.is_main)
    dist_ctx.barrier()
    if dist_ctx.is_main:
        recorded = finished_shards(folder)
        finalize_metadata(folder, meta, [recorded[job_key(job)] for job in jobs])


def check_same_text(folder: str, jobs: list[Job], finished: dict[str, ShardEntry]) -> None:
    """Raise ValueError if all finished shards are from files that are not in the jobs."""
    sources = {shard["job"]["source"] for shard in finished.values()}
    others = sources - {job["source"] for job in jobs}
    if others and len(others) == len(finished):
        raise ValueError(
            f"{folder} holds the tokens of another text, {min(others)}: give another --data_dir"
        )


class ShardRecorder:
    """Records the shards that this process finishes: in meta.json if it is the main process, else
    in a file partRANK.json that the main process merges at the end."""

    def __init__(
        self, folder: str, meta: dict, finished: list[ShardEntry], dist_ctx: DistContext
    ) -> None:
        self.folder = folder
        self.meta = meta
        self.finished = finished
        self.dist_ctx = dist_ctx
        self.shards: list[ShardEntry] = []

    def record(self, shard: ShardEntry) -> None:
        """Add a finished shard and write the file."""
        self.shards.append(shard)
        if self.dist_ctx.is_main:
            write_meta(self.folder, self.meta | {"shards": self.finished + self.shards})
        else:
            content = json.dumps({"dtype": self.meta["dtype"], "shards": self.shards})
            path = os.path.join(self.folder, f"part{self.dist_ctx.rank}.json")
            write_atomically(path, content.encode())


def finalize_metadata(folder: str, meta: dict, shards: list[ShardEntry]) -> None:
    """Write the complete meta.json. Remove shards of files that are gone, incomplete files and the
    metadata files of other ranks."""
    for name in set(os.listdir(folder)) - {shard["file"] for shard in shards}:
        if name.endswith((".bin", ".partial")):
            os.remove(os.path.join(folder, name))
    tokens = {
        "train": sum(shard["train"][1] - shard["train"][0] for shard in shards),
        "val": sum(shard["val"][1] - shard["val"][0] for shard in shards),
    }
    write_meta(folder, meta | {"shards": shards, "complete": True, "tokens": tokens})
    for path in rank_metadata_files(folder):
        os.remove(path)
    print(
        f"{folder}: {tokens['train']:,} tokens to train on, {tokens['val']:,} to validate, "
        f"{len(shards)} shard(s)"
    )


def rank_metadata_files(folder: str) -> list[str]:
    """The metadata files of all processes but the main process."""
    return glob.glob(os.path.join(glob.escape(folder), "part*.json"))


def finished_shards(folder: str) -> dict[str, ShardEntry]:
    """The shards that were recorded and still have their size, by job_key. Damaged metadata is
    ignored, so that its files are tokenized again."""
    finished: dict[str, ShardEntry] = {}
    for path in (os.path.join(folder, META_FILE), *rank_metadata_files(folder)):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            with open(path, encoding="utf-8") as file:
                meta = json.load(file)
            itemsize = int(meta["dtype"][-1])
            shards = [shard for shard in meta["shards"] if is_intact(folder, shard, itemsize)]
            finished |= {job_key(shard["job"]): shard for shard in shards}
    return finished


def is_intact(folder: str, shard: ShardEntry, itemsize: int) -> bool:
    """Whether the shard's file has as many tokens as recorded. An old entry may have no job."""
    path = os.path.join(folder, shard["file"])
    size = os.path.getsize(path) if os.path.exists(path) else -1
    return size == shard["tokens"] * itemsize and "job" in shard


def run_jobs(
    jobs: list[Job],
    folder: str,
    num_workers: int,
    record: Callable[[ShardEntry], None],
    show_progress: bool,
) -> None:
    """Tokenize the files with num_workers processes under one progress bar. With fewer files than
    workers, each uses several threads. The first failure ends the run."""
    num_processes = min(num_workers, len(jobs))
    num_threads = max(1, num_workers // max(1, num_processes))
    bar = tqdm(
        disable=None if show_progress else True,
        total=sum(job["size"] for job in jobs),
        unit="B",
        unit_scale=True,
        desc="tokenizing",
    )
    with bar:
        if num_processes < 2:
            for job in jobs:
                record(tokenize_file(job, folder, num_threads, bar.update))
        else:
            run_in_pool(jobs, folder, num_processes, num_threads, record, bar)


def run_in_pool(
    jobs: list[Job],
    folder: str,
    num_processes: int,
    num_threads: int,
    record: Callable[[ShardEntry], None],
    bar: tqdm,
) -> None:
    """Tokenize the files in worker processes, each with num_threads threads."""
    context = multiprocessing.get_context("spawn")
    bytes_read = context.Value("q", 0)
    pool = ProcessPoolExecutor(num_processes, context, init_worker, (bytes_read,))
    try:
        with ignore_interrupts():  # until the workers have set their own handler
            running = {pool.submit(tokenize_in_worker, job, folder, num_threads) for job in jobs}
        while running:
            ended, running = wait(running, POLL_INTERVAL, FIRST_COMPLETED)
            bar.update(bytes_read.value - bar.n)
            for future in ended:
                record(future.result())
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


def tokenize_in_worker(job: Job, folder: str, num_threads: int) -> ShardEntry:
    """tokenize_file in a worker process, with the counter that all workers share."""
    return tokenize_file(job, folder, num_threads, add_bytes_read)


def add_bytes_read(num_bytes: int) -> None:
    """Add to the counter that all workers share."""
    with worker_bytes_read.get_lock():
        worker_bytes_read.value += num_bytes


def tokenize_file(
    job: Job, folder: str, num_threads: int, on_progress: Callable[[int], object]
) -> ShardEntry:
    """Write the shard of one file; returns its entry in meta.json. on_progress is called with the
    number of bytes read since the last call."""
    tokenizer = load_folder_tokenizer(folder)
    path = os.path.join(folder, job["file"])
    progress = ByteProgress(on_progress)
    with ShardWriter(path, tokenizer.vocab_size) as writer:
        encoder = Encoder(tokenizer, writer.dtype)
        for batch in batches_of_text(read_documents(job["source"], job["separator"], progress)):
            write_batch(writer, encoder, batch, num_threads)
    cut = train_val_cut(path, writer.dtype, tokenizer.bos_id, job["val_fraction"])
    return ShardEntry(
        file=job["file"],
        tokens=writer.num_tokens,
        train=[0, cut],
        val=[cut, writer.num_tokens],
        job=job,
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
    encoded = encoder.encode([chunk.text for chunk in batch], num_threads)
    for chunk, ids in zip(batch, encoded, strict=True):
        if chunk.starts_document:
            writer.write([encoder.tokenizer.bos_id])
        writer.write_bytes(ids)
