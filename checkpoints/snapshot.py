"""A copy of a training state on the CPU."""

from typing import Any

import torch

from runtime.distributed import full_tensor


def snapshot(value: Any, keep: bool = True, copies: dict | None = None) -> Any:
    """Copy a nested state to the CPU, so that training can continue while it is written.

    A tensor that occurs twice, such as tied weights, is copied once. Sharded tensors are gathered:
    then all processes must call this. keep: whether this process keeps the copy."""
    copies = {} if copies is None else copies
    if isinstance(value, torch.Tensor):
        if id(value) not in copies:
            full = full_tensor(value.detach())
            copies[id(value)] = full.to("cpu", copy=True) if keep else None
        return copies[id(value)]
    if isinstance(value, dict):
        return {key: snapshot(item, keep, copies) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(item, keep, copies) for item in value)
    return value
