"""
A model as decoding wants it: matrices packed or quantized, products of the same input joined, and
steps that are compiled.
"""

import sys
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F

from generation.engine import DRAFTED, Draft, one_step, tell
from model import Transformer
from ops.kv_cache import KVCache
from ops.quantized_linear import (
    LIBRARY,
    CastLinear,
    Int8Linear,
    Joined,
    PackedLinear,
    lie_together,
    packable_kinds,
)
from runtime.device import DTYPES

SMALL = (
    2**27
)  # parameters of a model whose tokens come so fast that what is done once a token counts


LIBRARY.define("packed_linear(Tensor x, Tensor weight, int out_features) -> Tensor")


def for_inference(model: Transformer, kind: str, rows: int = 1) -> Transformer:
    """A model that shares its embedding and norms with the given one, and whose matrices are of this
    kind, int8 or a number format, for products of so many rows."""

    def linear(weight):
        if kind == "int8":
            return Int8Linear(weight)
        weight = weight.to(DTYPES[kind])
        if weight.device.type == "cpu" and kind in packable_kinds():
            return PackedLinear(weight, rows)
        return CastLinear(weight)

    def joined(*layers):
        weights = [layer.weight for layer in layers]
        return Joined(linear(torch.cat(weights)), [len(weight) for weight in weights])

    packed = Transformer.on_meta(model.args)
    with torch.no_grad():
        packed.tok_embeddings, packed.norm = model.tok_embeddings, model.norm
        packed.rope_cos, packed.rope_sin = model.rope_cos, model.rope_sin
        packed.output = linear(model.output.weight)
        for ours, theirs in zip(packed.layers, model.layers, strict=True):
            ours.attention_norm, ours.ffn_norm = theirs.attention_norm, theirs.ffn_norm
            attention, feed_forward = theirs.attention, theirs.feed_forward
            ours.attention.wq = joined(attention.wq, attention.wk, attention.wv)
            ours.attention.wk = ours.attention.wv = None
            ours.attention.wo = linear(attention.wo.weight)
            ours.feed_forward.w1 = joined(feed_forward.w1, feed_forward.w3)
            ours.feed_forward.w3 = None
            ours.feed_forward.w2 = linear(feed_forward.w2.weight)
    if kind == "int8" and model.num_parameters() < SMALL:
        lie_together([layer for layer in packed.modules() if isinstance(layer, Int8Linear)])
    return packed.eval()


# How PyTorch compiles for a CPU: calls in C++, apart from the loops that they call (together, g++ takes
# two minutes longer), and a product with its sum as one instruction.
ON_CPU = {
    "cpp_wrapper": True,
    "cpp_wrapper_build_separate": True,
    "cpp.enable_floating_point_contract_flag": "fast",
}
MOST_COMPILED = (
    64  # steps for other lengths and options; beyond a limit PyTorch silently compiles no more
)


def compiled(function: Callable, plain: Callable):
    """function(model, cache, tokens, starts, filled, *others, how), compiled at its first call, for calls
    with end in the place of filled and how by name; where that fails, plain is called so instead. What
    grows from call to call, the filled part of the cache, is the size of a tensor, which is taken as one
    that changes from the first."""
    import torch._dynamo  # takes a second, which only those wait for who compile
    import torch._inductor.config

    # A code of its own, with which PyTorch keeps what it compiled.
    function = types.FunctionType(function.__code__.replace(), function.__globals__)
    run = torch.compile(function, dynamic=False)
    works = usual = None  # not known yet
    kinds = []  # of calls, compiled for

    def call(model: Transformer, cache: KVCache, tokens, starts, end: int, *others, **how):
        nonlocal works, usual
        if works is False:
            return plain(model, cache, tokens, starts, end, *others, **how)
        filled, on_cpu = torch.empty(end, 0), tokens.device.type == "cpu"
        kind = (model, cache.length, cache.keys[0].dtype, tokens.shape, how)
        if (
            on_cpu and kind == usual
        ):  # to look whether what was compiled fits takes a third of a step
            try:
                with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
                    return run(model, cache, tokens, starts, filled, *others, how)
            except RuntimeError as error:
                if "Recompilation triggered" not in str(error):
                    raise
                usual = None  # it does not, and nothing was done
        if kind not in kinds and others[0].shape[1] > 1:
            # The compiler takes the first size for the usual one. What lies beyond a row's end is masked here.
            filled = torch.empty(min(cache.length - 1, model.args.max_seq_len), 0)
        torch._dynamo.maybe_mark_dynamic(filled, 0)
        try:
            many = torch._dynamo.config.patch(recompile_limit=MOST_COMPILED)
            with many, torch._inductor.config.patch(ON_CPU if on_cpu else {}):
                result = run(model, cache, tokens, starts, filled, *others, how)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, or one that fails in its own way
            if works:
                raise
            works = False
            print(
                f"cannot compile here ({type(error).__name__}); more slowly, without",
                file=sys.stderr,
            )
            return plain(model, cache, tokens, starts, end, *others, **how)
        works, usual = True, kind
        if kind not in kinds:
            kinds.append(kind)
        return result

    return call


