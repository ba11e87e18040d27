"""
A checkpoint in shares: a folder to which each process writes its own part of every tensor, so that
no process ever holds all of them.

The folder is one of PyTorch's distributed checkpoints (DCP), with what that leaves out:

    ckpt.dcp/.metadata       DCP's table of which part of which tensor lies where
    ckpt.dcp/__0_0.distcp    the first process's parts
    ckpt.dcp/run.pt          all that is no share, as ckpt.pt has it, and the SHA-256 of the other files

A tensor's name in the table is its place in ckpt.pt's dictionaries: model/norm.weight,
optimizer/state/0/exp_avg. The modules that this file imports take a second and a half.
"""

import glob
import hashlib
import math
import os
import pickle
import shutil
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

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

STATE_FILE = "run.pt"
METADATA_FILE = ".metadata"
LM_HEAD_KEY = "model/output.weight"
# All that a table of tensors is made of: what else a pickle names is not called.
ALLOWED_METADATA_CLASSES = {
    *(("torch", name) for name in ("Size", "float32", "float16", "bfloat16", "float64", "strided")),
    *(("torch.serialization", "_get_layout"), ("collections", "OrderedDict")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("torch.distributed.checkpoint.metadata", name) for name in dcp.metadata.__all__),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
}


def split_sharded(state: dict, place: str = "") -> tuple[dict[str, torch.Tensor], dict]:
    """The shares in nested dictionaries, by their places, and the dictionaries without them."""
    shares, rest = {}, {}
    for key, value in state.items():
        if isinstance(value, dict):
            inner, rest[key] = split_sharded(value, f"{place}{key}/")
            shares |= inner
        elif is_dtensor(value):
            shares[f"{place}{key}"] = value
        else:
            rest[key] = value
    return shares, rest


def merge(rest: dict, tensors: dict[str, torch.Tensor]):
    """Undo split."""
    for place, tensor in tensors.items():
        *path, name = place.split("/")
        inner = rest
        for key in path:
            inner = inner[int(key) if key.isdigit() else key]
        inner[name] = tensor


def without_tied_head(shares: dict[str, torch.Tensor], args: ModelArgs) -> dict[str, torch.Tensor]:
    """A tied classifier is in a state dict twice, and is to be kept once."""
    return {
        place: share
        for place, share in shares.items()
        if place != LM_HEAD_KEY or not args.tie_embeddings
    }


def cpu_copy(share: DTensor, mesh: DeviceMesh) -> DTensor:
    """A copy of this process's share on the CPU. mesh: of the same processes, there."""
    local = share.to_local().detach().to("cpu", copy=True)
    form = dict(run_check=False, shape=share.shape, stride=share.stride())
    return DTensor.from_local(local, mesh, share.placements, **form)


def run_on_all_ranks(group, action: Callable | None) -> list:
    """What the action of each process gives, in all of them; or, raised in all, what one of them raised."""
    own = error = None
    try:
        own = action() if action else None
    except Exception as failure:
        error = failure.with_traceback(None)
    everyone = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, (own, error), group=group)
    for _, error in everyone:
        if error is not None:
            raise error
    return [result for result, _ in everyone]


def save_sharded(
    shares: dict[str, DTensor], rest: dict, folder: str, mesh: DeviceMesh, commit: Callable
):
    """Write a checkpoint, all processes together. The main one calls commit with the finished folder,
    which is beside its final place until then. Raises in all processes what goes wrong in one: ValueError
    for weights that are no numbers, OSError where something cannot be written."""
    partial, group = f"{folder}.{rest['iter_num']}.partial", mesh.get_group()
    rank = dist.get_rank(group)

    def begin():
        for name, share in shares.items():
            local = share.to_local()
            if name.startswith("model/") and local.numel() and not math.isfinite(max_abs(local)):
                raise ValueError(
                    f"{folder} not written: the weights have values that are no numbers (first in {name})"
                )
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            os.makedirs(partial)

    def finish():
        if missing := [name for name in files if not os.path.exists(os.path.join(partial, name))]:
            raise ValueError(
                f"{missing[0]}, which another process wrote, is not in {partial}: --out_dir must be one folder that "
                "all machines see"
            )
        write_hashed(os.path.join(partial, STATE_FILE), rest | {"files": files})
        sync_folder(partial)
        commit(partial)

    try:
        run_on_all_ranks(group, begin)
        dcp_save(shares, partial, group)
        mine = glob.glob(os.path.join(glob.escape(partial), f"__{rank}_*"))
        mine += [os.path.join(partial, METADATA_FILE)] if rank == 0 else []
        digests = run_on_all_ranks(
            group, lambda: {os.path.basename(path): file_sha256(path) for path in mine}
        )
        files = {name: digest for own in digests for name, digest in own.items()}
        run_on_all_ranks(group, finish if rank == 0 else None)
    finally:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


