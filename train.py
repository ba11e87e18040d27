"""
Train a Llama from scratch.

    python train.py --batch_size=8 --compile=False
    python train.py config/stories15M.py --max_iters=2000 --learning_rate=1e-3
    python train.py --init_from=resume
    python train.py --init_from=Llama-3.2-1B --max_seq_len=512 --learning_rate=1e-5
    torchrun --nproc_per_node=4 train.py

Everything a run leaves is in out_dir: ckpt.pt (the newest), ckpt_000200.pt (an older one), best.pt
(the lowest validation loss), model.bin and tokenizer.bin (the best for C), metrics.jsonl and loss.png.
All randomness is a function of (seed, batch_size, position in the data), so that a run goes on
exactly where it stopped, on any number of processes.
"""

import contextlib
import copy
import math
import os
import signal
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoints.manager import snapshot
from configurator import configure, print_overrides, run_main
from generation.streaming import generate
from model import ModelArgs, Transformer, flops_per_token
from runtime.atomic_files import run_lock
from runtime.device import autocast, disable_malloc_trim, peak_flops, pick_device
from runtime.distributed import (
    DistContext,
    full_tensor,
    init_distributed,
    shutdown_distributed,
    translate_dist_errors,
)
from textdata.loader import dropout_seed, evaluation_batches, prefetch, training_batches
from training.evaluation import evaluate
from training.inspect_step import show_step
from training.monitor import check_finite, remember_bad, skips, tell_spikes
from training.optim import lr_at_step
from training.parallel import grad_sync, is_sharded
from training.resume import ARCHITECTURE, fine_tune, resume
from training.saving import finish_saving, open_out_dir, save
from training.setup import set_up
from training.state import Run

# Without this the compiler fuses a concatenation with what is made of it, and loses the vector units.
COMPILE_OPTIONS = {"max_pointwise_cat_inputs": 0}


