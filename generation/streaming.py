"""
Generation of text: each token's text as soon as it is certain, and stop strings.

    for chunk in generate(model, tokenizer, ["Once upon", "Tom saw"], temperature=0.8):
        print(chunk.prompt, chunk.text)
"""

import dataclasses
import zlib
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from generation.banned_strings import BannedStrings
from generation.engine import InferenceEngine, NewToken
from generation.prepared_model import PreparedModel
from generation.request import Request
from generation.sampling_params import SamplingParams
from model import Transformer
from textdata.tokenizer import Tokenizer


class TextStream:
    """The text of a completion, from its tokens.

    Text that may be the beginning of a stop string is pending until that is decided.

    Attributes:
        prompt_text: the text of the prompt, as the vocabulary spells it.
        emitted: the text of the completion that push returned so far.
    """

    def __init__(
        self, tokenizer: Tokenizer, tokens: list[int], stop_strings: Collection[str] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self.stop_strings = stop_strings
        self.emitted = ""
        self.pending = ""
        self.stopped_by_string = False
        self._queue: deque[int | None] = deque()  # tokens for the detokenizer
        self._detokenizer = self.tokenizer.decode_stream(iter(self._queue.popleft, None))
        self.prompt_text = self._detokenize(tokens)

    def _detokenize(self, tokens: Iterable[int | None]) -> str:
        """The text that these tokens add; None: no more tokens follow."""
        text = ""
        for token in tokens:
            self._queue.append(token)
            text += next(self._detokenizer)
        return text

    def push(self, token: int | None) -> str:
        """Add a generated token, or None after the last; returns the text that is now certain.

        If a stop string is complete, the text ends before it."""
        if not self.stopped_by_string:
            self.pending += self._detokenize([token])
        matches = []  # (end, start) of the stop strings in the text
        for stop in self.stop_strings:
            start = self.pending.find(stop)
            if start >= 0:
                matches.append((start + len(stop), start))
        if matches:
            _, length = min(matches)  # the first that is complete; of several, the longest
            rest = ""
            self.stopped_by_string = True
        else:
            partial = [partial_stop_length(self.pending, stop) for stop in self.stop_strings]
            length = len(self.pending) - (max(partial, default=0) if token is not None else 0)
            rest = self.pending[length:]
        text = self.pending[:length]
        self.pending = rest
        self.emitted += text
        return text

    def push_all(self, tokens: list[int]) -> list[int]:
        """Add all tokens of a completion; returns them up to the end of a stop string."""
        for count, token in enumerate([*tokens, None], 1):
            self.push(token)
            if self.stopped_by_string:
                return tokens[:count]
        return tokens


def partial_stop_length(text: str, stop: str) -> int:
    """The length of the longest end of text that is a proper prefix of the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)


class TextChunk(NamedTuple):
    """The text that one token adds to one of the completions."""

    prompt: int  # index of the prompt
    sample: int  # index of the sample of that prompt
    token: int | None  # None: the completion has ended
    text: str
    finish: str = ""  # finish reason, in the last chunk: "stop" or "length"
    logprob: float | None = None  # of the token, if SamplingParams.logprobs asks for it


@dataclass(frozen=True)
class GenerationConfig(SamplingParams):
    """Options of generate, besides those of SamplingParams. Raises ValueError if one is invalid."""

    num_samples: int = 1  # completions of each prompt
    batch_size: int = 16  # sequences decoded at once
    stop: Collection[str] = ()  # strings that end a completion and are not part of it
    bad_words: Collection[str] = ()  # strings that no completion contains

    def __post_init__(self) -> None:
        check_strings(stop=self.stop, bad_words=self.bad_words)
        if self.num_samples < 1 or not all([*self.stop, *self.bad_words]):
            raise ValueError(
                f"num_samples={self.num_samples}, stop={self.stop}, bad_words={self.bad_words}: "
                "must not be 0 or contain an empty string"
            )
        super().__post_init__()

    def sampling_params(self, tokenizer: Tokenizer, num_embeddings: int) -> SamplingParams:
        """The sampling parameters of the requests: the tokenizer's stop tokens end a completion,
        and a model with more embeddings than tokens gives none of the others."""
        names = [field.name for field in dataclasses.fields(SamplingParams)]
        options = {name: getattr(self, name) for name in names}
        if self.bad_words:
            options["banned_strings"] = BannedStrings(self.bad_words, tokenizer.token_bytes)
        options["banned_tokens"] = tokenizer.ids_without_token(num_embeddings)
        return SamplingParams(**options | {"stop_ids": {*self.stop_ids, *tokenizer.stop_ids}})


def check_strings(**arguments: Collection[str]) -> None:
    """Raise ValueError, naming the argument, if one is not a collection of strings."""
    for name, strings in arguments.items():
        if isinstance(strings, str) or not isinstance(strings, Collection):
            raise ValueError(f"{name}: must be a list of strings, not {type(strings).__name__}")


def generate(
    model: Transformer | PreparedModel,
    tokenizer: Tokenizer,
    prompts: Collection[str],
    **options: Any,
) -> Iterator[TextChunk]:
    """Complete each of the prompts; yields chunks of text as they come, of all completions in turn.

    A completion depends on the seed, its prompt and its sample index, and only by rounding on the
    others in its batch. Raises ValueError with the first chunk for invalid options, and if all
    tokens are banned.

    Args:
        model: a model, or the result of prepare_for_inference for the batch size.
        options: the fields of GenerationConfig.
    """
    check_strings(prompts=prompts)
    config = GenerationConfig(**options)
    args = model.model.args if isinstance(model, PreparedModel) else model.args
    params = config.sampling_params(tokenizer, args.vocab_size)
    completions: dict[Request, Completion] = {}
    for index, prompt in enumerate(prompts):
        tokens = tokenizer.encode_prompt(prompt)
        for sample in range(config.num_samples):
            request = Request(tokens, params, request_index(prompt, sample))
            stream = TextStream(tokenizer, tokens, config.stop)
            completions[request] = Completion(index, sample, stream)
    batch_size = min(config.batch_size, max(1, len(completions)))
    engine = InferenceEngine(model, batch_size)
    for new_token in engine.generate(completions):
        completion = completions[new_token.request]
        yield from push_token(engine, completion, new_token)


class Completion(NamedTuple):
    """The text of one of the completions."""

    prompt: int  # index of the prompt
    sample: int  # index of the sample of that prompt
    stream: TextStream


def push_token(
    engine: InferenceEngine, completion: Completion, new_token: NewToken
) -> Iterator[TextChunk]:
    """Yield the chunks for a new token: two if it completes a stop string."""
    request, token, logprob, _ = new_token
    prompt, sample, stream = completion
    text = stream.push(token)
    finish = "" if token is not None else request.finish_reason
    yield TextChunk(prompt, sample, token, text, finish, logprob)
    if token is not None and stream.stopped_by_string:
        engine.cancel(request, "stop")
        yield TextChunk(prompt, sample, None, "", "stop")


def request_index(prompt: str, sample: int) -> int:
    """The index of a request: different prompts and samples get different random draws."""
    return (zlib.crc32(prompt.encode("utf-8", "surrogatepass")) << 32) + sample


def serialize_streams(chunks: Iterable[TextChunk], num_samples: int) -> Iterator[TextChunk]:
    """Reorder chunks so that completions follow one another; those of the current one at once."""
    pending: dict[int, deque[TextChunk]] = defaultdict(deque)
    current = 0
    for chunk in chunks:
        pending[chunk.prompt * num_samples + chunk.sample].append(chunk)
        while pending[current]:
            first = pending[current].popleft()
            yield first
            if first.token is None:
                current += 1
