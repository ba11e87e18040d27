"""
Generate text with a model.

    python sample.py --init_from=resume --start="Once upon a time" --num_samples=3
    python sample.py --init_from=out/model.bin --tokenizer=data/tok4096.model --temperature=0
    python sample.py --start=- --format=jsonl < prompts.txt > samples.jsonl
    python sample.py --interactive=True
    python sample.py --score=mytext.txt
"""

import contextlib
import dataclasses
import io
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from checkpoints.latest import latest_path
from configurator import configure, print_overrides, run_main
from formats.registry import load_model
from generation.beam_search import BeamSearchParams, Hypothesis, beam_search
from generation.engine import InferenceEngine
from generation.prepared_model import prepare_for_inference
from generation.request import Request
from generation.sampling_params import sampling_problems
from generation.scoring import score_text, token_logprobs
from generation.streaming import (
    GenerationConfig,
    TextChunk,
    TextStream,
    generate,
    request_index,
    serialize_streams,
)
from model import Transformer
from runtime.device import pick_device, pick_dtype
from textdata.prompts import decode_utf8, read_prompts, read_text, unescape
from textdata.tokenizer import Tokenizer

SEPARATOR = "---------------"  # between samples


@dataclass(frozen=True)
class SampleConfig:
    """Print completions of a prompt as they are generated."""

    # I/O
    init_from: str = "resume"  # resume: the latest checkpoint in OUT_DIR; or a model in any format
    out_dir: str = "out"  # folder that resume looks in
    # tokenizer.model or tokenizer.bin; if empty, the one in the model or in its folder
    tokenizer: str = ""
    # prompt, with \n, \t and \\ as in --stop; FILE:path reads it from a file,
    # - reads one prompt per line of standard input
    start: str = ""
    num_samples: int = 1  # samples per prompt
    batch_size: int = 16  # sequences decoded at once; samples depend on it only by rounding
    interactive: bool = False  # interactive mode: type a line, the model continues the text
    # output format; jsonl: one record per sample; events: one record per token, immediately
    format: Literal["text", "jsonl", "events"] = "text"
    logprobs: bool = False  # also print the natural log-probability of each new token
    score: str = ""  # score the text in this file instead of generating
    # sampling
    max_new_tokens: int = 256  # maximum new tokens; past max_seq_len the context slides by half
    min_new_tokens: int = 0  # suppress end-of-sequence tokens before this many new tokens
    stop: tuple[str, ...] = ()  # stop string; may repeat; \n is a newline, \t a tab, \\ a backslash
    stop_ids: tuple[int, ...] = ()  # id of a further stop token; may repeat; the model's own stay
    bad_words: tuple[str, ...] = ()  # banned string; may repeat; no completion contains it
    temperature: float = 1.0  # sampling temperature; 0: greedy
    # sample among the k most probable tokens; 0: no limit, because top_p adapts to the model
    top_k: int = 0
    top_p: float = 1.0  # sample among the most probable tokens with this total probability
    min_p: float = 0.0  # minimum probability of a token, relative to the most probable one
    repetition_penalty: float = 1.0  # above 1: earlier tokens become less probable
    # beam width; above 1: beam search, which ignores temperature, top_k, top_p, min_p and seed
    num_beams: int = 1
    length_penalty: float = 1.0  # beam search ranks by log-probability / length**length_penalty
    seed: int = 1337  # the same seed gives the same samples
    # system
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"  # of the matrix products
    # int8: 8-bit weights and, on a CPU, 8-bit activations: faster, with hardly any loss of quality
    quantize: Literal["none", "int8"] = "none"
    # compile the decode step in the background; None: after 15 seconds; True: at once; False: never
    compile: bool | None = None

    @property
    def sampling_options(self) -> dict[str, Any]:
        """The options that are also in SamplingParams, and those of generate."""
        names = [field.name for field in dataclasses.fields(GenerationConfig)]
        options = {name: getattr(self, name) for name in names if hasattr(self, name)}
        strings = {
            name: [unescape(text) for text in getattr(self, name)] for name in ("stop", "bad_words")
        }
        return options | strings | {"logprobs": 0 if self.logprobs else None}

    def validate(self) -> Iterator[str]:
        """Yield one sentence for each problem."""
        yield from (f"--{problem}" for problem in sampling_problems(self.sampling_options))
        for name in ("num_samples", "batch_size", "num_beams"):
            if getattr(self, name) < 1:
                yield f"--{name}={getattr(self, name)}: must be at least 1"
        if not -10 <= self.length_penalty <= 10:
            yield f"--length_penalty={self.length_penalty:g}: must be at least -10 and at most 10"
        yield from self._mode_problems()
        yield from self._output_problems()
        for token in self.stop_ids:
            if token < 0:
                yield f"--stop_ids={token}: must be the id of a token, 0 or more"
        for name in ("stop", "bad_words"):
            for text in getattr(self, name):
                if not text:
                    yield f"--{name}: an empty string in the list; leave it out"
                if any("\ud800" <= character <= "\udfff" for character in text):
                    yield f"--{name}={text!r}: not UTF-8 text"

    def _mode_problems(self) -> Iterator[str]:
        uses_beams = self.num_beams > 1
        has_prompt = self.start or self.stop or self.stop_ids or self.bad_words
        if self.score and (has_prompt or self.num_samples > 1 or self.interactive):
            options = "--start, --stop, --stop_ids, --bad_words, --num_samples and --interactive"
            yield f"--score generates no text: leave out {options}"
        if uses_beams and self.num_samples > self.num_beams:
            yield f"--num_samples={self.num_samples}: must be at most --num_beams={self.num_beams}"
        if uses_beams and (self.repetition_penalty != 1 or self.interactive):
            yield "--num_beams does not work with --repetition_penalty and --interactive"
        if self.compile and (self.score or uses_beams):
            yield "--compile is for sampling: leave it out with --score and --num_beams"

    def _output_problems(self) -> Iterator[str]:
        has_other_output = self.format != "text" or self.logprobs
        if self.interactive and (self.num_samples > 1 or self.start == "-" or has_other_output):
            options = "--num_samples, --start=-, --format and --logprobs"
            yield f"--interactive generates one text in the terminal: leave out {options}"
        if self.quantize != "none" and self.dtype != "float32":
            yield "--quantize=int8 and --dtype both set the dtype of the weights: leave out one"
        if self.format == "events" and (self.score or self.num_beams > 1 or self.logprobs):
            options = "--score, --num_beams and --logprobs"
            yield f"--format=events does not work with {options}: use --format=jsonl"


