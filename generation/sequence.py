"""
The state of one sequence while it is generated: its tokens, and how many are in the KV cache.
"""

from collections.abc import Collection


def context_start(length: int, max_seq_len: int) -> int:
    """The position where the model's context starts for a sequence of this length.

    It is 0 while the sequence fits. After that it advances by half a context at a time, so that the
    KV cache is rarely recomputed."""
    stride = max(1, max_seq_len // 2)
    return max(0, -(-(length - max_seq_len) // stride)) * stride


class SequenceState:
    """A sequence of tokens that is being generated.

    Args:
        tokens: the prompt, at least one token.
        sample_index: distinguishes samples of the same prompt; it selects their random draws.
    """

    def __init__(self, tokens: Collection[int], sample_index: int = 0) -> None:
        if not tokens:
            raise ValueError("the prompt is empty: begin with at least one token, such as BOS")
        self.tokens = list(tokens)
        self.sample_index = sample_index
        self.num_generated = 0
        self.finish = ""  # the finish reason: "stop" or "length"; empty while it is generated
        self.context_start = 0  # position of the first token in the model's context
        self.kv_len = 0  # number of tokens, from context_start on, in the KV cache
        self.owner: object = None  # the engine with that cache

    @property
    def num_uncached(self) -> int:
        return len(self.tokens) - self.context_start - self.kv_len

    def truncate_cache(self) -> None:
        """Drop cached positions that the tokens no longer have; at least one stays uncached."""
        self.kv_len = max(0, min(self.kv_len, len(self.tokens) - self.context_start - 1))

    def clear_cache(self, start: int = 0) -> None:
        """Forget the cached positions; the context then starts at start."""
        self.context_start = start
        self.kv_len = 0
