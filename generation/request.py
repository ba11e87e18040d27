"""
A request: the tokens of a prompt, how to complete them, and the completion so far.
"""

from collections.abc import Collection

from generation.sampling_params import SamplingParams

DEFAULT_PARAMS = SamplingParams()


def context_start(length: int, max_seq_len: int) -> int:
    """The position where the model's context starts for a sequence of this length.

    It is 0 while the sequence fits. After that it advances by half a context at a time, so that the
    KV cache is rarely recomputed."""
    stride = max(1, max_seq_len // 2)
    return max(0, -(-(length - max_seq_len) // stride)) * stride


class Request:
    """A sequence of tokens to complete. An InferenceEngine appends to tokens.

    Args:
        prompt: at least one token, such as BOS.
        index: distinguishes requests with the same prompt; with the seed it selects the random
            draws.

    Attributes:
        finish_reason: "stop", "length", "cancelled" or "error"; empty until the request ends.
        error: a message, for finish_reason "error".
    """

    def __init__(
        self, prompt: Collection[int], params: SamplingParams = DEFAULT_PARAMS, index: int = 0
    ) -> None:
        if not prompt:
            raise ValueError("the prompt is empty: begin with at least one token, such as BOS")
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.params = params
        self.index = index
        self.finish_reason = ""
        self.error = ""
        self.is_cancelled = False

    @property
    def num_generated(self) -> int:
        """The number of new tokens so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def has_constraints(self) -> bool:
        """Whether the tokens so far decide which ones may follow or are penalized."""
        return self.params.repetition_penalty != 1 or self.params.banned_strings is not None

    @property
    def needs_each_token(self) -> bool:
        """Whether something must be done for each token before the next one can be generated."""
        return self.has_constraints or self.params.logprobs is not None

    @property
    def completion(self) -> list[int]:
        """The new tokens so far."""
        return self.tokens[self.prompt_length :]
