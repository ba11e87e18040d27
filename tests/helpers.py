"""
What several test files share: options, small models and tokenizers, comparisons of runs.
"""

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from checkpoints.file import is_sharded_checkpoint, load_checkpoint, write_model_args
from checkpoints.latest import load_latest
from generation.engine import InferenceEngine
from generation.prepared_model import PreparedModel
from generation.request import Request
from generation.sampling_params import SamplingParams
from model import ModelArgs, Transformer, parameter_shapes
from ops.rope import RopeScaling
from textdata.tokenizer import Llama3Tokenizer
from training.parallel import load_weights

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

VOCAB_SIZE = 512  # of the tokenizer that the fixtures train

# Options of train.py for a run of seconds.
TINY_RUN = (
    "--vocab_size=512",
    "--dim=32",
    "--n_layers=2",
    "--n_heads=4",
    "--n_kv_heads=2",
    "--max_seq_len=32",
    "--batch_size=2",
    "--gradient_accumulation_steps=4",
    "--learning_rate=1e-2",
    "--warmup_iters=2",
    "--eval_interval=20",
    "--eval_iters=2",
    "--compile=False",
    "--device=cpu",
    "--dtype=float32",
)

# Shapes of small models.
EXPORT_MODEL = {
    "dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "vocab_size": VOCAB_SIZE,
    "hidden_dim": 96,
    "max_seq_len": 160,
}
CHECKPOINT_MODEL = {
    "dim": 16,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 19,
    "multiple_of": 8,
    "max_seq_len": 6,
}
GENERATION_MODEL = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 61,
    "max_seq_len": 16,
}
REFERENCE_MODEL = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "vocab_size": 61,
    "hidden_dim": 48,
    "max_seq_len": 40,
}
LLAMA3 = {"rope_theta": 500000.0, "norm_eps": 1e-6, "rope_scaling": RopeScaling("llama3", 8.0)}


# Models and tokenizers


def random_model(
    shape: dict = EXPORT_MODEL, std: float | None = 0.1, /, **overrides
) -> Transformer:
    """A small model in evaluation mode; the same arguments give the same weights.

    Matrices are drawn with this standard deviation, and gains around 1: wide enough that a mistake
    in any weight shows in the logits. With std=None the weights stay those of a new model."""
    torch.manual_seed(0)
    model = Transformer(ModelArgs(**(shape | overrides)))
    if std is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, std)
    return model.eval()


def model_logits(model: Transformer) -> torch.Tensor:
    """The logits of one fixed sequence of the model's maximum length, (1, T, vocab_size)."""
    tokens = torch.arange(model.args.max_seq_len)[None] * 7 % model.args.vocab_size
    with torch.no_grad():
        return model(tokens)[0]


def to_transformers(model: Transformer) -> "LlamaForCausalLM":
    """The same model in the transformers library, without any code of ours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    args, state = model.args, model.state_dict()
    config = LlamaConfig(
        hidden_size=args.dim,
        intermediate_size=args.ffn_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.kv_heads,
        vocab_size=args.vocab_size,
        max_position_embeddings=args.max_seq_len,
        rms_norm_eps=args.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        tie_word_embeddings=args.tie_embeddings,
    )
    hf_names = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    hf_state = {
        "model.embed_tokens.weight": state["tok_embeddings.weight"],
        "model.norm.weight": state["norm.weight"],
        "lm_head.weight": state["output.weight"],
    }
    for layer in range(args.n_layers):
        for name, hf_name in hf_names.items():
            weight = state[f"layers.{layer}.{name}.weight"]
            if name in ("attention.wq", "attention.wk"):
                weight = half_split_layout(weight, args.dim // args.n_heads)
            hf_state[f"model.layers.{layer}.{hf_name}.weight"] = weight
    llama = LlamaForCausalLM(config)
    llama.load_state_dict(hf_state, strict=True)
    return llama.eval()


def half_split_layout(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """A query or key matrix whose pairs are neighbours, in the layout that rotates halves."""
    out_dim, in_dim = weight.shape
    pairs = weight.view(out_dim // head_dim, head_dim // 2, 2, in_dim)
    return pairs.transpose(1, 2).reshape(out_dim, in_dim)


def small_llama3_tokenizer() -> Llama3Tokenizer:
    """Bytes, some longer tokens, and Llama 3's special ones."""
    words = ["th", "he", "the", " t", " the", "in", "ing", "er", "\n\n", " a", "an", " an", "and"]
    words += [" and", "  ", "12"]
    single_bytes = [bytes([byte]) for byte in range(256)]
    return Llama3Tokenizer(single_bytes + [word.encode() for word in words])


