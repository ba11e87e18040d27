"""
The same models, trained and sampled from with other code. bench.py compares cria with these.

The baseline is the textbook loop: the architecture from PyTorch's own modules with its fused
attention, all logits at once, cross-entropy, AdamW, gradient clipping; float32 on a CPU, bfloat16
autocast on a GPU. It uses nothing of model.py but the hyperparameters.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import ModelArgs
from runtime.device import autocast

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

BOS_ID = 1  # of Llama 2's vocabulary
EOS_ID = 2

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (inputs, targets) -> loss


class Attention(nn.Module):
    """Causal attention with PyTorch's fused kernel."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = args.n_heads, args.kv_heads, args.head_dim
        self.query = nn.Linear(args.dim, self.heads * self.head_dim, bias=False)
        self.key = nn.Linear(args.dim, self.kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(args.dim, self.kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(self.heads * self.head_dim, args.dim, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q = self.query(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.key(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.value(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.kv_heads < self.heads:
            k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
            v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, head_dim)
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x (B, heads, T, head_dim) as in transformers and GPT-NeoX: a pair is made
    of a value from each half of the head."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.attention = Attention(args)
        self.ffn_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.gate = nn.Linear(args.dim, args.ffn_dim, bias=False)
        self.up = nn.Linear(args.dim, args.ffn_dim, bias=False)
        self.down = nn.Linear(args.ffn_dim, args.dim, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class BaselineLlama(nn.Module):
    """Llama from PyTorch's own modules."""

    cos: torch.Tensor  # (max_seq_len, head_dim/2)
    sin: torch.Tensor

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embedding = nn.Embedding(args.vocab_size, args.dim)
        self.blocks = nn.ModuleList(Block(args) for _ in range(args.n_layers))
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.head = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_embeddings:
            self.head.weight = self.embedding.weight
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)
        frequencies = args.rope_theta ** -(torch.arange(0, args.head_dim, 2) / args.head_dim)
        angles = torch.outer(torch.arange(args.max_seq_len), frequencies)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, T) to hidden states (B, T, C)."""
        x = self.embedding(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x)

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits (B, V) of the token after tokens (B, T)."""
        return self.head(self.hidden(tokens)[:, -1])

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of targets; both are (B, T)."""
        logits = self.head(self.hidden(tokens))  # (B, T, V)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def baseline_step(args: ModelArgs, device: str, compile: bool, dtype: str) -> LossFunction:
    """step(inputs, targets), which trains on a micro-batch and returns the loss."""
    torch.manual_seed(0)
    model = BaselineLlama(args).to(device)
    return textbook_step(model, torch.compile(model) if compile else model, device, dtype)


def transformers_step(args: ModelArgs, device: str, compile: bool, dtype: str) -> LossFunction:
    """The same for transformers' LlamaForCausalLM. Raises ImportError if it is not installed."""
    model = transformers_model(args, device)
    forward = torch.compile(model) if compile else model

    def compute_loss(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # transformers shifts the labels itself.
        return forward(input_ids=inputs, labels=inputs, use_cache=False).loss

    return textbook_step(model, compute_loss, device, dtype)


def transformers_model(args: ModelArgs, device: str) -> "LlamaForCausalLM":
    """LlamaForCausalLM of the same shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.ffn_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.max_seq_len,
        rms_norm_eps=args.norm_eps,
        tie_word_embeddings=args.tie_embeddings,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    return LlamaForCausalLM(config).to(device)  # type: ignore[arg-type]


def textbook_step(
    model: nn.Module, compute_loss: LossFunction, device: str, dtype: str
) -> LossFunction:
    """step(inputs, targets) of the textbook loop: autocast, backward, clip, AdamW."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    torch.set_float32_matmul_precision("high")

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with autocast(device, dtype):
            loss = compute_loss(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


# Decoding: each step() generates length tokens after the BOS token in batch_size sequences, with
# temperature 1, and returns the number of new tokens.


def baseline_decoding(
    args: ModelArgs, device: str, batch_size: int, length: int
) -> Callable[[], int]:
    """As llama2.c's sample.py: no cache; the whole sequence passes the model for every token."""
    torch.manual_seed(0)
    model = BaselineLlama(args).to(device).eval()

    @torch.inference_mode()
    def step() -> int:
        tokens = torch.full((batch_size, 1), BOS_ID, device=device)
        for _ in range(length):
            probabilities = F.softmax(model.next_logits(tokens[:, -args.max_seq_len :]), dim=-1)
            tokens = torch.cat((tokens, torch.multinomial(probabilities, num_samples=1)), dim=1)
        return tokens.numel() - batch_size

    return step


def transformers_decoding(
    args: ModelArgs, device: str, batch_size: int, length: int
) -> Callable[[], int]:
    """transformers' generate() with its cache. Raises ImportError if it is not installed."""
    model = transformers_model(args, device).eval()
    prompt = torch.full((batch_size, 1), BOS_ID, device=device)

    def step() -> int:
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
            min_new_tokens=length,
            max_new_tokens=length,
        )
        return tokens.numel() - batch_size

    return step