def dcp_save(shares: dict[str, DTensor], folder: str, group):
    try:
        return dcp.save(
            shares, storage_writer=DCPWriter(folder, per_thread_copy_ahead=0), process_group=group
        )
    except (
        CheckpointException
    ) as error:  # which is no Exception, and would keep the shares in memory
        cause = first_cause(error)
    if isinstance(cause, RuntimeError):
        cause = write_error(folder, cause)
    if isinstance(cause, OSError) and not cause.filename and cause.errno:
        cause = OSError(cause.errno, cause.strerror, folder)
    raise cause


def first_cause(error: CheckpointException) -> BaseException:
    return next(iter(error.failures.values()))[0].with_traceback(None)


def file_sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class DCPWriter(dcp.FileSystemWriter):
    def storage_meta(self) -> None:
        """Nothing of where the folder was when it was written."""


class SafeMetadataUnpickler(pickle.Unpickler):
    """Reads DCP's table, which is a pickle, and calls nothing that a table does not need."""

    def find_class(self, module, name):
        if (module, name) not in ALLOWED_METADATA_CLASSES:
            raise ValueError(f"{module}.{name} is no part of a table of tensors")
        return super().find_class(module, name)


class DCPReader(dcp.FileSystemReader):
    """DCP's reader, with a table that was read and checked before."""

    def __init__(self, folder: str, table: Metadata):
        super().__init__(folder)
        self.table = table

    def read_metadata(self, *args, **kwargs) -> Metadata:
        return self.table


def read_metadata_file(folder: str, files: dict) -> Metadata:
    """DCP's table, with nothing but tensors in it that lie, all of each, in these files of the folder."""
    with open(os.path.join(folder, METADATA_FILE), "rb") as file:
        table = SafeMetadataUnpickler(file).load()
    if not isinstance(table, Metadata):
        raise ValueError("its table is none of tensors")
    for name, entry in table.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata):
            raise ValueError("its table is none of tensors")
        for chunk in entry.chunks:
            places = zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
            if not all(0 <= start <= start + length <= size for start, length, size in places):
                raise ValueError(f"a part of {name} is beyond it")
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise ValueError(f"not all of {name} is there")
    entries = table.state_dict_metadata.values()
    promised = sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in entries)
    if promised > sum(os.path.getsize(os.path.join(folder, name)) for name in files):
        raise ValueError("its tensors are larger than its files")
    for info in table.storage_data.values():
        if info.relative_path not in files:
            raise ValueError(f"its table names another file, {info.relative_path}")
    return table


