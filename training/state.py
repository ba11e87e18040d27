"""The state of a training run, which a checkpoint holds, and its fixed components."""

import contextlib
import functools
import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from checkpoints.manager import CheckpointManager
from formats.model_metadata import ModelMetadata
from model import Transformer
from runtime.distributed import DistContext
from textdata.token_shards import TokenDataset
from textdata.tokenizer import Tokenizer
from training.evaluation import EvalSettings, evaluation_hash
from training.metrics import MetricsLogger
from training.optim import CombinedOptimizer, LRSchedule, lr_at_step


@dataclass
class TrainState:
    """How far a run has come. The weights, the moments and the loss scale are in its components."""

    iter_num: int = 0  # optimizer steps done
    position: int = 0  # training sequences consumed
    best_val_loss: float = math.inf  # nats per token
    recent_grad_norms: list[float] = field(default_factory=list)  # for --skip_spikes


@dataclass(frozen=True)
class TrainingRun:
    """The components of a run. Only state, and what components hold, changes in training."""

    config: Any  # train.py's TrainConfig
    dist_ctx: DistContext
    device: str
    dtype: str  # of the matrix products: float32, bfloat16 or float16
    tokenizer: Tokenizer
    train_dataset: TokenDataset
    val_dataset: TokenDataset
    model: Transformer
    optimizer: torch.optim.Optimizer | CombinedOptimizer
    scaler: torch.amp.GradScaler
    metrics: MetricsLogger  # written by the main process only
    checkpoints: CheckpointManager
    first_nonfinite_step: (
        torch.Tensor
    )  # on the device: -1, or the first step with a NaN or Inf norm
    metadata: ModelMetadata | None = None  # of the model that the run started from
    state: TrainState = field(default_factory=TrainState)

    @property
    def lr(self) -> float:
        """The learning rate of the next optimizer step."""
        config = self.config
        schedule = LRSchedule(
            name=config.lr_schedule if config.decay_lr else "constant",
            max_lr=config.learning_rate,
            min_lr=config.min_lr,
            warmup_steps=config.warmup_iters,
            total_steps=config.max_iters,
            decay_fraction=config.wsd_cooldown,
        )
        return lr_at_step(self.state.iter_num, schedule)

    @property
    def eval_settings(self) -> EvalSettings:
        """How the run evaluates: the same batches at every evaluation."""
        config = self.config
        return EvalSettings(
            byte_counts=self.tokenizer.byte_counts,
            batch_size=config.batch_size,
            num_batches=config.eval_iters,
            device=self.device,
            dtype=self.dtype,
            dist_ctx=self.dist_ctx,
        )

    @functools.cached_property
    def eval_hash(self) -> str:
        """The hash of the validation windows that the run evaluates on."""
        config = self.config
        return evaluation_hash(self.val_dataset, config.batch_size, config.eval_iters)

    def path(self, name: str) -> str:
        """The path of a file in the run's output folder."""
        return os.path.join(self.config.out_dir, name)

    def log(self, text: str) -> None:
        """Print a line on the main process. A closed or full standard output is ignored."""
        if self.dist_ctx.is_main:
            with contextlib.suppress(OSError):
                tqdm.write(text)

    def log_metrics(self, **figures: float) -> None:
        """Append figures of this step to metrics.jsonl, and to Weights & Biases if requested."""
        if not self.dist_ctx.is_main:
            return
        try:
            self.metrics.write(iter=self.state.iter_num, **figures)
        except OSError as error:
            self.log(f"{self.metrics.path}: {error.strerror}; its records are written later")
        if self.config.wandb_log:
            import wandb

            wandb.log(figures, step=self.state.iter_num)
