"""
Take a model from any format in which a Llama is kept to any other.

    python export.py out/model.bin --from=out/ckpt.pt
    python export.py story.gguf --from=out/best.pt --dtype=q8_0
    python export.py llama-hf --from=Meta-Llama-3-8B --format=hf

What is read is recognised by its content. One tensor at a time is in memory.
"""

import dataclasses
import math
import os
import signal
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Literal

import tyro

from checkpoints.latest import latest_path
from configurator import configure, print_overrides, run_main
from formats import ckpt, gguf, llama2c
from formats.lazy_model import LazyModel
from formats.registry import FORMATS, checked_tokenizer, open_model
from model import MAX_POSITIONS, parameter_shapes
from runtime.atomic_files import write_atomically
from textdata.tokenizer import load_tokenizer

SUFFIXES = {".pt": "ckpt", ".pth": "ckpt", ".bin": "v0", ".gguf": "gguf", "": "hf"}
VERSIONS = {-1: "hf", 0: "v0", 1: "v1", 2: "v2"}  # llama2.c's numbers
SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class ExportConfig:
    """Write a model in another format."""

    output: str = ""  # the file or folder to write; may be given bare
    # a model in any format; None: the newest checkpoint in out
    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None
    # auto: by output's suffix; .pt: ckpt, .bin: v0, .gguf: gguf, none: hf
    format: Literal["auto", "ckpt", "v0", "v1", "v2", "hf", "meta", "gguf"] = "auto"
    # auto: the model's own, where the format has it
    dtype: Literal["auto", "float32", "float16", "bfloat16", "q8_0", "fp32", "fp16", "bf16"] = (
        "auto"
    )
    tokenizer: str = ""  # the model's vocabulary; if empty, the one in or beside it
    max_seq_len: int | None = (
        None  # the longest context; None: the model's (Meta's folders do not say)
    )
    # also the optimizer's state and the step: from ckpt.pt to a sharded checkpoint (.dcp), or back
    training_state: bool = False
    # llama2.c's options
    checkpoint: str | None = None  # the same as --from
    meta_llama: str | None = None  # the same as --from
    hf: str | None = None  # the same as --from
    version: Literal[-1, 0, 1, 2] | None = None  # 0, 1, 2: --format=v0, v1, v2; -1: --format=hf

    @property
    def sources(self) -> list[str]:
        named = (self.from_, self.checkpoint, self.meta_llama, self.hf)
        return [path for path in named if path is not None] or [latest_path("out")]

    @property
    def source(self) -> str:
        return self.sources[0]

    @property
    def target(self) -> str:
        """The format to write, or nothing where that is not clear."""
        if self.format != "auto" or self.version is not None:
            return VERSIONS.get(self.version, self.format)
        return SUFFIXES.get(os.path.splitext(self.output.rstrip(os.sep))[1].lower(), "")

    def validate(self):
        if not self.output:
            yield "say what to write: python export.py out/model.bin"
        elif not self.target and not self.training_state:
            yield f"{self.output}: which format is that to be? Name it with --format="
        if self.max_seq_len is not None and not 1 <= self.max_seq_len <= MAX_POSITIONS:
            yield f"--max_seq_len={self.max_seq_len}: must be at least 1 and at most {MAX_POSITIONS}"
        if os.path.basename(self.output) in ("tokenizer.model", "tokenizer.bin", "config.json"):
            yield f"{self.output}: is a name that other files beside a model have; choose another"
        if not all(self.sources):
            yield "--from= is empty: name a model"
        if len(self.sources) > 1:
            yield "name one model to read: --from, --checkpoint, --meta_llama and --hf say the same"
        if (
            self.format != "auto"
            and self.version is not None
            and self.format != VERSIONS[self.version]
        ):
            yield f"--version={self.version} is --format={VERSIONS[self.version]}, not {self.format}"
        if self.training_state:
            yield from self.training_state_problems()
        if self.output and os.path.realpath(self.output) == os.path.realpath(self.source):
            yield f"{self.output}: is also what is read; write elsewhere"

    def training_state_problems(self):
        others = ("format", "dtype", "tokenizer", "max_seq_len", "version")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        if present := [f"--{name}" for name in others if getattr(self, name) != defaults[name]]:
            yield f"--training_state=True copies a checkpoint as it is: leave out {', '.join(present)}"
        if not self.output.endswith((".pt", ".dcp")):
            yield f"{self.output}: must end in .pt (one file) or .dcp (a sharded checkpoint)"
        elif os.path.lexists(self.output):
            yield f"{self.output}: exists already; write elsewhere, or remove it first"


