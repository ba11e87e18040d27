"""
Sharded checkpoints: a folder to which each rank writes its shards, so that no rank ever holds a
full copy of the training state.

The folder is a PyTorch distributed checkpoint (DCP) with one additional file:

    ckpt.dcp/.metadata       DCP's index: the file and offset of every shard of every tensor
    ckpt.dcp/__0_0.distcp    the shards of rank 0
    ckpt.dcp/run.pt          all entries of ckpt.pt that are not sharded, and "files": the SHA-256
                             of the other files of the folder

The key of a tensor in the index is its path in the nested dictionaries of ckpt.pt, joined by "/":
model/norm.weight, optimizer/state/0/exp_avg. Importing this module takes 1.5 seconds, because it
imports DCP.
"""

import glob
import hashlib
import math
import os
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from checkpoints.dcp_storage import (
    METADATA_FILE,
    DCPReader,
    DCPWriter,
    read_metadata,
    tensor_entries,
)
from checkpoints.file import (
    UNREADABLE,
    as_value_error,
    check_checkpoint,
    describe_load_error,
    is_sharded_checkpoint,
    load_checkpoint,
    max_abs,
    read_hashed,
    save_checkpoint,
    write_error,
    write_hashed,
    write_model_args,
)
from model import ModelArgs
from runtime.atomic_files import FileSource, sync_folder
from runtime.distributed import is_dtensor
from runtime.untrusted import clip

STATE_FILE = "run.pt"
LM_HEAD_KEY = "model/output.weight"

T = TypeVar("T")
TensorT = TypeVar("TensorT", bound=torch.Tensor)


# Nested dictionaries of tensors


def split_sharded(state: dict, prefix: str = "") -> tuple[dict[str, DTensor], dict]:
    """Split nested dictionaries into the DTensors by their keys, and everything else.

    The inverse is merge.
    """
    shards: dict[str, DTensor] = {}
    rest: dict = {}
    for key, value in state.items():
        if isinstance(value, dict):
            inner, rest[key] = split_sharded(value, f"{prefix}{key}/")
            shards |= inner
        elif is_dtensor(value):
            shards[f"{prefix}{key}"] = value
        else:
            rest[key] = value
    return shards, rest


def merge(state: dict, tensors: dict[str, torch.Tensor]) -> dict:
    """A copy of the nested dictionaries with the tensors at their keys."""
    merged = copy_dicts(state)
    for key, tensor in tensors.items():
        *path, name = key.split("/")
        inner = merged
        for part in path:
            inner = inner[int(part) if part.isdigit() else part]
        inner[name] = tensor
    return merged


def copy_dicts(value: Any) -> Any:
    """A copy of nested dictionaries; other values are not copied."""
    if not isinstance(value, dict):
        return value
    return {key: copy_dicts(item) for key, item in value.items()}


def without_tied_head(shards: dict[str, T], args: ModelArgs) -> dict[str, T]:
    """The tensors without a tied output.weight: only the embedding is stored."""
    if not args.tie_embeddings:
        return shards
    return {key: shard for key, shard in shards.items() if key != LM_HEAD_KEY}


def cpu_copy(shard: DTensor, mesh: DeviceMesh) -> DTensor:
    """A copy of a DTensor on the CPU. mesh holds the same ranks on the CPU."""
    return DTensor.from_local(
        shard.to_local().detach().to("cpu", copy=True),
        mesh,
        shard.placements,
        run_check=False,
        shape=shard.shape,
        stride=shard.stride(),
    )


def to_dtensors(value: Any, mesh: DeviceMesh) -> Any:
    """Nested dictionaries with DTensors for the tensors that have dimensions.

    mesh has one rank, so each DTensor has one shard.
    """
    if isinstance(value, dict):
        return {key: to_dtensors(item, mesh) for key, item in value.items()}
    if isinstance(value, torch.Tensor) and value.dim() > 0:
        return DTensor.from_local(value, mesh, [Shard(0)], run_check=False)
    return value


# Writing