@dataclass(frozen=True)
class TrainConfig:
    """Train a Llama from scratch, go on with a run, or fine-tune a model."""

    # I/O
    out_dir: str = "out"  # where the run writes
    eval_interval: int = 2000  # steps between evaluations
    log_interval: int = 1  # steps between reports of the training loss
    eval_iters: int = (
        100  # batches to evaluate on, the same every time; 0: all of the validation split
    )
    eval_only: bool = False  # evaluate once and stop
    debug_step: int | None = None  # show this step's batch, its losses and gradients, and stop
    always_save_checkpoint: bool = (
        True  # write ckpt.pt at every evaluation, not only when it is the best
    )
    checkpoint_interval: int = (
        200  # steps between further writes of ckpt.pt; 0: at evaluations only
    )
    keep_checkpoints: int = (
        1  # how many older ones (ckpt_000200.pt) to keep; one steps in where ckpt.pt is damaged
    )
    sample_interval: int = 0  # steps between sample stories, told at evaluations; 0: never
    init_from: str = "scratch"  # scratch; resume: go on in OUT_DIR; auto: if there is a run; or a model to fine-tune
    # wandb logging
    wandb_log: bool = False  # report to Weights & Biases
    wandb_project: str = "cria"  # its project
    wandb_run_name: str = ""  # the run's name there; empty: wandb chooses
    # data
    data_dir: str = "data"  # where tinystories.py wrote the tokens
    batch_size: int = 128  # sequences in a micro-batch
    max_seq_len: int = 256  # tokens in a sequence
    vocab_source: Literal["custom", "llama2"] = "custom"  # our own vocabulary or Llama 2's
    vocab_size: int = 4096  # Llama 2's has 32000
    tokenizer: str = ""  # checked against the data's; empty: take the data's
    # model
    dim: int = 288  # width of the residual stream
    n_layers: int = 6  # blocks
    n_heads: int = 6  # attention heads
    n_kv_heads: int | None = None  # heads of keys and values; None: as many as n_heads
    multiple_of: int = 32  # round the feed-forward width up to a multiple of this
    hidden_dim: int | None = None  # feed-forward width; None: two thirds of 4 dim
    ffn_dim_multiplier: float | None = None  # scales the feed-forward width (Llama 3)
    rope_theta: float = 10000.0  # base of the rotary positions; model.bin knows only 10000
    dropout: float = 0.0  # share of activations zeroed in training
    # adamw optimizer
    optimizer: Literal["adamw", "muon"] = (
        "adamw"  # muon: Muon for the blocks' matrices, AdamW for the rest
    )
    gradient_accumulation_steps: int = 4  # micro-batches in a step, over all processes
    learning_rate: float = 5e-4  # the highest
    max_iters: int = 100000  # steps in the run
    weight_decay: float = 1e-1  # of matrices
    beta1: float = 0.9  # decay of the gradient's mean
    beta2: float = 0.95  # decay of the gradient's square
    grad_clip: float = 1.0  # the largest norm of the gradient; 0: any
    skip_spikes: float = (
        0.0  # skip an update whose gradient is so many times the usual norm; 0: never
    )
    # learning rate decay settings
    decay_lr: bool = True  # come down after the warm-up
    lr_schedule: Literal["cosine", "wsd"] = (
        "cosine"  # how: along a cosine; or late (warm up, stay, decay)
    )
    wsd_cooldown: float = 0.2  # share of the steps in which wsd comes down
    warmup_iters: int = 1000  # steps of linear rise
    min_lr: float = 0.0  # where the decay ends
    # system
    seed: int = 1337  # of weights, data order and dropout
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the matrix products
    compile: bool = True  # compile the model with torch.compile
    parallel: Literal["ddp", "fsdp"] = "ddp"  # each process has the whole model; or a share of it
    timeout: float = 600.0  # seconds that processes wait for one that does not answer; to begin, a minute at least
    activation_checkpointing: bool = (
        False  # less memory for more time: compute activations again (long contexts)
    )

    def validate(self):
        at_least = {
            1: (
                "eval_interval",
                "log_interval",
                "batch_size",
                "gradient_accumulation_steps",
                "max_iters",
            )
        }
        at_least[0] = (
            "eval_iters",
            "checkpoint_interval",
            "keep_checkpoints",
            "sample_interval",
            "warmup_iters",
        )
        at_least[0] += ("learning_rate", "weight_decay", "grad_clip", "min_lr", "skip_spikes")
        for least, names in at_least.items():
            for name in names:
                if getattr(self, name) < least:
                    yield f"--{name}={getattr(self, name):g}: must be {least} or more"
        if not 0 <= self.seed < 2**63:
            yield f"--seed={self.seed}: must be at least 0 and below 2**63"
        for name in ("out_dir", "init_from"):
            if not getattr(self, name):
                yield f"--{name}= is empty: leave it out, or name one"
        if 0 < self.skip_spikes <= 1 or not math.isfinite(self.skip_spikes):
            yield f"--skip_spikes={self.skip_spikes:g}: must be 0, or above 1"
        for name, value in (("optimizer", "muon"), ("dtype", "float16")):
            if self.parallel == "fsdp" and getattr(self, name) == value:
                yield f"--parallel=fsdp: does not go with --{name}={value}; take --parallel=ddp"
        if not 1 <= self.timeout <= 1e6:
            yield f"--timeout={self.timeout:g}: must be 1 to 1e6 seconds"
        if self.debug_step is not None and self.debug_step < 0:
            yield f"--debug_step={self.debug_step}: must be 0 or more"
        if not 0 < self.wsd_cooldown <= 1:
            yield f"--wsd_cooldown={self.wsd_cooldown:g}: must be above 0 and at most 1"
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"--{name}={getattr(self, name):g}: must be at least 0 and below 1"
        if 0 <= self.learning_rate < self.min_lr:
            yield f"--min_lr={self.min_lr:g}: must not be above --learning_rate={self.learning_rate:g}"
        try:
            if self.init_from in (
                "scratch",
                "auto",
            ):  # else the rest of the architecture is in the file
                self.model_args()
        except ValueError as error:
            yield f"--{error}"

    def model_args(self) -> ModelArgs:
        return ModelArgs(**{name: getattr(self, name) for name in (*ARCHITECTURE, "dropout")})

    @property
    def sequences_per_step(self) -> int:
        return self.gradient_accumulation_steps * self.batch_size


