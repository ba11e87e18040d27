"""
Texts as they are told: what each token adds to them, and where they end. No files here.

    for piece in generate(model, tokenizer, ["Once upon", "Tom saw"], temperature=0.8):
        print(piece.prompt, piece.text)
"""

import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

import torch

from generation.engine import Decoder, Decoding, Draft, Sequence
from generation.sampling import BadWords
from model import Transformer
from textdata.tokenizer import Tokenizer


class Story(Sequence):
    """A text that is being told, as text: nothing of a stop string is shown before it is known to be
    none."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: str, sample: int = 0, stops: Collection[str] = ()
    ):
        of_prompt = (
            zlib.crc32(prompt.encode("utf-8", "surrogatepass")) << 32
        )  # other prompts, other draws
        super().__init__(tokenizer.encode(prompt, bos=True), of_prompt + sample)
        self.tokenizer, self.stops = tokenizer, stops
        self.begin()

    def begin(self):
        self.held, self.shown, self.is_cut, self.to_spell = "", "", False, deque()
        self.pieces = self.tokenizer.decode_stream(iter(self.to_spell.popleft, None))
        self.beginning = self.spell(self.tokens)  # the prompt, as the vocabulary spells it

    def spell(self, tokens: Iterable[int | None]) -> str:
        """What these add to the text; None: no more tokens follow."""
        told = ""
        for token in tokens:
            self.to_spell.append(token)
            told += next(self.pieces)
        return told

    def show(self, token: int | None) -> str:
        """The text that is certain with one more token, or without any more. Where a stop string is
        complete, that is the end."""
        self.held += "" if self.is_cut else self.spell([token])
        found = [
            (place + len(stop), place)
            for stop in self.stops
            if (place := self.held.find(stop)) >= 0
        ]
        if found:
            certain, kept, self.is_cut, self.finish = min(found)[1], "", True, "stop"
        else:
            open_length = (
                max((overlap(self.held, stop) for stop in self.stops), default=0)
                if token is not None
                else 0
            )
            certain = len(self.held) - open_length
            kept = self.held[certain:]
        text, self.held = self.held[:certain], kept
        self.shown += text
        return text

    def go_on_from(self, text: str) -> str:
        """Add a text of somebody else's; returns it as the vocabulary spells it here. What a stop string
        cut off is no part of the story."""
        if self.is_cut:
            self.tokens = self.tokenizer.encode(self.beginning + self.shown, bos=True)
            self.start = self.cached = 0
        before = self.tokenizer.decode(self.tokens)
        if text:
            space = "" if self.tokenizer.has_dummy_prefix or not before else " "
            self.tokens += self.tokenizer.encode(space + text, bos=False)
        self.begin()
        return self.beginning[len(before) :]


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of text may begin a stop string: the most that do."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0
    )


class Piece(NamedTuple):
    """What one token adds to one of the texts that are being told."""

    prompt: int  # which of the prompts it goes on from
    sample: int  # which of the samples of that prompt
    token: int | None  # None: the text is over
    text: str
    finish: str = ""  # of the last piece: "stop" or "length"


def check_texts(**arguments):
    for name, texts in arguments.items():
        if isinstance(texts, str) or not isinstance(texts, Collection):
            raise ValueError(f"{name}: must be a list of texts, not {type(texts).__name__}")


def generate(
    model: Transformer, tokenizer: Tokenizer, prompts: Collection[str], num_samples: int = 1, batch_size: int = 16,
    stop: Collection[str] = (), bad_words: Collection[str] = (), tell: Callable | None = None,
    at_once: int = 1, draft: Draft | None = None, cache_dtype: torch.dtype | None = None, **options,
) -> Iterator[Piece]:  # fmt: skip
    """Go on from each of the prompts, num_samples times, batch_size texts at once: pieces as they
    come, of all texts in turn. A text is a function of the seed, its prompt and its sample's number,
    whatever else is told. stop: strings that end a text and are not part of it. options: Decoding's.
    Raises ValueError, with the first piece, for impossible options, and where no token is left to choose."""
    check_texts(prompts=prompts, stop=stop, bad_words=bad_words)
    if num_samples < 1 or not all([*stop, *bad_words]):
        raise ValueError(
            f"num_samples={num_samples}, stop={stop}, bad_words={bad_words}: none may be 0 or empty text"
        )
    stories = [
        Story(tokenizer, prompt, sample, stop)
        for prompt in prompts
        for sample in range(num_samples)
    ]
    place = {id(story): divmod(number, num_samples) for number, story in enumerate(stories)}
    bad = BadWords(bad_words, tokenizer.token_bytes) if bad_words else None
    size = min(batch_size, max(1, len(stories)))
    how = dict(tell=tell, at_once=at_once, draft=draft, cache_dtype=cache_dtype)
    decoder = Decoder(model, Decoding(**options), size, tokenizer.stop_ids, bad, **how)
    for story, token in decoder.run(stories):
        text = story.show(token)
        yield Piece(*place[id(story)], token, text, "" if token is not None else story.finish)
