"""Train a Llama from scratch.

    python train.py --batch_size=8 --compile=False
    python train.py config/stories15M.py --max_iters=2000 --learning_rate=1e-3
    python train.py --init_from=resume
    python train.py --init_from=Llama-3.2-1B --max_seq_len=512 --learning_rate=1e-5
    torchrun --nproc_per_node=4 train.py

A run writes to out_dir: ckpt.pt (the latest checkpoint), ckpt_000200.pt (of that step), best.pt
(the lowest validation loss), model.bin and tokenizer.bin (the best model for llama2.c),
metrics.jsonl and loss.png. Data order and dropout are functions of (seed, position in the data):
a resumed run continues where it stopped, bit for bit on a CPU, on any number of processes
within rounding.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from configurator import configure, print_overrides, restore_options, run_main
from generation.streaming import generate
from model import ModelArgs, flops_per_token
from runtime.device import autocast, disable_malloc_trim, peak_flops, pick_device, translate_oom
from runtime.distributed import (
    DistContext,
    full_tensor,
    init_distributed,
    shutdown_distributed,
    translate_dist_errors,
)
from textdata.loader import dropout_seed, prefetch, training_batches
from training import monitor
from training.best_model import restore_best, update_best
from training.compile import maybe_compile
from training.evaluation import evaluate
from training.inspect_step import inspect_step
from training.interrupt import GracefulInterrupt, complete_saves
from training.out_dir import finish_saving, lock_out_dir, plot_loss, prepare_out_dir
from training.parallel import gather_model, grad_sync, is_sharded
from training.resume import (
    ARCHITECTURE,
    StartPoint,
    architecture_options,
    check_resumed,
    find_checkpoint,
    open_pretrained,
    pretrained_options,
    saved_options,
)
from training.setup import build_run, same_start, save_state
from training.state import TrainingRun
from training.step_timer import StepTimer
from training.validation import range_errors


@dataclass(frozen=True)
class TrainConfig:
    """Train a Llama from scratch, resume a run, or fine-tune a model."""

    # I/O
    out_dir: str = "out"  # the output folder of the run
    eval_interval: int = 2000  # steps between evaluations
    log_interval: int = 1  # steps between reports of the training loss
    eval_iters: int = 100  # batches per evaluation, always the same; 0: the whole validation split
    eval_only: bool = False  # evaluate once and exit
    debug_step: int | None = None  # show the batch, losses and gradients of this step, and exit
    # save a checkpoint at every evaluation, not only at the best
    always_save_checkpoint: bool = True
    checkpoint_interval: int = 200  # steps between further checkpoints; 0: at evaluations only
    # older checkpoints (ckpt_000200.pt) to keep; one is the fallback when ckpt.pt is corrupt
    keep_checkpoints: int = 1
    sample_interval: int = 0  # generate a sample at evaluations every N steps; 0: never
    # scratch; resume: from the latest checkpoint in OUT_DIR; auto: resume if there is one;
    # or the path of a pretrained model to fine-tune
    init_from: str = "scratch"
    # wandb logging
    wandb_log: bool = False  # log to Weights & Biases
    wandb_project: str = "cria"  # project name
    wandb_run_name: str = ""  # run name; empty: chosen by wandb
    # data
    data_dir: str = "data"  # where tinystories.py wrote the tokens
    batch_size: int = 128  # sequences in a micro-batch
    max_seq_len: int = 256  # tokens in a sequence
    vocab_source: Literal["custom", "llama2"] = "custom"  # a trained vocabulary, or Llama 2's
    vocab_size: int = 4096  # Llama 2's has 32000
    tokenizer: str = ""  # tokenizer of the data; empty: the one beside the tokens
    # model
    dim: int = 288  # width of the residual stream
    n_layers: int = 6  # transformer blocks
    n_heads: int = 6  # attention heads
    n_kv_heads: int | None = None  # heads of keys and values; None: as many as n_heads
    multiple_of: int = 32  # round the feed-forward width up to a multiple of this
    hidden_dim: int | None = None  # feed-forward width; None: two thirds of 4 dim
    ffn_dim_multiplier: float | None = None  # scales the feed-forward width (Llama 3)
    rope_theta: float = 10000.0  # RoPE base frequency; model.bin supports 10000 only
    dropout: float = 0.0  # dropout probability
    # adamw optimizer
    # muon: Muon for the matrices in the blocks, AdamW for the rest
    optimizer: Literal["adamw", "muon"] = "adamw"
    gradient_accumulation_steps: int = 4  # micro-batches per optimizer step, over all processes
    learning_rate: float = 5e-4  # peak learning rate
    max_iters: int = 100000  # optimizer steps in the run
    weight_decay: float = 1e-1  # weight decay on 2-D parameters
    beta1: float = 0.9  # AdamW beta1
    beta2: float = 0.95  # AdamW beta2
    grad_clip: float = 1.0  # maximum gradient norm; 0: no clipping
    # skip a step if its gradient norm exceeds this multiple of the recent median; 0: never
    skip_spikes: float = 0.0
    # learning rate decay settings
    decay_lr: bool = True  # decay the learning rate after warm-up
    # cosine; or wsd: warm up, constant, decay at the end
    lr_schedule: Literal["cosine", "wsd"] = "cosine"
    wsd_cooldown: float = 0.2  # fraction of the steps in which wsd decays
    warmup_iters: int = 1000  # steps of linear warm-up
    min_lr: float = 0.0  # learning rate at the end of the decay
    # system
    seed: int = 1337  # of the weights, the data order and dropout
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    # dtype of the matrix products (autocast)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    compile: bool = True  # compile the model with torch.compile
    parallel: Literal["ddp", "fsdp"] = "ddp"  # ddp: replicate the model; fsdp: shard it
    timeout: float = 600.0  # seconds to wait for other processes; at least 60 at the start
    # recompute activations in the backward pass: less memory, more time
    activation_checkpointing: bool = False

    def validate(self) -> Iterator[str]:
        """Yield a sentence for each invalid option."""
        yield from range_errors(self)
        if not 0 <= self.seed < 2**63:
            yield f"--seed={self.seed}: must be at least 0 and below 2**63"
        for name in ("out_dir", "init_from"):
            if not getattr(self, name):
                yield f"--{name}= is empty: leave it out, or give a value"
        if 0 < self.skip_spikes <= 1 or not math.isfinite(self.skip_spikes):
            yield f"--skip_spikes={self.skip_spikes:g}: must be 0, or above 1"
        for name, value in (("optimizer", "muon"), ("dtype", "float16")):
            if self.parallel == "fsdp" and getattr(self, name) == value:
                yield f"--parallel=fsdp: cannot be used with --{name}={value}; use --parallel=ddp"
        if 0 <= self.learning_rate < self.min_lr:
            lr = f"--learning_rate={self.learning_rate:g}"
            yield f"--min_lr={self.min_lr:g}: must not be above {lr}"
        try:
            if self.init_from in ("scratch", "auto"):  # else the architecture is in a file
                self.model_args()
        except ValueError as error:
            yield f"--{error}"

    def model_args(self) -> ModelArgs:
        """The architecture. Raises ValueError for an impossible one."""
        return ModelArgs(**{name: getattr(self, name) for name in (*ARCHITECTURE, "dropout")})

    @property
    def sequences_per_step(self) -> int:
        """Sequences that one optimizer step reads, over all processes."""
        return self.gradient_accumulation_steps * self.batch_size


def main(argv: list[str] | None = None) -> None:
    """Train with the options on the command line."""
    requested, overrides = configure(TrainConfig, argv)
    if requested.debug_step is not None and "RANK" in os.environ:
        raise ValueError("--debug_step: one process is enough; start it without torchrun")
    with lock_out_dir(requested):  # before the look for checkpoints: another run may be saving one
        config, start = find_start(requested, overrides)
        dist_ctx, device = init_distributed(pick_device(config.device), config.timeout)
        disable_malloc_trim()
        if dist_ctx.is_main:
            print_overrides(config, overrides)
        with translate_dist_errors(f"for {config.timeout:g} s (--timeout)"), translate_oom():
            if not same_start(start.checkpoint, dist_ctx) and not dist_ctx.is_main:
                config, start = find_start(requested, overrides)  # rank 0 has the lock by now
            run_training(config, start, dist_ctx, device)
            shutdown_distributed()


def find_start(config: TrainConfig, overrides: dict[str, str]) -> tuple[TrainConfig, StartPoint]:
    """The options, completed from what --init_from names, and that start point."""
    if config.init_from == "scratch":
        return config, StartPoint()
    if config.init_from not in ("resume", "auto"):
        start = open_pretrained(config, overrides)
        assert start.pretrained is not None, "open_pretrained opens a model"
        args = architecture_options(start.pretrained)
        return replace(config, **pretrained_options(args, overrides)), start
    checkpoint = find_checkpoint(config)
    if checkpoint is None:  # only with --init_from=auto
        return replace(config, init_from="scratch"), StartPoint()
    saved = saved_options(config, overrides, checkpoint)
    config = restore_options(replace(config, init_from="resume"), saved, checkpoint.path)
    check_resumed(config, checkpoint)
    return config, checkpoint


def run_training(
    config: TrainConfig, start: StartPoint, dist_ctx: DistContext, device: str
) -> None:
    """Build the run and train it; or inspect one step of it."""
    run = build_run(config, start, dist_ctx, device)
    if config.debug_step is not None:
        return inspect_step(run, config.debug_step)
    if not config.eval_only:
        if dist_ctx.is_main:
            prepare_out_dir(run, start)
        restore_best(run)
    run.log(
        f"{run.model.num_parameters():,} parameters; {config.sequences_per_step} sequences of "
        f"{config.max_seq_len} tokens per step on {dist_ctx.size} x {device}, {run.dtype}"
    )
    step = run.state.iter_num
    if step >= config.max_iters and not config.eval_only:
        run.log(f"the run is complete at step {step}: a --max_iters above it continues training")
    with complete_saves(run.checkpoints):
        train(run)


def train(run: TrainingRun) -> None:
    """The training loop: evaluate, step, report and save, until max_iters or an interrupt."""
    config, state = run.config, run.state
    interrupt = GracefulInterrupt()
    if run.device.startswith("mps"):
        monitor.check_against_cpu(run)
    # forward: for evaluations; model: also averages gradients; run.model: owns the parameters
    forward = model = maybe_compile(run)
    if run.dist_ctx.size > 1 and not is_sharded(run.model):
        model = DistributedDataParallel(forward, gradient_as_bucket_view=True)
    positions = remaining_positions(run)
    batches = prefetch(
        training_batches(run.train_dataset, config.seed, config.batch_size, positions), run.device
    )
    timer = StepTimer()
    # disable=None: tqdm hides the bar where standard error is no terminal
    disable = None if run.dist_ctx.is_main else True
    with tqdm(total=config.max_iters, initial=state.iter_num, disable=disable, unit="step") as bar:
        while True:
            at_end = state.iter_num >= config.max_iters
            if at_end or config.eval_only or state.iter_num % config.eval_interval == 0:
                evaluate_and_save(run, forward)
                timer.restart()
            if at_end or config.eval_only:
                return finish_saving(run)
            loss, grad_norm = training_step(run, model, batches)
            timer.count_step()
            if state.iter_num % config.log_interval == 0:
                report_step(run, bar, loss, grad_norm, timer)
            state.iter_num += 1
            state.position += config.sequences_per_step
            bar.update()
            stop = run.dist_ctx.any_rank(interrupt.requested)
            is_due = config.checkpoint_interval and state.iter_num % config.checkpoint_interval == 0
            if stop or is_due:
                last_step = state.iter_num - 1
                monitor.check_finite(run, last_step, loss.item(), grad_norm.item())
                save_state(run, update_best(run))
                timer.restart()
            for message in run.checkpoints.poll():
                run.log(f"step {state.iter_num}: {message}")
            if stop:
                finish_saving(run)
                resume = f"python train.py --init_from=resume --out_dir={config.out_dir}"
                return run.log(f"stopped after step {state.iter_num}; resume with: {resume}")


def training_step(
    run: TrainingRun, model: torch.nn.Module, batches: Iterator
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step: forward and backward for each micro-batch, clip, update.

    Returns this process's mean loss and the gradient norm before clipping, both scalars."""
    config, state = run.config, run.state
    for group in run.optimizer.param_groups:
        group["lr"] = run.lr
    num_micro_steps = config.gradient_accumulation_steps // run.dist_ctx.size
    step_loss = torch.zeros((), device=run.device)
    for micro_step in range(num_micro_steps):
        inputs, targets = next(batches)  # each (batch_size, max_seq_len)
        position = micro_batch_position(run, state.position, micro_step)
        torch.manual_seed(dropout_seed(config.seed, position))
        with grad_sync(model, enabled=micro_step == num_micro_steps - 1):
            with autocast(run.device, run.dtype):
                _, loss = model(inputs, targets)
            run.scaler.scale(loss / num_micro_steps).backward()
        step_loss += loss.detach() / num_micro_steps
    run.scaler.unscale_(run.optimizer)  # type: ignore[arg-type]  # it may be a CombinedOptimizer
    max_norm = config.grad_clip or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), max_norm)
    grad_norm = full_tensor(grad_norm)
    monitor.record_first_nonfinite(run, grad_norm)
    if not monitor.should_skip_step(run, grad_norm):
        run.scaler.step(run.optimizer)  # type: ignore[arg-type]
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return step_loss, grad_norm


