"""
A checkpoint in shares: a folder to which each process writes its own part of every tensor, so that
no process ever holds all of them. As a program: from shares to one file, or back, training state and all.

    python sharded.py out/ckpt.dcp out/ckpt.pt

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
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from atomic import AtomicFile, sync_folder
from checkpoint import (
    UNREADABLE,
    check_checkpoint,
    fingerprint,
    is_in_shares,
    largest,
    load_checkpoint,
    read_whole_file,
    reason_of,
    save_checkpoint,
    write_model_args,
)
from configurator import configure, run_script
from parallel import is_share

REST = "run.pt"
TABLE = ".metadata"
# All that a table of tensors is made of: what else a pickle names is not called.
TABLE_IS_MADE_OF = {
    *(("torch", name) for name in ("Size", "float32", "float16", "bfloat16", "float64", "strided")),
    *(("torch.serialization", "_get_layout"), ("collections", "OrderedDict")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("torch.distributed.checkpoint.metadata", name) for name in dcp.metadata.__all__),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
}


def split(state: dict, place: str = "") -> tuple[dict[str, torch.Tensor], dict]:
    """The shares in nested dictionaries, by their places, and the dictionaries without them."""
    shares, rest = {}, {}
    for key, value in state.items():
        if isinstance(value, dict):
            inner, rest[key] = split(value, f"{place}{key}/")
            shares |= inner
        elif is_share(value):
            shares[f"{place}{key}"] = value
        else:
            rest[key] = value
    return shares, rest


def put_back(rest: dict, tensors: dict[str, torch.Tensor]):
    """Undo split."""
    for place, tensor in tensors.items():
        *path, name = place.split("/")
        inner = rest
        for key in path:
            inner = inner[int(key) if key.isdigit() else key]
        inner[name] = tensor


def cpu_copy(share: DTensor, mesh: DeviceMesh) -> DTensor:
    """A copy of this process's share on the CPU. mesh: of the same processes, there."""
    local = share.to_local().detach().to("cpu", copy=True)
    form = dict(run_check=False, shape=share.shape, stride=share.stride())
    return DTensor.from_local(local, mesh, share.placements, **form)


def together(group, action: Callable | None) -> list:
    """What the action of each process gives, in all of them; or, raised in all, what one of them raised."""
    own = error = None
    try:
        own = action() if action else None
    except (OSError, ValueError) as failure:
        error = failure.with_traceback(None)
    everyone = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, (own, error), group=group)
    for _, error in everyone:
        if error is not None:
            raise error
    return [result for result, _ in everyone]


def write_shares(shares: dict[str, DTensor], rest: dict, folder: str, mesh: DeviceMesh, put_in_place: Callable):
    """Write a checkpoint, all processes together. The main one calls put_in_place with the finished folder,
    which is beside its final place until then. Raises in all processes what goes wrong in one: ValueError
    for weights that are no numbers, OSError where something cannot be written."""
    partial, group = f"{folder}.{rest['iter_num']}.partial", mesh.get_group()
    rank = dist.get_rank(group)

    def finish(digests):
        content = rest | {"files": {name: digest for own in digests for name, digest in own.items()}}
        with AtomicFile(os.path.join(partial, REST)) as file:
            torch.save(content | {"sha256": fingerprint(content)}, file)
        sync_folder(partial)
        put_in_place(partial)

    try:
        together(group, lambda: check_finite_shares(shares, folder))
        save_parts(shares, partial, group)
        mine = glob.glob(os.path.join(glob.escape(partial), f"__{rank}_*"))
        mine += [os.path.join(partial, TABLE)] if rank == 0 else []
        digests = together(group, lambda: {os.path.basename(path): digest_of(path) for path in mine})
        together(group, (lambda: finish(digests)) if rank == 0 else None)
    finally:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


def save_parts(shares: dict[str, DTensor], folder: str, group):
    try:
        dcp.save(shares, storage_writer=Writer(folder), process_group=group)
    except CheckpointException as error:  # no Exception of Python's; the cause of a short write it does not tell
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, OSError):
            raise cause.with_traceback(None) from None
        reason = str(cause).splitlines()[0]
        raise OSError(f"{folder}: could not be written whole; is the disk full? ({reason})") from None


def check_finite_shares(shares: dict[str, DTensor], path: str):
    for name, share in shares.items():
        local = share.to_local()
        if name.startswith("model/") and local.numel() and not math.isfinite(largest(local)):
            raise ValueError(f"{path} not written: the weights have values that are no numbers (first in {name})")


