"""
The Llama 2 and 3 architecture, from leaf to root: RMSNorm to Transformer.

Llama 2: https://arxiv.org/abs/2307.09288, Llama 3: https://arxiv.org/abs/2407.21783.
Shapes in the comments: B batch, T time, C width (dim), V vocabulary, S keys and values (kv_len).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ops.attention import dot_product_attention
from ops.cross_entropy import linear_cross_entropy
from ops.fused_linear import fused_linear
from ops.kv_cache import ForwardContext, KVCache, attention_mask
from ops.rope import RopeScaling, apply_rope, precompute_rope_cache

MAX_DIM = 2**31  # a file that claims a larger size is damaged
MAX_POSITIONS = 2**20


@dataclass(frozen=True)
class ModelArgs:
    """Hyperparameters of the architecture. Raises ValueError for an impossible combination."""

    dim: int = 288
    n_layers: int = 6
    n_heads: int = 6
    n_kv_heads: int | None = None  # fewer than n_heads: grouped-query attention (arXiv 2305.13245)
    vocab_size: int = 4096
    hidden_dim: int | None = None  # feed-forward width; None: computed from the next two fields
    multiple_of: int = 32
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0  # Llama 3: 500000
    rope_scaling: RopeScaling | None = None  # Llama 3.1: type llama3, factor 8
    max_seq_len: int = 256
    dropout: float = 0.0
    tie_embeddings: bool = True  # the LM head uses the embedding matrix

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_heads()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be at least 0 and below 1")
        if not (1e-30 <= self.norm_eps <= 1 and 1 <= self.rope_theta <= 1e30):  # float32's range
            raise ValueError(
                f"norm_eps={self.norm_eps}, rope_theta={self.rope_theta}: not in 1e-30..1, 1..1e30"
            )

    def _check_sizes(self) -> None:
        required = ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "max_seq_len")
        for name in (*required, "n_kv_heads", "hidden_dim"):
            value = getattr(self, name)
            if value is None and name not in required:
                continue
            is_number = isinstance(value, int) and not isinstance(value, bool)
            if not is_number or not 1 <= value < MAX_DIM:
                raise ValueError(f"{name}={value}: must be a whole number from 1 to {MAX_DIM - 1}")
        if self.max_seq_len > MAX_POSITIONS:
            raise ValueError(f"max_seq_len={self.max_seq_len}: at most {MAX_POSITIONS} positions")
        multiplier = self.ffn_dim_multiplier
        if multiplier is not None and not 0 < multiplier < MAX_DIM:
            raise ValueError(f"ffn_dim_multiplier={multiplier}: must be positive, or None")

    def _check_heads(self) -> None:
        if self.dim % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads}: must divide dim={self.dim}")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_kv_heads={self.n_kv_heads}: must divide n_heads={self.n_heads}")
        if self.head_dim % 2:
            raise ValueError(
                f"n_heads={self.n_heads}: dim/n_heads={self.head_dim} must be even for RoPE"
            )

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        """The effective number of key-value heads; n_kv_heads is the option."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward layer: 2/3 of 4·dim, rounded up to multiple_of. SwiGLU's three
        matrices then have as many parameters as two of width 4·dim (arXiv 2002.05202)."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        width = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return self.multiple_of * math.ceil(width / self.multiple_of)


