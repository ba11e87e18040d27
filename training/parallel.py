"""A model on several processes: replicated by DDP, or sharded by FSDP2.

The modules of FSDP2 take most of a second to import, so only sharded runs import them."""

import contextlib
from collections.abc import Iterable

import torch
from torch.nn.parallel import DistributedDataParallel

from checkpoints.snapshot import snapshot
from model import Transformer
from runtime.distributed import shard_like


def shard(model: Transformer, device: str, num_processes: int, dtype: str) -> None:
    """Shard every parameter, its gradient and its moments among the processes (FSDP2).

    A block's weights are gathered when the block computes, in bfloat16 if dtype is, and freed
    afterwards. Activations between blocks stay float32, as under autocast."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.partition(":")[0], (num_processes,))
    policy = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        policy = MixedPrecisionPolicy(
            torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)  # the remaining parameters: embedding, final norm, LM head


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether a model is sharded by FSDP2."""
    return hasattr(model, "set_requires_gradient_sync")  # a method of FSDPModule


@torch.no_grad()
def load_weights(model: Transformer, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Set the model's parameters, or this process's shards of them, from full tensors."""
    for name, weight in weights:
        parameter = model.get_parameter(name)
        parameter.copy_(shard_like(weight, parameter))


def grad_sync(model: torch.nn.Module, enabled: bool) -> contextlib.AbstractContextManager[None]:
    """A context in which the backward pass averages gradients over the processes, or not.

    With gradient accumulation only the last micro-batch of a step needs it."""
    if is_sharded(model):
        model.set_requires_gradient_sync(enabled)  # type: ignore[operator]  # FSDPModule's
    elif isinstance(model, DistributedDataParallel) and not enabled:
        return model.no_sync()
    return contextlib.nullcontext()


def gather_model(model: Transformer, is_main: bool) -> Transformer | None:
    """The model with full tensors, on the main process; None on the others.

    All processes must call this where the model is sharded."""
    if not is_sharded(model):
        return model if is_main else None
    weights = snapshot(model.state_dict(), keep=is_main)
    if not is_main:
        return None
    full_model = Transformer.uninitialized(model.args)
    full_model.load_state_dict(weights)
    return full_model
