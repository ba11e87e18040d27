"""
The optimizer and its learning rate.
"""

import math

import torch

from runtime.distributed import shard_like


def make_optimizer(
    model, name: str, learning_rate: float, betas: tuple[float, float], weight_decay: float
):
    """adamw: fused AdamW (arXiv 1711.05101). muon: Muon for the matrices inside the blocks, and AdamW
    for the rest. Matrices decay towards zero; norms' gains do not, nothing is gained by making them
    small. Among AdamW's the order of the groups and of the parameters is llama2.c's."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    is_muon = [
        name == "muon" and "layers." in n and p.dim() == 2
        for n, p in zip(names, parameters, strict=True)
    ]
    hidden = [p for p, muon in zip(parameters, is_muon, strict=True) if muon]
    others = [p for p, muon in zip(parameters, is_muon, strict=True) if not muon]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
    if not hidden:
        return adamw
    muon = torch.optim.Muon(
        hidden, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return CombinedOptimizer(muon, adamw)


class CombinedOptimizer:
    """Several optimizers, each with parameters of its own, as one."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        """As one optimizer with all the groups would write it: the parameters are numbered through."""
        state, groups = {}, []
        for part, first in zip(self.parts, self.param_offsets(), strict=True):
            own = part.state_dict()
            state |= {number + first: moments for number, moments in own["state"].items()}
            groups += [
                group | {"params": [n + first for n in group["params"]]}
                for group in own["param_groups"]
            ]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, saved: dict):
        groups = iter(saved["param_groups"])
        for part, first in zip(self.parts, self.param_offsets(), strict=True):
            own = [next(groups) for _ in part.param_groups]
            numbers = [number for group in own for number in group["params"]]
            state = {
                number - first: saved["state"][number]
                for number in numbers
                if number in saved["state"]
            }
            own = [
                group | {"params": [number - first for number in group["params"]]} for group in own
            ]
            part.load_state_dict({"state": state, "param_groups": own})

    def param_offsets(self) -> list[int]:
        """The number of each part's first parameter."""
        counts = [sum(len(group["params"]) for group in part.param_groups) for part in self.parts]
        return [sum(counts[:i]) for i in range(len(counts))]


def load_optimizer(optimizer, state: dict, path: str):
    """Take the moments from a saved state and keep our own settings. Raises ValueError, naming
    the checkpoint, where the state belongs to another model."""
    try:
        ours = optimizer.state_dict()["param_groups"]
        groups = [
            {**mine, "params": saved["params"]}
            for mine, saved in zip(ours, state["param_groups"], strict=True)
        ]
        known = {number for group in groups for number in group["params"]}
        if state["state"] and state["state"].keys() != known:
            raise ValueError("it has no moments for some of the parameters")
        own = {}
        for mine, saved in zip(optimizer.param_groups, groups, strict=True):
            moments = ("momentum_buffer",) if "momentum" in mine else ("exp_avg", "exp_avg_sq")
            for parameter, number in zip(mine["params"], saved["params"], strict=True):
                check_moments(state["state"].get(number), moments, parameter)
                if number in state["state"]:
                    shared = {
                        name: shard_like(state["state"][number][name], parameter)
                        for name in moments
                    }
                    own[number] = state["state"][number] | shared
        optimizer.load_state_dict({"state": own, "param_groups": groups})
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: its optimizer state does not fit the model ({error})") from error


def check_moments(saved: dict | None, names: tuple[str, ...], parameter):
    """Raise ValueError or KeyError unless a parameter's saved state, if any, is of its shape."""
    for name in names if saved is not None else ():
        if saved[name].shape != parameter.shape or not saved[name].is_floating_point():
            found = f"{tuple(saved[name].shape)} of {saved[name].dtype}"
            raise ValueError(
                f"a moment is {found}, not {tuple(parameter.shape)} of floating-point numbers"
            )


def lr_at_step(
    step: int,
    peak: float,
    floor: float,
    warmup_steps: int,
    total_steps: int,
    kind: str = "cosine",
    cooldown=0.2,
) -> float:
    """The rate of update number step, counted from 0: rising in a line over warmup_steps, of which
    the first already moves, and reaching floor at total_steps. cosine: down half a cosine (arXiv
    1608.03983). wsd: at its peak until the last cooldown share of the steps, then down as one minus
    a square root (arXiv 2405.18392). constant: never down."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if kind == "constant":
        return peak
    decay_from = (
        warmup_steps if kind == "cosine" else max(warmup_steps, round(total_steps * (1 - cooldown)))
    )
    progress = min(1.0, max(0.0, (step - decay_from) / max(1, total_steps - decay_from)))
    share = (1 + math.cos(math.pi * progress)) / 2 if kind == "cosine" else 1 - math.sqrt(progress)
    return floor + (peak - floor) * share
