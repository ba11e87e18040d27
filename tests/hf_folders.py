"""
Small Hugging Face folders, made with transformers and tokenizers without any code of cria.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA3_WORDS = WORDS + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(texts: list[str], steps: list, ignore_merges: bool = False) -> Tokenizer:
    """A byte-level encoding that is trained on the texts."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def metaspace(texts: list[str], **options) -> Tokenizer:
    """An encoding with ▁ for a space and tokens for bytes; all possible merges, as Llama 2's."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=150, show_progress=False, limit_alphabet=60)
    trained.train_from_iterator(texts, trainer)
    found = trained.get_vocab()
    names = ["<unk>", "<s>", "</s>", *BYTES, *sorted(found, key=found.__getitem__)]
    vocab = {name: token for token, name in enumerate(names)}
    merges = [
        (name[:cut], name[cut:])
        for name in names[259:]
        for cut in range(1, len(name))
        if name[:cut] in vocab and name[cut:] in vocab
    ]
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True} | options
    tokenizer = Tokenizer(models.BPE(vocab, merges, **options))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def with_tokens(tokenizer: Tokenizer, *names: str) -> Tokenizer:
    """The tokenizer with added tokens that are not special."""
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
    return tokenizer


def special_bytes(texts: list[str]) -> Tokenizer:
    """Trained with the byte tokens as special tokens, and merges of some pairs only."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    prepend = normalizers.Prepend("▁")
    tokenizer.normalizer = normalizers.Sequence([prepend, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False
    )
    words = [word for text in texts for word in text.split(" ")]
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA3 = [
    pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
]
TOKENIZERS: dict[str, Callable[[list[str]], Tokenizer]] = {
    "gpt2": lambda texts: byte_level(texts, [GPT2]),
    "smollm": lambda texts: byte_level(texts, [pre_tokenizers.Digits(True), GPT2]),
    "llama3": lambda texts: with_tokens(byte_level(texts, LLAMA3, True), "[DOMAIN]", " Lily"),
    "metaspace": metaspace,
    "added": lambda texts: with_tokens(metaspace(texts), "[DOMAIN]", "the cat", "é"),
    "no_unknown": lambda texts: metaspace(texts, unk_token=None),
    "special_bytes": special_bytes,
}
# Tokens that begin and end a text.
ENDS = {"gpt2": ("<|endoftext|>",) * 2, "smollm": ("<|endoftext|>", "<|im_end|>")}
ENDS["llama3"] = ENDS["smollm"]


def save_folder(name: str, texts: list[str], folder: Path, padding: int = 0, **config) -> Path:
    """Save a tokenizer of TOKENIZERS and a random model with this many embeddings more."""
    backend = TOKENIZERS[name](texts)
    bos, eos = ENDS.get(name, ("<s>", "</s>"))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "vocab_size": len(fast) + padding,
        "bos_token_id": fast.bos_token_id,
        "eos_token_id": fast.eos_token_id,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | config)))
    model.save_pretrained(folder)
    return folder