def compiled(run: Run) -> torch.nn.Module:
    """The model compiled, tried on one batch; as it is, with a warning, where that fails."""
    if not run.config.compile:
        return run.model
    run.say("compiling the model (--compile=False starts at once, and is slower later) ...")
    began = time.perf_counter()
    tokens = torch.zeros(
        2, run.config.batch_size, run.config.max_seq_len, dtype=torch.int64, device=run.device
    )
    try:
        options, model = COMPILE_OPTIONS if run.device == "cpu" else None, run.model
        if is_sharded(model):  # a block at a time: what brings its shares together is not compiled
            for block in model.layers:
                block.forward = torch.compile(block.forward, options=options)
        else:
            model = torch.compile(model, options=options)
        with autocast(run.device, run.dtype):
            model(*tokens.unbind())[1].backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a missing compiler, an old GPU, an unsupported system
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        run.say(f"cannot compile here, going on without: {reason}")
        model = run.model
        for block in model.layers:
            block.__dict__.pop("forward", None)
    run.optimizer.zero_grad(set_to_none=True)
    run.say(f"... took {time.perf_counter() - began:.0f} s")
    return model


def training_step(run: Run, model: torch.nn.Module, batches) -> tuple[torch.Tensor, torch.Tensor]:
    """One update of the weights; returns this process's loss and the norm of the gradient."""
    config, micro_steps = run.config, run.config.gradient_accumulation_steps // run.dist_ctx.size
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run)
    step_loss = torch.zeros((), device=run.device)
    for micro_step in range(micro_steps):
        inputs, targets = next(batches)
        torch.manual_seed(
            dropout_seed(config.seed, micro_batch_position(run, run.position, micro_step))
        )
        is_last = micro_step == micro_steps - 1
        with grad_sync(model, now=is_last):
            with autocast(run.device, run.dtype):
                _, loss = model(inputs, targets)
            run.scaler.scale(loss / micro_steps).backward()
        step_loss += loss.detach() / micro_steps
    run.scaler.unscale_(run.optimizer)
    norm = full_tensor(
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf)
    )
    remember_bad(run, norm)
    if not skips(run, norm):
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return step_loss, norm


def learning_rate(run: Run) -> float:
    config = run.config
    kind = config.lr_schedule if config.decay_lr else "constant"
    schedule = (
        config.learning_rate,
        config.min_lr,
        config.warmup_iters,
        config.max_iters,
        kind,
        config.wsd_cooldown,
    )
    return lr_at_step(run.iter_num, *schedule)


def micro_batch_position(run: Run, step_position: int, micro_step: int) -> int:
    """Where this process's micro-batch begins in the run's order of sequences."""
    return (
        step_position + (micro_step * run.dist_ctx.size + run.dist_ctx.rank) * run.config.batch_size
    )


