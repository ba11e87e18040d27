"""
Several processes that train together, as torchrun starts them; alone, everything is a no-op.
"""

import gc
import os
from typing import NamedTuple

import torch
import torch.distributed as dist


class World(NamedTuple):
    """Which process this is. Processes agree with each other over gloo, on the CPU, so that
    asking costs the accelerator no synchronization."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """The element-wise sums over all processes, known to all."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        return self.sum([float(flag)])[0] > 0


def join_world(device: str) -> tuple[World, str]:
    """Meet the other processes of torchrun; returns our place among them and our own device."""
    if "RANK" not in os.environ:
        return World(), device
    world = World(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]))
    if device.startswith("cuda"):
        if world.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"--nproc_per_node asks for more processes than this machine has GPUs ({torch.cuda.device_count()})"
            )
        device = f"cuda:{world.local_rank}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return world, device


def leave_world():
    """Part in order: a process that leaves while others still talk to it makes them abort, and so
    does a model in DDP that lives on, in a cycle of references, after its process group."""
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
