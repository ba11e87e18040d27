"""
Resume a run from its checkpoint, or start one from a pretrained model.
"""

import dataclasses
import math
import os

from checkpoints.manager import load_latest
from configurator import parse
from formats.lazy_model import LazyModel
from formats.registry import open_model
from model import ModelArgs
from training.optim import load_optimizer
from training.state import Run

# Options that a resumed run cannot change: they are the checkpoint's.
ARCHITECTURE = (
    *("max_seq_len", "vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of"),
    *("hidden_dim", "ffn_dim_multiplier", "rope_theta"),
)
LONGEST_UNASKED = 4096  # tokens of a pretrained model's context that a run takes for its own


def resume(config, overrides: dict) -> tuple[object, tuple[str, dict] | None]:
    """The options, and the path and content of the checkpoint to go on from: the newest in OUT_DIR that
    is whole. None if there is none at all, and init_from is auto."""
    is_main = os.environ.get("RANK", "0") == "0"
    found = load_latest(config.out_dir, print if is_main else lambda text: None)
    if found is None and config.init_from == "auto":
        return dataclasses.replace(config, init_from="scratch"), None
    if found is None:
        path = os.path.join(config.out_dir, "ckpt.pt")
        raise ValueError(f"{path}: there is no checkpoint here; train one with python train.py")
    path, checkpoint = found
    return resumed_config(
        dataclasses.replace(config, init_from="resume"), overrides, checkpoint, path
    ), found


def fine_tune(config, overrides: dict) -> tuple[object, LazyModel]:
    """The options for a new run with the weights of a model in any format, and that model. Its
    architecture is the file's; only another context may be asked for."""
    if os.path.realpath(config.init_from).startswith(
        os.path.join(os.path.realpath(config.out_dir), "")
    ):
        raise ValueError(
            f"--init_from={config.init_from}: lies in --out_dir={config.out_dir}; name another --out_dir"
        )
    max_seq_len = config.max_seq_len if "max_seq_len" in overrides else None
    pretrained = open_model(config.init_from, config.tokenizer, max_seq_len)
    if pretrained.args.max_seq_len > LONGEST_UNASKED and max_seq_len is None:
        raise ValueError(
            f"{config.init_from} has a context of {pretrained.args.max_seq_len} tokens; say how long the sequences "
            "to train on are to be with --max_seq_len"
        )
    check_architecture(config, overrides, pretrained.args, config.init_from)
    options = {
        name: getattr(pretrained.args, name) for name in ARCHITECTURE if name not in overrides
    }
    return dataclasses.replace(config, **options), pretrained


def keeps_architecture(args: ModelArgs, name: str, value) -> bool:
    """Whether an option asks for what the model has, if only in other words."""
    try:
        asked = dataclasses.replace(args, **{name: value})
    except ValueError:
        return False
    effective = {
        "n_kv_heads": "kv_heads",
        "hidden_dim": "ffn_dim",
        "ffn_dim_multiplier": "ffn_dim",
    }.get(name, name)
    return getattr(asked, effective) == getattr(args, effective) and asked.ffn_dim == args.ffn_dim


def check_architecture(config, overrides: dict, args: ModelArgs, path: str):
    """Raise ValueError where an option that was given asks for another model than the file's."""
    problems = []
    for name in filter(overrides.__contains__, ARCHITECTURE):
        if not keeps_architecture(args, name, getattr(config, name)):
            problems.append(
                f"--{name}={getattr(config, name)}: {path} has {name}={getattr(args, name)}"
            )
    if problems:
        raise ValueError(
            "; ".join(problems)
            + "; leave the option out, or train a new model in another --out_dir"
        )


def resumed_config(config, overrides: dict, checkpoint: dict, path: str):
    """The checkpoint's options, except those given now. Raises ValueError where one that was
    given would make it another model."""
    saved_args = checkpoint["model_args"]
    check_architecture(config, overrides, saved_args, path)
    of_this_call = {"out_dir", "init_from", "eval_only", "debug_step", *overrides}
    if "versions" not in checkpoint:  # from llama2.c, perhaps from another kind of machine
        of_this_call |= {"device", "compile"}
    types = {
        field.name: field.type
        for field in dataclasses.fields(config)
        if field.name not in of_this_call
    }
    saved = {name: value for name, value in checkpoint.get("config", {}).items() if name in types}
    for name, value in saved.items():
        try:
            saved[name] = parse(types[name], value, from_file=True)
        except ValueError as error:
            raise ValueError(
                f"{path}: its option {name} is {value!r}, not {error}; give --{name}"
            ) from None
    saved |= {name: getattr(saved_args, name) for name in ARCHITECTURE if name not in overrides}
    resumed = dataclasses.replace(config, **saved)
    trained_with = checkpoint.get("config", {}).get("optimizer", "adamw")
    if resumed.optimizer != trained_with:
        raise ValueError(
            f"--optimizer={resumed.optimizer}: the moments in {path} are {trained_with}'s; leave the option out, or "
            f"begin a new run with these weights: --init_from={path} and another --out_dir"
        )
    if problems := list(resumed.validate()):
        raise ValueError("; ".join(problems))
    return resumed


def restore(run: Run, checkpoint: dict, path: str):
    """Where the run was: moments, scale, step, position and best loss."""
    if "optimizer" in checkpoint:
        load_optimizer(run.optimizer, checkpoint["optimizer"], path)
    else:
        run.say(f"{path} has no optimizer state: its moments begin anew")
    if "sharded_tensors" in checkpoint:
        from checkpoints.sharded import split_sharded, without_tied_head

        state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
        checkpoint["sharded_tensors"].read(without_tied_head(split_sharded(state)[0], run.model.args))
    if run.scaler.is_enabled() and checkpoint.get("scaler"):
        try:
            run.scaler.load_state_dict(checkpoint["scaler"])
        except KeyError as error:
            raise ValueError(f"{path}: its scaler has no {error}") from None
    run.iter_num = run.saved_at = run.started_at = int(checkpoint["iter_num"])
    run.position = int(checkpoint.get("position", run.iter_num * run.config.sequences_per_step))
    try:
        run.late_norms = [float(norm) for norm in checkpoint.get("late_norms", [])]
    except (TypeError, ValueError):
        raise ValueError(f"{path}: its late_norms are no numbers") from None
    saved = checkpoint.get("config", {})
    measure = ("data_dir", "eval_iters", "batch_size")  # another choice of windows has its own best
    if all(
        saved.get(name, getattr(run.config, name)) == getattr(run.config, name) for name in measure
    ):
        try:
            run.best_val_loss = float(checkpoint.get("best_val_loss", math.inf))
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{path}: its best_val_loss is no number") from None