def save_sharded(
    shards: dict[str, DTensor],
    state: dict[str, Any],
    folder: str,
    mesh: DeviceMesh,
    commit: Callable[[str], None],
) -> None:
    """Write a sharded checkpoint; all ranks call this together.

    Args:
        shards: the DTensors by key, as split_sharded returns them.
        state: the rest of the checkpoint; rank 0 writes it.
        folder: the final path; the files are written to a temporary folder beside it.
        mesh: the ranks that take part, on the CPU.
        commit: called on rank 0 with the path of the complete temporary folder; moves it.

    An exception of one rank is raised on all ranks: ValueError for weights that are not finite,
    OSError if a file cannot be written.
    """
    temporary = f"{folder}.{state['iter_num']}.partial"
    group = mesh.get_group()
    rank = dist.get_rank(group)
    try:
        run_on_all_ranks(group, partial(begin_save, shards, folder, temporary, rank))
        dcp_save(shards, temporary, group)
        hashes = run_on_all_ranks(group, partial(hash_files_of_rank, temporary, rank))
        files = {name: digest for of_rank in hashes for name, digest in of_rank.items()}
        finish = partial(finish_folder, temporary, state, files, commit)
        run_on_all_ranks(group, finish if rank == 0 else None)
    finally:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def begin_save(shards: dict[str, DTensor], folder: str, temporary: str, rank: int) -> None:
    """Check the weights of this rank and, on rank 0, make the empty temporary folder.

    Raises ValueError if a weight is NaN or infinite.
    """
    for name, shard in shards.items():
        local = shard.to_local()
        if name.startswith("model/") and local.numel() and not math.isfinite(max_abs(local)):
            raise ValueError(
                f"{folder} not written: the weights contain NaN or Inf values (first in {name})"
            )
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)


def dcp_save(shards: dict[str, DTensor], folder: str, group: dist.ProcessGroup) -> None:
    """Call dcp.save. Raises the exception of the first rank that failed."""
    try:
        writer = DCPWriter(folder, per_thread_copy_ahead=0)
        dcp.save(shards, storage_writer=writer, process_group=group)
        return
    except CheckpointException as error:  # a BaseException; its traceback would keep the shards
        cause = first_cause(error)
    if isinstance(cause, RuntimeError):
        cause = write_error(folder, cause)
    if isinstance(cause, OSError) and not cause.filename and cause.errno:
        cause = OSError(cause.errno, cause.strerror, folder)
    raise cause


def first_cause(error: CheckpointException) -> BaseException:
    """The exception of the first rank that failed, without its traceback."""
    return next(iter(error.failures.values()))[0].with_traceback(None)


def hash_files_of_rank(folder: str, rank: int) -> dict[str, str]:
    """SHA-256 of the files that a rank wrote, by name."""
    paths = glob.glob(os.path.join(glob.escape(folder), f"__{rank}_*"))
    if rank == 0:
        paths.append(os.path.join(folder, METADATA_FILE))
    return {os.path.basename(path): file_sha256(path) for path in paths}