def positions(run: Run):
    """The positions of all micro-batches that this process has still to read, from now on."""
    config, first = (
        run.config,
        run.position,
    )  # fixed here: a thread reads ahead while the run goes on
    micro_steps = range(config.gradient_accumulation_steps // run.dist_ctx.size)
    return (
        micro_batch_position(run, first + step * config.sequences_per_step, micro_step)
        for step in range(config.max_iters - run.iter_num)
        for micro_step in micro_steps
    )


def evaluate_and_save(run: Run):
    """Report both losses, keep the best model, write the checkpoint, draw the curve, tell a story."""
    config = run.config
    amount = (
        run.tokenizer.byte_counts,
        config.batch_size,
        config.eval_iters,
        run.device,
        run.dtype,
        run.dist_ctx,
    )
    train_quality = evaluate(run.forward, run.train_windows, *amount)
    quality = evaluate(run.forward, run.val_windows, *amount)
    run.say(
        f"step {run.iter_num}: train loss {train_quality.loss:.4f}, val loss {quality.loss:.4f}, "
        f"perplexity {quality.perplexity:.2f}, {quality.bits_per_byte:.4f} bits per byte"
    )
    if config.eval_only:
        return
    figures = dict(train_loss=train_quality.loss, val_loss=quality.loss)
    figures |= dict(perplexity=quality.perplexity, bits_per_byte=quality.bits_per_byte)
    run.report(**figures)
    is_best = quality.loss < run.best_val_loss
    if is_best:
        run.best_val_loss = quality.loss
    if config.always_save_checkpoint or is_best or run.iter_num >= config.max_iters:
        save(run, best=is_best)
    if run.dist_ctx.is_main:
        with contextlib.suppress(OSError):  # a picture less; the next one shows all
            run.metrics.draw()
    if config.sample_interval and run.iter_num % config.sample_interval == 0:
        tell_story(run)


def tell_story(run: Run):
    model = run.model
    if is_sharded(model):
        weights = snapshot(model.state_dict(), keeps=run.dist_ctx.is_main)  # all must take part
        model = Transformer.uninitialized(model.args) if run.dist_ctx.is_main else None
        if model:
            model.load_state_dict(weights)
    if run.dist_ctx.is_main:
        model.eval()
        options = dict(
            max_new_tokens=max(1, model.args.max_seq_len - 1), temperature=0.8, top_p=0.9, seed=0
        )
        story = "".join(piece.text for piece in generate(model, run.tokenizer, [""], **options))
        run.say(f"--- a story after {run.iter_num} steps\n{story}\n---")
        model.train()


def report_step(run: Run, bar: tqdm, loss, norm, seconds: float):
    """The line of a training step, on the terminal as a progress bar."""
    config = run.config
    loss, norm = run.dist_ctx.all_reduce_sum([loss.item()])[0] / run.dist_ctx.size, norm.item()
    check_finite(run, run.iter_num, loss, norm)
    tell_spikes(run, loss=loss, grad_norm=norm)
    tokens_per_second = config.sequences_per_step * config.max_seq_len / max(seconds, 1e-9)
    shown = f"loss {loss:.4f} | lr {learning_rate(run):.3e} | {seconds * 1000:.0f} ms | {tokens_per_second:,.0f} tok/s"
    figures = dict(
        loss=loss,
        lr=learning_rate(run),
        grad_norm=norm,
        ms=seconds * 1000,
        tok_per_s=tokens_per_second,
    )
    if peak := peak_flops(run.device):
        flops = tokens_per_second * flops_per_token(run.model.args, config.max_seq_len)
        figures["mfu"] = flops / (peak * run.dist_ctx.size)
        shown += f" | mfu {figures['mfu']:.1%}"
    run.report(**figures)
    bar.set_postfix_str(shown, refresh=False)
    if bar.disable:
        run.say(f"{run.iter_num} | {shown}")


@torch.no_grad()
def check_against_cpu(run: Run):
    """Raise ValueError if the device computes another loss than the CPU: Apple's has done so silently."""
    run.model.eval()
    inputs, targets = next(evaluation_batches(run.val_windows, batch_size=1, num_batches=1))
    loss = run.model(inputs.to(run.device), targets.to(run.device))[1].item()
    expected = copy.deepcopy(run.model).cpu()(inputs, targets)[1].item()
    run.model.train()
    if not math.isclose(loss, expected, rel_tol=1e-2):
        raise ValueError(
            f"--device={run.device} computes a loss of {loss:.4f} where the CPU computes {expected:.4f}: "
            "another version of PyTorch may do better, --device=cpu is right"
        )


class Interrupt:
    """Ctrl-C, SIGTERM or the loss of the terminal asks the run to stop after its step; a second
    Ctrl-C stops it at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if (
                number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN
            ):  # nohup stays nohup
                signal.signal(number, self.ask)

    def ask(self, number, frame):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.asked = True
        with contextlib.suppress(
            OSError
        ):  # the terminal may be gone; and print may not be re-entered
            os.write(
                2,
                f"\n{signal.Signals(number).name}: finishing the step, then saving ...\n".encode(),
            )


def train(run: Run):
    """Evaluate, step, report and save, until max_iters or an interruption."""
    config, interrupt = run.config, Interrupt()
    if run.device.startswith("mps"):
        check_against_cpu(run)
    run.forward = model = compiled(run)
    if run.dist_ctx.size > 1 and not is_sharded(run.model):
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    micro_batches = training_batches(
        run.train_windows, config.seed, config.batch_size, positions(run)
    )
    batches = prefetch(micro_batches, run.device)
    bar = tqdm(
        total=config.max_iters,
        initial=run.iter_num,
        disable=None if run.dist_ctx.is_main else True,
        unit="step",
    )
    with bar:
        while True:
            at_end = run.iter_num >= config.max_iters
            if evaluates := run.iter_num % config.eval_interval == 0 or at_end or config.eval_only:
                evaluate_and_save(run)
            if at_end or config.eval_only:
                return finish_saving(run)
            if evaluates or run.iter_num == run.started_at:
                began, since = time.perf_counter(), run.iter_num
            loss, norm = training_step(run, model, batches)
            if run.iter_num % config.log_interval == 0:
                loss.item()  # waits for the device
                now = time.perf_counter()
                report_step(run, bar, loss, norm, (now - began) / (run.iter_num + 1 - since))
                began, since = now, run.iter_num + 1
            run.iter_num += 1
            run.position += config.sequences_per_step
            bar.update()
            stops = run.dist_ctx.any_rank(interrupt.asked)
            if stops or (
                config.checkpoint_interval and run.iter_num % config.checkpoint_interval == 0
            ):
                check_finite(run, run.iter_num - 1, loss.item(), norm.item())
                save(run)
                began, since = time.perf_counter(), run.iter_num
            for news in run.keeper.news():
                run.say(f"step {run.iter_num}: {news}")
            if stops:
                finish_saving(run)
                go_on = f"python train.py --init_from=resume --out_dir={config.out_dir}"
                return run.say(f"stopped after step {run.iter_num}; go on with: {go_on}")


@contextlib.contextmanager
def out_of_memory_in_words():
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            advice = "halve --batch_size and double --gradient_accumulation_steps"
            raise ValueError(
                f"out of memory: {advice}, or give --activation_checkpointing=True"
            ) from error
        raise


def main(argv: list[str] | None = None) -> None:
    config, overrides = configure(TrainConfig, argv)
    found = pretrained = None
    if config.init_from in ("resume", "auto"):
        config, found = resume(config, overrides)
    elif config.init_from != "scratch":
        config, pretrained = fine_tune(config, overrides)
    if config.debug_step is not None and "RANK" in os.environ:
        raise ValueError("--debug_step: one process is enough; leave torchrun out")
    dist_ctx, device = init_distributed(pick_device(config.device), config.timeout)
    disable_malloc_trim()
    if dist_ctx.is_main:
        print_overrides(config, overrides)
    with translate_dist_errors(f"for {config.timeout:g} s (--timeout)"), out_of_memory_in_words():
        go_through(config, found, pretrained, dist_ctx, device)
        shutdown_distributed()


def go_through(config, found, pretrained, dist_ctx: DistContext, device: str):
    """The run, set up and trained; or one step of it shown."""
    writes = dist_ctx.is_main and not config.eval_only and config.debug_step is None
    with run_lock(config.out_dir) if writes else contextlib.nullcontext():
        run = set_up(config, found, pretrained, dist_ctx, device)
        if config.debug_step is not None:
            return show_step(run, config.debug_step)
        if writes:
            open_out_dir(run, found[0] if found else "")
        run.say(
            f"{run.model.num_parameters():,} parameters; {run.config.sequences_per_step} sequences of "
            f"{run.config.max_seq_len} tokens a step on {dist_ctx.size} x {run.device}, {run.dtype}"
        )
        try:
            train(run)
        finally:
            run.keeper.join()  # before another may write here


if __name__ == "__main__":
    run_main(main)
