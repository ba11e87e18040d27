"""
One step of a run looked at: which sequences it reads, what each costs, and where the gradient is large
or no number. Nothing is written.
"""

import math

import torch

from runtime.device import autocast
from textdata.loader import collate, dropout_seed, training_indices
from training.state import Run

SHOWN = 5  # of the parameters with the largest gradients


def show_step(run: Run, step: int):
    """Print the batch of a step, counted from 0, with the losses and gradients that the run's present
    weights have on it. The batch, and its dropout, are those of the step on any number of processes."""
    config = run.config
    if run.position != run.iter_num * config.sequences_per_step and step != run.iter_num:
        raise ValueError(
            f"--debug_step={step}: the number of sequences in a step was changed, now or in the past; of such a run "
            f"only the next step, {run.iter_num}, is known"
        )
    first = run.position + (step - run.iter_num) * config.sequences_per_step
    print(
        f"step {step} reads sequences {first} to {first + config.sequences_per_step - 1} of the run's order;"
    )
    print(f"losses and gradients are those of the weights of step {run.iter_num}")
    total = 0.0
    for position in range(first, first + config.sequences_per_step, config.batch_size):
        total += show_micro_batch(run, position) / config.gradient_accumulation_steps
    norms = {
        name: p.grad.norm().item() for name, p in run.model.named_parameters() if p.grad is not None
    }
    norm = math.hypot(*norms.values())
    print(f"loss {total:.6f}, norm of the gradient {norm:.6f}; largest:")
    unusual_first = sorted(norms, key=lambda name: (math.isfinite(norms[name]), -norms[name]))
    for name in unusual_first[:SHOWN]:
        print(f"  {norms[name]:.6f} {name}")


def show_micro_batch(run: Run, position: int) -> float:
    """The lines of the sequences that begin at this position, as many as a micro-batch has. Adds to the
    gradients; returns the mean loss."""
    config, windows = run.config, run.train_windows
    numbers = training_indices(windows, config.seed, config.batch_size, position)
    batch = collate([windows[number] for number in numbers], config.batch_size, windows.seq_len)
    inputs, targets = (tokens.to(run.device) for tokens in batch)
    run.model.eval()
    for row, number in enumerate(numbers):
        with torch.no_grad(), autocast(run.device, run.dtype):
            loss = run.model(inputs[row : row + 1], targets[row : row + 1])[1].item()
        path, start, _ = windows.locate(number)
        text = run.tokenizer.decode(inputs[row, :24].tolist())
        print(f"{position + row:>10}  {path}:{start}  loss {loss:.4f}  {text[:60]!r}")
    run.model.train()
    torch.manual_seed(dropout_seed(config.seed, position))
    with autocast(run.device, run.dtype):
        loss = run.model(inputs, targets)[1]
    (loss / config.gradient_accumulation_steps).backward()
    return loss.item()
