"""
A model over several processes: each with all of it (DDP), or each with a share (FSDP2), whose
modules take most of a second to import and are not needed without it.
"""

import contextlib
from collections.abc import Iterable

import torch
from torch.nn.parallel import DistributedDataParallel

from model import Transformer
from runtime.distributed import shard_like


def shard(model: Transformer, device: str, processes: int, dtype: str):
    """Leave each process a share of every weight, and so of its gradient and moments. A block's weights
    are brought together when it computes, and given up again; in 16 bits where its products are."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.partition(":")[0], (processes,))
    policy = MixedPrecisionPolicy()
    if dtype == "bfloat16":  # what flows between the blocks stays float32, as with autocast alone
        policy = MixedPrecisionPolicy(
            torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)  # what is in no block, a tied classifier among it


def is_sharded(model: torch.nn.Module) -> bool:
    return hasattr(model, "set_requires_gradient_sync")  # of an FSDPModule


@torch.no_grad()
def load_weights(model: Transformer, weights: Iterable[tuple[str, torch.Tensor]]):
    """Set the weights, or this process's share of them, from whole ones."""
    for name, weight in weights:
        parameter = model.get_parameter(name)
        parameter.copy_(shard_like(weight, parameter))


def grad_sync(model: torch.nn.Module, now: bool):
    """The context of a micro-batch, in whose backward pass the processes' gradients are averaged or not."""
    if is_sharded(model):
        model.set_requires_gradient_sync(now)
    elif isinstance(model, DistributedDataParallel) and not now:
        return model.no_sync()
    return contextlib.nullcontext()
