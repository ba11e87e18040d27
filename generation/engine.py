"""
The inference engine: prefill, then decode steps over a batch that sequences join and leave.

The engine works on tokens; streaming.py turns them into text.
"""

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch

from generation.sampling import (
    BannedStrings,
    UntruncatedSample,
    apply_repetition_penalty,
    sample_next,
    sample_seed,
)
from generation.sampling_params import SamplingParams
from generation.sequence import SequenceState, context_start
from generation.steps import DraftModel, PreparedModel, StepInputs, check_no_nan, decode_step
from model import Transformer

MAX_PREFILL_TOKENS = 8192  # tokens in one prefill, with the padding of the shorter sequences

# (sequence, token) pairs, in the order of generation.
NewTokens = list[tuple[SequenceState, int]]


class InferenceEngine:
    """Generates several sequences at once, each in a row of one KV cache (continuous batching).

    A finished sequence makes room for the next one. Rows have different lengths.

    Args:
        model: a model, or the result of prepare_for_inference for this batch_size.
        params: applies to all sequences.
        stop_ids: tokens that end a sequence.
        use_cache: False recomputes everything for each token; the tokens are the same.
    """

    def __init__(
        self,
        model: Transformer | PreparedModel,
        params: SamplingParams,
        batch_size: int = 1,
        stop_ids: Collection[int] = (),
        banned_strings: BannedStrings | None = None,
        use_cache: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        self.prepared = model if isinstance(model, PreparedModel) else PreparedModel(model)
        self.model = self.prepared.model
        self.params = params
        self.truncation = params.truncation
        self.batch_size = batch_size
        self.stop_ids = tuple(stop_ids)
        self.banned_strings = banned_strings
        self.use_cache = use_cache
        self.device = self.model.tok_embeddings.weight.device
        self.max_seq_len = self.model.args.max_seq_len
        self.cache = self.model.new_kv_cache(0, 0)  # ensure_capacity replaces it
        self.rows: list[SequenceState] = []  # the sequence in each row of the cache

    @torch.inference_mode()
    def generate(
        self, sequences: Iterable[SequenceState]
    ) -> Iterator[tuple[SequenceState, int | None]]:
        """Yield (sequence, token) for each new token, and (sequence, None) when a sequence ends.

        The caller may end a sequence earlier: it sets sequence.finish. A sequence that this engine
        generated before continues from its KV cache, if the sequences are the same as in the
        previous call. Raises ValueError if all tokens are banned, or if the logits of a prefill are
        NaN; decode steps do not check them."""
        waiting = self._enqueue(list(sequences))
        while waiting or self.active_rows():
            self.schedule(waiting)
            active = [self.rows[row] for row in self.active_rows()]
            self._advance_context(active)
            needs_prefill = [seq for seq in active if seq.num_uncached > 1 or not seq.kv_len]
            if needs_prefill:
                new_tokens = self.prefill(self.prefill_batch(needs_prefill))
            elif self.prepared.draft and self._can_draft(active, self.prepared.draft):
                new_tokens = self.speculative_step(self.prepared.draft)
            else:
                new_tokens = self.decode()
            for sequence, token in new_tokens:
                yield from self._append(sequence, token)

    # Scheduling

    def _enqueue(self, sequences: list[SequenceState]) -> deque[SequenceState]:
        """Start a call of generate; returns the sequences that wait for a row."""
        draft = self.prepared.draft
        longest = max((len(sequence.tokens) for sequence in sequences), default=0)
        longest += self.params.max_new_tokens
        self.ensure_capacity(longest + draft.num_tokens if draft else longest)
        is_cached = all(sequence.owner is self for sequence in sequences)
        if self.rows != sequences or not is_cached:
            self.rows = []
            for sequence in sequences:
                sequence.clear_cache()
                sequence.owner = self
        for sequence in sequences:
            sequence.num_generated = 0
            sequence.finish = ""
            sequence.truncate_cache()
        # Sequences that continue from the previous call are in their rows already.
        return deque() if self.rows else deque(sequences)

    def ensure_capacity(self, length: int) -> None:
        """Allocate or grow the KV cache for sequences of this length."""
        rounded = 1 << (length - 1).bit_length()  # few different lengths mean few compilations
        # One more position, so that kv_len is always below the length of the cache: reading all
        # of it would need another compilation.
        length = min(rounded, self.max_seq_len) + 1
        if self.cache.batch_size != self.batch_size:
            dtype = self.prepared.cache_dtype
            self.cache = self.model.new_kv_cache(self.batch_size, length, dtype)
            self.rows = []
        elif self.cache.length < length:
            self.cache.grow(length)

    def active_rows(self) -> list[int]:
        """The indices of the rows whose sequence has not ended."""
        return [row for row, sequence in enumerate(self.rows) if not sequence.finish]

    def schedule(self, waiting: deque[SequenceState]) -> None:
        """Give free rows to waiting sequences; when none waits, drop the free rows."""
        free = [row for row, sequence in enumerate(self.rows) if sequence.finish]
        for row in free[: len(waiting)]:
            self.rows[row] = waiting.popleft()
        while waiting and len(self.rows) < self.batch_size:
            self.rows.append(waiting.popleft())
        active = self.active_rows()
        is_fixed_size = self.prepared.decode_step is not None
        if active and len(active) < len(self.rows) and not is_fixed_size:
            self.rows = [self.rows[row] for row in active]
            self.cache.select_rows(torch.tensor(active, device=self.device))

    def _advance_context(self, active: list[SequenceState]) -> None:
        """Move the context of sequences that outgrew it; their cache is then computed again."""
        for sequence in active:
            start = context_start(len(sequence.tokens), self.max_seq_len)
            if start != sequence.context_start or not self.use_cache:
                sequence.clear_cache(start)

    def _append(
        self, sequence: SequenceState, token: int
    ) -> Iterator[tuple[SequenceState, int | None]]:
        """Append a generated token to its sequence; yields what generate yields for it."""
        if sequence.finish:
            return  # the token was generated past the end
        # All tokens before this one are in the cache. Later entries may be of rejected tokens.
        sequence.kv_len = len(sequence.tokens) - sequence.context_start
        if token in self.stop_ids:
            sequence.finish = "stop"
        else:
            sequence.tokens.append(token)
            sequence.num_generated += 1
            yield sequence, token
        if not sequence.finish and sequence.num_generated == self.params.max_new_tokens:
            sequence.finish = "length"
        if sequence.finish:
            yield sequence, None

    # Prefill

    def prefill_batch(self, needs_prefill: list[SequenceState]) -> list[SequenceState]:
        """The sequences to prefill together: of similar lengths, up to MAX_PREFILL_TOKENS.

        A partly cached sequence is prefilled alone."""
        if partly_cached := [sequence for sequence in needs_prefill if sequence.kv_len]:
            return partly_cached[:1]
        by_length = sorted(needs_prefill, key=lambda sequence: sequence.num_uncached)
        return [
            sequence
            for count, sequence in enumerate(by_length, 1)
            if count == 1 or count * sequence.num_uncached <= MAX_PREFILL_TOKENS
        ]

    def prefill(self, sequences: list[SequenceState]) -> NewTokens:
        """Run the model on all uncached tokens in one pass and sample the next token of each."""
        lengths = torch.tensor([sequence.num_uncached for sequence in sequences])
        # Shorter sequences are padded at the end, where no token attends to the padding.
        tokens = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.int64)  # (B, T)
        for index, sequence in enumerate(sequences):
            length = sequence.num_uncached
            tokens[index, :length] = torch.tensor(sequence.tokens[-length:])
        rows = [self.rows.index(sequence) for sequence in sequences]
        batch_idx = torch.tensor(rows, device=self.device)
        x = self.model.forward_hidden(
            tokens.to(self.device),
            self.cache,
            start_pos=sequences[0].kv_len,  # all are 0, or there is one sequence
            batch_idx=batch_idx,
        )
        logits = self.model.output(x[torch.arange(len(sequences)), lengths - 1])  # (B, V)
        check_no_nan(logits)
        next_tokens = self.sample_with_constraints(sequences, logits)
        return list(zip(sequences, next_tokens, strict=True))

    # Decode

    def decode(self) -> NewTokens:
        """Generate the next tokens of all active sequences, equally many for each."""
        rows = self.active_rows()
        sequences = [self.rows[row] for row in rows]
        remaining = max(self.params.max_new_tokens - seq.num_generated for seq in sequences)
        limit = min(self.prepared.tokens_per_call, remaining)
        inputs = self.decode_inputs(rows, self._num_tokens_ahead(sequences, limit))
        step = self.prepared.decode_step or decode_step
        output = step(self.model, self.cache, inputs, self.truncation, self.stop_ids)
        logits, tokens, accepted = output  # (B, V), (B, N), (B,)
        if len(rows) < len(tokens):  # a compiled step returns unused rows too
            logits, tokens, accepted = logits[rows], tokens[rows], accepted[rows]
        # All tokens but the last are final. The last may still need truncation.
        last = UntruncatedSample(tokens[:, -1], accepted)
        num_pending = tokens.shape[1] - 1
        last_tokens = self.sample_with_constraints(sequences, logits, last, num_pending)
        columns = [*tokens[:, :-1].t().tolist(), last_tokens]
        return [pair for column in columns for pair in zip(sequences, column, strict=True)]

    def _num_tokens_ahead(self, active: list[SequenceState], limit: int) -> int:
        """How many tokens, at most limit, one call can generate: 1 if a constraint needs the text
        so far, else as many as fit in the KV cache and the model's context."""
        if self.banned_strings or self.params.repetition_penalty != 1:
            return 1
        if any(sequence.num_generated < self.params.min_new_tokens for sequence in active):
            return 1
        capacity = min(self.cache.length - 1, self.max_seq_len)
        return max(1, min(limit, capacity - max(sequence.kv_len for sequence in active)))

    def decode_inputs(self, active_rows: list[int], count: int) -> StepInputs:
        """The last token of each row and the seeds of its next count tokens."""
        size = len(self.rows) if self.prepared.decode_step is None else self.batch_size
        for sequence in self.rows:
            if sequence.finish:
                # A compiled step also computes unused rows; it overwrites their position 0.
                sequence.kv_len = 0
        tokens = [0] * size
        start_pos = [0] * size
        seeds = [[0] * count] * size
        for row in active_rows:
            sequence = self.rows[row]
            tokens[row] = sequence.tokens[-1]
            start_pos[row] = sequence.kv_len
            seeds[row] = self.sample_seeds(sequence, count)
        return StepInputs(
            tokens=torch.tensor(tokens, device=self.device)[:, None],
            start_pos=torch.tensor(start_pos, device=self.device),
            kv_len=max(start_pos) + 1,
            seeds=torch.tensor(seeds, dtype=torch.int32, device=self.device),
        )

    # Speculative decoding

    def _can_draft(self, active: list[SequenceState], draft: DraftModel) -> bool:
        num_tokens = 1 + draft.num_tokens
        return self._num_tokens_ahead(active, num_tokens) == num_tokens

    def speculative_step(self, draft: DraftModel) -> NewTokens:
        """Draft tokens with the small model and verify them in one pass of the target model.

        Returns, for each sequence, the drafted tokens that the target model samples too, and the
        token that it samples after them."""
        rows = self.active_rows()
        inputs = self.decode_inputs(rows, 1 + draft.num_tokens)
        # 1. Draft.
        draft_tokens = self.draft_tokens(draft, inputs)  # (B, 1 + num_tokens)
        # 2. Verify.
        kv_len = inputs.kv_len + draft.num_tokens
        verify_inputs = StepInputs(draft_tokens, inputs.start_pos, kv_len, inputs.seeds)
        output = draft.verify(self.model, self.cache, verify_inputs, self.truncation, ())
        sample = UntruncatedSample(output.tokens.flatten(), output.accepted)
        target_tokens = sample_next(
            output.logits, inputs.seeds.flatten(), self.truncation, sample
        ).view_as(draft_tokens)
        # 3. Return the tokens that agree, and the target model's token after them.
        agrees = target_tokens[:, :-1] == draft_tokens[:, 1:]
        num_agreed = agrees.cumprod(1).sum(1).tolist()
        new_tokens: NewTokens = []
        for row in rows:
            row_tokens = target_tokens[row, : num_agreed[row] + 1].tolist()
            new_tokens += [(self.rows[row], token) for token in row_tokens]
        return new_tokens

    def draft_tokens(self, draft: DraftModel, inputs: StepInputs) -> torch.Tensor:
        """The last token of each row and the draft's tokens after it: (B, 1 + num_tokens)."""
        # seeds[:, i] is for the token after tokens[:, i]; the draft does not need the last.
        # Example: at length 3 the step reads tokens[:, 2] with seeds[:, 2:-1]. If it returns 2
        # tokens, the second has seeds[:, 3].
        tokens = inputs.tokens  # (B, 1)
        while (length := tokens.shape[1]) <= draft.num_tokens:
            # Copies, because a compiled loop requires the strides of a contiguous tensor, and
            # contiguous() keeps those of a slice with one row.
            step_inputs = StepInputs(
                tokens=tokens[:, -1:].clone(memory_format=torch.contiguous_format),
                start_pos=inputs.start_pos + length - 1,
                kv_len=inputs.kv_len + length - 1,
                seeds=inputs.seeds[:, length - 1 : -1].clone(memory_format=torch.contiguous_format),
            )
            output = draft.decode_step(draft.model, self.cache, step_inputs, self.truncation, ())
            seeds = inputs.seeds[:, length - 2 + output.tokens.shape[1]]
            sample = UntruncatedSample(output.tokens[:, -1], output.accepted)
            last = sample_next(output.logits, seeds, self.truncation, sample)
            tokens = torch.cat([tokens, output.tokens[:, :-1], last[:, None]], dim=1)
        return tokens

    # Sampling

    def sample_with_constraints(
        self,
        sequences: list[SequenceState],
        logits: torch.Tensor,
        sample: UntruncatedSample | None = None,
        num_pending: int = 0,
    ) -> list[int]:
        """Apply repetition penalty and banned tokens to logits (B, V) and sample the next tokens.

        Args:
            sample: the result of sample_untruncated for logits, if there is one.
            num_pending: tokens generated before this one that are not appended yet.
        """
        penalty = self.params.repetition_penalty
        banned = [self.banned_tokens(sequence) for sequence in sequences]
        if penalty != 1 or any(banned):
            logits = logits.float().clone()
            sample = None
        for index, sequence in enumerate(sequences):
            if penalty != 1:
                seen = torch.tensor([sequence.tokens], device=self.device)
                logits[index : index + 1] = apply_repetition_penalty(
                    logits[index : index + 1], seen, penalty
                )
            if banned[index]:
                logits[index, banned[index]] = float("-inf")
                if logits[index].isneginf().all():
                    raise ValueError("no token is left to sample: all are stop tokens or banned")
        if sample and sample.accepted.all():
            # Skip computing the seeds, which takes as long as the rest of this method.
            return sample.tokens.tolist()
        seeds = [self.sample_seeds(sequence, 1, num_pending)[0] for sequence in sequences]
        seed_tensor = torch.tensor(seeds, dtype=torch.int32, device=self.device)
        return sample_next(logits, seed_tensor, self.truncation, sample).tolist()

    def banned_tokens(self, sequence: SequenceState) -> list[int]:
        """The tokens that must not come next: early stop tokens, ends of banned strings."""
        is_early = sequence.num_generated < self.params.min_new_tokens
        banned = list(self.stop_ids) if is_early else []
        if self.banned_strings:
            banned += self.banned_strings.banned_next_tokens(sequence.tokens)
        return banned

    def sample_seeds(self, sequence: SequenceState, count: int, num_pending: int = 0) -> list[int]:
        """Seeds of the next count tokens; num_pending tokens before them are sampled but not
        appended."""
        length = len(sequence.tokens) + num_pending
        return [
            sample_seed(self.params.seed, sequence.sample_index, position)
            for position in range(length, length + count)
        ]


def generate_tokens(
    model: Transformer | PreparedModel,
    prompt: Collection[int],
    stop_ids: Collection[int] = (),
    **options: Any,
) -> list[int]:
    """The completion of a prompt, both as tokens. options: those of SamplingParams."""
    sequence = SequenceState(prompt)
    for _ in InferenceEngine(model, SamplingParams(**options), stop_ids=stop_ids).generate(
        [sequence]
    ):
        pass
    return sequence.tokens[len(prompt) :]
