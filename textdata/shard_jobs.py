"""
Which text files each token shard packs, and records of the shards that are finished.

A shard packs consecutive files, so that many small files become few shards. Its job, which is all
that its tokens depend on, is kept in a record beside it (NNNNN.record), so that a later run
does not write a shard again if its files did not change.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple, TypedDict

from runtime.atomic_files import write_atomically
from textdata.corpus import CorpusReport, SkippedFile
from textdata.token_shards import META_FILE
from textdata.tokenizer import Tokenizer

PACK_SIZE = 2**22  # bytes; files are packed into a shard until they have as many
RECORD_SUFFIX = ".record"
SHARD_NAME = re.compile(r"\d{5,}\.bin")
RECORD_NAME = re.compile(r"\d{5,}\.record")
PARTIAL_NAME = re.compile(r"\d{5,}\.(bin|record)\.\d+\.partial")


class Source(NamedTuple):
    """A text file, in one version."""

    path: str
    size: int  # bytes
    modified_ns: int  # modification time


class Job(TypedDict):
    """The text files of one shard, and everything else that its tokens depend on."""

    file: str  # name of the shard
    sources: list[Source]
    tokenizer_hash: str
    separator: str
    text_field: str
    val_fraction: float


class ShardEntry(TypedDict):
    """The entry of a shard in meta.json."""

    file: str
    tokens: int
    train: list[int]  # start and stop
    val: list[int]


class ShardRecord(NamedTuple):
    """The content of the record of a shard. entry is None while the shard is being written."""

    job: Job
    entry: ShardEntry | None
    num_bytes: int  # of the shard
    report: CorpusReport


def list_jobs(
    files: list[str],
    tokenizer: Tokenizer,
    separator: str,
    val_fractions: list[float],
    text_field: str = "",
) -> list[Job]:
    """The jobs that tokenize the files, each with the fraction of its tokens that validates."""
    return [
        Job(
            file=f"{number:05d}.bin",
            sources=sources,
            tokenizer_hash=tokenizer.hash,
            separator=separator,
            text_field=text_field,
            val_fraction=val_fraction,
        )
        for number, (sources, val_fraction) in enumerate(pack_files(files, val_fractions))
    ]


def pack_files(
    files: list[str], val_fractions: list[float]
) -> Iterator[tuple[list[Source], float]]:
    """Yield groups of consecutive files with equal val_fractions. A group ends as soon as its files
    have PACK_SIZE bytes."""
    group: list[Source] = []
    group_fraction = 0.0
    num_bytes = 0
    for file, val_fraction in zip(files, val_fractions, strict=True):
        if group and (num_bytes >= PACK_SIZE or val_fraction != group_fraction):
            yield group, group_fraction
            group = []
            num_bytes = 0
        group.append(read_source(file))
        group_fraction = val_fraction
        num_bytes += group[-1].size
    yield group, group_fraction


def read_source(file: str) -> Source:
    """The present version of a text file."""
    status = os.stat(file)
    return Source(os.path.abspath(file), status.st_size, status.st_mtime_ns)


def job_size(job: Job) -> int:
    """The number of bytes of the job's files."""
    return sum(source.size for source in job["sources"])


def count_files(jobs: Iterable[Job]) -> int:
    """The number of text files of all jobs."""
    return sum(len(job["sources"]) for job in jobs)


def record_path(folder: str, shard_file: str) -> str:
    """The path of the record of a shard."""
    return os.path.join(folder, shard_file.removesuffix(".bin") + RECORD_SUFFIX)


def write_record(folder: str, record: ShardRecord) -> None:
    """Write the record of a shard."""
    content = record._asdict() | {"report": asdict(record.report)}
    write_atomically(record_path(folder, record.job["file"]), json.dumps(content).encode())


def read_record(path: str) -> ShardRecord | None:
    """The record at path. None if it is missing or damaged, so that the shard is written again."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        job = content["job"]
        job["sources"] = [Source(*source) for source in job["sources"]]
        report = CorpusReport(**content["report"])
        report.skipped = [SkippedFile(*skipped) for skipped in report.skipped]
        return ShardRecord(job, content["entry"], content["num_bytes"], report)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def finished_record(folder: str, job: Job) -> ShardRecord | None:
    """The record of the job's shard if it is the record of this job and the shard is complete."""
    record = read_record(record_path(folder, job["file"]))
    if record is None or record.job != job:
        return None
    return record if is_complete(folder, record) else None


def is_complete(folder: str, record: ShardRecord) -> bool:
    """Whether the shard was written to its end and still has its size."""
    path = os.path.join(folder, record.job["file"])
    return (
        record.entry is not None
        and os.path.isfile(path)
        and os.path.getsize(path) == record.num_bytes
    )


def earlier_shards(folder: str) -> list[dict[str, Any]]:
    """The entries of the shards in the folder's meta.json; none if it is missing or damaged."""
    try:
        with open(os.path.join(folder, META_FILE), encoding="utf-8") as file:
            shards = json.load(file)["shards"]
        return [shard for shard in shards if SHARD_NAME.fullmatch(shard["file"])]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def check_same_text(folder: str, files: list[str]) -> None:
    """Raise ValueError if the folder has tokens, but none from these files. A file is the same if
    it has the same path, or else, in a renamed folder, the same name, size and modification time.
    """
    shards = earlier_shards(folder)
    # Earlier versions of cria wrote the source to meta.json and no records.
    earlier_sources = {shard["job"]["source"] for shard in shards if "job" in shard}
    versions = set()
    for record in all_records(folder):
        if is_complete(folder, record):
            earlier_sources |= {source.path for source in record.job["sources"]}
            versions |= {without_folder(source) for source in record.job["sources"]}
    if not earlier_sources or not earlier_sources.isdisjoint(map(os.path.abspath, files)):
        return
    if versions.isdisjoint(without_folder(read_source(file)) for file in files):
        raise ValueError(
            f"{folder} holds the tokens of another text, {min(earlier_sources)}: "
            "delete it or give another --data_dir"
        )


def without_folder(source: Source) -> Source:
    """The version of a text file, with its name instead of its path."""
    return source._replace(path=os.path.basename(source.path))


def all_records(folder: str) -> Iterator[ShardRecord]:
    """The records of all shards in the folder."""
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        record = read_record(path) if RECORD_NAME.fullmatch(name) else None
        if record is not None and record_path(folder, record.job["file"]) == path:
            yield record


def remove_stale_files(folder: str, jobs: list[Job], shards: list[dict[str, Any]]) -> None:
    """Remove the shards that are not of the jobs but in a record or in an earlier meta.json, their
    records, and what a killed run left of a shard. The folder may hold files of others.

    shards: the entries in the earlier meta.json."""
    current = {job["file"] for job in jobs}
    for record in all_records(folder):
        if record.job["file"] not in current:
            remove_if_present(os.path.join(folder, record.job["file"]))
            os.remove(record_path(folder, record.job["file"]))
    for shard in shards:
        if shard["file"] not in current:
            remove_if_present(os.path.join(folder, shard["file"]))
    for name in os.listdir(folder):
        if PARTIAL_NAME.fullmatch(name):
            remove_if_present(os.path.join(folder, name))


def remove_if_present(path: str) -> None:
    """Remove the file, unless it does not exist."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
