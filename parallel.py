"""
A model over several processes: each with all of it (DDP), or each with a share (FSDP2), whose
modules take most of a second to import and are not needed without it.
"""

import contextlib

import torch
from torch.nn.parallel import DistributedDataParallel

from model import Transformer


def shard(model: Transformer, device: str, processes: int):
    """Leave each process a share of every weight, and so of its gradient and moments. A block's weights
    are brought together when it computes, and given up again."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.partition(":")[0], (processes,))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # what is in no block, a tied classifier among it


def is_sharded(model: torch.nn.Module) -> bool:
    return hasattr(model, "set_requires_gradient_sync")  # of an FSDPModule


def gradients_meet(model: torch.nn.Module, now: bool):
    """The context of a micro-batch, in whose backward pass the processes' gradients are averaged or not."""
    if is_sharded(model):
        model.set_requires_gradient_sync(now)
    elif isinstance(model, DistributedDataParallel) and not now:
        return model.no_sync()
    return contextlib.nullcontext()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all processes' shares, which all must ask for; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def share_like(tensor: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """This process's share of a whole tensor, cut as own is; all of it where own is whole."""
    if not hasattr(own, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements)
