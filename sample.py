"""
Let a model tell stories.

    python sample.py --init_from=resume --start="Once upon a time" --num_samples=3
    python sample.py --init_from=out/model.bin --tokenizer=data/tok4096.model --temperature=0
"""

import functools
import os
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch

from configurator import configure, print_overrides, run_script
from device import autocast, pick_device, pick_dtype
from export import read_model
from generation import choose, generate


@dataclass(frozen=True)
class SampleConfig:
    """Print text that goes on from --start, as it is generated."""

    init_from: str = "resume"  # resume: OUT_DIR/ckpt.pt; or the path of a model in any format
    out_dir: str = "out"  # where resume looks
    tokenizer: str = ""  # a tokenizer.model or tokenizer.bin; if empty, the one in or beside the model
    start: str = ""  # the text to go on from, or FILE:path of it
    num_samples: int = 1  # how many samples to draw
    max_new_tokens: int = 256  # the longest continuation, in tokens
    temperature: float = 1.0  # 0 always takes the likeliest token, above 1 is wilder
    top_k: int = 300  # draw among the k likeliest tokens; 0: among all
    top_p: float = 1.0  # draw among the likeliest tokens that together reach this probability
    seed: int = 1337  # the same seed tells the same stories
    # system
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"  # of the matrix products
    compile: bool = False  # compile the model first; for long texts only

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


def read_start(start: str) -> str:
    if not start.startswith("FILE:"):
        return start.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # whatever the locale is
    path = start.removeprefix("FILE:")
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"--start={start}: not UTF-8 text ({error.reason})") from error


def main():
    config, given = configure(SampleConfig)
    sys.stdout.reconfigure(errors="replace")  # where the terminal knows fewer characters than the model
    print_overrides(config, given)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    path = os.path.join(config.out_dir, "ckpt.pt") if config.init_from == "resume" else config.init_from
    model, tokenizer = read_model(path, config.tokenizer)
    prompt = tokenizer.encode(read_start(config.start), bos=True)
    model.to(device)
    if config.compile:
        model.compile(dynamic=True)
    generator = torch.Generator().manual_seed(config.seed)
    pick = functools.partial(
        choose, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, generator=generator
    )
    new_tokens, began = 0, time.perf_counter()
    for number in range(config.num_samples):
        if number:
            print("---------------")

        def story():
            nonlocal new_tokens
            yield from prompt
            with autocast(device, dtype):
                for token in generate(model, prompt, config.max_new_tokens, pick, tokenizer.stop_ids):
                    new_tokens += 1
                    yield token

        for text in tokenizer.decode_stream(story()):
            print(text, end="", flush=True)
        print()
    seconds = time.perf_counter() - began
    print(f"\n{new_tokens} tokens, {new_tokens / seconds:.0f} tokens/s on {device}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
