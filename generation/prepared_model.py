"""
A model prepared for an InferenceEngine: converted matrices, compiled steps, a draft model.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from generation.compile import StepCompiler, StepSpec
from generation.inference_model import convert_weights
from generation.steps import DecodeStep, uncompiled_step
from model import Transformer

NUM_DRAFT_TOKENS = 7  # that the draft model proposes for one pass of the target model
BATCH_BUCKETS = (1, 4, 16, 64, 256)  # numbers of rows that steps are compiled for


class Step(NamedTuple):
    """A step that an engine can run."""

    run: DecodeStep
    num_rows: int  # that it computes
    max_tokens: int  # that it can generate in a call


@dataclass(frozen=True)
class PreparedModel:
    """A model with what runs it. prepare_for_inference makes one.

    Args:
        cache_dtype: dtype of the KV cache; None: the model's.
        compiler: finds compiled steps; None: steps are not compiled.
        draft: a small model for speculative decoding (arXiv 2211.17192) of one sequence. It
            proposes NUM_DRAFT_TOKENS tokens, which the model verifies in one pass. Both sample with
            the same Gumbel noise, so they nearly always agree.
    """

    model: Transformer
    cache_dtype: torch.dtype | None = None
    compiler: StepCompiler | None = None
    draft: "PreparedModel | None" = None

    def find_step(self, rows: int, batch_size: int, length: int = 1) -> Step:
        """A compiled step for these rows, or for up to 16 times as many; else the uncompiled one.

        Args:
            batch_size: of the engine.
            length: T, see StepInputs.
        """
        if self.compiler:
            for bucket in batch_buckets(batch_size):
                if not rows <= bucket <= 16 * rows:
                    continue
                if step := self.compiler.find(bucket, length):
                    return Step(step, bucket, step.max_tokens)
        return Step(uncompiled_step, rows, 1)

    def is_compiled(self, rows: int, batch_size: int) -> bool:
        """Whether no further compilation would make steps of these rows faster."""
        if self.compiler is None or self.compiler.failures:
            return True
        length = 1 + NUM_DRAFT_TOKENS if self.draft else 1
        is_draft_compiled = self.draft is None or self.draft.is_compiled(1, 1)
        bucket = smallest_bucket(rows, batch_size)
        return is_draft_compiled and self.compiler.find(bucket, length) is not None

    @property
    def is_compiling(self) -> bool:
        """Whether a compilation goes on."""
        is_draft_compiling = self.draft is not None and self.draft.is_compiling
        return is_draft_compiling or (self.compiler is not None and bool(self.compiler.workers))

    @contextlib.contextmanager
    def cores_shared(self) -> Iterator[None]:
        """While a compilation goes on, leave a core to it: threads that wait for each other would
        otherwise be stopped again and again, and decoding would take ten times as long."""
        if not self.is_compiling or self.compiler is None:
            yield
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, self.compiler.spec.threads - 1))
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def start_compiling(self, rows: int, batch_size: int) -> None:
        """Compile the steps for these rows in the background, if they are not compiled yet."""
        bucket = smallest_bucket(rows, batch_size)
        if self.compiler:
            self.compiler.start(bucket, 1 + NUM_DRAFT_TOKENS if self.draft else 1)
        if self.draft:
            self.draft.start_compiling(1, 1)

    def wait_for_compilation(self) -> None:
        """Wait until all compilations that were started have ended."""
        if self.compiler:
            self.compiler.wait()
        if self.draft:
            self.draft.wait_for_compilation()


def batch_buckets(batch_size: int) -> list[int]:
    """The numbers of rows that steps are compiled for, in an engine of this batch size."""
    return [*(size for size in BATCH_BUCKETS if size < batch_size), batch_size]


def smallest_bucket(rows: int, batch_size: int) -> int:
    """The smallest of batch_buckets that has space for these rows."""
    return next(bucket for bucket in batch_buckets(batch_size) if bucket >= rows)


def can_draft(device: torch.device, dtype: str) -> bool:
    """Whether a model with 8-bit matrices is faster than one with this dtype, and exists here."""
    has_quantized = torch.backends.quantized.engine != "none"
    return device.type == "cpu" and dtype != "int8" and has_quantized


def prepared_cache_dtype(model: Transformer, dtype: str, has_draft: bool) -> torch.dtype:
    """The dtype of the KV cache; see prepare_for_inference for the dtype of the matrices."""
    weight = model.tok_embeddings.weight
    has_bfloat16_cache = weight.device.type == "cpu" and dtype != "float32" and not has_draft
    return torch.bfloat16 if has_bfloat16_cache else weight.dtype


def prepare_for_inference(
    model: Transformer,
    dtype: str = "float32",
    batch_size: int = 1,
    compile: bool | None = False,
    draft: bool = True,
) -> PreparedModel:
    """Prepare a model for an InferenceEngine with this batch size.

    On a CPU, a single sequence in floating point is generated by speculative decoding: the same
    model with 8-bit matrices drafts. The tokens are those of the model itself.

    Args:
        dtype: of the matrices: int8, float32, bfloat16 or float16.
        compile: True compiles in the background from the start, None after COMPILE_AFTER seconds
            (engine.py); both use what an earlier run compiled. False never does.
        draft: False leaves out the draft model, for scoring and beam search.
    """
    device = model.tok_embeddings.weight.device
    if device.type not in ("cpu", "cuda"):
        if compile:
            print(f"cannot compile on {device.type}; continuing uncompiled", file=sys.stderr)
        compile = False
    has_draft = draft and batch_size == 1 and can_draft(device, dtype)
    rows = 1 + NUM_DRAFT_TOKENS if has_draft else batch_size
    converted = convert_weights(model, dtype, rows)
    cache_dtype = prepared_cache_dtype(model, dtype, has_draft)
    spec = StepSpec(
        args=dataclasses.replace(model.args, dropout=0.0),
        dtype=dtype,
        packed_rows=rows,
        cache_dtype=str(cache_dtype).removeprefix("torch."),
        rows=batch_size,
        length=rows if has_draft else 1,
        device=str(device),
        threads=torch.get_num_threads(),
    )
    compiler = StepCompiler(converted, spec) if compile is not False else None
    draft_prepared = None
    if has_draft:
        draft_spec = dataclasses.replace(spec, dtype="draft", packed_rows=1, length=1)
        draft_model = convert_weights(model, draft_spec.dtype)
        draft_compiler = StepCompiler(draft_model, draft_spec, compiler) if compiler else None
        draft_prepared = PreparedModel(draft_model, cache_dtype, draft_compiler)
    prepared = PreparedModel(converted, cache_dtype, compiler, draft_prepared)
    if compile:
        prepared.start_compiling(batch_size, batch_size)
    return prepared
