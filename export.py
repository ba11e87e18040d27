"""
Convert a model from any format to any other.

    python export.py out/model.bin --from=out/ckpt.pt
    python export.py model.gguf --from=out/best.pt --dtype=q8_0
    python export.py llama-hf --from=Meta-Llama-3-8B --format=hf
    python export.py out/ckpt.pt --from=out/ckpt.dcp --training_state=True

The input format is detected from the content. One tensor at a time is in memory, except with
--training_state=True.
"""

import dataclasses
import io
import math
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Annotated, Literal

import tyro

from checkpoints.latest import latest_path
from configurator import configure, print_overrides, run_main
from formats.lazy_model import LazyModel, one_line
from formats.registry import checked_tokenizer, open_model
from formats.writer import write_model
from model import MAX_POSITIONS, parameter_shapes

FORMAT_BY_SUFFIX = {".pt": "ckpt", ".pth": "ckpt", ".bin": "v0", ".gguf": "gguf", "": "hf"}
FORMAT_BY_VERSION = {-1: "hf", 0: "v0", 1: "v1", 2: "v2"}  # llama2.c's --version
RESERVED_NAMES = ("tokenizer.model", "tokenizer.bin", "config.json")  # of files beside a model
TRAINING_STATE_SUFFIXES = (".pt", ".dcp")


@dataclass(frozen=True)
class ExportConfig:
    """Write a model in another format."""

    # I/O
    output: str = ""  # the file or folder to write; also the first positional argument
    # a model in any format; None: the latest checkpoint in out
    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None
    # auto: by the suffix of output; .pt: ckpt, .bin: v0, .gguf: gguf, none: hf
    format: Literal["auto", "ckpt", "v0", "v1", "v2", "hf", "meta", "gguf"] = "auto"
    # auto: the model's dtype, if the format supports it
    dtype: Literal["auto", "float32", "float16", "bfloat16", "q8_0", "fp32", "fp16", "bf16"] = (
        "auto"
    )
    tokenizer: str = ""  # the model's tokenizer; if empty, the one in the model or beside it
    # the maximum context length; None: the model's (Meta's folders do not contain it)
    max_seq_len: int | None = None
    # convert a checkpoint with its optimizer state: a file (.pt) to a sharded one (.dcp), or back
    training_state: bool = False
    # options of llama2.c's export.py
    checkpoint: str | None = None  # the same as --from
    meta_llama: str | None = None  # the same as --from
    hf: str | None = None  # the same as --from
    version: Literal[-1, 0, 1, 2] | None = None  # 0, 1, 2: --format=v0, v1, v2; -1: --format=hf

    @property
    def sources(self) -> list[str]:
        """The paths of the model to read, one for each option that names it."""
        given = (self.from_, self.checkpoint, self.meta_llama, self.hf)
        return [path for path in given if path is not None] or [latest_path("out")]

    @property
    def source(self) -> str:
        """The path of the model to read."""
        return self.sources[0]

    @property
    def target(self) -> str:
        """The format to write; empty if neither an option nor the suffix determines it."""
        if self.version is not None:
            return FORMAT_BY_VERSION[self.version]
        if self.format != "auto":
            return self.format
        suffix = os.path.splitext(self.output.rstrip(os.sep))[1]
        return FORMAT_BY_SUFFIX.get(suffix.lower(), "")

    def validate(self) -> Iterator[str]:
        """The problems of the options, one message each."""
        yield from self.source_problems()
        if not self.output:
            yield "say what to write: python export.py out/model.bin"
            return
        if os.path.basename(self.output) in RESERVED_NAMES:
            yield f"{self.output}: is the name of another file of a model; choose another"
        if os.path.realpath(self.output) == os.path.realpath(self.source):
            yield f"{self.output}: is also the input; write elsewhere"
        if self.training_state:
            yield from self.training_state_problems()
        elif not self.target:
            yield f"{self.output}: the suffix names no format; choose one with --format="

    def source_problems(self) -> Iterator[str]:
        """The problems of the options other than the output."""
        if self.max_seq_len is not None and not 1 <= self.max_seq_len <= MAX_POSITIONS:
            yield (
                f"--max_seq_len={self.max_seq_len}: must be at least 1 and at most {MAX_POSITIONS}"
            )
        if not all(self.sources):
            yield "--from= is empty: name a model"
        if len(self.sources) > 1:
            yield (
                "name one model to read: --from, --checkpoint, --meta_llama and --hf "
                "are the same option"
            )
        if self.version is not None and self.format not in ("auto", self.target):
            yield f"--version={self.version} is --format={self.target}, not {self.format}"

    def training_state_problems(self) -> Iterator[str]:
        """The problems of --training_state=True."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        names = ("format", "dtype", "tokenizer", "max_seq_len", "version")
        if unused := [f"--{name}" for name in names if getattr(self, name) != defaults[name]]:
            yield f"--training_state=True does not convert the model: omit {', '.join(unused)}"
        if not self.output.endswith(TRAINING_STATE_SUFFIXES):
            yield (
                f"{self.output}: with --training_state=True it must end in "
                ".pt (one file) or .dcp (a sharded checkpoint)"
            )
        elif os.path.lexists(self.output):
            yield f"{self.output}: exists already; write elsewhere, or remove it first"


def with_tokenizer(model: LazyModel, tokenizer_path: str) -> LazyModel:
    """The model with its tokenizer, or with none, and a note, if its own does not match.

    Raises ValueError if the tokenizer at tokenizer_path does not match.
    """
    tokenizer = None
    problem = f"no tokenizer is beside {model.path}"
    try:
        tokenizer = checked_tokenizer(model, tokenizer_path)
    except ValueError as error:
        if tokenizer_path:
            raise
        problem = str(error)
    if tokenizer is None:
        print(f"note: {problem}; none is written (name it with --tokenizer=PATH)")
    return dataclasses.replace(model, read_tokenizer=lambda: tokenizer)


def size_on_disk(path: str) -> int:
    """Size of a file, or of all files in a folder, in bytes."""
    if os.path.isfile(path):
        return os.path.getsize(path)
    return sum(os.path.getsize(os.path.join(path, name)) for name in os.listdir(path))


def export_training_state(config: ExportConfig) -> None:
    """Convert a checkpoint with its training state."""
    from checkpoints.sharded import convert_checkpoint  # importing DCP takes a second

    step = convert_checkpoint(config.source, config.output)
    print(f"wrote {config.output}, the training state of step {step}")


def export_model(config: ExportConfig) -> None:
    """Convert a model without training state."""
    model = open_model(config.source, config.tokenizer, config.max_seq_len)
    model = with_tokenizer(model, config.tokenizer)
    lost = write_model(model, config.output, config.target, config.dtype)
    if lost:
        print(f"note: {config.target} does not store: {one_line('; '.join(lost))}")
    parameters = sum(math.prod(shape) for _, shape in parameter_shapes(model.args))
    print(
        f"wrote {config.output} ({config.target}): {parameters:,} parameters, "
        f"{size_on_disk(config.output):,} bytes"
    )


def exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Raise SystemExit, so that finally blocks remove partly written files."""
    sys.exit(128 + number)


def main(argv: list[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the command line."""
    config, overrides = configure(ExportConfig, argv, positional=("output",))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for a path in another encoding
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), exit_on_signal)
    print_overrides(config, overrides)
    if config.training_state:
        export_training_state(config)
    else:
        export_model(config)


if __name__ == "__main__":
    run_main(main)
