"""
The Llama 2 and 3 architecture, leaf to root: RMSNorm, KVCache, Attention, FeedForward,
TransformerBlock, Transformer. No files, no printing.

Llama 2: https://arxiv.org/abs/2307.09288, Llama 3: https://arxiv.org/abs/2407.21783.
Shapes in the comments: B batch, T time, C width (dim), V vocabulary, S cached positions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ops.attention import causal_attention, single_query_attention
from ops.cross_entropy import linear_cross_entropy
from ops.kv_cache import ForwardContext, KVCache
from ops.rope import RopeScaling, apply_rope, precompute_rope_cache

# Up to this length attention in blocks beats the fused kernel on a CPU; beyond it the gain is small
# and what it keeps is large.
BLOCKWISE_ATTENTION_MAX_LEN = 1024


MAX_DIM = 2**31  # of a dimension; what is beyond is damage
MAX_POSITIONS = 2**20  # a longer context is a damaged file, whose tables would fill the memory


@dataclass(frozen=True)
class ModelArgs:
    """The shape of a model. Raises ValueError for a shape that no Llama has."""

    dim: int = 288
    n_layers: int = 6
    n_heads: int = 6
    n_kv_heads: int | None = None  # fewer than n_heads: grouped-query attention (arXiv 2305.13245)
    vocab_size: int = 4096
    hidden_dim: int | None = None  # width of the feed-forward layer; None: from the two below
    multiple_of: int = 32
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0  # Llama 3: 500000
    rope_scaling: RopeScaling | None = None  # Llama 3.1: llama3, by 8
    max_seq_len: int = 256
    dropout: float = 0.0
    tie_embeddings: bool = True  # the classifier is the embedding matrix

    def __post_init__(self):
        sizes = ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "max_seq_len")
        for name in (*sizes, "n_kv_heads", "hidden_dim"):
            value = getattr(self, name)
            if value is None and name not in sizes:
                continue
            if not isinstance(value, int) or not 1 <= value < MAX_DIM:
                raise ValueError(
                    f"{name}={value}: must be a whole number, at least 1 and below {MAX_DIM}"
                )
        if self.max_seq_len > MAX_POSITIONS:
            raise ValueError(f"max_seq_len={self.max_seq_len}: at most {MAX_POSITIONS} positions")
        if self.ffn_dim_multiplier is not None and not 0 < self.ffn_dim_multiplier < MAX_DIM:
            raise ValueError(
                f"ffn_dim_multiplier={self.ffn_dim_multiplier}: must be positive, or None"
            )
        if self.dim % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads}: must divide dim={self.dim}")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_kv_heads={self.n_kv_heads}: must divide n_heads={self.n_heads}")
        if self.head_dim % 2:
            raise ValueError(
                f"n_heads={self.n_heads}: dim/n_heads={self.head_dim} must be even for rotary positions"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be at least 0 and below 1")
        if not (
            1e-30 <= self.norm_eps <= 1 and 1 <= self.rope_theta <= 1e30
        ):  # as far as float32 serves
            raise ValueError(
                f"norm_eps={self.norm_eps}, rope_theta={self.rope_theta}: beyond 1e-30..1 and 1..1e30"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward layer: two thirds of 4·dim, so that SwiGLU's three
        matrices weigh as much as two of 4·dim (arXiv 2002.05202), rounded up to multiple_of."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        width = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return self.multiple_of * math.ceil(width / self.multiple_of)


def parameter_shapes(args: ModelArgs) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a model, in the order of its state dict; a tied classifier,
    which is the embedding, is not named. Lazy: a damaged file may speak of millions of layers."""
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

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):  # (B, T, C)
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


