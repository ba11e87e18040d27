"""torch.compile for training, with a fallback to eager mode."""

import time
from typing import Any

import torch

from runtime.device import autocast
from training.parallel import is_sharded
from training.state import TrainingRun

# On a CPU the compiler would fuse a concatenation with the operations on its result, and then
# could not use vector instructions for them.
CPU_OPTIONS: dict[str, Any] = {"max_pointwise_cat_inputs": 0}


def maybe_compile(run: TrainingRun) -> torch.nn.Module:
    """Compile the model and run one batch through it; the eager model where that fails.

    A failure (no C++ compiler, an old GPU, an unsupported system) is logged once. Returns the
    module to call; run.model keeps the parameters. Raises torch.OutOfMemoryError."""
    if not run.config.compile:
        return run.model
    run.log("compiling the model (--compile=False starts at once, and is slower later) ...")
    started = time.perf_counter()
    try:
        module = compile_model(run)
        run_one_batch(run, module)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        run.log(f"cannot compile here, training continues without: {reason}")
        module = run.model
        for block in run.model.layers:
            block.__dict__.pop("forward", None)
    run.optimizer.zero_grad(set_to_none=True)
    run.log(f"... took {time.perf_counter() - started:.0f} s")
    return module


def compile_model(run: TrainingRun) -> torch.nn.Module:
    """The compiled model; FSDP's all-gathers are not compiled, so each block is compiled alone."""
    options = CPU_OPTIONS if run.device == "cpu" else None
    if not is_sharded(run.model):
        compiled: Any = torch.compile(run.model, options=options)
        return compiled
    for block in run.model.layers:
        block.forward = torch.compile(block.forward, options=options)
    return run.model


def run_one_batch(run: TrainingRun, module: torch.nn.Module) -> None:
    """A forward and a backward pass: compilation happens here."""
    shape = (run.config.batch_size, run.config.max_seq_len)
    tokens = torch.zeros(2, *shape, dtype=torch.int64, device=run.device)
    with autocast(run.device, run.dtype):
        _, loss = module(*tokens.unbind())
    loss.backward()