def micro_batch_position(run: TrainingRun, step_position: int, micro_step: int) -> int:
    """The position of this process's micro-batch in the run's order of sequences."""
    micro_batch = micro_step * run.dist_ctx.size + run.dist_ctx.rank
    return step_position + micro_batch * run.config.batch_size


def remaining_positions(run: TrainingRun) -> Iterator[int]:
    """The positions of all micro-batches that this process has still to read."""
    config = run.config
    first = run.state.position  # read now: a thread consumes this iterator while training advances
    num_steps = config.max_iters - run.state.iter_num
    num_micro_steps = config.gradient_accumulation_steps // run.dist_ctx.size
    return (
        micro_batch_position(run, first + step * config.sequences_per_step, micro_step)
        for step in range(num_steps)
        for micro_step in range(num_micro_steps)
    )


def evaluate_and_save(run: TrainingRun, forward: torch.nn.Module) -> None:
    """Evaluate both splits, log the result, save the state, and plot the loss."""
    config, state = run.config, run.state
    train_result = evaluate(forward, run.train_dataset, run.eval_settings)
    val_result = evaluate(forward, run.val_dataset, run.eval_settings)
    run.log(
        f"step {state.iter_num}: train loss {train_result.loss:.4f}, val loss "
        f"{val_result.loss:.4f}, perplexity {val_result.perplexity:.2f}, "
        f"{val_result.bits_per_byte:.4f} bits per byte"
    )
    if config.eval_only:
        return
    monitor.check_evaluation(run, val_result.loss)
    run.log_metrics(
        train_loss=train_result.loss,
        val_loss=val_result.loss,
        perplexity=val_result.perplexity,
        bits_per_byte=val_result.bits_per_byte,
    )
    is_best = update_best(run, val_result.loss)
    if config.always_save_checkpoint or is_best or state.iter_num >= config.max_iters:
        save_state(run, is_best)
    plot_loss(run)
    if config.sample_interval and state.iter_num % config.sample_interval == 0:
        log_sample(run)


