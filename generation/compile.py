"""
A model prepared for inference: packed or quantized matrices, fused projections, compiled steps.
"""

import sys
import types
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from generation.sampling_params import TruncationParams
from generation.steps import (
    NUM_DRAFT_TOKENS,
    DraftModel,
    PreparedModel,
    StepInputs,
    StepOutput,
    decode_step,
)
from model import Transformer, TransformerBlock
from ops.kv_cache import KVCache
from ops.quantized_linear import (
    CastLinear,
    FusedLinear,
    Int8Linear,
    PackedLinear,
    pack_weights,
    packed_dtypes,
)
from runtime.device import DTYPES

SMALL_MODEL = 2**27  # parameters; in smaller models the overhead of each call matters
MAX_TOKENS_PER_CALL = 32  # of each sequence, in one call of the compiled decode loop
# Parameters times tokens of one call, which then takes about 50 ms; at least 4 tokens per sequence.
MAX_WORK_PER_CALL = 2**29
RECOMPILE_LIMIT = 64  # for other lengths and options; beyond it PyTorch silently stops compiling
# The C++ wrapper is compiled apart from the kernels: together g++ takes two minutes longer.
INDUCTOR_CPU_OPTIONS = {
    "cpp_wrapper": True,
    "cpp_wrapper_build_separate": True,
    "cpp.enable_floating_point_contract_flag": "fast",  # fused multiply-add
}


# Weights


def linear_for_inference(weight: Tensor, dtype: str, rows: int) -> nn.Module:
    """The layer that multiplies with weight (out, in) fastest. See convert_weights."""
    if dtype == "int8":
        return Int8Linear(weight)
    weight = weight.to(DTYPES[dtype])
    if weight.device.type == "cpu" and dtype in packed_dtypes():
        return PackedLinear(weight, rows)
    return CastLinear(weight)


def fuse_linear(layers: list[nn.Linear], dtype: str, rows: int) -> FusedLinear:
    """One layer in place of several with the same input."""
    weights = [layer.weight for layer in layers]
    fused = linear_for_inference(torch.cat(weights), dtype, rows)
    return FusedLinear(fused, [len(weight) for weight in weights])


def convert_block(block: TransformerBlock, source: TransformerBlock, dtype: str, rows: int) -> None:
    """Give block the norms of source and its matrices, fused and converted."""
    block.attention_norm = source.attention_norm
    block.ffn_norm = source.ffn_norm
    attention = source.attention
    qkv = fuse_linear([attention.wq, attention.wk, attention.wv], dtype, rows)
    block.attention.add_module("wq", qkv)
    block.attention.add_module("wk", None)
    block.attention.add_module("wv", None)
    block.attention.add_module("wo", linear_for_inference(attention.wo.weight, dtype, rows))
    feed_forward = source.feed_forward
    gate_up = fuse_linear([feed_forward.w1, feed_forward.w3], dtype, rows)
    block.feed_forward.add_module("w1", gate_up)
    block.feed_forward.add_module("w3", None)
    block.feed_forward.add_module("w2", linear_for_inference(feed_forward.w2.weight, dtype, rows))


def convert_weights(model: Transformer, dtype: str, rows: int = 1) -> Transformer:
    """A model for inference that shares its embedding and norms with the given model.

    Args:
        dtype: of the matrices: int8 or a name in runtime.device.DTYPES.
        rows: of the inputs that the matrices are packed for: batch size times tokens.
    """
    converted = Transformer.on_meta(model.args)
    with torch.no_grad():
        converted.tok_embeddings = model.tok_embeddings
        converted.norm = model.norm
        converted.rope_cos = model.rope_cos
        converted.rope_sin = model.rope_sin
        converted.add_module("output", linear_for_inference(model.output.weight, dtype, rows))
        for block, source in zip(converted.layers, model.layers, strict=True):
            assert isinstance(block, TransformerBlock) and isinstance(source, TransformerBlock)
            convert_block(block, source, dtype, rows)
    if dtype == "int8" and model.num_parameters() < SMALL_MODEL:
        pack_weights([layer for layer in converted.modules() if isinstance(layer, Int8Linear)])
    return converted.eval()


# Compiled steps


class TracedInputs(NamedTuple):
    """StepInputs for compiled code: all tensors, so that other values need no recompilation."""

    tokens: Tensor  # (B, T)
    start_pos: Tensor  # (B,)
    kv_len_carrier: Tensor  # (kv_len, 0): its size, which is dynamic, is StepInputs.kv_len
    seeds: Tensor  # (B, N)
    num_steps: Tensor  # () int64: passes of the model to run, at most N - T + 1


