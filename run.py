"""
The parts of a training run: built, and restored from a checkpoint. How it goes on from there is train.py's.
"""

import contextlib
import dataclasses
import math
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from configurator import parse
from dataset import TokenWindows, read_meta, tokens_folder
from device import pick_dtype
from distributed import World
from export import read_stored
from formats.stored import StoredModel
from keeper import Keeper, newest_checkpoint
from metrics import Metrics
from model import ModelArgs, Transformer, draw_weights, parameter_shapes
from optim import Together, load_optimizer, make_optimizer
from parallel import fill, shard
from tokenizer import Tokenizer, load_tokenizer

LONGEST_UNASKED = 4096  # tokens of a pretrained model's context that a run takes for its own
# Options that a resumed run cannot change: they are the checkpoint's.
ARCHITECTURE = (
    *("max_seq_len", "vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of"),
    *("hidden_dim", "ffn_dim_multiplier", "rope_theta"),
)


@dataclass
class Run:
    """The parts of a run, and how far it is."""

    config: object  # train.py's TrainConfig
    world: World
    device: str
    dtype: str
    tokenizer: Tokenizer
    train_windows: TokenWindows
    val_windows: TokenWindows
    model: Transformer
    optimizer: torch.optim.Optimizer | Together
    scaler: torch.amp.GradScaler
    metrics: Metrics | None = None  # of the main process
    forward: torch.nn.Module | None = None  # the model, compiled where that works
    iter_num: int = 0  # steps done
    position: int = 0  # sequences read
    best_val_loss: float = math.inf
    first_bad: torch.Tensor | None = None  # -1, or the step whose gradient was the first that is no number
    late_norms: list[float] = dataclasses.field(default_factory=list)  # of gradients, to tell what is unusual
    saved_at: int | None = None  # the step of the newest checkpoint
    started_at: int = 0  # the step this process began with
    owes_best: bool = False  # a best checkpoint in shares, which could not be written yet
    keeper: Keeper = dataclasses.field(default_factory=Keeper)
    saving_mesh: object | None = None  # the processes once more, on the CPU, to save shares in the background

    def say(self, text: str):
        if self.world.is_main:
            with contextlib.suppress(OSError):  # whoever read us may be gone, or their disk full; the run is not
                tqdm.write(text)

    def report(self, **figures):
        """Into metrics.jsonl, and to wandb when asked."""
        if self.world.is_main:
            try:
                self.metrics.write(iter=self.iter_num, **figures)
            except OSError as error:
                self.say(f"{self.metrics.path}: {error.strerror}; its lines wait until it can be written")
            if self.config.wandb_log:
                import wandb

                wandb.log(figures, step=self.iter_num)

    def path(self, name: str) -> str:
        return os.path.join(self.config.out_dir, name)


def resume(config, given: dict) -> tuple[object, tuple[str, dict] | None]:
    """The options, and the path and content of the checkpoint to go on from: the newest in OUT_DIR that
    is whole. None if there is none at all, and init_from is auto."""
    is_main = os.environ.get("RANK", "0") == "0"
    found = newest_checkpoint(config.out_dir, print if is_main else lambda text: None)
    if found is None and config.init_from == "auto":
        return dataclasses.replace(config, init_from="scratch"), None
    if found is None:
        path = os.path.join(config.out_dir, "ckpt.pt")
        raise ValueError(f"{path}: there is no checkpoint here; train one with python train.py")
    path, checkpoint = found
    return resumed_config(dataclasses.replace(config, init_from="resume"), given, checkpoint, path), found


def fine_tune(config, given: dict) -> tuple[object, StoredModel]:
    """The options for a new run with the weights of a model in any format, and that model. Its
    architecture is the file's; only another context may be asked for."""
    if os.path.realpath(config.init_from).startswith(os.path.join(os.path.realpath(config.out_dir), "")):
        raise ValueError(f"--init_from={config.init_from}: lies in --out_dir={config.out_dir}; name another --out_dir")
    max_seq_len = config.max_seq_len if "max_seq_len" in given else None
    pretrained = read_stored(config.init_from, config.tokenizer, max_seq_len)
    if pretrained.args.max_seq_len > LONGEST_UNASKED and max_seq_len is None:
        raise ValueError(
            f"{config.init_from} has a context of {pretrained.args.max_seq_len} tokens; say how long the sequences "
            "to train on are to be with --max_seq_len"
        )
    check_architecture(config, given, pretrained.args, config.init_from)
    options = {name: getattr(pretrained.args, name) for name in ARCHITECTURE if name not in given}
    return dataclasses.replace(config, **options), pretrained


