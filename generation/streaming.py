"""
Generation of text: each token's text as soon as it is certain, and stop strings.

    for chunk in generate(model, tokenizer, ["Once upon", "Tom saw"], temperature=0.8):
        print(chunk.prompt, chunk.text)
"""

import zlib
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from generation.engine import InferenceEngine
from generation.sampling import BannedStrings
from generation.sampling_params import SamplingParams
from generation.sequence import SequenceState
from generation.steps import PreparedModel
from model import Transformer
from textdata.tokenizer import Tokenizer


class TextStream:
    """The text of a sequence that is being generated.

    Text that may be the beginning of a stop string is pending until that is decided.

    Attributes:
        sequence: the tokens, to be passed to an InferenceEngine.
        prompt_text: the text of the sequence before generation, as the vocabulary spells it.
        emitted: the text that push returned so far.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        sample_index: int = 0,
        stop_strings: Collection[str] = (),
    ) -> None:
        prompt_hash = zlib.crc32(prompt.encode("utf-8", "surrogatepass"))
        prompt_ids = tokenizer.encode(prompt, bos=True)
        # Different prompts get different random draws.
        self.sequence = SequenceState(prompt_ids, (prompt_hash << 32) + sample_index)
        self.tokenizer = tokenizer
        self.stop_strings = stop_strings
        self.reset()

    def reset(self) -> None:
        """Make the current tokens the prompt; a new completion starts."""
        self.emitted = ""
        self.pending = ""
        self.stopped_by_string = False
        self._queue: deque[int | None] = deque()  # tokens for the detokenizer
        self._detokenizer = self.tokenizer.decode_stream(iter(self._queue.popleft, None))
        self.prompt_text = self._detokenize(self.sequence.tokens)

    def _detokenize(self, tokens: Iterable[int | None]) -> str:
        """The text that these tokens add; None: no more tokens follow."""
        text = ""
        for token in tokens:
            self._queue.append(token)
            text += next(self._detokenizer)
        return text

    def push(self, token: int | None) -> str:
        """Add a generated token, or None after the last; returns the text that is now certain.

        If a stop string is complete, the sequence ends before it."""
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
            self.sequence.finish = "stop"
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

    def append_user_text(self, text: str) -> str:
        """Append text that was not generated; returns it as the vocabulary spells it.

        Generated tokens from a stop string on are removed first."""
        sequence = self.sequence
        if self.stopped_by_string:
            sequence.tokens = self.tokenizer.encode(self.prompt_text + self.emitted, bos=True)
            sequence.clear_cache()
        before = self.tokenizer.decode(sequence.tokens)
        if text:
            space = "" if self.tokenizer.has_dummy_prefix or not before else " "
            sequence.tokens += self.tokenizer.encode(space + text, bos=False)
        self.reset()
        return self.prompt_text[len(before) :]


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
    streams: dict[SequenceState, tuple[int, int, TextStream]] = {}
    for index, prompt in enumerate(prompts):
        for sample in range(config.num_samples):
            stream = TextStream(tokenizer, prompt, sample, config.stop)
            streams[stream.sequence] = (index, sample, stream)
    banned_strings = None
    if config.bad_words:
        banned_strings = BannedStrings(config.bad_words, tokenizer.token_bytes)
    batch_size = min(config.batch_size, max(1, len(streams)))
    engine = InferenceEngine(model, config, batch_size, tokenizer.stop_ids, banned_strings)
    for sequence, token in engine.generate(streams):
        index, sample, stream = streams[sequence]
        text = stream.push(token)
        finish = "" if token is not None else sequence.finish
        yield TextChunk(index, sample, token, text, finish)


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
