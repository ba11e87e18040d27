"""
The options that decide how the next token is sampled, and their valid ranges.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from generation.banned_strings import BannedStrings


@dataclass(frozen=True)
class SamplingParams:
    """How to complete a sequence. Raises ValueError for a value out of range."""

    max_new_tokens: int = 256
    min_new_tokens: int = 0  # stop tokens are suppressed before this many new tokens
    temperature: float = 1.0  # 0: greedy
    # The truncations apply in this order, each to the tokens that the previous one left.
    top_k: int = 0  # 0: no limit, the default everywhere: top_p adapts to the distribution
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 1337
    stop_ids: Collection[int] = ()  # tokens that end a completion
    banned_strings: BannedStrings | None = None
    banned_tokens: Collection[int] = ()  # such as ids without a token, which pad an embedding
    # None: no log-probabilities; N: of each new token and of the N most probable ones
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for problem in sampling_problems(vars(self)):
            raise ValueError(problem)

    def banned_next_tokens(self, tokens: list[int]) -> list[int]:
        """The tokens that must not follow these tokens."""
        banned = self.banned_strings.banned_next_tokens(tokens) if self.banned_strings else []
        return [*self.banned_tokens, *banned]


def sampling_problems(options: Mapping[str, Any]) -> Iterator[str]:
    """Yield one sentence, beginning with NAME=VALUE, for each value that is out of range.

    Args:
        options: values by name, with at least the numbers of SamplingParams.
    """
    rules = {
        "max_new_tokens": (options["max_new_tokens"] >= 1, "at least 1"),
        "min_new_tokens": (
            0 <= options["min_new_tokens"] <= options["max_new_tokens"],
            "from 0 to max_new_tokens",
        ),
        "temperature": (0 <= options["temperature"] <= 1e4, "at least 0 and at most 10000"),
        "top_k": (0 <= options["top_k"] < 2**31, "0 or more"),
        "top_p": (0 < options["top_p"] <= 1, "above 0 and at most 1"),
        "min_p": (0 <= options["min_p"] <= 1, "at least 0 and at most 1"),
        "repetition_penalty": (
            0.01 <= options["repetition_penalty"] <= 100,
            "at least 0.01 and at most 100",
        ),
        "seed": (0 <= options["seed"] < 2**63, "at least 0 and below 2**63"),
    }
    for name, (is_valid, rule) in rules.items():
        if not is_valid:
            value = options[name]
            text = f"{value:g}" if isinstance(value, float) else str(value)
            yield f"{name}={text}: must be {rule}"
