"""
Let a model tell stories.

    python sample.py --init_from=resume --start="Once upon a time" --num_samples=3
    python sample.py --init_from=out/model.bin --tokenizer=data/tok4096.model --temperature=0
    python sample.py --start=- --format=jsonl < prompts.txt > stories.jsonl
    python sample.py --score=mytext.txt
"""

import contextlib
import functools
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from configurator import configure, print_overrides, run_script
from dataset import mix
from device import autocast, pick_device, pick_dtype
from export import read_model
from generation import BadWords, choose, generate, log_probabilities, until_stop
from model import Transformer
from tokenizer import Tokenizer


@dataclass(frozen=True)
class SampleConfig:
    """Print text that goes on from --start, as it is generated."""

    init_from: str = "resume"  # resume: OUT_DIR/ckpt.pt; or the path of a model in any format
    out_dir: str = "out"  # where resume looks
    tokenizer: str = ""  # a tokenizer.model or tokenizer.bin; if empty, the one in or beside the model
    start: str = ""  # the text to go on from, or FILE:path of it, or - for a text in each line of standard input
    num_samples: int = 1  # how many samples to draw of each text
    max_new_tokens: int = 256  # the longest continuation; beyond the model's context it sees the newest half or more
    min_new_tokens: int = 0  # the text does not end by itself before there are so many tokens
    stop: str = ""  # end before this text; several with | between them, \n for a new line
    bad_words: str = ""  # texts that may not appear in what is told; several with | between them
    temperature: float = 1.0  # 0 always takes the likeliest token, above 1 is wilder
    top_k: int = 300  # draw among the k likeliest tokens; 0: among all
    top_p: float = 1.0  # draw among the likeliest tokens that together reach this probability
    min_p: float = 0.0  # draw among the tokens at least so many times as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: tokens that are there already become less likely
    seed: int = 1337  # the same seed tells the same stories
    format: Literal["text", "jsonl"] = "text"  # jsonl: a record a sample: prompt, text, tokens, finish
    logprobs: bool = False  # also ln of the probability the model itself gives each new token
    score: str = ""  # tell no story, but how likely the model finds the text in this file
    # system
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"  # of the matrix products
    compile: bool = False  # compile the model first; for long texts only

    @property
    def stops(self) -> list[str]:
        return separated(self.stop)

    def problems(self):
        if self.num_samples < 1 or self.max_new_tokens < 1:
            yield "--num_samples and --max_new_tokens must be at least 1"
        if self.temperature < 0:
            yield f"--temperature={self.temperature:g}: must be 0 or more"
        if not 0 <= self.seed < 2**63:
            yield f"--seed={self.seed}: must be at least 0 and below 2**63"
        if self.top_k < 0:
            yield f"--top_k={self.top_k}: must be 0 or more"
        if not 0 < self.top_p <= 1:
            yield f"--top_p={self.top_p:g}: must be above 0 and at most 1"
        if not 0 <= self.min_p <= 1:
            yield f"--min_p={self.min_p:g}: must be at least 0 and at most 1"
        if not 0.01 <= self.repetition_penalty <= 100:
            yield f"--repetition_penalty={self.repetition_penalty:g}: must be at least 0.01 and at most 100"
        if self.score and (self.start or self.stop or self.bad_words or self.num_samples > 1):
            yield "--score tells no story: leave out --start, --stop, --bad_words and --num_samples"
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            yield f"--min_new_tokens={self.min_new_tokens}: must be at least 0 and at most --max_new_tokens"
        for name in ("stop", "bad_words"):
            texts = getattr(self, name)
            if not all(separated(texts)):
                yield f"--{name}={texts}: there is nothing before or after a |"
            if any("\ud800" <= character <= "\udfff" for character in texts):
                yield f"--{name}={texts!r}: not UTF-8 text"


def separated(texts: str) -> list[str]:
    return texts.replace("\\n", "\n").split("|") if texts else []


def read_prompts(start: str) -> list[str]:
    """The texts to go on from. Raises ValueError for what is not text, or is none at all."""
    if start == "-":
        text = decoded(sys.stdin.buffer.read(), "standard input") if sys.stdin else ""
        if not text:
            raise ValueError("--start=-: standard input is empty; give a text in each line")
        return text.removesuffix("\n").split("\n")
    if start.startswith("FILE:"):
        return [read_text(start.removeprefix("FILE:"), f"--start={start}")]
    return [start.encode("utf-8", "surrogateescape").decode("utf-8", "replace")]  # whatever the locale is


def read_text(path: str, option: str) -> str:
    with open(path, "rb") as file:
        return decoded(file.read(), option)


def decoded(content: bytes, option: str) -> str:
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: not UTF-8 text ({error.reason})") from error