class ShardedTensors:
    """The tensors of a checkpoint in shares, still on the disk."""

    def __init__(self, folder: str, files: dict):
        self.folder = folder
        self.stamps = {name: self.stamp_now(name) for name in files}
        for name, digest in files.items():
            if os.path.basename(name) != name or file_sha256(os.path.join(folder, name)) != digest:
                raise ValueError(f"the sha256 of {name} is another")
        self.table = read_metadata_file(folder, files)

    def stamp_now(self, name: str) -> tuple:
        return FileSource.fingerprint_of(os.stat(os.path.join(self.folder, name)))

    def empty(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Tensors of their shapes, by their places."""
        entries = self.table.state_dict_metadata.items()
        return {
            name: torch.empty(e.size, dtype=e.properties.dtype, device=device)
            for name, e in entries
        }

    def read(self, into: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Fill these tensors, or shares of them, which all processes do together. Raises ValueError where
        that fails, and where the folder is another by now: no model is to be made of the halves of two."""
        cause = None
        try:
            with warnings.catch_warnings(
                action="ignore"
            ):  # that one process reads alone, which is meant
                alone = not any(map(is_dtensor, into.values()))
                dcp.load(into, storage_reader=DCPReader(self.folder, self.table), no_dist=alone)
            is_changed = any(self.stamp_now(name) != stamp for name, stamp in self.stamps.items())
        except FileNotFoundError:
            is_changed = True
        except CheckpointException as error:
            cause = first_cause(error)
            is_changed = isinstance(cause, FileNotFoundError)
        if is_changed:
            raise ValueError(
                f"{self.folder}: it was changed while it was read; run again"
            ) from None
        if cause:
            raise ValueError(f"{self.folder}: {describe_load_error(cause)}") from None
        return into


def open_sharded(folder: str) -> dict:
    """What ckpt.pt would hold, in which the shares are tensors without memory (PyTorch's meta device), and
    the Shares. Every file was compared with its hash. Raises ValueError where the checkpoint is damaged."""
    try:
        rest = read_hashed(os.path.join(folder, STATE_FILE))
        shares = ShardedTensors(folder, rest.pop("files"))
        merge(rest, shares.empty("meta"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder}: damaged, {os.path.basename(error.filename)} is not there"
        ) from error
    except UNREADABLE as error:
        raise as_value_error(folder, error) from error
    check_checkpoint(rest, folder)
    return rest | {"shares": shares}


def gather_full_state(outline: dict) -> dict:
    """The content of a checkpoint with all its tensors, on the CPU: what load_checkpoint gives of ckpt.pt."""
    whole = {key: value for key, value in outline.items() if key != "shares"}
    merge(whole, outline["shares"].read(outline["shares"].empty()))
    if whole["model_args"].tie_embeddings:
        whole["model"]["output.weight"] = whole["model"]["tok_embeddings.weight"]
    return whole


def to_dtensors(value, mesh: DeviceMesh):
    """Nested dictionaries with each tensor that has a shape as a share, which is all of it: mesh is of one process."""
    if isinstance(value, dict):
        return {key: to_dtensors(item, mesh) for key, item in value.items()}
    is_one = isinstance(value, torch.Tensor) and value.dim() > 0
    return DTensor.from_local(value, mesh, [Shard(0)], run_check=False) if is_one else value


def write_single_rank(checkpoint: dict, folder: str):
    """Write in shares, of which there is one, what load_checkpoint gave."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")
        state = {key: value for key, value in checkpoint.items() if key != "sha256"}
        state["model_args"] = write_model_args(checkpoint["model_args"])
        state |= {
            key: to_dtensors(state[key], mesh) for key in ("model", "optimizer") if key in state
        }
        shares, rest = split_sharded(state)
        shares = without_tied_head(shares, checkpoint["model_args"])
        save_sharded(shares, rest, folder, mesh, lambda partial: os.rename(partial, folder))
        sync_folder(os.path.dirname(folder) or ".")
    finally:
        dist.destroy_process_group()


def convert_checkpoint(source: str, target: str) -> int:
    """Rewrite a checkpoint with its training state: a sharded folder as one file, or back. target ends in
    .pt or .dcp and does not exist. Returns the step of the checkpoint. Raises ValueError where the source
    is damaged, OSError where the target cannot be written."""
    source = source.rstrip(os.sep)
    checkpoint = (
        gather_full_state(open_sharded(source))
        if is_sharded_checkpoint(source)
        else load_checkpoint(source)
    )
    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    step = checkpoint["iter_num"]
    if target.endswith(".dcp"):
        write_single_rank(checkpoint, target)
    else:
        checkpoint["model_args"] = write_model_args(checkpoint["model_args"])
        save_checkpoint(target, checkpoint)
    return step