def digest_of(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Writer(dcp.FileSystemWriter):
    def storage_meta(self) -> None:
        """Nothing of where the folder was when it was written."""


class TableUnpickler(pickle.Unpickler):
    """Reads DCP's table, which is a pickle, and calls nothing that a table does not need."""

    def find_class(self, module, name):
        if (module, name) not in TABLE_IS_MADE_OF:
            raise ValueError(f"{module}.{name} is no part of a table of tensors")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """DCP's reader, with a table that was read and checked before."""

    def __init__(self, folder: str, table: Metadata):
        super().__init__(folder)
        self.table = table

    def read_metadata(self, *args, **kwargs) -> Metadata:
        return self.table


def read_table(folder: str, files: dict) -> Metadata:
    """DCP's table, with nothing but tensors in it that lie in these files of the folder."""
    with open(os.path.join(folder, TABLE), "rb") as file:
        table = TableUnpickler(file).load()
    if not isinstance(table, Metadata):
        raise ValueError("its table is none of tensors")
    for name, entry in table.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata):
            raise ValueError("its table is none of tensors")
    for info in table.storage_data.values():
        if info.relative_path not in files:
            raise ValueError(f"its table names another file, {info.relative_path}")
    return table


def read_outline(folder: str) -> dict:
    """What ckpt.pt would hold, in which the shares are tensors without memory (PyTorch's meta device).
    Every file was compared with its hash. Raises ValueError where the checkpoint is damaged."""
    try:
        rest = read_whole_file(os.path.join(folder, REST))
        files = rest.pop("files")
        for name, digest in files.items():
            if os.path.basename(name) != name or digest_of(os.path.join(folder, name)) != digest:
                raise ValueError(f"the sha256 of {name} is another")
        table = read_table(folder, files)
        entries = table.state_dict_metadata.items()
        meta = {name: torch.empty(e.size, dtype=e.properties.dtype, device="meta") for name, e in entries}
        put_back(rest, meta)
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: damaged, {os.path.basename(error.filename)} is not there") from error
    except UNREADABLE as error:
        raise ValueError(f"{folder}: damaged or not a checkpoint ({reason_of(error)})") from error
    check_checkpoint(rest, folder)
    rest["table"] = table
    return rest


def read_tensors(folder: str, table: Metadata, into: dict[str, torch.Tensor]):
    """Fill these tensors, or shares of them. Raises ValueError where that fails."""
    try:
        with warnings.catch_warnings(action="ignore"):  # that one process reads alone, which is meant
            alone = not any(map(is_share, into.values()))
            dcp.load(into, storage_reader=Reader(folder, table), no_dist=alone)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise ValueError(f"{folder}: {reason_of(cause)}") from None


def with_whole_tensors(folder: str, outline: dict) -> dict:
    """The content of the checkpoint with all its tensors, on the CPU: what ckpt.pt would hold."""
    whole = {key: value for key, value in outline.items() if key != "table"}
    entries = outline["table"].state_dict_metadata.items()
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries}
    read_tensors(folder, outline["table"], tensors)
    put_back(whole, tensors)
    if whole["model_args"].tie_embeddings:
        whole["model"]["output.weight"] = whole["model"]["tok_embeddings.weight"]
    return whole


def as_shares(value, mesh: DeviceMesh):
    """Nested dictionaries with each tensor that has a shape as a share, which is all of it: mesh is of one process."""
    if isinstance(value, dict):
        return {key: as_shares(item, mesh) for key, item in value.items()}
    is_one = isinstance(value, torch.Tensor) and value.dim() > 0
    return DTensor.from_local(value, mesh, [Shard(0)], run_check=False) if is_one else value


def write_whole(checkpoint: dict, folder: str):
    """Write in shares, of which there is one, what load_checkpoint gave."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")
        state = {key: value for key, value in checkpoint.items() if key != "sha256"}
        state["model_args"] = write_model_args(checkpoint["model_args"])
        if checkpoint["model_args"].tie_embeddings:
            state["model"] = {name: w for name, w in checkpoint["model"].items() if name != "output.weight"}
        state |= {key: as_shares(state[key], mesh) for key in ("model", "optimizer") if key in state}
        shares, rest = split(state)
        write_shares(shares, rest, folder, mesh, lambda partial: os.rename(partial, folder))
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class ConvertConfig:
    """Take a checkpoint from shares to one file, or back, training state and all."""

    source: str = ""  # ckpt.dcp or ckpt.pt; may be given bare
    target: str = ""  # what to write, ending in .pt or .dcp; may be given bare

    def problems(self):
        if not self.source or not self.target:
            yield "say what to read and what to write: python sharded.py out/ckpt.dcp out/ckpt.pt"
        elif not self.target.endswith((".pt", ".dcp")):
            yield f"{self.target}: must end in .pt, for one file, or in .dcp, for a folder of shares"
        elif os.path.lexists(self.target):
            yield f"{self.target}: is there already; write elsewhere, or remove it first"


def main():
    config, _ = configure(ConvertConfig, positional=("source", "target"))
    source = config.source.rstrip(os.sep)
    checkpoint = with_whole_tensors(source, read_outline(source)) if is_in_shares(source) else load_checkpoint(source)
    os.makedirs(os.path.dirname(config.target) or ".", exist_ok=True)
    if config.target.endswith(".dcp"):
        write_whole(checkpoint, config.target)
    else:
        checkpoint["model_args"] = write_model_args(checkpoint["model_args"])
        save_checkpoint(config.target, checkpoint)
    print(f"wrote {config.target}, the state of step {checkpoint['iter_num']}")


if __name__ == "__main__":
    run_script(main)
