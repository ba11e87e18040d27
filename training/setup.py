"""Builds the components of a training run and restores its state."""

import contextlib
import dataclasses
import os
import sys
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch

from checkpoints.file import FORMAT, write_model_args
from checkpoints.manager import CheckpointManager
from formats import ckpt, llama2c
from formats.lazy_model import LazyModel, from_state_dict
from formats.model_metadata import ModelMetadata, configure_tokenizer, fine_tuned, to_json
from formats.registry import known_tokenizer
from formats.writer import export_problem
from model import ModelArgs, Transformer, iter_initial_weights, parameter_shapes
from runtime.device import pick_dtype
from runtime.distributed import DistContext
from textdata.token_shards import TokenDataset, read_meta, token_dir
from textdata.tokenizer import Tokenizer, find_tokenizer_file, load_tokenizer
from training.metrics import MetricsLogger
from training.optim import make_optimizer
from training.parallel import is_sharded, load_weights, shard
from training.resume import StartPoint, restore_state
from training.state import TrainingRun
from training.validation import warmup_note

MAX_UNUSED = 0.1  # of the training tokens; more are worth a note


class Data(NamedTuple):
    """The tokenizer and both splits."""

    tokenizer: Tokenizer
    train: TokenDataset
    val: TokenDataset


def build_run(config: Any, start: StartPoint, dist_ctx: DistContext, device: str) -> TrainingRun:
    """Build a run: new, resumed from a checkpoint, or with the weights of a pretrained model.

    Raises ValueError where data, tokenizer, checkpoint or processes do not fit each other."""
    if config.gradient_accumulation_steps % dist_ctx.size:
        raise ValueError(
            f"--gradient_accumulation_steps={config.gradient_accumulation_steps} cannot be shared "
            f"evenly by {dist_ctx.size} processes; give a multiple of {dist_ctx.size}"
        )
    check_ranks_agree(config, start.checkpoint, dist_ctx)
    data = open_data(config)
    is_sharded_start = start.checkpoint is not None and "sharded_tensors" in start.checkpoint
    if start.checkpoint and is_sharded_start and not uses_fsdp(config, dist_ctx):
        from checkpoints.sharded import gather_full_state

        start = dataclasses.replace(start, checkpoint=gather_full_state(start.checkpoint))
    check_start_tokenizer(config, start, data.tokenizer, dist_ctx.is_main)
    metadata = start_metadata(start, data.tokenizer)
    torch.manual_seed(config.seed)
    args, weights = initial_weights(config, start)
    run = build_components(config, dist_ctx, device, data, args, metadata)
    load_weights(run.model, weights)
    if run.train_dataset.unused > MAX_UNUSED:
        run.log(
            f"note: {run.train_dataset.unused:.0%} of the training tokens are not read, as the "
            "shards are short; lower --max_seq_len or add text (pretokenize packs small files)"
        )
    if note := warmup_note(config):
        run.log(note)
    if start.checkpoint:
        restore_state(run, start)
        start.checkpoint.clear()  # frees the tensors, whoever else refers to them
    return run


def same_start(checkpoint: dict | None, dist_ctx: DistContext) -> bool:
    """Whether all processes start from a checkpoint of the same step, file or folder."""
    step = checkpoint["iter_num"] if checkpoint else 0
    is_sharded_checkpoint = checkpoint is not None and "sharded_tensors" in checkpoint
    return dist_ctx.all_equal(2 * step + is_sharded_checkpoint)


def check_ranks_agree(config: Any, checkpoint: dict | None, dist_ctx: DistContext) -> None:
    """Raise ValueError, in all processes, unless checkpoint and options are the same in all."""
    if not same_start(checkpoint, dist_ctx):
        step = checkpoint["iter_num"] if checkpoint else 0
        raise ValueError(
            f"this process would start at step {step}, others elsewhere: "
            f"--out_dir={config.out_dir} must be one folder that all machines see and can read"
        )
    options = dataclasses.asdict(config)
    for name in ("out_dir", "data_dir", "tokenizer", "device"):  # may differ between machines
        options[name] = ""
    if not dist_ctx.all_equal(zlib.crc32(repr(options).encode())):
        raise ValueError(
            "the processes have different options: start train.py with the same ones everywhere"
        )


