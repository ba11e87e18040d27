"""
Training in several processes, started by torchrun. In a single process everything is a no-op.
"""

import atexit
import contextlib
import datetime
import gc
import multiprocessing.util
import os
import sys
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

MIN_RENDEZVOUS_TIMEOUT = 60.0  # seconds, because processes do not start at the same time
POLL_INTERVAL = 0.02  # seconds


class DistContext(NamedTuple):
    """This process's rank and the collectives that the program uses. They run over gloo on the CPU,
    so that they do not synchronize the accelerator."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """Element-wise sums over all ranks."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def all_equal(self, number: int) -> bool:
        """Whether number is the same on all ranks. The result is the same on all ranks, too."""
        total = self.all_reduce_sum([float(number)])[0]
        return not self.any_rank(total != float(number) * self.size)

    def any_rank(self, flag: bool) -> bool:
        """Whether flag is true on any rank."""
        return self.all_reduce_sum([float(flag)])[0] > 0

    def new_cpu_mesh(self, timeout: float) -> "DeviceMesh":
        """A mesh of all ranks on the CPU with a separate process group, for a second thread. Its
        collectives do not mix with those of the main thread. timeout: see init_distributed."""
        from torch.distributed.device_mesh import DeviceMesh

        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
        return DeviceMesh.from_group(group, "cpu")


def init_distributed(device: str, timeout: float = 600.0) -> tuple[DistContext, str]:
    """Join torchrun's process group; returns this process's DistContext and device.

    timeout: seconds after which a collective fails; at the start, at least
    MIN_RENDEZVOUS_TIMEOUT. Raises ValueError if the environment or the number of GPUs is wrong, or
    if the other processes do not join in time."""
    if "RANK" not in os.environ:
        return DistContext(), device
    dist_ctx = read_environment()
    if device.startswith("cuda"):
        num_gpus = torch.cuda.device_count()
        if dist_ctx.local_rank >= num_gpus:
            raise ValueError(
                f"--nproc_per_node asks for more processes than this machine has GPUs ({num_gpus})"
            )
        device = f"cuda:{dist_ctx.local_rank}"
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    join_timeout = datetime.timedelta(seconds=max(timeout, MIN_RENDEZVOUS_TIMEOUT))
    atexit.register(hard_exit)  # shutdown_distributed unregisters it
    with translate_dist_errors("in time to begin"):
        store = next(dist.rendezvous("env://", timeout=join_timeout))[0]
        prefix = negotiate_store_prefix(store, dist_ctx, join_timeout.total_seconds())
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(prefix, store),
            rank=dist_ctx.rank,
            world_size=dist_ctx.size,
            timeout=join_timeout,
        )
        dist.barrier()
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=timeout))
    return dist_ctx, device


def read_environment() -> DistContext:
    """The ranks in torchrun's environment variables. Raises ValueError if some are missing."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in os.environ]:
        raise ValueError(
            f"RANK is set in the environment, but not {', '.join(missing)}; "
            "start with torchrun, or unset it"
        )
    rank, local_rank, size = (int(os.environ[name]) for name in names[:3])
    return DistContext(rank, local_rank, size)


def negotiate_store_prefix(store: dist.Store, dist_ctx: DistContext, timeout: float) -> str:
    """Agree with the other ranks on a key prefix that no earlier start of the processes used.

    torchrun's store survives restarts. Under an old prefix, a process would read the addresses of
    dead processes and wait for them forever. Each rank publishes a random id. Rank 0 proposes a
    prefix for the ids that it sees, and a new one when they change. A rank accepts a proposal with
    its id. The prefix is final when all ranks have accepted it. Raises ValueError after timeout
    seconds."""
    rank_id = uuid.uuid4().hex
    deadline = time.monotonic() + timeout
    store.set(f"rank_id{dist_ctx.rank}", rank_id)
    proposed_ids: list[str] = []
    while time.monotonic() < deadline:
        if dist_ctx.is_main:
            proposed_ids = propose_prefix(store, dist_ctx.size, proposed_ids)
        if prefix := accept_prefix(store, dist_ctx, rank_id):
            return prefix
        time.sleep(POLL_INTERVAL)
    raise ValueError(f"not all of the {dist_ctx.size} processes came within {timeout:g} s")


def propose_prefix(store: dist.Store, size: int, proposed_ids: list[str]) -> list[str]:
    """On rank 0: propose a prefix if the ids of the ranks differ from those of the last proposal;
    returns the ids of the newest proposal."""
    keys = [f"rank_id{rank}" for rank in range(size)]
    if not store.check(keys):
        return proposed_ids
    ids = [store.get(key).decode() for key in keys]
    if ids != proposed_ids:
        store.set("proposal", " ".join([uuid.uuid4().hex, *ids]))
    return ids


def accept_prefix(store: dist.Store, dist_ctx: DistContext, rank_id: str) -> str | None:
    """Accept the current proposal if it contains this rank's id; returns the prefix once all ranks
    have accepted it."""
    if not store.check(["proposal"]):
        return None
    prefix, *ids = store.get("proposal").decode().split()
    if ids[dist_ctx.rank : dist_ctx.rank + 1] != [rank_id]:
        return None
    store.set(f"{prefix}{dist_ctx.rank}", "accepted")
    is_final = store.check([f"{prefix}{rank}" for rank in range(dist_ctx.size)])
    return prefix if is_final else None


@contextlib.contextmanager
def translate_dist_errors(limit: str) -> Iterator[None]:
    """Replace PyTorch's errors about lost or unresponsive processes by a ValueError in one
    sentence. limit names the time limit in it."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        is_lost = "gloo" in text or "connection closed by peer" in text
        if not (isinstance(error, dist.DistError) or is_lost):
            raise
        is_timeout = "timed out" in text or "timeout" in text
        reason = f"another process did not answer {limit}" if is_timeout else "another one is gone"
        raise ValueError(f"this process ends because {reason}; its output may say why") from error


def hard_exit() -> None:
    """Exit with status 1 without destroying the process group. Destroying it can abort the process
    if other ranks are gone."""
    try:
        # Releases semaphores; os._exit would skip it.
        multiprocessing.util._exit_function()  # type: ignore[attr-defined]
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(1)


def shutdown_distributed() -> None:
    """Leave the process group after all ranks have finished.

    A rank that leaves early aborts the others. So does a DDP model that outlives its process group
    in a reference cycle; the garbage collection prevents that."""
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
    atexit.unregister(hard_exit)


def is_dtensor(value: object) -> TypeGuard["DTensor"]:
    """Whether value is a DTensor, a tensor sharded over the ranks."""
    return hasattr(value, "full_tensor")


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a DTensor from all ranks, which must all call this. Other tensors are returned."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def shard_like(tensor: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a full tensor, sharded as reference is; the tensor itself if reference
    is not sharded. A tensor on the meta device gives zeros. No communication."""
    if not is_dtensor(reference):
        return tensor
    if tensor.is_meta:
        return torch.zeros_like(reference)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor.to(reference.device),
        reference.device_mesh,
        reference.placements,
        src_data_rank=None,
    )