class Storyteller:
    """A model with the options of how it is to tell."""

    def __init__(self, config: SampleConfig, model: Transformer, tokenizer: Tokenizer, device: str):
        self.config, self.model, self.tokenizer = config, model.to(device), tokenizer
        self.precision = functools.partial(autocast, device, pick_dtype(config.dtype, device))
        self.choose = functools.partial(
            choose, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p
        )
        self.bad_words = BadWords(separated(config.bad_words), tokenizer.token_bytes) if config.bad_words else None
        self.total = 0  # tokens made

    def tell(self, prompt: str, sample: int) -> Iterator[dict]:
        """A continuation of the prompt: {"text": a piece} as it comes; then the whole record. It is a
        function of the seed, the prompt and the sample's number, whatever else is told."""
        generator = torch.Generator().manual_seed(mix(mix(self.config.seed) + sample))
        pick = functools.partial(self.choose, generator=generator)
        config, prompt_ids, ids = self.config, self.tokenizer.encode(prompt, bos=True), []

        def story():
            yield from prompt_ids
            options = dict(
                min_new_tokens=config.min_new_tokens, repetition_penalty=config.repetition_penalty,
                bad_words=self.bad_words,
            )  # fmt: skip
            with self.precision():
                for token in generate(
                    self.model, prompt_ids, config.max_new_tokens, pick, self.tokenizer.stop_ids, **options
                ):
                    ids.append(token)
                    self.total += 1
                    yield token

        pieces = self.tokenizer.decode_stream(story())
        yield {"text": "".join(next(pieces) for _ in prompt_ids)}  # as the vocabulary spells it
        told, stopped = "", False

        def continuation():
            nonlocal stopped
            stopped = yield from until_stop(pieces, config.stops)

        for piece in continuation():
            told += piece
            yield {"text": piece}
        is_full = len(ids) == config.max_new_tokens and not stopped
        record = dict(prompt=prompt, text=told, tokens=ids, finish="length" if is_full else "stop")
        if config.logprobs:
            record["logprobs"] = self.logprobs([*prompt_ids, *ids])[len(prompt_ids) - 1 :]
        yield record

    def logprobs(self, ids: list[int]) -> list[float]:
        with self.precision():
            return log_probabilities(self.model, ids).tolist()

    def score(self, text: str) -> dict:
        """How likely the model finds a text. Raises ValueError for an empty one."""
        if not text:
            raise ValueError(f"--score={self.config.score}: there is no text in it")
        ids = self.tokenizer.encode(text, bos=True)
        logprobs = self.logprobs(ids)
        nats, size = -math.fsum(logprobs), len(text.encode())
        loss = nats / len(logprobs)
        record = dict(file=self.config.score, tokens=len(logprobs), bytes=size, loss=loss)
        record |= dict(perplexity=math.exp(min(loss, 700)), bits_per_byte=nats / math.log(2) / size)
        return record | (dict(ids=ids[1:], logprobs=logprobs) if self.config.logprobs else {})


def print_logprobs(tokenizer: Tokenizer, ids: list[int], logprobs: list[float]):
    """A line a token: its text, as Python would write it, and its log-probability."""
    for token, logprob in zip(ids, logprobs, strict=True):
        print(f"{tokenizer.token_bytes[token].decode('utf-8', 'backslashreplace')!r}\t{logprob:.4f}")


def print_score(record: dict, teller: Storyteller):
    if teller.config.format == "jsonl":
        return print(json.dumps(record))
    figures = f"loss {record['loss']:.4f}, perplexity {record['perplexity']:.2f}"
    print(f"{record['tokens']} tokens, {record['bytes']} bytes: {figures}, {record['bits_per_byte']:.4f} bits per byte")
    if teller.config.logprobs:
        print_logprobs(teller.tokenizer, record["ids"], record["logprobs"])


def print_stories(prompts: list[str], teller: Storyteller):
    as_text = teller.config.format == "text"
    wanted = ((prompt, sample) for prompt in prompts for sample in range(teller.config.num_samples))
    for number, (prompt, sample) in enumerate(wanted):
        if number and as_text:
            print("---------------")
        for part in teller.tell(prompt, sample):
            if as_text and "tokens" not in part:
                print(part["text"], end="", flush=True)
        if not as_text:
            print(json.dumps(part), flush=True)
            continue
        print()
        if teller.config.logprobs:
            print_logprobs(teller.tokenizer, part["tokens"], part["logprobs"])


def main():
    config, given = configure(SampleConfig)
    if sys.stdout is None:
        raise ValueError("standard output is closed")
    sys.stdout.reconfigure(errors="replace")  # where the terminal knows fewer characters than the model
    with contextlib.redirect_stdout(sys.stderr) if config.format == "jsonl" else contextlib.nullcontext():
        print_overrides(config, given)
    device = pick_device(config.device)
    path = os.path.join(config.out_dir, "ckpt.pt") if config.init_from == "resume" else config.init_from
    model, tokenizer = read_model(path, config.tokenizer)
    teller = Storyteller(config, model, tokenizer, device)
    if config.score:
        return print_score(teller.score(read_text(config.score, f"--score={config.score}")), teller)
    prompts = read_prompts(config.start)
    if config.compile:
        teller.model.compile(dynamic=True)
    began = time.perf_counter()
    print_stories(prompts, teller)
    seconds = time.perf_counter() - began
    print(f"\n{teller.total} tokens, {teller.total / seconds:.0f} tokens/s on {device}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
