"""
The optimizer and its learning rate.
"""

import math

import torch


def make_optimizer(model, learning_rate: float, betas: tuple[float, float], weight_decay: float):
    """Fused AdamW (arXiv 1711.05101). Matrices decay towards zero; norms' gains do not, nothing is
    gained by making them small. The order of the groups and of the parameters is llama2.c's."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def load_optimizer(optimizer, state: dict, path: str):
    """Take the moments from a saved state and keep our own settings. Raises ValueError, naming
    the checkpoint, where the state belongs to another model."""
    try:
        ours = optimizer.state_dict()["param_groups"]
        groups = [{**mine, "params": saved["params"]} for mine, saved in zip(ours, state["param_groups"], strict=True)]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        indices = [index for group in groups for index in group["params"]]
        for parameter, index in zip(parameters, indices, strict=True):
            saved = state["state"].get(index)
            for moment in (saved["exp_avg"], saved["exp_avg_sq"]) if saved else ():
                if moment.shape != parameter.shape:
                    raise ValueError(f"a moment is {tuple(moment.shape)}, not {tuple(parameter.shape)}")
        optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its optimizer state does not fit the model ({error})") from error


def learning_rate_at(
    step: int, peak: float, floor: float, warmup_steps: int, total_steps: int, decay: bool = True
) -> float:
    """The rate of update number step, counted from 0: rising in a line over warmup_steps, of which
    the first already moves, then down half a cosine to floor at total_steps (arXiv 1608.03983)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if not decay:
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2
