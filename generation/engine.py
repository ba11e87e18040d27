"""
The inference engine: continuous batching over the rows of one KV cache.

Requests are added and cancelled at any time. Each step gives free rows to waiting requests, runs
the model on a chunk of the prompts (prefill), and generates a token for each running row (a decode
step) or several for a single row (speculative decoding). The engine works on tokens; streaming.py
turns them into text.
"""

import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from generation.batch import Batch, Row, has_no_token_left, update_constraints
from generation.prepared_model import NUM_DRAFT_TOKENS, PreparedModel
from generation.request import Request
from generation.sampling import SamplingTensors, sample_next
from generation.sampling_params import SamplingParams
from generation.steps import NAN_MESSAGE, StepInputs
from model import Transformer

PREFILL_TOKENS = 256  # of one step while other rows are decoded, with padding
MAX_PREFILL_TOKENS = 2048  # of one step otherwise
MAX_LOOP_WORK = 2**29  # parameters times tokens of one call, for streaming without pauses
COMPILE_AFTER = 15.0  # seconds of uncompiled steps; a shorter job ends before compilation does


class NewToken(NamedTuple):
    """A generated token, or the end of a request."""

    request: Request
    token: int | None  # None: the request has ended, see its finish_reason
    logprob: float | None = None  # natural log-probability in the model's own distribution
    top_logprobs: tuple[tuple[int, float], ...] = ()  # of the most probable tokens


