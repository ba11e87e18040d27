"""
The same models, trained and sampled from as others do: what bench.py compares with.

Plain is the loop that a competent person writes: the architecture from PyTorch's own modules and its
fused attention, whole logits, cross-entropy, AdamW, clipping; float32 on a CPU, bfloat16 autocast on
a GPU. Nothing in it comes from our model.py.
"""

import itertools

import requests
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import ModelArgs
from runtime.device import autocast


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = args.n_heads, args.kv_heads, args.head_dim
        self.query = nn.Linear(args.dim, self.heads * self.head_dim, bias=False)
        self.key = nn.Linear(args.dim, self.kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(args.dim, self.kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(self.heads * self.head_dim, args.dim, bias=False)

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        q = rotate(
            self.query(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2), cos, sin
        )
        k = rotate(
            self.key(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2), cos, sin
        )
        v = self.value(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        if self.kv_heads < self.heads:
            k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
            v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, head_dim)
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


def rotate(x, cos, sin):
    """Rotary positions in the layout of transformers and GPT-NeoX: the halves of a head are the pairs."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.attention = Attention(args)
        self.ffn_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.gate = nn.Linear(args.dim, args.ffn_dim, bias=False)
        self.up = nn.Linear(args.dim, args.ffn_dim, bias=False)
        self.down = nn.Linear(args.ffn_dim, args.dim, bias=False)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class PlainLlama(nn.Module):
    def __init__(self, args: ModelArgs):
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

    def hidden(self, tokens):
        x = self.embedding(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x)

    def next_logits(self, tokens):
        """The logits (B, V) of what comes after tokens (B, T)."""
        return self.head(self.hidden(tokens)[:, -1])

    def forward(self, tokens, targets):
        """The mean cross-entropy of targets; both (B, T)."""
        logits = self.head(self.hidden(tokens))  # (B, T, V)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def plain_step(args: ModelArgs, device: str, compile: bool, dtype: str):
    """step(inputs, targets), which trains once on a micro-batch and returns the loss."""
    torch.manual_seed(0)
    model = PlainLlama(args).to(device)
    return textbook_step(model, torch.compile(model) if compile else model, device, dtype)


def transformers_step(args: ModelArgs, device: str, compile: bool, dtype: str):
    """step(inputs, targets) of transformers' LlamaForCausalLM. Raises ImportError where it is not
    installed."""
    model = transformers_model(args, device)
    forward = torch.compile(model) if compile else model

    def loss_of(inputs, targets):
        return forward(
            input_ids=inputs, labels=inputs, use_cache=False
        ).loss  # it shifts the labels itself

    return textbook_step(model, loss_of, device, dtype)


def transformers_model(args: ModelArgs, device: str):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.dim,
            intermediate_size=args.ffn_dim,
            num_hidden_layers=args.n_layers,
            num_attention_heads=args.n_heads,
            num_key_value_heads=args.kv_heads,
            max_position_embeddings=args.max_seq_len,
            rms_norm_eps=args.norm_eps,
            tie_word_embeddings=args.tie_embeddings,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).to(device)


def textbook_step(model, loss_of, device: str, dtype: str):
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    torch.set_float32_matmul_precision("high")

    def step(inputs, targets):
        with autocast(device, dtype):
            loss = loss_of(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


# Telling stories: step() goes on from the token that begins a text for so many tokens, in so many
# texts at once, each token drawn at temperature 1, and returns how many tokens that were.


def plain_decoding(args: ModelArgs, device: str, batch_size: int, length: int):
    """As llama2.c's sample.py: without a cache, the whole text goes through the model for every token."""
    torch.manual_seed(0)
    model = PlainLlama(args).to(device).eval()

    @torch.inference_mode()
    def step() -> int:
        tokens = torch.full((batch_size, 1), 1, device=device)
        for _ in range(length):
            probabilities = F.softmax(model.next_logits(tokens[:, -args.max_seq_len :]), dim=-1)
            tokens = torch.cat((tokens, torch.multinomial(probabilities, num_samples=1)), dim=1)
        return tokens.numel() - batch_size

    return step


def transformers_decoding(args: ModelArgs, device: str, batch_size: int, length: int):
    """transformers' generate(), with its own cache. Raises ImportError where it is not installed."""
    model = transformers_model(args, device).eval()
    begin = torch.full((batch_size, 1), 1, device=device)
    drawn = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)
    drawn |= dict(
        attention_mask=torch.ones_like(begin), min_new_tokens=length, max_new_tokens=length
    )

    def step() -> int:
        return model.generate(begin, **drawn).numel() - batch_size

    return step


def llama_cpp_decoding(path: str, threads: int, context: int, length: int):
    """llama.cpp's server in this process, with the GGUF file at path, asked by HTTP as its users do. Raises
    ImportError where it is not installed."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = path, context, 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    session, seeds = requests.Session(), itertools.count()
    session.trust_env = False  # no proxy
    drawn = dict(prompt=[1], n_predict=length, ignore_eos=True, cache_prompt=False)
    drawn |= dict(samplers=["temperature"], temperature=1.0)

    def step() -> int:
        answer = session.post(
            f"{server.listening_address}/completion", json=drawn | dict(seed=next(seeds))
        )
        answer.raise_for_status()
        return answer.json()["timings"]["predicted_n"]

    return step
