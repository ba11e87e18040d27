"""
Let a model tell stories.

    python sample.py --init_from=resume --start="Once upon a time" --num_samples=3
    python sample.py --init_from=out/model.bin --tokenizer=data/tok4096.model --temperature=0
    python sample.py --start=- --format=jsonl < prompts.txt > stories.jsonl
    python sample.py --interactive=True
    python sample.py --score=mytext.txt
"""

import contextlib
import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from checkpoints.latest import latest_path
from configurator import configure, print_overrides, run_main
from formats.registry import load_model
from generation.beam_search import Hypothesis, beam_search
from generation.compile import prepared
from generation.engine import Decoder, Decoding, decoding_problems
from generation.sampling import BadWords
from generation.scoring import log_probabilities
from generation.streaming import Piece, Story, generate
from model import Transformer
from runtime.device import pick_device, pick_dtype
from textdata.tokenizer import Tokenizer


@dataclass(frozen=True)
class SampleConfig:
    """Print text that goes on from --start, as it is generated."""

    init_from: str = "resume"  # resume: the newest in OUT_DIR; or the path of a model in any format
    out_dir: str = "out"  # where resume looks
    tokenizer: str = (
        ""  # a tokenizer.model or tokenizer.bin; if empty, the one in or beside the model
    )
    start: str = ""  # the text to go on from, or FILE:path of it, or - for a text in each line of standard input
    num_samples: int = 1  # how many samples to draw of each text
    batch_size: int = (
        16  # how many are told at once; the texts depend on it no more than rounding does
    )
    interactive: bool = (
        False  # a story in turns: what you type in a line is added, and the model goes on
    )
    max_new_tokens: int = (
        256  # the longest continuation; beyond the model's context it sees the newest half or more
    )
    min_new_tokens: int = 0  # the text does not end by itself before there are so many tokens
    stop: str = ""  # end before this text; several with | between them, \n for a new line
    bad_words: str = ""  # texts that may not appear in what is told; several with | between them
    temperature: float = 1.0  # 0 always takes the likeliest token, above 1 is wilder
    top_k: int = 300  # draw among the k likeliest tokens; 0: among all
    top_p: float = 1.0  # draw among the likeliest tokens that together reach this probability
    min_p: float = 0.0  # draw among the tokens at least so many times as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: tokens that are there already become less likely
    num_beams: int = (
        1  # above 1: no draw, but the likeliest text that a search with so many beams finds
    )
    length_penalty: float = 1.0  # of beams: they are ranked by log-probability / length**this
    seed: int = 1337  # the same seed tells the same stories
    format: Literal["text", "jsonl", "events"] = (
        "text"  # jsonl: a record a sample; events: one a piece, at once
    )
    logprobs: bool = False  # also ln of the probability the model itself gives each new token
    score: str = ""  # tell no story, but how likely the model finds the text in this file
    # system
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"  # of the matrix products
    quantize: Literal["none", "int8"] = (
        "none"  # int8: 8-bit matrices, on a CPU faster and hardly worse
    )
    compile: bool | None = (
        None  # a faster step, after half a minute or more; None: if the length asked for is worth it
    )

    @property
    def decoding(self) -> dict:
        """The options of decoder.Decoding."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Decoding)}

    def validate(self):
        yield from (f"--{problem}" for problem in decoding_problems(self))
        for name in ("num_samples", "batch_size", "num_beams"):
            if getattr(self, name) < 1:
                yield f"--{name}={getattr(self, name)}: must be at least 1"
        if self.score and (
            self.start or self.stop or self.bad_words or self.num_samples > 1 or self.interactive
        ):
            yield "--score tells no story: leave out --start, --stop, --bad_words, --num_samples and --interactive"
        if self.num_beams > 1 and self.num_samples > self.num_beams:
            yield f"--num_samples={self.num_samples}: a search with --num_beams={self.num_beams} finds no more"
        if not -10 <= self.length_penalty <= 10:
            yield f"--length_penalty={self.length_penalty:g}: must be at least -10 and at most 10"
        if self.num_beams > 1 and (self.repetition_penalty != 1 or self.interactive):
            yield "--num_beams goes without --repetition_penalty and --interactive"
        if self.interactive and (
            self.num_samples > 1 or self.start == "-" or self.format != "text" or self.logprobs
        ):
            yield "--interactive is one story, from the terminal, as text: leave out the options for others"
        if self.compile and (self.score or self.num_beams > 1):
            yield "--compile is for drawing stories: leave it out beside --score and --num_beams"
        if self.quantize != "none" and self.dtype != "float32":
            yield "--quantize=int8 and --dtype are two choices of one thing: leave out one"
        if self.format == "events" and (self.score or self.num_beams > 1 or self.logprobs):
            yield "--format=events goes without --score, --num_beams and --logprobs; take --format=jsonl"
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
    return [
        start.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    ]  # whatever the locale is


def read_text(path: str, option: str) -> str:
    with open(path, "rb") as file:
        return decoded(file.read(), option)


def decoded(content: bytes, option: str) -> str:
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: not UTF-8 text ({error.reason})") from error


RULER = "---------------"  # between stories


WORTH_COMPILING = 10_000  # steps, in which it saves more time than it takes


class Storyteller:
    """A model with the options of how it is to tell so many stories."""

    def __init__(
        self,
        config: SampleConfig,
        model: Transformer,
        tokenizer: Tokenizer,
        device: str,
        stories: int,
    ):
        self.config, self.tokenizer = config, tokenizer
        kind = "int8" if config.quantize == "int8" else pick_dtype(config.dtype, device)
        rows = min(config.batch_size, stories)
        compile = config.compile
        if compile is None and config.num_beams == 1 and not config.score:
            compile = stories / rows * config.max_new_tokens >= WORTH_COMPILING
        if compile:
            print("compiling first; --compile=False begins at once", file=sys.stderr)
        self.engine = prepared(model.to(device), kind, rows, bool(compile))
        bad_words = separated(config.bad_words)
        self.bad_words = BadWords(bad_words, tokenizer.token_bytes) if bad_words else None
        self.model, self.rows, self.total = self.engine["model"], rows, 0  # tokens made

    def pieces(self, prompts: list[str]) -> Iterator[Piece]:
        """What every token of every story adds, as it comes."""
        config = self.config
        options = dict(num_samples=config.num_samples, batch_size=self.rows, **config.decoding)
        words = dict(stop=separated(config.stop), bad_words=separated(config.bad_words))
        for piece in generate(
            tokenizer=self.tokenizer, prompts=prompts, **self.engine, **words, **options
        ):
            self.total += piece.token is not None
            yield piece

    def record(self, prompt: str, pieces: list[Piece]) -> dict:
        """All there is to say about a story that is over."""
        ids = [piece.token for piece in pieces[:-1]]
        told = "".join(piece.text for piece in pieces)
        return self.with_logprobs(
            dict(prompt=prompt, text=told, tokens=ids, finish=pieces[-1].finish)
        )

    def with_logprobs(self, record: dict) -> dict:
        if not self.config.logprobs:
            return record
        prompt_ids = self.tokenizer.encode(record["prompt"], bos=True)
        return record | dict(
            logprobs=self.logprobs([*prompt_ids, *record["tokens"]])[len(prompt_ids) - 1 :]
        )

    def best(self, prompt: str) -> Iterator[dict]:
        """The records of the likeliest continuations that a beam search finds, the best first."""
        config = self.config
        ids, stop_ids = self.tokenizer.encode(prompt, bos=True), self.tokenizer.stop_ids
        found = beam_search(
            self.model, ids, config.num_beams, config.max_new_tokens, config.length_penalty, stop_ids,
            config.num_samples, config.min_new_tokens, self.bad_words.completed_by if self.bad_words else None,
        )  # fmt: skip
        for hypothesis in found:
            self.total += len(hypothesis.tokens)
            yield self.with_logprobs(self.record_of(prompt, hypothesis))

    def record_of(self, prompt: str, hypothesis: Hypothesis) -> dict:
        story, tokens = (
            Story(self.tokenizer, prompt, stops=separated(self.config.stop)),
            hypothesis.tokens,
        )
        for count, token in enumerate([*tokens, None], 1):
            story.show(token)
            if story.finish:
                tokens = tokens[:count]
                break
        finish = story.finish or hypothesis.finish
        return dict(
            prompt=prompt, text=story.shown, tokens=tokens, finish=finish, score=hypothesis.score
        )

    def logprobs(self, ids: list[int]) -> list[float]:
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
        print(
            f"{tokenizer.token_bytes[token].decode('utf-8', 'backslashreplace')!r}\t{logprob:.4f}"
        )


def print_score(record: dict, teller: Storyteller):
    if teller.config.format == "jsonl":
        return print(json.dumps(record))
    figures = f"loss {record['loss']:.4f}, perplexity {record['perplexity']:.2f}"
    print(
        f"{record['tokens']} tokens, {record['bytes']} bytes: {figures}, {record['bits_per_byte']:.4f} bits per byte"
    )
    if teller.config.logprobs:
        print_logprobs(teller.tokenizer, record["ids"], record["logprobs"])


def in_order(pieces: Iterable[Piece], num_samples: int) -> Iterator[Piece]:
    """Pieces of several stories, one story after the other: those of its turn as they come."""
    held, turn = {}, 0
    for piece in pieces:
        held.setdefault(piece.prompt * num_samples + piece.sample, []).append(piece)
        while held.get(turn):
            yield (first := held[turn].pop(0))
            turn += first.token is None


def print_stories(prompts: list[str], teller: Storyteller):
    num_samples, as_text = teller.config.num_samples, teller.config.format == "text"
    pieces = in_order(teller.pieces(prompts), num_samples)
    for number in range(len(prompts) * num_samples):
        prompt, told = prompts[number // num_samples], []
        if as_text:
            print_beginning(prompt, number, teller)
        for piece in pieces:
            told.append(piece)
            if as_text:
                print(piece.text, end="", flush=True)
            if piece.token is None:
                break
        print_record(teller.record(prompt, told), teller)


def print_beginning(prompt: str, number: int, teller: Storyteller):
    print(
        f"{RULER}\n" if number else "",
        Story(teller.tokenizer, prompt).beginning,
        sep="",
        end="",
        flush=True,
    )


def print_record(record: dict, teller: Storyteller):
    """What is still to be printed of a story when it is over."""
    if teller.config.format == "jsonl":
        return print(json.dumps(record), flush=True)
    print()
    if teller.config.logprobs:
        print_logprobs(teller.tokenizer, record["tokens"], record["logprobs"])


def print_best(prompts: list[str], teller: Storyteller):
    found = ((prompt, record) for prompt in prompts for record in teller.best(prompt))
    for number, (prompt, record) in enumerate(found):
        if teller.config.format == "text":
            print_beginning(prompt, number, teller)
            print(record["text"], end="")
        print_record(record, teller)


def print_events(prompts: list[str], teller: Storyteller):
    for piece in teller.pieces(prompts):
        print(json.dumps(piece._asdict()), flush=True)


def tell_in_turns(prompt: str, teller: Storyteller):
    """A story that a person and the model tell in turns. The cache is kept from turn to turn."""
    config, tokenizer = teller.config, teller.tokenizer
    print(
        "Type how the story goes on; an empty line leaves it to the model, Ctrl-D ends.",
        file=sys.stderr,
    )
    # No turn is empty: where the model would end the story, it was asked to go on.
    options = Decoding(**config.decoding | dict(min_new_tokens=max(1, config.min_new_tokens)))
    decoder = Decoder(
        options=options, stop_ids=tokenizer.stop_ids, bad_words=teller.bad_words, **teller.engine
    )
    story = Story(tokenizer, prompt, stops=separated(config.stop))
    print(story.beginning, end="")
    for line in itertools.chain([""] if prompt else [], typed_lines()):
        added = story.go_on_from(line)
        if not sys.stdin.isatty():  # a terminal shows already what is typed
            print(added, end="")
        for _, token in decoder.run([story]):
            teller.total += token is not None
            print(story.show(token), end="", flush=True)
        print()


def typed_lines() -> Iterator[str]:
    while line := sys.stdin.buffer.readline() if sys.stdin else b"":
        yield decoded(line, "standard input").removesuffix("\n")


def main(argv: list[str] | None = None) -> None:
    config, overrides = configure(SampleConfig, argv)
    if sys.stdout is None:
        raise ValueError("standard output is closed")
    sys.stdout.reconfigure(
        errors="replace"
    )  # where the terminal knows fewer characters than the model
    with (
        contextlib.redirect_stdout(sys.stderr)
        if config.format != "text"
        else contextlib.nullcontext()
    ):
        print_overrides(config, overrides)
    device = pick_device(config.device)
    path = latest_path(config.out_dir) if config.init_from == "resume" else config.init_from
    model, tokenizer = load_model(path, config.tokenizer)
    prompts = [] if config.score else read_prompts(config.start)
    teller = Storyteller(
        config, model, tokenizer, device, stories=max(1, len(prompts) * config.num_samples)
    )
    del model  # what is left of it is the teller's
    if config.score:
        return print_score(teller.score(read_text(config.score, f"--score={config.score}")), teller)
    began = time.perf_counter()
    if config.interactive:
        tell_in_turns(prompts[0], teller)
    elif config.num_beams > 1:
        print_best(prompts, teller)
    else:
        (print_events if config.format == "events" else print_stories)(prompts, teller)
    seconds = time.perf_counter() - began
    print(
        f"\n{teller.total} tokens, {teller.total / seconds:.0f} tokens/s on {device}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    run_main(main)
