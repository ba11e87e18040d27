"""The optimizers, their saved state, and the learning-rate schedule."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from runtime.distributed import shard_like
from runtime.untrusted import clip


def make_optimizer(
    model: nn.Module,
    name: str,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> "torch.optim.Optimizer | CombinedOptimizer":
    """Make the optimizer of a Transformer.

    "adamw": fused AdamW (arXiv 1711.05101). "muon": Muon for the matrices inside the blocks, AdamW
    for the other parameters. Weight decay applies to matrices, not to the gains of the norms.
    AdamW's groups and parameters are in llama2.c's order."""
    muon_parameters = []
    adamw_parameters = []
    for parameter_name, parameter in model.named_parameters():
        if name == "muon" and "layers." in parameter_name and parameter.dim() == 2:
            muon_parameters.append(parameter)
        else:
            adamw_parameters.append(parameter)
    matrices = [p for p in adamw_parameters if p.dim() >= 2]
    gains = [p for p in adamw_parameters if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
    if not muon_parameters:
        return adamw
    muon = torch.optim.Muon(
        muon_parameters,
        lr=learning_rate,
        weight_decay=weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return CombinedOptimizer([muon, adamw])


class CombinedOptimizer:
    """Several optimizers with disjoint parameters, used as one."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        """The parameter groups of all optimizers, in order."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        """Update the parameters of every optimizer."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of every optimizer's parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        """The state that one optimizer with all the groups would have: parameters are numbered
        consecutively."""
        state: dict[int, dict] = {}
        groups: list[dict] = []
        for optimizer, offset in zip(self.optimizers, self.param_offsets(), strict=True):
            part = optimizer.state_dict()
            state |= {number + offset: moments for number, moments in part["state"].items()}
            for group in part["param_groups"]:
                groups.append(group | {"params": [number + offset for number in group["params"]]})
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, saved: dict) -> None:
        """Load what state_dict returned."""
        saved_groups = iter(saved["param_groups"])
        for optimizer, offset in zip(self.optimizers, self.param_offsets(), strict=True):
            own_groups = [next(saved_groups) for _ in optimizer.param_groups]
            numbers = [number for group in own_groups for number in group["params"]]
            state = {n - offset: saved["state"][n] for n in numbers if n in saved["state"]}
            groups = [
                group | {"params": [number - offset for number in group["params"]]}
                for group in own_groups
            ]
            optimizer.load_state_dict({"state": state, "param_groups": groups})

    def param_offsets(self) -> list[int]:
        """The number of each optimizer's first parameter."""
        offsets = [0]
        for optimizer in self.optimizers:
            num_params = sum(len(group["params"]) for group in optimizer.param_groups)
            offsets.append(offsets[-1] + num_params)
        return offsets[:-1]


def load_optimizer(
    optimizer: "torch.optim.Optimizer | CombinedOptimizer", saved: dict, path: str
) -> None:
    """Load the moments and learning rates of a saved state dict; other hyperparameters stay.

    Raises ValueError, with the checkpoint's path, where the state does not fit the parameters."""
    try:
        groups = merge_groups(optimizer, saved)
        numbers = {number for group in groups for number in group["params"]}
        if saved["state"] and saved["state"].keys() != numbers:
            raise ValueError("it has no moments for some of the parameters")
        state: dict[int, dict] = {}
        for group, saved_group in zip(optimizer.param_groups, groups, strict=True):
            state |= group_state(group, saved_group["params"], saved["state"])
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{path}: its optimizer state does not fit the model ({clip(str(error), 200)})"
        ) from error


def merge_groups(optimizer: "torch.optim.Optimizer | CombinedOptimizer", saved: dict) -> list[dict]:
    """The optimizer's parameter groups with the parameter numbers of a saved state dict.

    The learning rate is that of the last step; the next step sets it again."""
    pairs = zip(optimizer.state_dict()["param_groups"], saved["param_groups"], strict=True)
    return [
        {**group, "lr": float(saved_group.get("lr", group["lr"])), "params": saved_group["params"]}
        for group, saved_group in pairs
    ]


def group_state(group: dict, numbers: list[int], saved: dict) -> dict[int, dict]:
    """The saved states of a group's parameters, by their numbers; empty before the first step."""
    names = ("momentum_buffer",) if "momentum" in group else ("exp_avg", "exp_avg_sq")
    return {
        number: parameter_state(saved[number], names, parameter)
        for parameter, number in zip(group["params"], numbers, strict=True)
        if number in saved
    }


def parameter_state(saved: dict, names: tuple[str, ...], parameter: torch.Tensor) -> dict:
    """A parameter's saved state, its moments sharded as the parameter is.

    Raises ValueError or KeyError unless the moments have the parameter's shape."""
    for name in names:
        if saved[name].shape != parameter.shape or not saved[name].is_floating_point():
            found = f"{tuple(saved[name].shape)} of {saved[name].dtype}"
            expected = f"{tuple(parameter.shape)} of floating-point numbers"
            raise ValueError(f"a moment is {found}, not {expected}")
    return saved | {name: shard_like(saved[name], parameter) for name in names}


@dataclass(frozen=True)
class LRSchedule:
    """A learning-rate schedule: linear warm-up, then constant, cosine or WSD decay."""

    name: Literal["constant", "cosine", "wsd"]
    max_lr: float
    min_lr: float  # at total_steps
    warmup_steps: int
    total_steps: int
    decay_fraction: float = 0.2  # the part of the steps in which WSD decays


def lr_at_step(step: int, schedule: LRSchedule) -> float:
    """The learning rate of the optimizer step with this number, counted from 0.

    Warm-up is linear and its first step is above 0. cosine: half a cosine down to min_lr (arXiv
    1608.03983). wsd: constant until the last decay_fraction of the steps, then down as one minus a
    square root (arXiv 2405.18392). constant: no decay."""
    max_lr, min_lr = schedule.max_lr, schedule.min_lr
    warmup_steps, total_steps = schedule.warmup_steps, schedule.total_steps
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    if schedule.name == "constant":
        return max_lr
    decay_start = warmup_steps
    if schedule.name == "wsd":
        decay_start = max(warmup_steps, round(total_steps * (1 - schedule.decay_fraction)))
    progress = min(1.0, max(0.0, (step - decay_start) / max(1, total_steps - decay_start)))
    if schedule.name == "cosine":
        factor = (1 + math.cos(math.pi * progress)) / 2
    else:
        factor = 1 - math.sqrt(progress)
    return min_lr + (max_lr - min_lr) * factor