def set_up(config, found: tuple[str, dict] | None, pretrained: StoredModel | None, world: World, device: str) -> Run:
    """Everything a run needs: new, from the checkpoint found, or with the weights of another model."""
    path, checkpoint = found or ("", None)
    if config.gradient_accumulation_steps % world.size:
        raise ValueError(
            f"--gradient_accumulation_steps={config.gradient_accumulation_steps} cannot be shared evenly by "
            f"{world.size} processes; give a multiple of {world.size}"
        )
    check_agreement(config, checkpoint, world)
    data = open_data(config)
    if checkpoint and "shares" in checkpoint and not in_shares(config, world):
        from sharded import with_whole_tensors

        checkpoint = with_whole_tensors(checkpoint)
    if checkpoint:
        check_tokenizer(data[0], checkpoint.get("tokenizer_hash"), path, config)
    elif pretrained:
        expected = hash_of_tokenizer(pretrained)
        if expected is None and world.is_main:
            print(f"note: the vocabulary of {pretrained.path} is not known; is it that of {config.data_dir}?")
        check_tokenizer(data[0], expected, pretrained.path, config)
    torch.manual_seed(config.seed)
    args, weights = first_weights(config, checkpoint, pretrained)
    run = equip(config, world, device, data, args)
    fill(run.model, weights)
    if run.train_windows.unused > 0.1:
        run.say(
            f"note: {run.train_windows.unused:.0%} of the training tokens are not read, in many short shards; "
            "join small files before pretokenizing, or lower --max_seq_len"
        )
    if checkpoint:
        restore(run, checkpoint, path)
        checkpoint.clear()  # whoever else has it: what is not used is to be given back
    return run


def check_agreement(config, checkpoint: dict | None, world: World):
    """Raise ValueError, in all processes, unless they begin with the same checkpoint and the same options."""
    step, is_in_shares = (checkpoint["iter_num"], "shares" in checkpoint) if checkpoint else (0, False)
    if not world.agree(2 * step + is_in_shares):
        raise ValueError(
            f"this process would begin at step {step}, others elsewhere: --out_dir={config.out_dir} must be one folder "
            "that all machines see and can read"
        )
    options = dataclasses.asdict(config) | dict(out_dir="", data_dir="", tokenizer="", device="")
    if not world.agree(zlib.crc32(repr(options).encode())):
        raise ValueError("the processes were given different options: start train.py with the same ones everywhere")


def in_shares(config, world: World) -> bool:
    """Whether each process has a share of the model, and not all of it."""
    return config.parallel == "fsdp" and world.size > 1


def equip(config, world: World, device: str, data: tuple, args: ModelArgs) -> Run:
    """A run of a model on the device, its weights still to be set, with what it takes to train it."""
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA for what stays float32
    dtype, model = pick_dtype(config.dtype, device), Transformer.outline(args)
    model.activation_checkpointing = config.activation_checkpointing
    if shares := in_shares(config, world):
        shard(model, device, world.size, dtype)
    model.allocate(device)
    betas = (config.beta1, config.beta2)
    optimizer = make_optimizer(model, config.optimizer, config.learning_rate, betas, config.weight_decay)
    scaler = torch.amp.GradScaler(device.partition(":")[0], enabled=dtype == "float16")
    run = Run(config, world, device, dtype, *data, model, optimizer, scaler, keeper=Keeper(alone=not shares))
    run.first_bad = torch.tensor(-1, device=device)
    run.saving_mesh = world.mesh_of_its_own(config.timeout) if shares else None
    return run


def first_weights(config, checkpoint: dict | None, pretrained: StoredModel | None) -> tuple[ModelArgs, Iterable]:
    """The model to begin with: the checkpoint's, the pretrained one, or a new one; and its weights, one at a
    time. Those of a checkpoint in shares come later: each process reads its own."""
    if not checkpoint and not pretrained:
        return config.model_args(), draw_weights(config.model_args())
    args = checkpoint["model_args"] if checkpoint else pretrained.args
    names = [name for name, _ in parameter_shapes(args)]
    if pretrained:
        weights = ((name, pretrained.read(name)) for name in names)
    else:
        weights = () if "shares" in checkpoint else [(name, checkpoint["model"][name]) for name in names]
    return dataclasses.replace(args, dropout=config.dropout), weights


