"""
The loop that chooses one token after another for several texts at once. No text here, and no files.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from generation.sampling import BadWords, choose, draw_key, first_choice, penalize_repeats
from model import Transformer
from ops.kv_cache import KVCache


@dataclass(frozen=True)
class Decoding:
    """How to go on from a text. Raises ValueError for what cannot be."""

    max_new_tokens: int = 256
    min_new_tokens: int = 0  # the text does not end by itself before there are so many
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 1337

    def __post_init__(self):
        for problem in decoding_problems(self):
            raise ValueError(problem)


def decoding_problems(options) -> Iterator[str]:
    """What is wrong with options of these names."""
    rules = {
        "max_new_tokens": (options.max_new_tokens >= 1, "at least 1"),
        "min_new_tokens": (
            0 <= options.min_new_tokens <= options.max_new_tokens,
            "from 0 to max_new_tokens",
        ),
        "temperature": (options.temperature >= 0, "0 or more"),
        "top_k": (options.top_k >= 0, "0 or more"),
        "top_p": (0 < options.top_p <= 1, "above 0 and at most 1"),
        "min_p": (0 <= options.min_p <= 1, "at least 0 and at most 1"),
        "repetition_penalty": (
            0.01 <= options.repetition_penalty <= 100,
            "at least 0.01 and at most 100",
        ),
        "seed": (0 <= options.seed < 2**63, "at least 0 and below 2**63"),
    }
    for name, (fits, rule) in rules.items():
        if not fits:
            value = getattr(options, name)
            yield (
                f"{name}={value:g}: must be {rule}"
                if isinstance(value, float)
                else f"{name}={value}: must be {rule}"
            )


def window_start(length: int, max_seq_len: int) -> int:
    """Where the model's context begins when length tokens are there: at 0 as long as they fit,
    then it moves on by half a context at a time, so that a cache is refilled rarely."""
    stride = max(1, max_seq_len // 2)
    return max(0, -(-(length - max_seq_len) // stride)) * stride


def check_numbers(logits):
    """Raise ValueError where a model has come to nothing."""
    if logits.isnan().any():
        raise ValueError(
            "the model's logits are not numbers: its weights are damaged, or its training diverged"
        )


class Sequence:
    """A text that is being told, as tokens."""

    def __init__(self, tokens: Collection[int], sample: int = 0):
        if not tokens:
            raise ValueError("nothing to go on from: begin with at least one token, such as BOS")
        self.tokens = list(tokens)
        self.sample = sample  # its number among those with the same beginning
        self.new = 0  # how many of the tokens were chosen
        self.finish = ""  # when it is over: "stop" or "length"
        self.start = self.cached = 0  # how many tokens from start on are in the cache
        self.read_by: Decoder | None = None  # whose cache that is

    @property
    def unread(self) -> int:
        return len(self.tokens) - self.start - self.cached

    def forget_beyond(self):
        """The tokens may be fewer than were there; and one must be left to read."""
        self.cached = max(0, min(self.cached, len(self.tokens) - self.start - 1))


def one_step(
    model: Transformer, cache: KVCache, tokens, starts, end: int, keys, exact: bool = True, **how
):
    """The logits (B·T, V) after each of the tokens (B, T), which follow what each of the cache's rows
    holds, from the positions starts (B,) on and before end; and what first_choice says of them. exact:
    whether the longest row reaches to the end."""
    logits = model.output(model.forward_hidden(tokens, cache, starts, end, exact_kv_len=exact)).flatten(
        0, 1
    )
    return logits, first_choice(logits, keys.flatten(), **how)


def tell(
    model: Transformer,
    cache: KVCache,
    token,
    starts,
    end: int,
    keys,
    stop_ids: tuple[int, ...] = (),
    **how,
):
    """The next tokens (B, N) after each row's token (B, 1), at the position starts (B,); end is one beyond
    the farthest of these. There is a key (B, M) for each token that may be told, but N is 1 here; see
    inference.compiled_tell for one that tells several, of which one of stop_ids can only be the last.
    Returns the last token's logits (B, V), the tokens, and whether the last of them is known (B,): see
    first_choice. Those before it are."""
    logits, (tokens, known) = one_step(model, cache, token, starts, end, keys[:, :1], **how)
    return logits, tokens[:, None], known


DRAFTED = 7  # tokens at a time


class Draft(NamedTuple):
    """A smaller model with the same cache, which proposes tokens that the model itself then checks, all
    in one pass (speculative decoding, arXiv 2211.17192). Both draw with the same noise, so they nearly always agree."""

    model: Transformer
    tell: Callable = tell  # for the smaller model
    check: Callable = one_step  # for the model itself
    tokens: int = DRAFTED  # proposed at a time


READ_AT_ONCE = 8192  # tokens of prompts, with what fills up the shorter ones


class Decoder:
    """A model that tells several texts at once, each in a row of one cache. A row that is over makes
    room for the next text; rows are of different lengths and need not be padded."""

    def __init__(
        self, model: Transformer, options: Decoding, batch_size: int = 1, stop_ids: Collection[int] = (),
        bad_words: BadWords | None = None, use_cache: bool = True, tell: Callable | None = None,
        at_once: int = 1, draft: Draft | None = None, cache_dtype: torch.dtype | None = None,
    ):  # fmt: skip
        """stop_ids end a text. Without the cache the same tokens come, more slowly. tell stands for the
        function of that name, but takes batch_size rows always; it is asked for at_once tokens where that
        may be. These two, draft and cache_dtype: see inference.prepared."""
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        self.model, self.options, self.batch_size = model, options, batch_size
        self.stop_ids, self.bad_words, self.use_cache = tuple(stop_ids), bad_words, use_cache
        self.how = {
            name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p")
        }
        self.tell, self.at_once, self.draft, self.cache_dtype = tell, at_once, draft, cache_dtype
        self.device, self.cache = model.tok_embeddings.weight.device, None
        self.rows: list[Sequence] = []  # whose keys and values the cache's rows hold

    @torch.inference_mode()
    def run(self, sequences: Iterable[Sequence]) -> Iterator[tuple[Sequence, int | None]]:
        """Yield (sequence, token) for every token that is chosen, and (sequence, None) where one is
        over. To end one earlier, set its finish. One that ran before goes on from where it was, if
        it has the rows for itself. Raises ValueError where no token is left to choose."""
        waiting = deque(sequences)
        longest = (
            max((len(sequence.tokens) for sequence in waiting), default=0)
            + self.options.max_new_tokens
        )
        self.reserve(longest + self.draft.tokens if self.draft else longest)
        if self.rows == list(waiting) and all(sequence.read_by is self for sequence in waiting):
            waiting.clear()
        else:
            self.rows = []
        for sequence in waiting:
            sequence.start, sequence.cached, sequence.read_by = 0, 0, self
        for sequence in [*waiting, *self.rows]:
            sequence.new, sequence.finish = 0, ""
            sequence.forget_beyond()
        while waiting or any(not sequence.finish for sequence in self.rows):
            self.admit(waiting)
            for sequence, token in self.choose_next():
                yield from self.add(sequence, token)

    def add(self, sequence: Sequence, token: int) -> Iterator[tuple[Sequence, int | None]]:
        """A token that was chosen for a text. What run yields of it."""
        if sequence.finish:
            return  # it was told beyond the end
        sequence.cached = (
            len(sequence.tokens) - sequence.start
        )  # all these; what is told beyond may not come
        if token in self.stop_ids:
            sequence.finish = "stop"
        else:
            sequence.tokens.append(token)
            sequence.new += 1
            yield sequence, token
        if not sequence.finish and sequence.new == self.options.max_new_tokens:
            sequence.finish = "length"
        if sequence.finish:
            yield sequence, None

    def reserve(self, length: int):
        """Room in the cache for rows of this length."""
        rounded = 1 << (length - 1).bit_length()  # of few lengths, so that few steps are compiled
        length = (
            min(rounded, self.model.args.max_seq_len) + 1
        )  # a cache that is full would be compiled apart
        if not self.cache or self.cache.batch_size != self.batch_size:
            self.cache, self.rows = (
                self.model.new_kv_cache(self.batch_size, length, self.cache_dtype),
                [],
            )
        elif self.cache.length < length:
            self.cache.grow(length)

    def admit(self, waiting: deque[Sequence]):
        """Put the waiting in the place of those that are over; when none waits, close the ranks."""
        over = [row for row, sequence in enumerate(self.rows) if sequence.finish]
        for row in over[: len(waiting)]:
            self.rows[row] = waiting.popleft()
        while waiting and len(self.rows) < self.batch_size:
            self.rows.append(waiting.popleft())
        going_on = self.going_on()
        if going_on and len(going_on) < len(self.rows) and self.tell is None:
            self.rows = [self.rows[row] for row in going_on]
            self.cache.select_rows(torch.tensor(going_on, device=self.device))

    def going_on(self) -> list[int]:
        """The numbers of the rows that are not over."""
        return [row for row, sequence in enumerate(self.rows) if not sequence.finish]

    def choose_next(self) -> list[tuple[Sequence, int]]:
        """The next token of every text that goes on; or of some, as long as not all of each text but
        its last token is in the cache."""
        going_on = [self.rows[row] for row in self.going_on()]
        for sequence in going_on:
            moved_start = window_start(len(sequence.tokens), self.model.args.max_seq_len)
            if moved_start != sequence.start or not self.use_cache:
                sequence.start, sequence.cached = moved_start, 0
        behind = [sequence for sequence in going_on if sequence.unread > 1 or not sequence.cached]
        if behind:
            return self.read_and_choose(self.read_together(behind))
        if self.draft and self.foreseen(going_on, 1 + self.draft.tokens) == 1 + self.draft.tokens:
            return self.draft_and_check()
        return self.tell_on()

    def foreseen(self, going_on: list[Sequence], count: int) -> int:
        """How many tokens, of count, may come next that neither depend on those before them nor lie
        beyond what the cache and the model's context hold."""
        if self.bad_words or self.options.repetition_penalty != 1:
            return 1
        if any(sequence.new < self.options.min_new_tokens for sequence in going_on):
            return 1
        longest = min(self.cache.length - 1, self.model.args.max_seq_len)
        return max(1, min(count, longest - max(sequence.cached for sequence in going_on)))

    def read_together(self, behind: list[Sequence]) -> list[Sequence]:
        """Those to read at once: of similar lengths, and not too much; one alone that is partly read."""
        if partly := [sequence for sequence in behind if sequence.cached]:
            return partly[:1]
        behind = sorted(behind, key=lambda sequence: sequence.unread)
        return [
            sequence for number, sequence in enumerate(behind, 1)
            if number == 1 or number * sequence.unread <= READ_AT_ONCE
        ]  # fmt: skip

    def read_and_choose(self, sequences: list[Sequence]) -> list[tuple[Sequence, int]]:
        logits = self.read(sequences)
        check_numbers(logits)
        return list(zip(sequences, self.pick(sequences, logits), strict=True))

    def read(self, sequences: list[Sequence]):
        """The logits (B, V) after all tokens that are not in the cache, put there in one pass. What
        fills up the shorter texts lies behind them, where nothing attends to it."""
        lengths = torch.tensor([sequence.unread for sequence in sequences])
        tokens = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.int64)
        for row, sequence in enumerate(sequences):
            tokens[row, : lengths[row]] = torch.tensor(sequence.tokens[-lengths[row] :])
        rows = torch.tensor(
            [self.rows.index(sequence) for sequence in sequences], device=self.device
        )
        x = self.model.forward_hidden(
            tokens.to(self.device), self.cache, sequences[0].cached, batch_idx=rows
        )
        return self.model.output(x[torch.arange(len(sequences)), lengths - 1])

    def tell_on(self) -> list[tuple[Sequence, int]]:
        """The next tokens of every text, as many of each."""
        going_on = self.going_on()
        sequences = [self.rows[row] for row in going_on]
        wanted = max(self.options.max_new_tokens - sequence.new for sequence in sequences)
        count = self.foreseen(sequences, min(self.at_once, wanted))
        inputs, how = self.inputs(going_on, count), self.how | dict(stop_ids=self.stop_ids)
        logits, tokens, known = (self.tell or tell)(self.model, self.cache, *inputs, **how)
        if len(going_on) < len(tokens):
            logits, tokens, known = logits[going_on], tokens[going_on], known[going_on]
        before = tokens.shape[1] - 1
        columns = [
            *tokens[:, :-1].t().tolist(),
            self.pick(sequences, logits, (tokens[:, -1], known), before),
        ]
        return [pair for column in columns for pair in zip(sequences, column, strict=True)]

    def inputs(self, going_on: list[int], count: int):
        """Of each row its last token (B, 1), the position of that (B,), one beyond the last of these,
        and the keys of the next count draws (B, count)."""
        size = self.batch_size if self.tell else len(self.rows)
        for sequence in self.rows:
            if sequence.finish:
                sequence.cached = 0  # whatever is read in its row is written over its beginning
        tokens, starts, keys = [0] * size, [0] * size, [[0] * count] * size
        for row in going_on:
            sequence = self.rows[row]
            tokens[row], starts[row], keys[row] = (
                sequence.tokens[-1],
                sequence.cached,
                self.keys(sequence, count),
            )
        end = max(starts) + 1
        tokens, starts = (torch.tensor(numbers, device=self.device) for numbers in (tokens, starts))
        return (
            tokens[:, None],
            starts,
            end,
            torch.tensor(keys, dtype=torch.int32, device=self.device),
        )

    def keys(self, sequence: Sequence, count: int, before: int = 0) -> list[int]:
        """Of the next count draws, after so many that are not among the tokens yet."""
        length = len(sequence.tokens) + before
        return [
            draw_key(self.options.seed, sequence.sample, position)
            for position in range(length, length + count)
        ]

    def draft_and_check(self) -> list[tuple[Sequence, int]]:
        """The next tokens of every text: as many of the proposed ones as the model draws itself, and
        the one that it draws after them."""
        draft = self.draft
        going_on = self.going_on()
        tokens, starts, end, keys = self.inputs(going_on, 1 + draft.tokens)
        while (read := tokens.shape[1]) <= draft.tokens:
            at = (
                tokens[:, -1:].contiguous(),
                starts + read - 1,
                end + read - 1,
                keys[:, read - 1 : -1].contiguous(),
            )
            logits, told, known = draft.tell(draft.model, self.cache, *at, **self.how)
            last = choose(
                logits, keys[:, read - 2 + told.shape[1]], **self.how, first=(told[:, -1], known)
            )
            tokens = torch.cat(
                [tokens, told[:, :-1], last[:, None]], dim=1
            )  # in the end (B, 1 + draft.tokens)
        logits, first = draft.check(
            self.model, self.cache, tokens, starts, end + draft.tokens, keys, **self.how
        )
        drawn = choose(logits, keys.flatten(), **self.how, first=first).view_as(tokens)
        agreeing = (drawn[:, :-1] == tokens[:, 1:]).cumprod(1).sum(1).tolist()
        chosen = []
        for row in going_on:
            chosen += [
                (self.rows[row], token) for token in drawn[row, : 1 + agreeing[row]].tolist()
            ]
        return chosen

    def pick(self, sequences: list[Sequence], logits, first=None, before: int = 0) -> list[int]:
        """The token that each text goes on with, of logits (B, V). first: what is known of it; before:
        how many tokens come before it that are not among the text's yet."""
        penalty = self.options.repetition_penalty
        forbidden = [self.forbidden(sequence) for sequence in sequences]
        if penalty != 1 or any(forbidden):
            logits, first = logits.float().clone(), None
        for row, sequence in enumerate(sequences):
            if penalty != 1:
                seen = torch.tensor([sequence.tokens], device=self.device)
                logits[row : row + 1] = penalize_repeats(logits[row : row + 1], seen, penalty)
            if forbidden[row]:
                logits[row, forbidden[row]] = float("-inf")
                if logits[row].isneginf().all():
                    raise ValueError(
                        "no token is left to go on with: each would end the text or complete a bad word"
                    )
        if first and first[1].all():
            return first[
                0
            ].tolist()  # without the keys, which take as long to make as the rest of this
        keys = [self.keys(sequence, 1, before)[0] for sequence in sequences]
        keys = torch.tensor(keys, dtype=torch.int32, device=self.device)
        return choose(logits, keys, **self.how, first=first).tolist()

    def forbidden(self, sequence: Sequence) -> list[int]:
        """The tokens that may not come next."""
        found = list(self.stop_ids) if sequence.new < self.options.min_new_tokens else []
        return found + self.bad_words.completed_by(sequence.tokens) if self.bad_words else found


def continuation(
    model: Transformer, prompt: Collection[int], stop_ids: Collection[int] = (), **options
) -> list[int]:
    """The tokens that a model goes on with after those of the prompt. options: Decoding's."""
    sequence = Sequence(prompt)
    for _ in Decoder(model, Decoding(**options), stop_ids=stop_ids).run([sequence]):
        pass
    return sequence.tokens[len(prompt) :]
