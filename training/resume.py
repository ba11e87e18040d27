"""Where a run starts: from new weights, from its latest checkpoint, or from a pretrained model."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from checkpoints.latest import load_latest
from formats.lazy_model import LazyModel
from formats.registry import known_tokenizer, open_model
from model import ModelArgs
from runtime.untrusted import describe_value
from training.optim import load_optimizer
from training.state import TrainingRun

# The options of the architecture: a resumed run takes them from the checkpoint.
ARCHITECTURE = (
    "max_seq_len",
    "vocab_size",
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "multiple_of",
    "hidden_dim",
    "ffn_dim_multiplier",
    "rope_theta",
)
MAX_IMPLICIT_CONTEXT = 4096  # tokens; a longer context of a pretrained model must be requested
# The options that always come from the current command line.
OWN_OPTIONS = ("out_dir", "init_from", "eval_only", "debug_step")


@dataclass(frozen=True)
class StartPoint:
    """What a run starts from; new weights if everything is empty."""

    path: str = ""
    checkpoint: dict | None = None  # loaded (see latest.open_checkpoint)
    damaged: list[str] = field(default_factory=list)  # checkpoints that could not be loaded
    pretrained: LazyModel | None = None


def find_checkpoint(config: Any) -> StartPoint | None:
    """Load the latest checkpoint in --out_dir, or None if there is none.

    Only the main process warns of damaged ones. Raises ValueError if all are damaged, or if there
    is none and --init_from=resume."""
    is_main = os.environ.get("RANK", "0") == "0"
    found = load_latest(config.out_dir, print if is_main else lambda text: None)
    if found is None and config.init_from == "resume":
        raise no_checkpoint_error(config.out_dir)
    if found is None:
        return None
    return StartPoint(found.path, found.checkpoint, found.damaged)


def no_checkpoint_error(out_dir: str) -> ValueError:
    """The error of --init_from=resume in a folder without a checkpoint."""
    path = os.path.join(out_dir, "ckpt.pt")
    return ValueError(f"{path}: there is no checkpoint; train a model with python train.py")


def open_pretrained(config: Any, overrides: Mapping[str, str]) -> StartPoint:
    """Open the model named by --init_from, of any format, for fine-tuning.

    Raises ValueError where it lies in --out_dir or does not fit the options."""
    path, out_dir = config.init_from, config.out_dir
    if os.path.realpath(path).startswith(os.path.join(os.path.realpath(out_dir), "")):
        raise ValueError(f"--init_from={path}: is in --out_dir={out_dir}; name another --out_dir")
    max_seq_len = config.max_seq_len if "max_seq_len" in overrides else None
    pretrained = open_model(path, config.tokenizer, max_seq_len)
    context = pretrained.args.max_seq_len
    if context > MAX_IMPLICIT_CONTEXT and max_seq_len is None:
        raise ValueError(
            f"{path} has a context of {context} tokens; give the length of the training sequences "
            "with --max_seq_len"
        )
    check_architecture(config, overrides, architecture_options(pretrained), path)
    return StartPoint(pretrained=pretrained)


def architecture_options(pretrained: LazyModel) -> ModelArgs:
    """The args of a pretrained model, with the vocab_size of its tokenizer, which names the folder
    of the tokens. It is smaller than the model's if the embedding is padded."""
    tokenizer = known_tokenizer(pretrained)
    if tokenizer is None:
        return pretrained.args
    return dataclasses.replace(pretrained.args, vocab_size=tokenizer.vocab_size)


def saved_options(config: Any, overrides: Mapping[str, str], start: StartPoint) -> dict[str, Any]:
    """The options that a resumed run takes from its checkpoint: all that are not given now.

    Raises ValueError where a given option asks for another architecture."""
    checkpoint = start.checkpoint
    assert checkpoint is not None, "a resumed run has a checkpoint"
    args: ModelArgs = checkpoint["model_args"]
    vocab_size = checkpoint.get("config", {}).get("vocab_size")  # of the tokenizer
    if type(vocab_size) is int and vocab_size > 0:
        args = dataclasses.replace(args, vocab_size=vocab_size)
    check_architecture(config, overrides, args, start.path)
    current = {*OWN_OPTIONS, *overrides}
    if "versions" not in checkpoint:  # written by llama2.c, perhaps on another type of machine
        current |= {"device", "compile"}
    names = {option.name for option in dataclasses.fields(config)} - current
    saved = checkpoint.get("config", {})
    values = {name: value for name, value in saved.items() if name in names}
    return values | pretrained_options(args, overrides)