def file_sha256(path: str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finish_folder(
    folder: str, state: dict[str, Any], files: dict[str, str], commit: Callable[[str], None]
) -> None:
    """Write STATE_FILE after all other files, and commit the folder.

    Raises ValueError if a file of another rank is not in the folder.
    """
    for name in files:
        if not os.path.exists(os.path.join(folder, name)):
            raise ValueError(
                f"{name} of another rank is not in {folder}: "
                "--out_dir must be one folder that all machines see"
            )
    write_hashed(os.path.join(folder, STATE_FILE), state | {"files": files})
    sync_folder(folder)
    commit(folder)


def run_on_all_ranks(group: dist.ProcessGroup, action: Callable[[], T] | None) -> list[T]:
    """Run an action on every rank; returns the results of all ranks on each of them.

    An exception of one rank is raised on all ranks. Ranks without an action contribute None.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = action() if action else None
    except Exception as raised:
        error = raised.with_traceback(None)
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, (result, error), group=group)
    for _, rank_error in gathered:
        if rank_error is not None:
            raise rank_error
    return [rank_result for rank_result, _ in gathered]


def write_single_rank(checkpoint: dict[str, Any], folder: str) -> None:
    """Write what load_checkpoint returned as a sharded checkpoint with one shard per tensor."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        assert group is not None, "init_process_group sets the default group"
        mesh = DeviceMesh.from_group(group, "cpu")
        state = {key: value for key, value in checkpoint.items() if key != "sha256"}
        state["model_args"] = write_model_args(checkpoint["model_args"])
        for key in ("model", "optimizer"):
            if key in state:
                state[key] = to_dtensors(state[key], mesh)
        shards, rest = split_sharded(state)
        shards = without_tied_head(shards, checkpoint["model_args"])
        save_sharded(shards, rest, folder, mesh, commit=lambda path: os.rename(path, folder))
        sync_folder(os.path.dirname(folder) or ".")
    finally:
        dist.destroy_process_group()


# Reading


def open_sharded(folder: str) -> dict[str, Any]:
    """The content of a checkpoint with tensors on the meta device.

    The additional entry sharded_tensors, a ShardedTensors, reads the values. The hash of every
    file is verified. Raises ValueError if the checkpoint is damaged.
    """
    try:
        state = read_hashed(os.path.join(folder, STATE_FILE))
        tensors = ShardedTensors(folder, state.pop("files"))
        content = merge(state, tensors.empty("meta"))
    except FileNotFoundError as error:
        missing = clip(os.path.basename(error.filename))
        raise ValueError(f"{folder}: damaged, {missing} is missing") from error
    except UNREADABLE as error:
        raise as_value_error(folder, error) from error
    return check_checkpoint(content, folder) | {"sharded_tensors": tensors}


def gather_full_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Read all tensors of what open_sharded returned to the CPU.

    The result is what load_checkpoint returns for a ckpt.pt.
    """
    tensors = checkpoint["sharded_tensors"]
    state = {key: value for key, value in checkpoint.items() if key != "sharded_tensors"}
    full = merge(state, tensors.read(tensors.empty()))
    if full["model_args"].tie_embeddings:
        full["model"]["output.weight"] = full["model"]["tok_embeddings.weight"]
    return full


class ShardedTensors:
    """The tensors of a sharded checkpoint, still on disk.

    Raises ValueError if a file does not match its hash or the index is invalid.
    """

    def __init__(self, folder: str, files: dict[str, str]):
        self.folder = folder
        self.fingerprints = {name: self.fingerprint(name) for name in files}
        for name, digest in files.items():
            path = os.path.join(folder, name)
            is_here = os.path.basename(name) == name and os.path.isfile(path)
            if not is_here or file_sha256(path) != digest:
                raise ValueError(f"the sha256 of {clip(name)} does not match")
        self.metadata = read_metadata(folder, files)

    def fingerprint(self, name: str) -> tuple:
        """Identifies the present version of a file: device, inode, size and time of change."""
        return FileSource.fingerprint_of(os.stat(os.path.join(self.folder, name)))

    def empty(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Uninitialized tensors of the stored shapes and dtypes, by key."""
        return {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device=device)
            for name, entry in tensor_entries(self.metadata).items()
        }

    def read(self, into: dict[str, TensorT]) -> dict[str, TensorT]:
        """Fill these tensors, given by key, in place, and return them.

        With DTensors, all ranks call this together, and each reads its shards. Raises ValueError
        if reading fails or if the folder was changed since it was opened: the values could come
        from two checkpoints.
        """
        cause = None
        try:
            self.load(into)
            is_changed = any(
                self.fingerprint(name) != before for name, before in self.fingerprints.items()
            )
        except FileNotFoundError:
            is_changed = True
        except CheckpointException as error:
            cause = first_cause(error)
            is_changed = isinstance(cause, FileNotFoundError)
        if is_changed:
            raise ValueError(f"{self.folder}: it was changed while it was read; run again")
        if cause:
            raise ValueError(f"{self.folder}: {describe_load_error(cause)}")
        return into

    def load(self, into: dict[str, TensorT]) -> None:
        """Call dcp.load, without communication if no tensor is a DTensor."""
        is_local = not any(map(is_dtensor, into.values()))
        with warnings.catch_warnings(action="ignore"):  # DCP warns that one process reads alone
            reader = DCPReader(self.folder, self.metadata)
            dcp.load(into, storage_reader=reader, no_dist=is_local)


# Converting


def convert_checkpoint(source: str, target: str) -> int:
    """Rewrite a checkpoint with its training state as one file or as a sharded checkpoint.

    target ends in .pt or .dcp and must not exist. Returns the step of the checkpoint. Raises
    ValueError if the source is damaged, OSError if the target cannot be written.
    """
    source = source.rstrip(os.sep)
    if is_sharded_checkpoint(source):
        checkpoint = gather_full_state(open_sharded(source))
    else:
        checkpoint = load_checkpoint(source)
    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    if target.endswith(".dcp"):
        write_single_rank(checkpoint, target)
    else:
        args = write_model_args(checkpoint["model_args"])
        save_checkpoint(target, checkpoint | {"model_args": args})
    return checkpoint["iter_num"]
