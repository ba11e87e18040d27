"""
What a training run is made of, and how far it is.
"""

import contextlib
import dataclasses
import math
import os
from dataclasses import dataclass

import torch
from tqdm import tqdm

from checkpoints.manager import Keeper
from model import Transformer
from runtime.distributed import DistContext
from textdata.token_shards import TokenDataset
from textdata.tokenizer import Tokenizer
from training.metrics import MetricsLogger
from training.optim import CombinedOptimizer


@dataclass
class Run:
    """The parts of a run, and how far it is."""

    config: object  # train.py's TrainConfig
    dist_ctx: DistContext
    device: str
    dtype: str
    tokenizer: Tokenizer
    train_windows: TokenDataset
    val_windows: TokenDataset
    model: Transformer
    optimizer: torch.optim.Optimizer | CombinedOptimizer
    scaler: torch.amp.GradScaler
    metrics: MetricsLogger | None = None  # of the main process
    forward: torch.nn.Module | None = None  # the model, compiled where that works
    iter_num: int = 0  # steps done
    position: int = 0  # sequences read
    best_val_loss: float = math.inf
    first_bad: torch.Tensor | None = (
        None  # -1, or the step whose gradient was the first that is no number
    )
    late_norms: list[float] = dataclasses.field(
        default_factory=list
    )  # of gradients, to tell what is unusual
    saved_at: int | None = None  # the step of the newest checkpoint
    started_at: int = 0  # the step this process began with
    owes_best: bool = False  # a best checkpoint in shares, which could not be written yet
    keeper: Keeper = dataclasses.field(default_factory=Keeper)
    saving_mesh: object | None = (
        None  # the processes once more, on the CPU, to save shares in the background
    )

    def say(self, text: str):
        if self.dist_ctx.is_main:
            with contextlib.suppress(
                OSError
            ):  # whoever read us may be gone, or their disk full; the run is not
                tqdm.write(text)

    def report(self, **figures):
        """Into metrics.jsonl, and to wandb when asked."""
        if self.dist_ctx.is_main:
            try:
                self.metrics.write(iter=self.iter_num, **figures)
            except OSError as error:
                self.say(
                    f"{self.metrics.path}: {error.strerror}; its lines wait until it can be written"
                )
            if self.config.wandb_log:
                import wandb

                wandb.log(figures, step=self.iter_num)

    def path(self, name: str) -> str:
        return os.path.join(self.config.out_dir, name)