def pretrained_options(args: ModelArgs, overrides: Mapping[str, str]) -> dict[str, Any]:
    """The architecture options of a model, except those that are given."""
    return {name: getattr(args, name) for name in ARCHITECTURE if name not in overrides}


def check_resumed(config: Any, start: StartPoint) -> None:
    """Raise ValueError where a resumed run's options are invalid, or its optimizer is another."""
    assert start.checkpoint is not None, "a resumed run has a checkpoint"
    path = start.path
    optimizer = start.checkpoint.get("config", {}).get("optimizer", "adamw")
    if not isinstance(optimizer, str):
        raise ValueError(f"{path}: its optimizer is {describe_value(optimizer)}, not a name")
    if config.optimizer != optimizer:
        raise ValueError(
            f"--optimizer={config.optimizer}: the moments in {path} are {optimizer}'s; leave the "
            f"option out, or start a new run with these weights: --init_from={path} and another "
            "--out_dir"
        )
    if errors := list(config.validate()):
        raise ValueError("; ".join(errors))


def same_architecture(args: ModelArgs, name: str, value: Any) -> bool:
    """Whether an option has the value of the model, or another spelling of it."""
    changes = {name: value}
    try:
        requested = dataclasses.replace(args, **changes)
    except ValueError:
        return False
    effective = {
        "n_kv_heads": "kv_heads",
        "hidden_dim": "ffn_dim",
        "ffn_dim_multiplier": "ffn_dim",
    }.get(name, name)
    is_equal = getattr(requested, effective) == getattr(args, effective)
    return is_equal and requested.ffn_dim == args.ffn_dim


def check_architecture(
    config: Any, overrides: Mapping[str, str], args: ModelArgs, path: str
) -> None:
    """Raise ValueError where a given option asks for another architecture than the file's."""
    errors = []
    for name in ARCHITECTURE:
        value = getattr(config, name)
        if name in overrides and not same_architecture(args, name, value):
            errors.append(f"--{name}={value}: {path} has {name}={getattr(args, name)}")
    if errors:
        advice = "leave the option out, or train a new model in another --out_dir"
        raise ValueError("; ".join([*errors, advice]))


def restore_state(run: TrainingRun, start: StartPoint) -> None:
    """Restore the moments, the loss scale and the TrainState from a checkpoint.

    The best loss is that of the best checkpoint (see best_model.py).

    The weights are already set, except those of a sharded checkpoint. Raises ValueError where a
    value in the checkpoint has the wrong type or does not fit."""
    checkpoint, path = start.checkpoint, start.path
    assert checkpoint is not None, "there is a checkpoint to restore from"
    if "optimizer" in checkpoint:
        load_optimizer(run.optimizer, checkpoint["optimizer"], path)
    else:
        run.log(f"{path} has no optimizer state: training starts with new moments")
    if "sharded_tensors" in checkpoint:
        read_shards(run, checkpoint)
    if run.scaler.is_enabled() and checkpoint.get("scaler"):
        try:
            run.scaler.load_state_dict(checkpoint["scaler"])
        except KeyError as error:
            raise ValueError(f"{path}: its scaler has no {error}") from None
    state = run.state
    state.iter_num = int(checkpoint["iter_num"])
    default_position = state.iter_num * run.config.sequences_per_step
    state.position = int(checkpoint.get("position", default_position))
    try:
        state.recent_grad_norms = [float(norm) for norm in checkpoint.get("late_norms", [])]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{path}: its late_norms are not numbers") from None
    run.checkpoints.last_saved_step = state.iter_num
    run.checkpoints.submitted_step = state.iter_num


def read_shards(run: TrainingRun, checkpoint: dict) -> None:
    """Read this process's shards of the weights and moments from a sharded checkpoint."""
    from checkpoints.sharded import split_sharded, without_tied_head

    state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    shards, _ = split_sharded(state)
    checkpoint["sharded_tensors"].read(without_tied_head(shards, run.model.args))