def parameter_shapes(args: ModelArgs) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every parameter, in the order of the state dict. Tied weights
    are yielded once. A generator, because a damaged file can claim millions of layers."""
    kv_dim = args.kv_heads * args.head_dim
    yield "tok_embeddings.weight", (args.vocab_size, args.dim)
    for layer in range(args.n_layers):
        yield f"layers.{layer}.attention.wq.weight", (args.dim, args.dim)
        yield f"layers.{layer}.attention.wk.weight", (kv_dim, args.dim)
        yield f"layers.{layer}.attention.wv.weight", (kv_dim, args.dim)
        yield f"layers.{layer}.attention.wo.weight", (args.dim, args.dim)
        yield f"layers.{layer}.feed_forward.w1.weight", (args.ffn_dim, args.dim)
        yield f"layers.{layer}.feed_forward.w2.weight", (args.dim, args.ffn_dim)
        yield f"layers.{layer}.feed_forward.w3.weight", (args.ffn_dim, args.dim)
        yield f"layers.{layer}.attention_norm.weight", (args.dim,)
        yield f"layers.{layer}.ffn_norm.weight", (args.dim,)
    yield "norm.weight", (args.dim,)
    if not args.tie_embeddings:
        yield "output.weight", (args.vocab_size, args.dim)


class RMSNorm(nn.Module):
    """Root mean square layer normalization (arXiv 1910.07467), computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (..., dim) to (..., dim), normalized over the last dimension."""
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


class Attention(nn.Module):
    """Causal multi-head attention with rotary embeddings; grouped-query if n_kv_heads < n_heads."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = args.head_dim
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)
        self.dropout = args.dropout

    def forward(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Map x (B, T, C) to (B, T, C). Updates context.cache, if there is one."""
        projections = fused_linear(x, self.wq, self.wk, self.wv)
        q, k, v = (projection.unflatten(-1, (-1, self.head_dim)) for projection in projections)
        # q (B, T, n_heads, head_dim), k and v (B, T, n_kv_heads, head_dim)
        scale = self.head_dim**-0.5  # scale q instead of the scores: fewer multiplications
        q = apply_rope(q, context.cos * scale, context.sin * scale)
        k = apply_rope(k, context.cos, context.sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, head_dim)
        if context.cache is not None:
            k, v = context.update_kv_cache(self.layer, k, v)  # (B, n_kv_heads, S, head_dim)
        dropout = self.dropout if self.training else 0.0
        y = dot_product_attention(q, k, v, context.mask, dropout)  # (B, n_heads, T, head_dim)
        y = self.wo(y.transpose(1, 2).flatten(-2))  # (B, T, C)
        return F.dropout(y, self.dropout, self.training)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w1 is the gate, w3 the up projection, w2 the down projection."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_dim, bias=False)
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.ffn_dim, bias=False)
        self.dropout = args.dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, T, C) to (B, T, C), each position by itself."""
        gate, up = fused_linear(x, self.w1, self.w3)  # (B, T, ffn_dim)
        y = self.w2(F.silu(gate) * up)  # (B, T, C)
        return F.dropout(y, self.dropout, self.training)


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.attention = Attention(args, layer)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Map the residual stream x (B, T, C) to (B, T, C)."""
        x = x + self.attention(self.attention_norm(x), context)
        return x + self.feed_forward(self.ffn_norm(x))


def init_matrix(name: str, matrix: torch.Tensor, args: ModelArgs) -> None:
    """Initialize a matrix with N(0, 0.02). Projections into the residual stream are divided by the
    square root of the number of additions, to keep its variance constant (GPT-2, section 2.3)."""
    into_residual = name.endswith(("wo.weight", "w2.weight"))
    std = 0.02 / math.sqrt(2 * args.n_layers) if into_residual else 0.02
    if not matrix.is_meta:  # see Transformer.on_meta
        nn.init.normal_(matrix, mean=0.0, std=std)


def iter_initial_weights(args: ModelArgs) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and weights of a new Transformer(args), bit for bit, one tensor at a time."""
    # Discarded: their constructors draw the random numbers that Transformer(args) draws first.
    nn.Embedding(args.vocab_size, args.dim)
    for layer in range(args.n_layers):
        TransformerBlock(args, layer)
    nn.Linear(args.dim, args.vocab_size, bias=False)
    for name, shape in parameter_shapes(args):
        weight = torch.ones(shape)
        if len(shape) > 1:
            init_matrix(name, weight, args)
        yield name, weight


def new_embedding(rows: int, dim: int) -> nn.Embedding:
    """nn.Embedding(rows, dim); no random draws on the meta device, see Transformer.on_meta."""
    if torch.get_default_device().type == "meta":
        return nn.Embedding.from_pretrained(torch.empty(rows, dim), freeze=False)
    return nn.Embedding(rows, dim)


class Transformer(nn.Module):
    """Embedding, n_layers blocks, norm, LM head. The parameters have llama2.c's names and order."""

    rope_cos: torch.Tensor  # (max_seq_len, head_dim/2)
    rope_sin: torch.Tensor

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.activation_checkpointing = False  # recompute the blocks' activations in backward
        self.tok_embeddings = new_embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args, layer) for layer in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.init_buffers_and_tie_weights()
        self.init_weights()

    @classmethod
    def on_meta(cls, args: ModelArgs) -> "Transformer":
        """A model on PyTorch's meta device: shapes without memory. See materialize."""
        # Normal draws and arithmetic there would import the compiler, which takes a second.
        with torch.device("meta"):
            return cls(args)

    @classmethod
    def uninitialized(cls, args: ModelArgs) -> "Transformer":
        """A model on the CPU with undefined weights, to load weights into."""
        model = cls.on_meta(args)  # without materialize, which imports sympy
        weights = {name: torch.empty(shape) for name, shape in parameter_shapes(args)}
        if args.tie_embeddings:
            weights["output.weight"] = weights["tok_embeddings.weight"]
        model.load_state_dict(weights, assign=True)
        model.init_buffers_and_tie_weights()
        return model

    def materialize(self, device: str) -> "Transformer":
        """Allocate memory on the device for a model from on_meta. The weights stay undefined."""
        self.to_empty(device=device)
        self.init_buffers_and_tie_weights()
        for name, buffer in list(self.named_buffers()):
            self.register_buffer(name, buffer.to(device), persistent=False)
        return self

    def init_buffers_and_tie_weights(self) -> None:
        """Compute the rotary embedding's tables, and tie the LM head to the embedding if asked."""
        args = self.args
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        if self.tok_embeddings.weight.is_meta:
            cos, sin = (torch.empty(args.max_seq_len, args.head_dim // 2) for _ in range(2))
        else:
            cos, sin = precompute_rope_cache(
                args.head_dim, args.max_seq_len, args.rope_theta, args.rope_scaling
            )
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def init_weights(self) -> None:
        """Draw the initial matrices. The norms' weights stay ones."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                init_matrix(name, parameter, self.args)

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        cache: KVCache | None = None,
        start_pos: int | torch.Tensor = 0,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Map tokens (B, T) to (logits (B, T, V), None), or to (None, loss) with targets (B, T).

        loss is the mean cross-entropy in nats over the targets other than -1. The logits are
        computed in chunks. For cache, start_pos and errors see forward_hidden."""
        x = self.forward_hidden(tokens, cache, start_pos)  # (B, T, C)
        if targets is None:
            return self.output(x), None
        return None, linear_cross_entropy(x.flatten(0, 1), self.output.weight, targets.flatten())

    def forward_hidden(
        self,
        tokens: torch.Tensor,
        cache: KVCache | None = None,
        start_pos: int | torch.Tensor = 0,
        kv_len: int = 0,
        batch_idx: torch.Tensor | None = None,
        exact_kv_len: bool = True,
    ) -> torch.Tensor:
        """Map tokens (B, T) to the hidden states (B, T, C) that the LM head reads. Raises
        ValueError for a position past max_seq_len.

        Args:
            cache: keys and values of the positions before start_pos; those of tokens are added.
            start_pos: position of the first token: one int, or a tensor (B,) with one per row.
            kv_len: 1 + the last position in all rows. Ignored for an int start_pos, else required.
            batch_idx: rows (B,) of the cache. None: the first B.
            exact_kv_len: False if kv_len is only an upper bound; later keys are then masked."""
        length = tokens.shape[1]
        positions: slice | torch.Tensor
        if isinstance(start_pos, int):
            kv_len = start_pos + length
            positions = slice(start_pos, kv_len)
        else:
            assert kv_len, "pass kv_len when start_pos is a tensor"
            positions = start_pos[:, None] + torch.arange(length, device=tokens.device)  # (B, T)
        if kv_len > self.args.max_seq_len:
            raise ValueError(f"{kv_len} positions exceed max_seq_len={self.args.max_seq_len}")
        mask = attention_mask(positions, kv_len, tokens.device, exact_kv_len)
        cos, sin = self.rope_cos[positions], self.rope_sin[positions]  # ([B,] T, head_dim/2)
        context = ForwardContext(cos, sin, cache, start_pos, kv_len, batch_idx, mask)
        x = F.dropout(self.tok_embeddings(tokens), self.args.dropout, self.training)  # (B, T, C)
        for layer in self.layers:
            if self.activation_checkpointing and self.training and cache is None:
                x = checkpoint(layer, x, context, use_reentrant=False)
            else:
                x = layer(x, context)
        return self.norm(x)

    def new_kv_cache(
        self, batch_size: int, length: int, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache for batch_size sequences of up to length positions, on the model's device.
        dtype None: autocast's dtype inside autocast, else the dtype of the weights."""
        weight = self.tok_embeddings.weight
        if dtype is None:
            device_type = weight.device.type
            is_autocast = torch.is_autocast_enabled(device_type)
            dtype = torch.get_autocast_dtype(device_type) if is_autocast else weight.dtype
        shape = (batch_size, self.args.kv_heads, length, self.args.head_dim)
        return KVCache.new(self.args.n_layers, shape, weight.device, dtype)

    def num_parameters(self) -> int:
        """The number of parameters. Tied weights count once."""
        return sum(parameter.numel() for parameter in self.parameters())


def flops_per_token(args: ModelArgs, seq_len: int) -> int:
    """Floating-point operations to train on one token (PaLM, arXiv 2204.02311, appendix B).

    6 per weight of a matrix product (2 forward, 4 backward; the embedding is a look-up), plus
    12·n_layers·dim·seq_len for attention's two products. The causal mask saves nothing here."""
    attention = args.dim * args.head_dim * (2 * args.n_heads + 2 * args.kv_heads)
    feed_forward = 3 * args.dim * args.ffn_dim
    weights = args.n_layers * (attention + feed_forward) + args.dim * args.vocab_size
    return 6 * weights + 12 * args.n_layers * args.dim * seq_len