def report_step(
    run: TrainingRun, bar: tqdm, loss: torch.Tensor, grad_norm: torch.Tensor, timer: StepTimer
) -> None:
    """Log a training step: loss, learning rate, speed, and MFU where the peak is known."""
    config, lr = run.config, run.lr
    mean_loss = run.dist_ctx.all_reduce_sum([loss.item()])[0] / run.dist_ctx.size
    seconds = timer.lap()  # after loss.item(), which waits for the device
    norm = grad_norm.item()
    monitor.check_finite(run, run.state.iter_num, mean_loss, norm)
    monitor.log_spikes(run, loss=mean_loss, grad_norm=norm)
    tokens_per_second = config.sequences_per_step * config.max_seq_len / max(seconds, 1e-9)
    line = f"loss {mean_loss:.4f} | lr {lr:.3e} | {seconds * 1000:.0f} ms"
    line += f" | {tokens_per_second:,.0f} tok/s"
    figures = {"loss": mean_loss, "lr": lr, "grad_norm": norm, "ms": seconds * 1000}
    figures["tok_per_s"] = tokens_per_second
    if peak := peak_flops(run.device):
        flops = tokens_per_second * flops_per_token(run.model.args, config.max_seq_len)
        figures["mfu"] = flops / (peak * run.dist_ctx.size)
        line += f" | mfu {figures['mfu']:.1%}"
    run.log_metrics(**figures)
    bar.set_postfix_str(line, refresh=False)
    if bar.disable:
        run.log(f"{run.state.iter_num} | {line}")


def log_sample(run: TrainingRun) -> None:
    """Generate a text from the beginning-of-text token and log it."""
    model = gather_model(run.model, run.dist_ctx.is_main)
    if model is None:
        return
    model.eval()
    length = max(1, model.args.max_seq_len - 1)
    chunks = generate(
        model, run.tokenizer, [""], max_new_tokens=length, temperature=0.8, top_p=0.9, seed=0
    )
    text = "".join(chunk.text for chunk in chunks)
    run.log(f"--- a sample after {run.state.iter_num} steps\n{text}\n---")
    model.train()


if __name__ == "__main__":
    run_main(main)