def hash_of_tokenizer(pretrained: StoredModel) -> str | None:
    """That of the vocabulary a model was trained with, if it tells, or else of one in or beside it."""
    try:
        tokenizer = pretrained.own_tokenizer() if pretrained.tokenizer_hash is None else None
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


def open_data(config) -> tuple[Tokenizer, TokenWindows, TokenWindows]:
    """The tokenizer and both splits, checked against each other."""
    folder = tokens_folder(config.data_dir, config.vocab_source, config.vocab_size)
    meta = read_meta(folder)
    path = config.tokenizer or os.path.join(folder, "tokenizer.model")
    tokenizer = load_tokenizer(path)
    if tokenizer.hash != meta["tokenizer_hash"]:
        raise ValueError(
            f"{path} (hash {tokenizer.hash[:12]}, {tokenizer.vocab_size} tokens) is not the tokenizer of {folder} "
            f"(hash {meta['tokenizer_hash'][:12]}, {meta['vocab_size']} tokens); pretokenize again or name that one"
        )
    if config.vocab_size != meta["vocab_size"]:
        raise ValueError(f"{folder} has {meta['vocab_size']} tokens: give --vocab_size={meta['vocab_size']}")
    train_windows = TokenWindows(folder, "train", config.max_seq_len)
    return tokenizer, train_windows, TokenWindows(folder, "val", config.max_seq_len, tails=True)


def keeps_architecture(args: ModelArgs, name: str, value) -> bool:
    """Whether an option asks for what the model has, if only in other words."""
    try:
        asked = dataclasses.replace(args, **{name: value})
    except ValueError:
        return False
    effective = {"n_kv_heads": "kv_heads", "hidden_dim": "ffn_dim", "ffn_dim_multiplier": "ffn_dim"}.get(name, name)
    return getattr(asked, effective) == getattr(args, effective) and asked.ffn_dim == args.ffn_dim


def check_architecture(config, given: dict, args: ModelArgs, path: str):
    """Raise ValueError where an option that was given asks for another model than the file's."""
    problems = []
    for name in filter(given.__contains__, ARCHITECTURE):
        if not keeps_architecture(args, name, getattr(config, name)):
            problems.append(f"--{name}={getattr(config, name)}: {path} has {name}={getattr(args, name)}")
    if problems:
        raise ValueError("; ".join(problems) + "; leave the option out, or train a new model in another --out_dir")


def resumed_config(config, given: dict, checkpoint: dict, path: str):
    """The checkpoint's options, except those given now. Raises ValueError where one that was
    given would make it another model."""
    saved_args = checkpoint["model_args"]
    check_architecture(config, given, saved_args, path)
    of_this_call = {"out_dir", "init_from", "eval_only", "debug_step", *given}
    if "versions" not in checkpoint:  # from llama2.c, perhaps from another kind of machine
        of_this_call |= {"device", "compile"}
    types = {field.name: field.type for field in dataclasses.fields(config) if field.name not in of_this_call}
    saved = {name: value for name, value in checkpoint.get("config", {}).items() if name in types}
    for name, value in saved.items():
        try:
            saved[name] = parse(types[name], value, from_file=True)
        except ValueError as error:
            raise ValueError(f"{path}: its option {name} is {value!r}, not {error}; give --{name}") from None
    saved |= {name: getattr(saved_args, name) for name in ARCHITECTURE if name not in given}
    resumed = dataclasses.replace(config, **saved)
    trained_with = checkpoint.get("config", {}).get("optimizer", "adamw")
    if resumed.optimizer != trained_with:
        raise ValueError(
            f"--optimizer={resumed.optimizer}: the moments in {path} are {trained_with}'s; leave the option out, or "
            f"begin a new run with these weights: --init_from={path} and another --out_dir"
        )
    if problems := list(resumed.problems()):
        raise ValueError("; ".join(problems))
    return resumed


def restore(run: Run, checkpoint: dict, path: str):
    """Where the run was: moments, scale, step, position and best loss."""
    if "optimizer" in checkpoint:
        load_optimizer(run.optimizer, checkpoint["optimizer"], path)
    else:
        run.say(f"{path} has no optimizer state: its moments begin anew")
    if "shares" in checkpoint:
        from sharded import split, without_classifier

        state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
        checkpoint["shares"].read(without_classifier(split(state)[0], run.model.args))
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
    if all(saved.get(name, getattr(run.config, name)) == getattr(run.config, name) for name in measure):
        try:
            run.best_val_loss = float(checkpoint.get("best_val_loss", math.inf))
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{path}: its best_val_loss is no number") from None