def random_slices(text: str, count: int = 1000) -> list[str]:
    """Substrings of up to 199 characters, the same in every call."""
    rng = random.Random(0)
    starts = [rng.randrange(len(text)) for _ in range(count)]
    return [text[start : start + rng.randrange(1, 200)] for start in starts]


def generate_batch(
    model: Transformer | PreparedModel, prompts: list[list[int]], batch_size: int, **options
) -> list[list[int]]:
    """The tokens of each prompt and its completion. options: those of SamplingParams."""
    params = SamplingParams(**options)
    requests = [Request(prompt, params, index) for index, prompt in enumerate(prompts)]
    return run_requests(model, requests, batch_size)


def run_requests(
    model: Transformer | PreparedModel, requests: list[Request], batch_size: int
) -> list[list[int]]:
    """Run all requests to their ends in one engine; returns the tokens of each."""
    for _ in InferenceEngine(model, batch_size).generate(requests):
        pass
    return [request.tokens for request in requests]


# Checkpoints and runs


def make_checkpoint(model: Transformer, /, **entries) -> dict:
    """A checkpoint of the model, to which entries are added."""
    args = write_model_args(model.args)
    return {"model": model.state_dict(), "model_args": args, "iter_num": 7} | entries


def load_model(path: str) -> tuple[Transformer, dict]:
    """The model of a checkpoint, loaded as a resumed run loads it, and the checkpoint."""
    checkpoint = load_checkpoint(path)
    model = Transformer.uninitialized(checkpoint["model_args"])
    names = [name for name, _ in parameter_shapes(model.args)]
    load_weights(model, ((name, checkpoint["model"][name]) for name in names))
    return model.eval(), checkpoint


def checkpoint_weights(path: str) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint file or a sharded checkpoint."""
    from checkpoints.sharded import gather_full_state, open_sharded

    if is_sharded_checkpoint(path):
        return gather_full_state(open_sharded(path))["model"]
    return load_checkpoint(path)["model"]


def max_weight_difference(a: Path, b: Path) -> float:
    """The largest absolute difference between the newest weights in two output folders."""
    paths = [load_latest(str(out_dir), lambda text: None)[0] for out_dir in (a, b)]
    weights_a, weights_b = map(checkpoint_weights, paths)
    return max((weights_a[name] - weights_b[name]).abs().max().item() for name in weights_a)


def same_tensors(a: dict, b: dict) -> bool:
    """Whether two dictionaries hold the same names and the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_training_state(a: Path | str, b: Path | str) -> bool:
    """Whether two checkpoints have the same weights and moments, bit for bit."""
    a, b = load_checkpoint(str(a)), load_checkpoint(str(b))
    moments_a, moments_b = a["optimizer"]["state"], b["optimizer"]["state"]
    if moments_a.keys() != moments_b.keys() or not same_tensors(a["model"], b["model"]):
        return False
    return all(same_tensors(moments_a[index], moments_b[index]) for index in moments_a)


def read_metrics(out_dir: Path, key: str) -> list[float]:
    """The values of this key in metrics.jsonl, in order."""
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    return [record[key] for record in map(json.loads, lines) if key in record]


def write_tinystories_shard(path: Path, texts: list[str]) -> None:
    """Write texts in the format of the TinyStories data set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{"story": text, "source": "test"} for text in texts]
    path.write_text(json.dumps(records), encoding="utf-8")
