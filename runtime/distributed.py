"""
Several processes that train together, as torchrun starts them; alone, everything is a no-op.
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
from typing import NamedTuple

import torch
import torch.distributed as dist

MIN_RENDEZVOUS_TIMEOUT = (
    60.0  # seconds for which the first process to start waits for the last, at the least
)


class DistContext(NamedTuple):
    """Which process this is. Processes agree with each other over gloo, on the CPU, so that
    asking costs the accelerator no synchronization."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """The element-wise sums over all processes, known to all."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def barrier(self):
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def all_equal(self, number: int) -> bool:
        """Whether it is the same in all processes, which all learn alike."""
        return not self.any_rank(
            self.all_reduce_sum([float(number)])[0] != float(number) * self.size
        )

    def any_rank(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        return self.all_reduce_sum([float(flag)])[0] > 0

    def new_cpu_mesh(self, timeout: float):
        """All processes, on the CPU, in a group for a thread of its own: what they say to each other there
        is not mixed up with what is said here. timeout: as of init_distributed."""
        from torch.distributed.device_mesh import DeviceMesh

        return DeviceMesh.from_group(
            dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout)), "cpu"
        )


def init_distributed(device: str, timeout: float = 600.0) -> tuple[DistContext, str]:
    """Meet the other processes of torchrun; returns our place among them and our own device. timeout:
    seconds for which a process waits for the others before it ends (at the start, a minute or more)."""
    if "RANK" not in os.environ:
        return DistContext(), device
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in os.environ]:
        raise ValueError(
            f"RANK is set in the environment, but not {', '.join(missing)}; start with torchrun, or unset it"
        )
    dist_ctx = DistContext(
        int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    )
    if device.startswith("cuda"):
        if dist_ctx.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"--nproc_per_node asks for more processes than this machine has GPUs ({torch.cuda.device_count()})"
            )
        device = f"cuda:{dist_ctx.local_rank}"
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    to_meet = datetime.timedelta(seconds=max(timeout, MIN_RENDEZVOUS_TIMEOUT))
    atexit.register(hard_exit)  # unless we part in order
    with translate_dist_errors("in time to begin"):
        store = next(dist.rendezvous("env://", timeout=to_meet))[0]
        store = dist.PrefixStore(
            negotiate_store_prefix(store, dist_ctx, to_meet.total_seconds()), store
        )
        dist.init_process_group(
            backend, store=store, rank=dist_ctx.rank, world_size=dist_ctx.size, timeout=to_meet
        )
        dist.barrier()
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=timeout))
    return dist_ctx, device


def negotiate_store_prefix(store, dist_ctx: DistContext, patience: float) -> str:
    """A name for this start of the processes, which no earlier one had. torchrun's store outlives its
    restarts, and processes that read there the addresses of dead ones would wait for them forever.

    Each process leaves a mark of its own; the first offers a name for the marks that it sees, and a new
    name when these change, until all have agreed to one. Raises ValueError after patience seconds."""
    mine, deadline, offered = uuid.uuid4().hex, time.monotonic() + patience, None
    store.set(f"mark{dist_ctx.rank}", mine)
    marks = [f"mark{rank}" for rank in range(dist_ctx.size)]
    while time.monotonic() < deadline:
        if dist_ctx.is_main and store.check(marks):
            seen = [store.get(mark).decode() for mark in marks]
            if seen != offered:
                offered, name = seen, uuid.uuid4().hex
                store.set("offer", " ".join([name, *seen]))
        if store.check(["offer"]):
            name, *seen = store.get("offer").decode().split()
            if seen[dist_ctx.rank : dist_ctx.rank + 1] == [mine]:
                store.set(f"{name}{dist_ctx.rank}", "agreed")
                if store.check([f"{name}{rank}" for rank in range(dist_ctx.size)]):
                    return name
        time.sleep(0.02)
    raise ValueError(f"not all of the {dist_ctx.size} processes came within {patience:g} s")


@contextlib.contextmanager
def translate_dist_errors(in_time: str):
    """Raise ValueError in place of what PyTorch says when another process ends, or does not answer in_time."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if not (
            isinstance(error, dist.DistError)
            or "gloo" in text
            or "connection closed by peer" in text
        ):
            raise
        is_late = "timed out" in text or "timeout" in text
        reason = f"another process did not answer {in_time}" if is_late else "another one is gone"
        raise ValueError(
            f"this process ends because {reason}; its own lines may say why"
        ) from error


def hard_exit():
    """With status 1, also after Ctrl-C. A process group whose members are gone, or about to go, is not taken
    down in order: that would sometimes abort."""
    try:
        multiprocessing.util._exit_function()  # would come after this, and gives back semaphores
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(1)


def shutdown_distributed():
    """Part in order: a process that leaves while others still talk to it makes them abort, and so
    does a model in DDP that lives on, in a cycle of references, after its process group."""
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
    atexit.unregister(hard_exit)


def is_dtensor(value) -> bool:
    """Whether a tensor is one process's share of a whole (a DTensor)."""
    return hasattr(value, "full_tensor")


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all processes' shares, which all must ask for; any other as it is."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def shard_like(tensor: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """This process's share of a whole tensor that each process has, cut as own is; all of it where
    own is whole. Zeros for a tensor whose values come later."""
    if not is_dtensor(own):
        return tensor
    if tensor.is_meta:
        return torch.zeros_like(own)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None
    )