def fused_linear(x, *layers: nn.Linear):
    """What each of the layers, which have no biases, makes of x (B, T, C). In training it is one
    product with all their weights, which costs less than several; to copy the weights together
    for a few tokens would cost more."""
    if not isinstance(layers[0], nn.Linear):
        return layers[0](x)  # joined beforehand, see inference.py
    if not torch.is_grad_enabled():
        return [layer(x) for layer in layers]
    together = F.linear(x, torch.cat([layer.weight for layer in layers]))
    return together.split([layer.out_features for layer in layers], dim=-1)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = args.head_dim
        self.queries_per_kv = args.n_heads // args.kv_heads
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)
        self.dropout = args.dropout

    def forward(self, x, place: ForwardContext):
        q, k, v = (
            y.unflatten(-1, (-1, self.head_dim)) for y in fused_linear(x, self.wq, self.wk, self.wv)
        )
        # (B, T, n_heads, head_dim) and twice (B, T, n_kv_heads, head_dim)
        scale = self.head_dim**-0.5  # of the scores
        q = apply_rope(q, place.cos * scale, place.sin * scale)
        k = apply_rope(k, place.cos, place.sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, head_dim)
        if place.cache is not None:
            k, v = place.update_kv_cache(self.layer, k, v)  # (B, n_kv_heads, S, head_dim)
        y = self.attend(q, k, v, place.mask)  # (B, n_heads, T, head_dim)
        y = self.wo(y.transpose(1, 2).flatten(-2))  # (B, T, C)
        return F.dropout(y, self.dropout, self.training)

    def attend(self, q, k, v, mask=None):
        dropout = self.dropout if self.training else 0.0
        length, seen = q.shape[2], k.shape[2]
        if length == 1:  # the queries that share a key are rows of one product
            grouped = q.reshape(len(q), -1, self.queries_per_kv, self.head_dim)
            if torch.compiler.is_compiling() and q.device.type == "cpu" and not dropout:
                return single_query_attention(grouped, k, v, mask).reshape(q.shape)
            y = F.scaled_dot_product_attention(
                grouped, k, v, attn_mask=mask, dropout_p=dropout, scale=1.0
            )
            return y.reshape(q.shape)
        if self.queries_per_kv > 1:
            k = k.repeat_interleave(self.queries_per_kv, dim=1)  # (B, n_heads, S, head_dim)
            v = v.repeat_interleave(self.queries_per_kv, dim=1)
        if mask is not None:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, scale=1.0
            )
        if q.device.type == "cpu" and length == seen <= BLOCKWISE_ATTENTION_MAX_LEN:
            return causal_attention(q, k, v, dropout)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=1.0)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w1 is the gate, w3 the value, w2 the way back."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_dim, bias=False)
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.ffn_dim, bias=False)
        self.dropout = args.dropout

    def forward(self, x):
        gate, value = fused_linear(x, self.w1, self.w3)  # (B, T, ffn_dim)
        y = self.w2(F.silu(gate) * value)  # (B, T, C)
        return F.dropout(y, self.dropout, self.training)


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.attention = Attention(args, layer)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x, place: ForwardContext):
        x = x + self.attention(self.attention_norm(x), place)
        return x + self.feed_forward(self.ffn_norm(x))


def init_matrix(name: str, matrix, args: ModelArgs):
    """Normal with deviation 0.02; what is added to the residual stream is scaled down by the square
    root of the number of additions, so that the stream's variance does not grow with depth (GPT-2's
    report, section 2.3)."""
    into_residual = name.endswith(("wo.weight", "w2.weight"))
    std = 0.02 / math.sqrt(2 * args.n_layers) if into_residual else 0.02
    if not matrix.is_meta:
        nn.init.normal_(matrix, mean=0.0, std=std)


def iter_initial_weights(args: ModelArgs) -> Iterator[tuple[str, torch.Tensor]]:
    """The names and weights of a new Transformer(args), bit for bit, of which one is in memory at a time."""
    nn.Embedding(args.vocab_size, args.dim)  # layers draw weights of their own, which are not used
    for layer in range(args.n_layers):
        TransformerBlock(args, layer)
    nn.Linear(args.dim, args.vocab_size, bias=False)
    for name, shape in parameter_shapes(args):
        weight = torch.ones(shape)
        if len(shape) > 1:
            init_matrix(name, weight, args)
        yield name, weight


def new_embedding(rows: int, dim: int) -> nn.Embedding:
    """As PyTorch makes it, but that nothing is drawn on the meta device."""
    if torch.get_default_device().type == "meta":
        return nn.Embedding.from_pretrained(torch.empty(rows, dim), freeze=False)
    return nn.Embedding(rows, dim)