def write_model(stored: LazyModel, path: str, target: str, dtype: str = "auto"):
    """Write a model in the format that --format calls target. Raises ValueError, before anything is
    written, for what the format cannot say and where something else is in the way."""
    module = next(module for module in FORMATS if target in module.DTYPES)
    if reason := module.unsupported_reason(stored.args):
        raise ValueError(f"{path}: {reason}")
    dtype = export_dtype(SHORT_DTYPES.get(dtype, dtype), target, module.DTYPES[target], stored)
    check_overwrite(path, module)
    beside = tokenizer_target(stored, path, module) if module in (ckpt, llama2c) else None
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    module.write(stored, path, target, dtype)
    if beside:
        write_atomically(*beside)


def check_overwrite(path: str, module: ModuleType):
    """Raise ValueError where something is in the place of what is to be written, unless it is an
    older model of the same format, and no checkpoint, in which there may be a training run's state."""
    if module in (ckpt, gguf, llama2c) and (os.path.isdir(path) or path.endswith(os.sep)):
        raise ValueError(f"{path}: is a folder; name a file to write")
    if os.path.islink(path.rstrip(os.sep)):
        raise ValueError(f"{path}: is a link; name the file or folder itself")
    is_empty = not os.path.exists(path) or (os.path.isdir(path) and not os.listdir(path))
    if is_empty or (os.path.isfile(path) and os.path.getsize(path) == 0):
        return
    try:
        is_older = module is not ckpt and module.matches(path) and module.read(path)
    except (ValueError, OSError):
        is_older = False
    if is_older:
        return
    if os.path.isdir(path):
        raise ValueError(
            f"{path}: holds other things than a model of this format; name a new or an empty folder"
        )
    raise ValueError(
        f"{path}: is there already and would be lost; write elsewhere, or remove it first"
    )


def tokenizer_target(stored: LazyModel, path: str, module: ModuleType) -> tuple[str, bytes] | None:
    """Where a model's vocabulary goes that is not in its file, and its content; None if it is there,
    or not known. Raises ValueError where another one lies there, as it would be taken for the model's."""
    tokenizer, folder = stored.own_tokenizer(), os.path.dirname(path)
    for name in ("tokenizer.model", "tokenizer.bin"):
        there = os.path.join(folder, name)
        if os.path.lexists(there) and tokenizer is None:
            raise ValueError(
                f"{there}: may be another model's; name this one's with --tokenizer, or write elsewhere"
            )
        if os.path.lexists(there) and load_tokenizer(there).hash != tokenizer.hash:
            raise ValueError(
                f"{there}: is another model's, and this one's is to be there; write elsewhere"
            )
    if tokenizer is None:
        return None
    name, content = (
        ("tokenizer.model", tokenizer.content)
        if module is ckpt
        else ("tokenizer.bin", tokenizer.to_bin())
    )
    return (
        None
        if os.path.exists(os.path.join(folder, name))
        else (os.path.join(folder, name), content)
    )


def export_dtype(asked: str, target: str, allowed: tuple[str, ...], stored: LazyModel) -> str:
    """The dtype to write: the one asked for, or the model's own, or the format's first. Raises
    ValueError for one that the format does not have."""
    if asked == "auto":
        own = str(stored.dtype).removeprefix("torch.")
        return own if own in allowed else allowed[0]
    if asked not in allowed:
        raise ValueError(f"--dtype={asked}: {target} is written in {' or '.join(allowed)}")
    return asked


def with_tokenizer(stored: LazyModel, named: str) -> LazyModel:
    """The model with a tokenizer that is known to be its own, or, saying so, with none."""
    try:
        tokenizer = checked_tokenizer(stored, named)
        missing = f"no tokenizer is beside {stored.path}"
    except ValueError as error:
        if named:
            raise
        tokenizer, missing = None, str(error)
    if tokenizer is None:
        print(f"note: {missing}; none is written (name it with --tokenizer=PATH)")
    return dataclasses.replace(stored, own_tokenizer=lambda: tokenizer)


def size_of(path: str) -> int:
    """Bytes of a file, or of all in a folder."""
    names = (
        [path] if os.path.isfile(path) else [os.path.join(path, name) for name in os.listdir(path)]
    )
    return sum(map(os.path.getsize, names))


def main(argv: list[str] | None = None) -> None:
    config, overrides = configure(ExportConfig, argv, positional=("output",))
    sys.stdout.reconfigure(errors="replace")  # of a path in another encoding
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        signal.signal(
            number, lambda number, frame: sys.exit(128 + number)
        )  # and nothing half-written stays
    print_overrides(config, overrides)
    if config.training_state:
        from checkpoints.sharded import convert_checkpoint  # imports DCP, which takes a second

        step = convert_checkpoint(config.source, config.output)
        return print(f"wrote {config.output}, the training state of step {step}")
    stored = with_tokenizer(
        open_model(config.source, config.tokenizer, config.max_seq_len), config.tokenizer
    )
    write_model(stored, config.output, config.target, config.dtype)
    parameters = sum(math.prod(shape) for _, shape in parameter_shapes(stored.args))
    print(
        f"wrote {config.output} ({config.target}): {parameters:,} parameters, {size_of(config.output):,} bytes"
    )


if __name__ == "__main__":
    run_main(main)