class GenerationSession:
    """A model prepared for the options of the command line, and what it generates."""

    def __init__(
        self,
        config: SampleConfig,
        model: Transformer,
        tokenizer: Tokenizer,
        device: str,
        num_sequences: int,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.num_tokens = 0  # generated so far
        self.batch_size = min(config.batch_size, num_sequences)
        self.options = GenerationConfig(**config.sampling_options | {"batch_size": self.batch_size})
        self.params = self.options.sampling_params(tokenizer, model.args.vocab_size)
        if (largest := max(config.stop_ids, default=0)) >= model.args.vocab_size:
            raise ValueError(
                f"--stop_ids={largest}: the ids of this model's tokens are 0 to "
                f"{model.args.vocab_size - 1}"
            )
        dtype = "int8" if config.quantize == "int8" else pick_dtype(config.dtype, device)
        is_sampling = not config.score and config.num_beams == 1
        compile = config.compile if is_sampling else False
        self.prepared = prepare_for_inference(
            model.to(device), dtype, self.batch_size, compile, draft=is_sampling
        )
        self.model = self.prepared.model

    def stream(self, prompts: list[str]) -> Iterator[TextChunk]:
        """Complete the prompts; yields chunks of all completions in turn, as they come."""
        for chunk in generate(self.prepared, self.tokenizer, prompts, **vars(self.options)):
            self.num_tokens += chunk.token is not None
            yield chunk

    def sample_record(self, prompt: str, chunks: list[TextChunk]) -> dict[str, Any]:
        """The record of a completion, from all of its chunks."""
        record: dict[str, Any] = {
            "prompt": prompt,
            "text": "".join(chunk.text for chunk in chunks),
            "tokens": [chunk.token for chunk in chunks[:-1]],
            "finish": chunks[-1].finish,
        }
        if self.config.logprobs:
            record["logprobs"] = [chunk.logprob for chunk in chunks[:-1]]
        return record

    def beam_records(self, prompt: str) -> Iterator[dict[str, Any]]:
        """The records of the best completions that beam search finds, best first."""
        params = BeamSearchParams(
            num_beams=self.config.num_beams,
            max_new_tokens=self.config.max_new_tokens,
            min_new_tokens=self.config.min_new_tokens,
            length_penalty=self.config.length_penalty,
            num_best=self.config.num_samples,
            banned_tokens=self.params.banned_next_tokens,
        )
        prompt_ids = self.tokenizer.encode_prompt(prompt)
        for hypothesis in beam_search(self.model, prompt_ids, params, self.params.stop_ids):
            self.num_tokens += len(hypothesis.tokens)
            record = self._hypothesis_record(prompt, hypothesis)
            if self.config.logprobs:
                logprobs = token_logprobs(self.model, [*prompt_ids, *record["tokens"]])
                record["logprobs"] = logprobs[len(prompt_ids) - 1 :]
            yield record

    def _hypothesis_record(self, prompt: str, hypothesis: Hypothesis) -> dict[str, Any]:
        """The record of a hypothesis, which ends at a stop string."""
        stream = TextStream(self.tokenizer, self.tokenizer.encode_prompt(prompt), self.options.stop)
        tokens = stream.push_all(hypothesis.tokens)
        return {
            "prompt": prompt,
            "text": stream.emitted,
            "tokens": tokens,
            "finish": "stop" if stream.stopped_by_string else hypothesis.finish,
            "score": hypothesis.score,
        }


def print_logprobs(tokenizer: Tokenizer, ids: list[int], logprobs: list[float]) -> None:
    """Print one line per token: its text as a Python literal, and its log-probability."""
    for token, logprob in zip(ids, logprobs, strict=True):
        text = tokenizer.token_bytes[token].decode("utf-8", "backslashreplace")
        print(f"{text!r}\t{logprob:.4f}")


def print_score(text: str, session: GenerationSession) -> None:
    """Score a text and print the result in the output format. Raises ValueError if it is empty."""
    config = session.config
    if not text:
        raise ValueError(f"--score={config.score}: there is no text in it")
    score = score_text(session.model, session.tokenizer, text)
    if config.format == "jsonl":
        record: dict[str, Any] = {"file": config.score} | score.summary()
        if config.logprobs:
            record |= {"ids": score.ids, "logprobs": score.logprobs}
        print(json.dumps(record))
        return
    print(
        f"{len(score.ids)} tokens, {score.num_bytes} bytes: loss {score.loss:.4f}, "
        f"perplexity {score.perplexity:.2f}, {score.bits_per_byte:.4f} bits per byte"
    )
    if config.logprobs:
        print_logprobs(session.tokenizer, score.ids, score.logprobs)


def print_samples(
    chunks: Iterable[TextChunk], prompts: list[str], session: GenerationSession
) -> None:
    """Print the completions as text or as JSON records, in the order of the prompts."""
    num_samples = session.config.num_samples
    as_text = session.config.format == "text"
    ordered = serialize_streams(chunks, num_samples)
    for index in range(len(prompts) * num_samples):
        prompt = prompts[index // num_samples]
        completion = []
        if as_text:
            print_prompt(prompt, index, session)
        for chunk in ordered:
            completion.append(chunk)
            if as_text:
                print(chunk.text, end="", flush=True)
            if chunk.token is None:
                break
        print_record(session.sample_record(prompt, completion), session)


def print_prompt(prompt: str, index: int, session: GenerationSession) -> None:
    """Print a prompt as the vocabulary spells it, after a separator unless it is the first."""
    separator = f"{SEPARATOR}\n" if index else ""
    tokens = session.tokenizer.encode_prompt(prompt)
    print(separator + TextStream(session.tokenizer, tokens).prompt_text, end="", flush=True)


def print_record(record: dict[str, Any], session: GenerationSession) -> None:
    """Print a JSON record; as text, what follows a completion that is already printed."""
    if session.config.format == "jsonl":
        print(json.dumps(record), flush=True)
        return
    print()
    if session.config.logprobs:
        print_logprobs(session.tokenizer, record["tokens"], record["logprobs"])


def print_beams(prompts: list[str], session: GenerationSession) -> None:
    """Print the completions that beam search finds."""
    records = itertools.chain.from_iterable(map(session.beam_records, prompts))
    for index, record in enumerate(records):
        if session.config.format == "text":
            print_prompt(record["prompt"], index, session)
            print(record["text"], end="")
        print_record(record, session)


def print_events(chunks: Iterable[TextChunk]) -> None:
    """Print each chunk as a JSON record."""
    for chunk in chunks:
        print(json.dumps(chunk._asdict()), flush=True)


def interactive_loop(prompt: str, session: GenerationSession) -> None:
    """Continue a text in turns with the user. The KV cache is kept from turn to turn."""
    tokenizer = session.tokenizer
    print(
        "Type how the text continues; an empty line lets the model continue, Ctrl-D ends.",
        file=sys.stderr,
    )
    # At least one token per turn: the user asked the model to continue.
    min_new_tokens = max(1, session.params.min_new_tokens)
    params = dataclasses.replace(session.params, min_new_tokens=min_new_tokens)
    engine = InferenceEngine(session.prepared)
    tokens = tokenizer.encode_prompt(prompt)
    text = TextStream(tokenizer, tokens).prompt_text
    print(text, end="")
    for line in itertools.chain([""] if prompt else [], stdin_lines()):
        if line:
            space = "" if tokenizer.has_dummy_prefix or not text else " "
            tokens = tokens + tokenizer.encode(space + line, bos=False)
        stream = TextStream(tokenizer, tokens, session.options.stop)
        if not sys.stdin.isatty():  # a terminal has shown the typed text
            print(stream.prompt_text[len(text) :], end="")
        request = Request(tokens, params, request_index(prompt, 0))
        for new_token in engine.generate([request]):
            session.num_tokens += new_token.token is not None
            print(stream.push(new_token.token), end="", flush=True)
            if stream.stopped_by_string:
                engine.cancel(request, "stop")
        print()
        text = stream.prompt_text + stream.emitted
        # Tokens from a stop string on are not part of the text.
        is_whole = not stream.stopped_by_string
        tokens = request.tokens if is_whole else tokenizer.encode_prompt(text)


def stdin_lines() -> Iterator[str]:
    """The lines of standard input as they are typed."""
    while line := sys.stdin.buffer.readline() if sys.stdin else b"":
        yield decode_utf8(line, "standard input").removesuffix("\n")


def main(argv: list[str] | None = None) -> None:
    """Generate text or score it, with the options in argv (None: the command line)."""
    config, overrides = configure(SampleConfig, argv)
    if sys.stdout is None:
        raise ValueError("standard output is closed")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal may lack some characters
    with contextlib.redirect_stdout(sys.stdout if config.format == "text" else sys.stderr):
        print_overrides(config, overrides)
    device = pick_device(config.device)
    path = latest_path(config.out_dir) if config.init_from == "resume" else config.init_from
    model, tokenizer = load_model(path, config.tokenizer)
    prompts = [] if config.score else read_prompts(config.start)
    num_sequences = max(1, len(prompts) * config.num_samples)
    session = GenerationSession(config, model, tokenizer, device, num_sequences)
    del model  # free the weights that the session has converted
    if config.score:
        print_score(read_text(config.score, f"--score={config.score}"), session)
        return
    start_time = time.perf_counter()
    if config.interactive:
        interactive_loop(prompts[0], session)
    elif config.num_beams > 1:
        print_beams(prompts, session)
    elif config.format == "events":
        print_events(session.stream(prompts))
    else:
        print_samples(session.stream(prompts), prompts, session)
    rate = session.num_tokens / (time.perf_counter() - start_time)
    print(f"\n{session.num_tokens} tokens, {rate:.0f} tokens/s on {device}", file=sys.stderr)
    if config.compile and session.prepared.is_compiling:
        print("compiling for later runs; Ctrl-C stops it", file=sys.stderr)
        session.prepared.wait_for_compilation()


if __name__ == "__main__":
    run_main(main)
