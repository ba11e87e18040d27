"""
The rows of a batch: which request is in each, its part of the KV cache and its sampling tensors.

Rows with a request come first. A free row keeps what it has in the cache, so that a later request
that begins with the same tokens (the next turn of a conversation) does not compute them again.
"""

import itertools
import operator

import torch
from torch import Tensor

from generation.request import Request, context_start
from generation.sampling import SamplingTensors, sampling_key
from model import Transformer
from ops.kv_cache import KVCache

MIN_SHARED_PREFIX = 32  # tokens; a shorter common prefix of two requests is computed again


class Row:
    """A row of the KV cache: its request, and the tokens whose keys and values it holds.

    These are the first tokens of the request's context, which begins at context_start."""

    def __init__(self) -> None:
        self.request: Request | None = None
        self.context_start = 0
        self.cached: list[int] = []
        self.freed_at = 0  # the number of requests that had ended before

    @property
    def tokens(self) -> list[int]:
        """The tokens of the request; none in a free row."""
        return self.request.tokens if self.request else []

    @property
    def uncached(self) -> list[int]:
        """The tokens of the request that are not in the cache."""
        return self.tokens[self.context_start + len(self.cached) :]

    @property
    def needs_prefill(self) -> bool:
        """Whether prefill computes the tokens. It checks the logits of a new request for NaN."""
        is_new = self.request is not None and not self.request.num_generated
        return is_new or len(self.uncached) > 1

    def move_context(self, max_seq_len: int) -> None:
        """Move the context of a request that outgrew it; all of it is then computed again."""
        start = context_start(len(self.tokens), max_seq_len)
        if start != self.context_start:
            self.context_start = start
            self.cached = []


class Batch:
    """The rows of an InferenceEngine.

    Args:
        cache_dtype: of the KV cache; None: the model's.
    """

    def __init__(
        self, model: Transformer, batch_size: int, cache_dtype: torch.dtype | None
    ) -> None:
        self.max_seq_len = model.args.max_seq_len
        self.vocab_size = model.args.vocab_size
        self.rows = [Row() for _ in range(batch_size)]
        self.num_active = 0
        self.num_freed = 0
        self.cache = model.new_kv_cache(batch_size, 1, cache_dtype)
        device = model.tok_embeddings.weight.device
        self.sampling = SamplingTensors.new(batch_size, self.vocab_size, device)
        # See first_rows. Cleared where the tensors of the cache are replaced.
        self.views: dict[int, tuple[KVCache, SamplingTensors]] = {}

    @property
    def active(self) -> list[Row]:
        """The rows with a request."""
        return self.rows[: self.num_active]

    def first_rows(self, count: int) -> tuple[KVCache, SamplingTensors]:
        """Views of the first rows of the KV cache and of the sampling tensors."""
        if count not in self.views:
            sampling = SamplingTensors(*(tensor[:count] for tensor in self.sampling))
            self.views[count] = self.cache.first_rows(count), sampling
        return self.views[count]

    @torch.inference_mode()
    def ensure_capacity(self, length: int) -> None:
        """Grow the KV cache for sequences of this length."""
        rounded = 1 << length.bit_length()
        # One more position, so that the number of positions in use is always below the length: a
        # compiled step would have to be compiled again to read all of it.
        length = min(rounded, self.max_seq_len) + 1
        if self.cache.length < length:
            self.cache.grow(length)
            self.views.clear()

    @torch.inference_mode()
    def add(self, request: Request) -> Row:
        """Put a request into a free row; it may share a cached prefix with another row."""
        start = context_start(len(request.tokens), self.max_seq_len)
        tokens = request.tokens[start:-1]  # the last one must be computed for its logits
        lengths = [shared_prefix_length(row.cached, tokens) for row in self.rows]
        source = max(range(len(lengths)), key=lengths.__getitem__)
        shared = lengths[source] if lengths[source] >= MIN_SHARED_PREFIX else 0
        free = range(self.num_active, len(self.rows))
        oldest = min(free, key=lambda index: self.rows[index].freed_at)
        chosen = source if shared and source >= self.num_active else oldest
        row = self.rows[chosen]
        if shared and source != chosen:
            self.cache.copy_row(source, chosen, shared)
        row.context_start = start
        row.cached = tokens[:shared]
        self._move_row(row, self.num_active)
        self._set_sampling(self.num_active, request)
        row.request = request
        self.num_active += 1
        return row

    @torch.inference_mode()
    def free(self, row: Row) -> None:
        """Take the request out of a row. The last active row moves to its index."""
        row.request = None
        self.num_freed += 1
        row.freed_at = self.num_freed
        # A step writes to the position after the cached ones, in free rows too.
        del row.cached[self.max_seq_len - 1 :]
        self.num_active -= 1
        self._move_row(row, self.num_active)

    @torch.inference_mode()
    def fork(self, parents: list[int], requests: list[Request]) -> None:
        """Replace all requests. Request i continues from the cached tokens of row parents[i]."""
        unused = [0] * (len(self.rows) - len(parents))
        device = self.sampling.key.device
        self.cache.select_rows(torch.tensor(parents + unused, device=device))
        self.views.clear()
        sources = [self.rows[parent] for parent in parents]
        self.rows = [Row() for _ in self.rows]
        self.num_active = len(parents)
        for row, source, request in zip(self.active, sources, requests, strict=True):
            row.request = request
            row.context_start = source.context_start
            row.cached = list(source.cached)
            row.move_context(self.max_seq_len)

    def _move_row(self, row: Row, index: int) -> None:
        """Swap a row with the one at this index."""
        old = self.rows.index(row)
        if old != index:
            other = self.rows[index]
            self.cache.swap_rows(old, index, max(len(row.cached), len(other.cached)))
            for tensor in self.sampling:
                tensor[[old, index]] = tensor[[index, old]]
            self.rows[old], self.rows[index] = other, row

    def _set_sampling(self, index: int, request: Request) -> None:
        """Write the sampling parameters of a request into the tensors of its row."""
        params = request.params
        sampling = self.sampling
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
            getattr(sampling, name)[index] = getattr(params, name)
        sampling.key[index] = sampling_key(params.seed, request.index)
        sampling.min_length[index] = request.prompt_length + params.min_new_tokens
        stop_ids = [token for token in params.stop_ids if token < self.vocab_size]
        sampling.is_stop[index] = False
        sampling.is_stop[index, stop_ids] = True
        update_constraints(sampling, index, request, request.tokens)


def shared_prefix_length(a: list[int], b: list[int]) -> int:
    """The number of equal tokens at the beginning of two lists."""
    is_equal = map(operator.eq, a, b)  # it ends with the shorter list
    return sum(itertools.takewhile(bool, is_equal))


def update_constraints(
    sampling: SamplingTensors, index: int, request: Request, tokens: list[int]
) -> None:
    """Write to a row of sampling what depends on the tokens so far: seen and banned tokens."""
    sampling.is_seen[index] = False
    sampling.is_seen[index, tokens] = True
    sampling.bias[index] = 0
    if banned := request.params.banned_next_tokens(tokens):
        sampling.bias[index, banned] = float("-inf")


def has_no_token_left(request: Request, bias: Tensor) -> bool:
    """Whether all tokens are banned by bias (V,), or are stop tokens that would come too early."""
    is_allowed = bias.isfinite()
    if request.num_generated < request.params.min_new_tokens:
        is_allowed[[token for token in request.params.stop_ids if token < len(bias)]] = False
    return not is_allowed.any()
