"""
The parts of a training run: built, and restored from a checkpoint. How it goes on from there is train.py's.
"""

import dataclasses
import os
import zlib
from collections.abc import Iterable

import torch

from checkpoints.manager import Keeper
from formats.lazy_model import LazyModel
from model import ModelArgs, Transformer, iter_initial_weights, parameter_shapes
from runtime.device import pick_dtype
from runtime.distributed import DistContext
from textdata.token_shards import TokenDataset, read_meta, token_dir
from textdata.tokenizer import Tokenizer, load_tokenizer
from training.optim import make_optimizer
from training.parallel import load_weights, shard
from training.resume import restore
from training.state import Run


def set_up(
    config,
    found: tuple[str, dict] | None,
    pretrained: LazyModel | None,
    dist_ctx: DistContext,
    device: str,
) -> Run:
    """Everything a run needs: new, from the checkpoint found, or with the weights of another model."""
    path, checkpoint = found or ("", None)
    if config.gradient_accumulation_steps % dist_ctx.size:
        raise ValueError(
            f"--gradient_accumulation_steps={config.gradient_accumulation_steps} cannot be shared evenly by "
            f"{dist_ctx.size} processes; give a multiple of {dist_ctx.size}"
        )
    check_agreement(config, checkpoint, dist_ctx)
    data = open_data(config)
    if checkpoint and "sharded_tensors" in checkpoint and not in_shares(config, dist_ctx):
        from checkpoints.sharded import gather_full_state

        checkpoint = gather_full_state(checkpoint)
    if checkpoint:
        check_tokenizer(data[0], checkpoint.get("tokenizer_hash"), path, config)
    elif pretrained:
        expected = hash_of_tokenizer(pretrained)
        if expected is None and dist_ctx.is_main:
            print(
                f"note: the vocabulary of {pretrained.path} is not known; is it that of {config.data_dir}?"
            )
        check_tokenizer(data[0], expected, pretrained.path, config)
    torch.manual_seed(config.seed)
    args, weights = first_weights(config, checkpoint, pretrained)
    run = equip(config, dist_ctx, device, data, args)
    load_weights(run.model, weights)
    if run.train_windows.unused > 0.1:
        run.say(
            f"note: {run.train_windows.unused:.0%} of the training tokens are not read, in many short shards; "
            "join small files before pretokenizing, or lower --max_seq_len"
        )
    if checkpoint:
        restore(run, checkpoint, path)
        checkpoint.clear()  # whoever else has it: what is not used is to be given back
    return run


def check_agreement(config, checkpoint: dict | None, dist_ctx: DistContext):
    """Raise ValueError, in all processes, unless they begin with the same checkpoint and the same options."""
    step, is_sharded_checkpoint = (
        (checkpoint["iter_num"], "sharded_tensors" in checkpoint) if checkpoint else (0, False)
    )
    if not dist_ctx.all_equal(2 * step + is_sharded_checkpoint):
        raise ValueError(
            f"this process would begin at step {step}, others elsewhere: --out_dir={config.out_dir} must be one folder "
            "that all machines see and can read"
        )
    options = dataclasses.asdict(config) | dict(out_dir="", data_dir="", tokenizer="", device="")
    if not dist_ctx.all_equal(zlib.crc32(repr(options).encode())):
        raise ValueError(
            "the processes were given different options: start train.py with the same ones everywhere"
        )


def in_shares(config, dist_ctx: DistContext) -> bool:
    """Whether each process has a share of the model, and not all of it."""
    return config.parallel == "fsdp" and dist_ctx.size > 1


def equip(config, dist_ctx: DistContext, device: str, data: tuple, args: ModelArgs) -> Run:
    """A run of a model on the device, its weights still to be set, with what it takes to train it."""
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA for what stays float32
    dtype, model = pick_dtype(config.dtype, device), Transformer.on_meta(args)
    model.activation_checkpointing = config.activation_checkpointing
    if shares := in_shares(config, dist_ctx):
        shard(model, device, dist_ctx.size, dtype)
    model.materialize(device)
    betas = (config.beta1, config.beta2)
    optimizer = make_optimizer(
        model, config.optimizer, config.learning_rate, betas, config.weight_decay
    )
    scaler = torch.amp.GradScaler(device.partition(":")[0], enabled=dtype == "float16")
    run = Run(
        config,
        dist_ctx,
        device,
        dtype,
        *data,
        model,
        optimizer,
        scaler,
        keeper=Keeper(alone=not shares),
    )
    run.first_bad = torch.tensor(-1, device=device)
    run.saving_mesh = dist_ctx.new_cpu_mesh(config.timeout) if shares else None
    return run


def first_weights(
    config, checkpoint: dict | None, pretrained: LazyModel | None
) -> tuple[ModelArgs, Iterable]:
    """The model to begin with: the checkpoint's, the pretrained one, or a new one; and its weights, one at a
    time. Those of a checkpoint in shares come later: each process reads its own."""
    if not checkpoint and not pretrained:
        return config.model_args(), iter_initial_weights(config.model_args())
    args = checkpoint["model_args"] if checkpoint else pretrained.args
    names = [name for name, _ in parameter_shapes(args)]
    if pretrained:
        weights = ((name, pretrained.read(name)) for name in names)
    else:
        weights = (
            () if "sharded_tensors" in checkpoint else [(name, checkpoint["model"][name]) for name in names]
        )
    return dataclasses.replace(args, dropout=config.dropout), weights


def hash_of_tokenizer(pretrained: LazyModel) -> str | None:
    """That of the vocabulary a model was trained with, if it tells, or else of one in or beside it."""
    try:
        tokenizer = pretrained.read_tokenizer() if pretrained.tokenizer_hash is None else None
    except ValueError:  # a vocabulary that we cannot read
        return None
    if tokenizer and tokenizer.vocab_size == pretrained.args.vocab_size:
        return tokenizer.hash
    return pretrained.tokenizer_hash


def check_tokenizer(tokenizer: Tokenizer, expected: str | None, model_path: str, config):
    """Raise ValueError where the data's tokenizer is not the model's, if that one is known."""
    if expected not in (None, tokenizer.hash):
        raise ValueError(
            f"the tokens in {config.data_dir} are of a tokenizer with hash {tokenizer.hash[:12]}, but {model_path} "
            f"was trained with another tokenizer (hash {expected[:12]}); give the --data_dir of that one"
        )


def open_data(config) -> tuple[Tokenizer, TokenDataset, TokenDataset]:
    """The tokenizer and both splits, checked against each other."""
    folder = token_dir(config.data_dir, config.vocab_source, config.vocab_size)
    meta = read_meta(folder)
    path = config.tokenizer or os.path.join(folder, "tokenizer.model")
    tokenizer = load_tokenizer(path)
    if tokenizer.hash != meta["tokenizer_hash"]:
        raise ValueError(
            f"{path} (hash {tokenizer.hash[:12]}, {tokenizer.vocab_size} tokens) is not the tokenizer of {folder} "
            f"(hash {meta['tokenizer_hash'][:12]}, {meta['vocab_size']} tokens); pretokenize again or name that one"
        )
    if config.vocab_size != meta["vocab_size"]:
        raise ValueError(
            f"{folder} has {meta['vocab_size']} tokens: give --vocab_size={meta['vocab_size']}"
        )
    train_windows = TokenDataset(folder, "train", config.max_seq_len)
    return (
        tokenizer,
        train_windows,
        TokenDataset(folder, "val", config.max_seq_len, include_partial=True),
    )