def uses_fsdp(config: Any, dist_ctx: DistContext) -> bool:
    """Whether the model is sharded among the processes."""
    return config.parallel == "fsdp" and dist_ctx.size > 1


def build_components(
    config: Any,
    dist_ctx: DistContext,
    device: str,
    data: Data,
    args: ModelArgs,
    metadata: ModelMetadata | None = None,
) -> TrainingRun:
    """Build the components of a run. The model's weights are not set yet."""
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA for what stays float32
    dtype = pick_dtype(config.dtype, device)
    model = Transformer.on_meta(args)
    model.activation_checkpointing = config.activation_checkpointing
    mesh = None
    if uses_fsdp(config, dist_ctx):
        shard(model, device, dist_ctx.size, dtype)
        mesh = dist_ctx.new_cpu_mesh(config.timeout)
    model.materialize(device)
    betas = (config.beta1, config.beta2)
    optimizer = make_optimizer(
        model, config.optimizer, config.learning_rate, betas, config.weight_decay
    )
    return TrainingRun(
        config=config,
        dist_ctx=dist_ctx,
        device=device,
        dtype=dtype,
        tokenizer=configure_tokenizer(data.tokenizer, metadata),
        train_dataset=data.train,
        val_dataset=data.val,
        model=model,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.partition(":")[0], enabled=dtype == "float16"),
        metrics=MetricsLogger(config.out_dir),
        checkpoints=CheckpointManager(
            config.out_dir,
            config.keep_checkpoints,
            dist_ctx,
            run_files=tokenizer_files(data.tokenizer),
            export_best=best_exporter(config.out_dir, args, metadata, data.tokenizer),
            mesh=mesh,
        ),
        first_nonfinite_step=torch.tensor(-1, device=device),
        metadata=metadata,
    )


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Name and content of the tokenizer files that a run leaves beside its model."""
    files = dict(tokenizer.files)
    with contextlib.suppress(ValueError):  # the format cannot hold this vocabulary
        files["tokenizer.bin"] = tokenizer.to_bin()
    return files


def start_metadata(start: StartPoint, tokenizer: Tokenizer) -> ModelMetadata | None:
    """The metadata of the model to start with. Raises ValueError if it is damaged."""
    metadata = None
    if start.checkpoint:
        metadata = ckpt.read_metadata(start.checkpoint.get(ckpt.METADATA_KEY), start.path)
    elif start.pretrained:
        metadata = start.pretrained.read_metadata()
    return fine_tuned(metadata, tokenizer)


def best_exporter(
    out_dir: str, args: ModelArgs, metadata: ModelMetadata | None, tokenizer: Tokenizer
) -> Callable[[ModelArgs, dict[str, torch.Tensor]], None] | None:
    """A function (args, state dict) that writes model.bin; None where it cannot hold the model."""
    if export_problem(llama2c, args, metadata, tokenizer):
        return None
    return partial(export_model_bin, os.path.join(out_dir, "model.bin"))


def export_model_bin(path: str, args: ModelArgs, weights: dict[str, torch.Tensor]) -> None:
    """Write a state dict as llama2.c's model.bin."""
    llama2c.write(from_state_dict(args, weights), path)


def initial_weights(
    config: Any, start: StartPoint
) -> tuple[ModelArgs, Iterable[tuple[str, torch.Tensor]]]:
    """The architecture and the weights to start with, one tensor at a time.

    The weights of a sharded checkpoint are missing: each process reads its shards later."""
    checkpoint, pretrained = start.checkpoint, start.pretrained
    if checkpoint:
        args = dataclasses.replace(checkpoint["model_args"], dropout=config.dropout)
        if "sharded_tensors" in checkpoint:
            return args, ()
        return args, [(name, checkpoint["model"][name]) for name, _ in parameter_shapes(args)]
    if pretrained:
        args = dataclasses.replace(pretrained.args, dropout=config.dropout)
        return args, ((name, pretrained.read(name)) for name, _ in parameter_shapes(args))
    args = config.model_args()
    return args, iter_initial_weights(args)