class Transformer(nn.Module):
    """The whole model. Its parameters' names and order are those of llama2.c's checkpoints."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.activation_checkpointing = (
            False  # in training: keep what flows between blocks, compute the rest again
        )
        self.tok_embeddings = new_embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args, layer) for layer in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.init_buffers_and_tie_weights()
        self.init_weights()

    @classmethod
    def on_meta(cls, args: ModelArgs) -> "Transformer":
        """The shapes of a model, on PyTorch's meta device. allocate gives them memory."""
        with torch.device(
            "meta"
        ):  # where nothing is drawn or computed: it would import the compiler, for a second
            return cls(args)

    @classmethod
    def uninitialized(cls, args: ModelArgs) -> "Transformer":
        """A model on the CPU whose weights are still to be loaded, so no time goes into drawing them."""
        model = cls.on_meta(args)  # allocate imports the compiler too
        spaces = {name: torch.empty(shape) for name, shape in parameter_shapes(args)}
        if args.tie_embeddings:
            spaces["output.weight"] = spaces["tok_embeddings.weight"]
        model.load_state_dict(spaces, assign=True)
        model.init_buffers_and_tie_weights()
        return model

    def materialize(self, device: str) -> "Transformer":
        """Take memory on the device for an outline, the weights in it still to be set."""
        self.to_empty(device=device)
        self.init_buffers_and_tie_weights()
        for name, buffer in list(self.named_buffers()):
            self.register_buffer(name, buffer.to(device), persistent=False)
        return self

    def init_buffers_and_tie_weights(self):
        if self.args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        args = self.args
        if self.tok_embeddings.weight.is_meta:
            cos, sin = (torch.empty(args.max_seq_len, args.head_dim // 2) for _ in range(2))
        else:
            cos, sin = precompute_rope_cache(
                args.head_dim, args.max_seq_len, args.rope_theta, args.rope_scaling
            )
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def init_weights(self):
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:  # the norms' gains are ones
                init_matrix(name, parameter, self.args)

    def forward(self, tokens, targets=None, cache: KVCache | None = None, start_pos=0):
        """tokens (B, T) -> (logits, loss).

        With targets (B, T): logits is None and loss the mean cross-entropy in nats over the
        targets that are not -1; the logits are never held whole. Without: logits (B, T, V)
        and loss None. cache and start_pos: see forward_hidden, whose ValueError this raises too."""
        x = self.forward_hidden(tokens, cache, start_pos)  # (B, T, C)
        if targets is None:
            return self.output(x), None
        return None, linear_cross_entropy(x.flatten(0, 1), self.output.weight, targets.flatten())

    def forward_hidden(
        self,
        tokens,
        cache: KVCache | None = None,
        start_pos=0,
        end: int = 0,
        rows=None,
        exact: bool = True,
    ):
        """What the classifier reads (B, T, C) of tokens (B, T).

        With a cache, the tokens are the positions from start_pos on, those before it are read from
        the cache, and the tokens' own are left there. start_pos is one number, or a tensor (B,) of one
        for each row; end is then one beyond the longest row's last position, or farther if not exact.
        rows (B,) are the cache's rows to take where start_pos is a number. Raises ValueError past
        max_seq_len."""
        length, mask = tokens.shape[1], None
        if isinstance(start_pos, int):
            end, positions = start_pos + length, slice(start_pos, start_pos + length)
        else:
            assert end, "with a position for each row, say where the longest row ends"
            positions = start_pos[:, None] + torch.arange(length, device=tokens.device)  # (B, T)
        if end > self.args.max_seq_len:
            raise ValueError(
                f"{end} positions, but the model was made for max_seq_len={self.args.max_seq_len}"
            )
        if not isinstance(start_pos, int) and (tokens.numel() > 1 or not exact):
            mask = (
                torch.arange(end, device=tokens.device) <= positions[:, None, :, None]
            )  # (B, 1, T, end)
        elif isinstance(start_pos, int) and 1 < length < end:  # causal from the end
            mask = torch.ones(length, end, dtype=torch.bool, device=tokens.device).tril(start_pos)
        place = ForwardContext(
            self.rope_cos[positions], self.rope_sin[positions], cache, start_pos, end, rows, mask
        )
        x = F.dropout(self.tok_embeddings(tokens), self.args.dropout, self.training)  # (B, T, C)
        for layer in self.layers:
            if self.activation_checkpointing and self.training and cache is None:
                x = checkpoint(layer, x, place, use_reentrant=False)
            else:
                x = layer(x, place)
        return self.norm(x)

    def new_kv_cache(
        self, batch_size: int, length: int, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache for batch_size sequences of up to length positions, on the model's device.

        dtype: of the keys and values; None: the dtype the model computes in here (autocast's, or the
        weights')."""
        weight = self.tok_embeddings.weight
        if dtype is None:
            device_type = weight.device.type
            is_autocast = torch.is_autocast_enabled(device_type)
            dtype = torch.get_autocast_dtype(device_type) if is_autocast else weight.dtype
        shape = (batch_size, self.args.kv_heads, length, self.args.head_dim)
        return KVCache(self.args.n_layers, shape, weight.device, dtype)

    def num_parameters(self) -> int:
        """Parameters, a tied classifier counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


def flops_per_token(args: ModelArgs, seq_len: int) -> int:
    """Floating-point operations to train on one token: 6 for every weight in a matrix product
    (2 forward, 4 backward; the embedding is a look-up and costs none), and 12·n_layers·dim·seq_len
    for attention's two products, without counting the causal half as saved (PaLM, arXiv 2204.02311,
    appendix B)."""
    per_layer = (
        args.dim * args.head_dim * (2 * args.n_heads + 2 * args.kv_heads)
        + 3 * args.dim * args.ffn_dim
    )
    weights = args.n_layers * per_layer + args.dim * args.vocab_size
    return 6 * weights + 12 * args.n_layers * args.dim * seq_len