class InferenceEngine:
    """Generates several requests at once.

    Args:
        model: a model, or the result of prepare_for_inference for this batch_size.
        batch_size: the most requests that run at once; others wait.
    """

    def __init__(self, model: Transformer | PreparedModel, batch_size: int = 1) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        self.prepared = model if isinstance(model, PreparedModel) else PreparedModel(model)
        self.model = self.prepared.model
        self.device = self.model.tok_embeddings.weight.device
        self.max_seq_len = self.model.args.max_seq_len
        self.num_parameters = self.model.num_parameters()
        self.batch_size = batch_size
        self.waiting: deque[Request] = deque()
        self.batch = Batch(self.model, batch_size, self.prepared.cache_dtype)
        # One row for each token that speculative decoding verifies.
        self.draft_sampling = SamplingTensors.new(
            1 + NUM_DRAFT_TOKENS, self.batch.vocab_size if self.prepared.draft else 0, self.device
        )
        self.draft_request: Request | None = None  # whose parameters are in draft_sampling
        self.uncompiled_seconds = 0.0  # in steps for which there was no compiled code

    # Requests

    def add(self, request: Request) -> None:
        """Let a request wait for a free row. Raises ValueError for a token that is not in the
        vocabulary."""
        if not 0 <= min(request.tokens) <= max(request.tokens) < self.batch.vocab_size:
            raise ValueError(f"the prompt has tokens outside 0 to {self.batch.vocab_size - 1}")
        self.waiting.append(request)

    def cancel(self, request: Request, reason: str = "cancelled") -> None:
        """End a request. Its row is free at once, and step does not mention it again."""
        request.is_cancelled = True
        request.finish_reason = reason
        if request in self.waiting:
            self.waiting.remove(request)
        for row in self.batch.active:
            if row.request is request:
                self.batch.free(row)

    @property
    def has_requests(self) -> bool:
        """Whether a request runs or waits."""
        return bool(self.waiting) or self.batch.num_active > 0

    def generate(self, requests: Iterable[Request]) -> Iterator[NewToken]:
        """Add requests, and yield their new tokens until all have ended.

        The caller may cancel them meanwhile. Raises ValueError if one cannot be continued."""
        requests = list(requests)
        for request in requests:
            self.add(request)
        try:
            for new_token in self._run():
                request = new_token.request
                if request.is_cancelled:
                    continue
                if new_token.token is None and request.error:
                    raise ValueError(request.error)
                yield new_token
        finally:
            for request in requests:
                if not request.finish_reason:
                    self.cancel(request)

    def _run(self) -> Iterator[NewToken]:
        """The new tokens of all requests until they have ended."""
        while self.has_requests:
            yield from self.step()

    def step(self) -> list[NewToken]:
        """Run all requests for one step; returns their new tokens, in order."""
        with self.prepared.cores_shared():
            return self._step()

    @torch.inference_mode()
    def _step(self) -> list[NewToken]:
        start_time = time.perf_counter()
        batch = self.batch
        while self.waiting and batch.num_active < self.batch_size:
            request = self.waiting.popleft()
            length = len(request.tokens) + request.params.max_new_tokens
            batch.ensure_capacity(length + NUM_DRAFT_TOKENS)
            self._constrain(batch.add(request))
        new_tokens: list[NewToken] = []
        prefilling = [row for row in batch.active if row.needs_prefill]
        is_decoding = len(prefilling) < batch.num_active
        if prefilling:
            new_tokens += self.prefill(
                prefilling, PREFILL_TOKENS if is_decoding else MAX_PREFILL_TOKENS
            )
        if is_decoding and not prefilling and self._can_draft():
            new_tokens += self.speculative_step()
        elif is_decoding:
            new_tokens += self.decode()
        if is_decoding and not self.prepared.is_compiled(batch.num_active, self.batch_size):
            self.uncompiled_seconds += time.perf_counter() - start_time
            if self.uncompiled_seconds > COMPILE_AFTER and batch.num_active:
                self.uncompiled_seconds = 0.0
                self.prepared.start_compiling(batch.num_active, self.batch_size)
        return new_tokens

    def _append(self, row: Row, token: int, logits: Tensor) -> list[NewToken]:
        """Append a token, sampled from logits (V,), to the request of a row."""
        request = row.request
        assert request, "the row is free"
        new_tokens = []
        if token in request.params.stop_ids:
            request.finish_reason = "stop"
        elif not request.error:
            new_tokens.append(new_token(request, token, logits))
            request.tokens.append(token)
            row.move_context(self.max_seq_len)
            if request.num_generated == request.params.max_new_tokens:
                request.finish_reason = "length"
            else:
                self._constrain(row)
        if request.error:
            request.finish_reason = "error"
        if request.finish_reason:
            self.batch.free(row)
            new_tokens.append(NewToken(request, None))
        return new_tokens

    def _constrain(self, row: Row) -> None:
        """Update the penalized and banned tokens of a row for the tokens that it has now."""
        request = row.request
        assert request, "the row is free"
        index = self.batch.rows.index(row)
        if request.has_constraints:
            update_constraints(self.batch.sampling, index, request, request.tokens)
        may_ban_all = request.params.banned_strings or request.params.min_new_tokens
        if may_ban_all and has_no_token_left(request, self.batch.sampling.bias[index]):
            request.error = "no token is left to sample: all are stop tokens or banned"

    # Prefill

    def prefill(self, rows: list[Row], limit: int) -> list[NewToken]:
        """Run the model on the next uncached tokens of these rows, at most limit with padding, and
        sample a token for each row whose prompt is then complete.

        Rows with at most as many tokens as the first one join it."""
        length = min(len(rows[0].uncached), limit)
        batch = rows[:1]
        for row in rows[1:]:
            has_space = len(row.cached) + length < self.batch.cache.length
            is_small = len(row.uncached) <= length and (len(batch) + 1) * length <= limit
            if has_space and is_small:
                batch.append(row)
        chunks = [row.uncached[:length] for row in batch]
        x = self.forward(batch, chunks)  # (B, T, C)
        complete = [index for index, row in enumerate(batch) if not row.uncached]
        if not complete:
            return []
        last = [len(chunks[index]) - 1 for index in complete]
        logits = self.model.output(x[complete, last])  # (rows, V)
        return self._sample_prefilled([batch[index] for index in complete], logits)

    @torch.inference_mode()
    def forward(self, rows: list[Row], chunks: list[list[int]]) -> Tensor:
        """The hidden states (B, T, C) of the next tokens of these rows, which are then cached.

        Shorter chunks are padded at the end, where no token attends to the padding."""
        length = max(map(len, chunks))
        starts = [len(row.cached) for row in rows]
        x = self.model.forward_hidden(
            self._tensor([chunk + [0] * (length - len(chunk)) for chunk in chunks]),
            self.batch.cache,
            start_pos=starts[0] if min(starts) == max(starts) else self._tensor(starts),
            kv_len=max(starts) + length,
            batch_idx=self._tensor([self.batch.rows.index(row) for row in rows]),
        )
        for row, chunk in zip(rows, chunks, strict=True):
            row.cached += chunk
        return x

    def _sample_prefilled(self, rows: list[Row], logits: Tensor) -> list[NewToken]:
        """Sample a token for each of these rows from logits (rows, V)."""
        indices = [self.batch.rows.index(row) for row in rows]
        sampling = SamplingTensors(*(tensor[indices] for tensor in self.batch.sampling))
        sampling.is_active.fill_(True)
        positions = self._tensor([len(row.tokens) for row in rows])
        tokens = sample_next(logits, sampling, positions).tolist()
        # Decode steps do not check this: it would take too long.
        is_nan = logits.isnan().any(-1).tolist()
        new_tokens: list[NewToken] = []
        for index, row in enumerate(rows):
            if is_nan[index] and row.request:
                row.request.error = NAN_MESSAGE
            new_tokens += self._append(row, tokens[index], logits[index])
        return new_tokens

    # Decode

    def decode(self) -> list[NewToken]:
        """Generate a token for each row that has one uncached token."""
        num_active = self.batch.num_active
        step = self.prepared.find_step(num_active, self.batch_size)
        cache, sampling = self.batch.first_rows(step.num_rows)
        rows = self.batch.rows[: step.num_rows]
        is_active = [len(row.uncached) == 1 for row in rows]
        decoding = [row for row, active in zip(rows, is_active, strict=True) if active]
        inputs = StepInputs(
            tokens=self._tensor([row.tokens[-1:] or [0] for row in rows]),
            start_pos=self._tensor([len(row.cached) for row in rows]),
            positions=self._tensor([len(row.tokens) for row in rows]),
            kv_len=1 + max(len(row.cached) for row in decoding),
            sampling=sampling._replace(is_active=self._tensor(is_active)),
        )
        count = min(step.max_tokens, self._num_loop_tokens(decoding))
        output = step.run(self.model, cache, inputs, count)
        new_tokens: list[NewToken] = []
        for column in output.tokens[:, :count].t().tolist():
            if not all(row.request for row in decoding):
                break  # the loop has ended with a stop token
            for row in decoding:
                row.cached += row.uncached
            for index, row in enumerate(rows):
                if is_active[index]:
                    new_tokens += self._append(row, column[index], output.logits[index])
        return new_tokens

    def _num_loop_tokens(self, rows: list[Row]) -> int:
        """How many tokens of these rows one call of a compiled step may generate."""
        requests = [row.request for row in rows if row.request]
        if len(rows) < self.batch.num_active or any(r.needs_each_token for r in requests):
            return 1
        work = self.num_parameters * len(rows)
        remaining = min(r.params.max_new_tokens - r.num_generated for r in requests)
        space = self.max_seq_len - max(len(row.cached) for row in rows)
        return max(1, min(MAX_LOOP_WORK // work, remaining, space))

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, device=self.device)

    # Speculative decoding

    def _can_draft(self) -> bool:
        """Whether a single row is decoded, and has space for the tokens to verify."""
        space = self.max_seq_len - len(self.batch.rows[0].cached)
        return bool(self.prepared.draft) and self.batch.num_active == 1 and space > NUM_DRAFT_TOKENS

    def speculative_step(self) -> list[NewToken]:
        """Draft tokens with the small model and verify them in one pass of the target model.

        Returns the drafted tokens that the target model samples too, and the one that it samples
        after them."""
        draft = self.prepared.draft
        row = self.batch.rows[0]
        request = row.request
        assert draft and request, "_can_draft is false"
        cache, _ = self.batch.first_rows(1)
        # 1. Draft. Row i of the sampling tensors is for the token after tokens[i].
        self._set_draft_sampling(request)
        tokens = [request.tokens[-1]]
        step = draft.find_step(1, 1)
        max_tokens = 1 if request.has_constraints else step.max_tokens
        while len(tokens) <= NUM_DRAFT_TOKENS:
            index = len(tokens) - 1
            if request.has_constraints:
                context = request.tokens + tokens[1:]
                update_constraints(self.draft_sampling, index, request, context)
            count = min(max_tokens, NUM_DRAFT_TOKENS - index)
            inputs = self._draft_inputs(row, tokens[-1:], index)
            tokens += step.run(draft.model, cache, inputs, count).tokens[0, :count].tolist()
        if request.has_constraints:
            context = request.tokens + tokens[1:]
            update_constraints(self.draft_sampling, NUM_DRAFT_TOKENS, request, context)
        # 2. Verify.
        step = self.prepared.find_step(1, 1, len(tokens))
        output = step.run(self.model, cache, self._draft_inputs(row, tokens, 0), 1)
        # 3. Append the tokens that agree, and the target model's token after them.
        new_tokens: list[NewToken] = []
        for index, token in enumerate(output.tokens[0].tolist()):
            row.cached += row.uncached
            new_tokens += self._append(row, token, output.logits[index])
            if request.finish_reason or tokens[index + 1 : index + 2] != [token]:
                break
        return new_tokens

    def _set_draft_sampling(self, request: Request) -> None:
        """Copy the sampling parameters of the first row for each of the tokens to verify."""
        if self.draft_request is not request:
            self.draft_request = request
            for tensor, source in zip(self.draft_sampling, self.batch.sampling, strict=True):
                tensor.copy_(source[:1].expand_as(tensor))
            self.draft_sampling.is_active.fill_(True)

    def _draft_inputs(self, row: Row, tokens: list[int], index: int) -> StepInputs:
        """The inputs for tokens of a row, from number index on of the tokens to verify."""
        end = index + len(tokens)
        position = len(row.tokens)
        return StepInputs(
            tokens=self._tensor([tokens]),
            start_pos=self._tensor([len(row.cached) + index]),
            positions=torch.arange(position + index, position + end, device=self.device),
            kv_len=len(row.cached) + end,
            sampling=SamplingTensors(*(tensor[index:end] for tensor in self.draft_sampling)),
        )


def new_token(request: Request, token: int, logits: Tensor) -> NewToken:
    """A token sampled from logits (V,), with the log-probabilities that its request asks for."""
    count = request.params.logprobs
    if count is None:
        return NewToken(request, token)
    logprobs = logits.float().log_softmax(-1)
    top = logprobs.topk(min(count, len(logprobs)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return NewToken(request, token, logprobs[token].item(), tuple(pairs))


def generate_tokens(
    model: Transformer | PreparedModel, prompt: Collection[int], **options: Any
) -> list[int]:
    """The completion of a prompt, both as tokens. options: those of SamplingParams."""
    request = Request(prompt, SamplingParams(**options))
    for _ in InferenceEngine(model).generate([request]):
        pass
    return request.completion