class LoopOutput(NamedTuple):
    """StepOutput of decode_loop, and how many steps it ran."""

    logits: Tensor  # (B * T, V)
    tokens: Tensor  # (B, N)
    accepted: Tensor  # (B * T,)
    num_steps: Tensor | int


def decode_loop(
    model: Transformer,
    cache: KVCache,
    inputs: TracedInputs,
    truncation: TruncationParams,
    stop_ids: tuple[int, ...],
) -> LoopOutput:
    """The function that is compiled: decode_step, in a loop if T = 1 and N > 1.

    The loop ends after num_steps steps, or earlier after a stop token or a token that is not
    accepted. It is part of the compiled code because a call of that takes half as long as a step of
    a small model."""
    tokens, start_pos, kv_len_carrier, seeds, num_steps = inputs
    kv_len = kv_len_carrier.shape[0]
    if tokens.shape[1] == seeds.shape[1]:
        step_inputs = StepInputs(tokens, start_pos, kv_len, seeds)
        logits, generated, accepted = decode_step(model, cache, step_inputs, truncation)
        return LoopOutput(logits, generated, accepted, num_steps)
    index = torch.arange(seeds.shape[1], device=tokens.device)
    is_unused = start_pos == 0  # see InferenceEngine.decode_inputs

    def continues(i: Tensor, token: Tensor, _: Tensor, accepted: Tensor, __: Tensor) -> Tensor:
        for stop_id in stop_ids:
            accepted = accepted & ((token[:, 0] != stop_id) | (i == 0))  # token 0 is an input
        return (i < num_steps) & (accepted | is_unused).all()

    def body(
        i: Tensor, token: Tensor, generated: Tensor, accepted: Tensor, logits: Tensor
    ) -> tuple[Tensor, ...]:
        step_inputs = StepInputs(token, start_pos + i, kv_len, seeds.index_select(1, i[None]))
        logits, token, accepted = decode_step(
            model, cache, step_inputs, truncation, exact_kv_len=False
        )
        return i + 1, token, torch.where(index == i, token, generated), accepted, logits

    initial = (
        tokens.new_zeros(()),
        tokens,
        tokens.new_zeros(seeds.shape),
        tokens.new_ones(len(tokens), dtype=torch.bool),
        model.tok_embeddings.weight.new_empty(len(tokens), model.args.vocab_size),
    )
    i, _, generated, accepted, logits = torch.while_loop(continues, body, initial)
    return LoopOutput(logits, generated, accepted, i)


class CompiledDecodeStep:
    """A decode_step that is compiled at its first call; it stays eager if compilation fails.

    With one token per row, it generates up to max_tokens tokens per call. See DecodeStep."""

    def __init__(self, max_tokens: int = 1) -> None:
        self.max_tokens = max_tokens
        # PyTorch keeps compiled code with the code object, so each instance needs a copy.
        function = types.FunctionType(decode_loop.__code__.replace(), decode_loop.__globals__)
        self.compiled = torch.compile(function, dynamic=False)
        self.compile_ok: bool | None = None  # None: not known yet
        self.seen_signatures: list[tuple] = []  # of earlier calls
        self.last_signature: tuple | None = None

    def __call__(
        self,
        model: Transformer,
        cache: KVCache,
        inputs: StepInputs,
        truncation: TruncationParams,
        stop_ids: tuple[int, ...] = (),
    ) -> StepOutput:
        num_read = inputs.tokens.shape[1]
        num_steps = inputs.seeds.shape[1] - num_read + 1
        padding = self.max_tokens - num_steps
        if padding < 0:
            raise ValueError(
                f"{num_steps} tokens in one call: this step is compiled for at most "
                f"{self.max_tokens}"
            )
        padded = StepInputs(
            tokens=inputs.tokens,
            start_pos=inputs.start_pos,
            kv_len=inputs.kv_len + num_steps - 1,
            seeds=F.pad(inputs.seeds, (0, padding)) if padding else inputs.seeds,
        )
        output = self._run(model, cache, padded, truncation, stop_ids, num_steps)
        tokens = output.tokens[:, : num_read - 1 + int(output.num_steps)]
        return StepOutput(output.logits, tokens, output.accepted)

    def _run(
        self,
        model: Transformer,
        cache: KVCache,
        inputs: StepInputs,
        truncation: TruncationParams,
        stop_ids: tuple[int, ...],
        num_steps: int,
    ) -> LoopOutput:
        if self.compile_ok is False:
            return run_eagerly(model, cache, inputs, truncation, num_steps)
        traced = trace_inputs(inputs, inputs.kv_len, num_steps)
        shape = inputs.tokens.shape
        signature = (model, cache.length, cache.keys[0].dtype, shape, truncation, stop_ids)
        if signature == self.last_signature and inputs.tokens.device.type == "cpu":
            try:  # without evaluating guards, which takes a third of a small model's step
                with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
                    return self.compiled(model, cache, traced, truncation, stop_ids)
            except RuntimeError as error:
                if "Recompilation triggered" not in str(error):
                    raise
                self.last_signature = None  # no compiled code fits, and nothing was run
        if signature not in self.seen_signatures and inputs.seeds.shape[1] > 1:
            # The compiler optimizes for the first size. Positions past a row's end are masked.
            max_kv_len = min(cache.length - 1, model.args.max_seq_len)
            traced = trace_inputs(inputs, max_kv_len, num_steps)
        try:
            output = self._run_with_guards(model, cache, traced, truncation, stop_ids)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, or any failure inside it
            if self.compile_ok:
                raise
            self.compile_ok = False
            reason = type(error).__name__
            print(f"cannot compile here ({reason}); continuing uncompiled", file=sys.stderr)
            return run_eagerly(model, cache, inputs, truncation, num_steps)
        self.compile_ok = True
        self.last_signature = signature
        if signature not in self.seen_signatures:
            self.seen_signatures.append(signature)
        return output

    def _run_with_guards(
        self,
        model: Transformer,
        cache: KVCache,
        traced: TracedInputs,
        truncation: TruncationParams,
        stop_ids: tuple[int, ...],
    ) -> LoopOutput:
        """Run the compiled code that fits the arguments; compile it if there is none."""
        import torch._dynamo  # takes a second
        import torch._inductor.config

        on_cpu = traced.tokens.device.type == "cpu"
        torch._dynamo.maybe_mark_dynamic(traced.kv_len_carrier, 0)
        with (
            torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT),
            torch._inductor.config.patch(INDUCTOR_CPU_OPTIONS if on_cpu else {}),
        ):
            return self.compiled(model, cache, traced, truncation, stop_ids)