def check_start_tokenizer(
    config: Any, start: StartPoint, tokenizer: Tokenizer, is_main: bool
) -> None:
    """Raise ValueError where the data's tokenizer is not that of the weights to start with."""
    if start.checkpoint:
        path = start.path
        expected = start.checkpoint.get("tokenizer_hash")
    elif start.pretrained:
        path = start.pretrained.path
        expected = pretrained_tokenizer_hash(start.pretrained)
        if expected is None and is_main:
            print(f"note: the tokenizer of {path} is not known; is it that of {config.data_dir}?")
    else:
        return
    if expected not in (None, tokenizer.hash):
        raise ValueError(
            f"the tokens in {config.data_dir} are of a tokenizer with hash {tokenizer.hash[:12]}, "
            f"but {path} was trained with another tokenizer (hash {expected[:12]}); give the "
            "--data_dir of that one"
        )


def pretrained_tokenizer_hash(pretrained: LazyModel) -> str | None:
    """The hash of the tokenizer that a model was trained with, or None if it is not known."""
    if pretrained.tokenizer_hash is not None:
        return pretrained.tokenizer_hash
    tokenizer = known_tokenizer(pretrained)
    return tokenizer.hash if tokenizer else None


def open_data(config: Any) -> Data:
    """Open the tokenizer and both splits. Raises ValueError where they do not fit the options."""
    folder = token_dir(config.data_dir, config.vocab_source, config.vocab_size)
    meta = read_meta(folder)
    default = os.path.join(folder, "tokenizer.model")
    path = config.tokenizer or find_tokenizer_file(folder) or default
    tokenizer = load_tokenizer(path)
    if tokenizer.hash != meta["tokenizer_hash"]:
        raise ValueError(
            f"{path} (hash {tokenizer.hash[:12]}, {tokenizer.vocab_size} tokens) is not the "
            f"tokenizer of {folder} (hash {meta['tokenizer_hash'][:12]}, {meta['vocab_size']} "
            "tokens); pretokenize again or name that one"
        )
    if config.vocab_size != meta["vocab_size"]:
        size = meta["vocab_size"]
        raise ValueError(f"{folder} has {size} tokens: give --vocab_size={size}")
    train = TokenDataset(folder, "train", config.max_seq_len)
    val = TokenDataset(folder, "val", config.max_seq_len, include_partial=True)
    return Data(tokenizer, train, val)


def training_state(run: TrainingRun) -> dict[str, Any]:
    """What a checkpoint holds: llama2.c's keys, then cria's.

    There is no random state: data order and dropout are functions of the position."""
    weights = run.model.state_dict()
    if run.model.args.tie_embeddings:
        weights["output.weight"] = weights["tok_embeddings.weight"]  # one object, copied once
    state = run.state
    saved = {
        "model": weights,
        "optimizer": run.optimizer.state_dict(),
        "model_args": write_model_args(run.model.args),
        "iter_num": state.iter_num,
        "best_val_loss": torch.tensor(state.best_val_loss, dtype=torch.float64),
        "eval_hash": run.eval_hash if run.dist_ctx.is_main else "",  # only its state is written
        "config": dataclasses.asdict(run.config),
        "scaler": run.scaler.state_dict(),
        "position": state.position,
        "late_norms": state.recent_grad_norms,
        "tokenizer_hash": run.tokenizer.hash,
        "versions": {
            "format": FORMAT,
            "torch": str(torch.__version__),
            "python": sys.version.split()[0],
        },
    }
    return saved | {ckpt.METADATA_KEY: to_json(run.metadata)} if run.metadata else saved


def save_state(run: TrainingRun, best: bool = False) -> None:
    """Start saving the training state in the background.

    The main process writes all of it, or all processes their shards. A state that is already saved
    is saved again only as the best one."""
    is_new = run.checkpoints.submitted_step != run.state.iter_num
    if (best or is_new) and (run.dist_ctx.is_main or is_sharded(run.model)):
        run.checkpoints.save(training_state(run), run.model.args, best)
    if run.dist_ctx.is_main:
        run.metrics.flush()
