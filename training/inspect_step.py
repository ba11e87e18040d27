"""Shows one step of a run: its sequences, their losses, the largest gradients. Writes nothing."""

import math

import torch

from runtime.device import autocast
from textdata.loader import collate, dropout_seed, training_indices
from training.state import TrainingRun

TOP_GRADS = 5  # parameters listed, by the norm of their gradients
PREVIEW_TOKENS = 24
PREVIEW_CHARACTERS = 60


def inspect_step(run: TrainingRun, step: int) -> None:
    """Print the batch of a step, counted from 0, with its losses and gradients.

    They are those of the run's current weights.

    The batch and its dropout are those of the step on any number of processes. Raises ValueError
    for a step whose batch is not known."""
    config, state = run.config, run.state
    if state.position != state.iter_num * config.sequences_per_step and step != state.iter_num:
        raise ValueError(
            f"--debug_step={step}: the number of sequences per step was changed during the run, so "
            f"only the batch of the next step, {state.iter_num}, is known"
        )
    first = state.position + (step - state.iter_num) * config.sequences_per_step
    last = first + config.sequences_per_step - 1
    print(f"step {step} reads sequences {first} to {last} of the run's order;")
    print(f"losses and gradients are those of the weights of step {state.iter_num}")
    loss = 0.0
    for position in range(first, last + 1, config.batch_size):
        loss += inspect_micro_batch(run, position) / config.gradient_accumulation_steps
    parameters = run.model.named_parameters()
    norms = {name: p.grad.norm().item() for name, p in parameters if p.grad is not None}
    print(f"loss {loss:.6f}, gradient norm {math.hypot(*norms.values()):.6f}; largest:")
    nonfinite_first = sorted(norms, key=lambda name: (math.isfinite(norms[name]), -norms[name]))
    for name in nonfinite_first[:TOP_GRADS]:
        print(f"  {norms[name]:.6f} {name}")


def inspect_micro_batch(run: TrainingRun, position: int) -> float:
    """Print the sequences of the micro-batch at this position; returns its mean loss.

    Adds its gradients to the parameters."""
    config, dataset = run.config, run.train_dataset
    indices = training_indices(dataset, config.seed, config.batch_size, position)
    batch = collate([dataset[index] for index in indices], config.batch_size, dataset.seq_len)
    inputs, targets = (tokens.to(run.device) for tokens in batch)  # each (B, T)
    run.model.eval()
    for row, index in enumerate(indices):
        with torch.no_grad(), autocast(run.device, run.dtype):
            _, loss = run.model(inputs[row : row + 1], targets[row : row + 1])
        path, start, _ = dataset.locate(index)
        text = run.tokenizer.decode(inputs[row, :PREVIEW_TOKENS].tolist())[:PREVIEW_CHARACTERS]
        print(f"{position + row:>10}  {path}:{start}  loss {loss.item():.4f}  {text!r}")
    run.model.train()
    torch.manual_seed(dropout_seed(config.seed, position))
    with autocast(run.device, run.dtype):
        _, loss = run.model(inputs, targets)
    (loss / config.gradient_accumulation_steps).backward()
    return loss.item()