def trace_inputs(inputs: StepInputs, kv_len: int, num_steps: int) -> TracedInputs:
    """The inputs as tensors, with this kv_len."""
    carrier = torch.empty(kv_len, 0)
    return TracedInputs(
        inputs.tokens, inputs.start_pos, carrier, inputs.seeds, torch.tensor(num_steps)
    )


def run_eagerly(
    model: Transformer,
    cache: KVCache,
    inputs: StepInputs,
    truncation: TruncationParams,
    num_steps: int,
) -> LoopOutput:
    """Run one step without compilation. kv_len of the inputs is that after num_steps steps."""
    kv_len = inputs.kv_len - num_steps + 1
    step_inputs = StepInputs(inputs.tokens, inputs.start_pos, kv_len, inputs.seeds)
    return LoopOutput(*decode_step(model, cache, step_inputs, truncation), 1)


def prepare_for_inference(
    model: Transformer, dtype: str = "float32", batch_size: int = 1, compile: bool = False
) -> PreparedModel:
    """Prepare a model for an InferenceEngine with this batch size.

    Compilation happens at the second token and takes half a minute or more. Compiled on a CPU, a
    single sequence in floating point is generated by speculative decoding: the same model with
    8-bit matrices drafts. The tokens are those of the model itself. Other compiled steps on a CPU
    with a dtype below 32 bits keep the KV cache in bfloat16.

    Args:
        dtype: of the matrices: int8, float32, bfloat16 or float16.
    """
    on_cpu = model.tok_embeddings.weight.device.type == "cpu"
    if on_cpu and dtype != "int8" and compile and batch_size == 1:
        draft = DraftModel(
            model=convert_weights(model, "int8"),
            decode_step=CompiledDecodeStep(NUM_DRAFT_TOKENS),
            verify=CompiledDecodeStep(),
        )
        return PreparedModel(convert_weights(model, dtype, 1 + draft.num_tokens), draft=draft)
    converted = convert_weights(model, dtype, batch_size)
    if not compile:
        return PreparedModel(converted)
    tokens_per_call = 1
    if on_cpu and model.num_parameters() < SMALL_MODEL:
        affordable = MAX_WORK_PER_CALL // (model.num_parameters() * batch_size)
        tokens_per_call = max(4, min(MAX_TOKENS_PER_CALL, affordable))
    # Uncompiled attention would read a bfloat16 cache more slowly.
    cache_dtype = torch.bfloat16 if on_cpu and dtype != "float32" else None
    step = CompiledDecodeStep(tokens_per_call)
    return PreparedModel(converted, step, tokens_per_call, cache_dtype=cache_dtype)