def checked(model, cache, tokens, starts, filled, keys, how):
    """What compiled_check compiles."""
    return one_step(model, cache, tokens, starts, filled.shape[0], keys, **how)


def compiled_check():
    """decoder.one_step, compiled."""
    return compiled(checked, one_step)


def told(model, cache, token, starts, filled, keys, count, how):
    """What compiled_tell compiles: the last logits, tokens (B, M) of which the first columns are told,
    whether the last of those is known (B,), and their number. There are count of them, a tensor, or fewer,
    if one is not known or ends a text. A loop, as the call alone would take half as long as a small
    model's step."""
    if keys.shape[1] == 1:
        return *tell(model, cache, token, starts, filled.shape[0], keys, **how), count
    how = dict(how)
    stop_ids = how.pop("stop_ids", ())
    number, is_over = (
        torch.arange(keys.shape[1], device=token.device),
        starts == 0,
    )  # see Decoder.inputs

    def goes_on(i, token, tokens, known, logits):
        for stop_id in stop_ids:
            known = known & ((token[:, 0] != stop_id) | (i == 0))  # the first is not told here
        return (i < count) & (known | is_over).all()

    def step(i, token, tokens, known, logits):
        at = (starts + i, filled.shape[0], keys.index_select(1, i[None]))
        logits, (token, known) = one_step(model, cache, token, *at, exact=False, **how)
        return (
            i + 1,
            token[:, None],
            torch.where(number == i, token[:, None], tokens),
            known,
            logits,
        )

    nothing = (
        token.new_zeros(()),
        token,
        token.new_zeros(keys.shape),
        token.new_ones(len(token), dtype=torch.bool),
    )
    logits = model.tok_embeddings.weight.new_empty(len(token), model.args.vocab_size)
    i, _, tokens, known, logits = torch.while_loop(goes_on, step, (*nothing, logits))
    return logits, tokens, known, i


def compiled_tell(at_once: int = 1):
    """decoder.tell, compiled, of up to so many tokens at once."""

    def plain(model, cache, token, starts, end, keys, count, **how):
        return *tell(model, cache, token, starts, end - int(count) + 1, keys, **how), 1

    run = compiled(told, plain)

    def call(model, cache, token, starts, end: int, keys, **how):
        count = keys.shape[1]
        if count > at_once:
            raise ValueError(f"{count} tokens at once: this is compiled for {at_once} at most")
        keys = F.pad(keys, (0, at_once - count)) if count < at_once else keys
        end += count - 1
        logits, tokens, known, done = run(
            model, cache, token, starts, end, keys, torch.tensor(count), **how
        )
        return logits, tokens[:, : int(done)], known

    return call


AT_ONCE = 32  # tokens of a text that are told in one call, at most
A_CALL = (
    2**29
)  # parameters times tokens of a call, where that leaves at least 4 of each text: some 50 ms


def prepared(
    model: Transformer, kind: str = "float32", batch_size: int = 1, compile: bool = False
) -> dict:
    """The arguments model, tell, at_once, draft and cache_dtype of a Decoder that is to tell batch_size
    texts at once with matrices of this kind: int8 or a number format. To compile takes half a minute or
    more, at the first token but one. On a CPU, a single text in floating point is then drafted with 8-bit
    matrices, several tokens at a time, and checked in one pass; its tokens are those of the model itself.
    Other compiled steps on a CPU, if of less than 32 bits, keep keys and values in 16."""
    on_cpu = model.tok_embeddings.weight.device.type == "cpu"
    if on_cpu and kind != "int8" and compile and batch_size == 1:
        draft = Draft(for_inference(model, "int8"), compiled_tell(DRAFTED), compiled_check())
        return dict(model=for_inference(model, kind, 1 + draft.tokens), draft=draft)
    ready = dict(model=for_inference(model, kind, batch_size))
    if compile:
        size = model.num_parameters()
        at_once = (
            max(4, min(AT_ONCE, A_CALL // (size * batch_size))) if on_cpu and size < SMALL else 1
        )
        ready |= dict(tell=compiled_tell(at_once), at_once=at_once)
    if (
        on_cpu and compile and kind != "float32"
    ):  # uncompiled, attention would read them more slowly
        ready |= dict(cache_dtype=torch.bfloat16)
    return ready
