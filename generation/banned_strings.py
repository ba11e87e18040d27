"""
Strings that a completion must not contain, in any tokenization.
"""

from collections.abc import Collection


class BannedStrings:
    """Finds the tokens that would complete a banned string.

    Args:
        strings: the banned strings.
        token_bytes: the bytes that each token of the vocabulary adds to the text.
    """

    def __init__(self, strings: Collection[str], token_bytes: list[bytes]) -> None:
        banned = [string.encode() for string in strings]
        self.token_bytes = token_bytes
        self.max_length = max(map(len, banned), default=0)
        self.always_banned = [
            token for token, text in enumerate(token_bytes) if any(b in text for b in banned)
        ]
        self.completions: dict[bytes, list[int]] = {}  # prefix of a string -> completing tokens
        for string in banned:
            for cut in range(1, len(string)):
                prefix, rest = string[:cut], string[cut:]
                tokens = [i for i, text in enumerate(token_bytes) if text.startswith(rest)]
                self.completions[prefix] = self.completions.get(prefix, []) + tokens

    def banned_next_tokens(self, tokens: list[int]) -> list[int]:
        """The tokens that would complete a banned string if they followed these tokens."""
        tail = b"".join(self.token_bytes[token] for token in tokens[-self.max_length :])
        matching = [ids for prefix, ids in self.completions.items() if tail.endswith(prefix)]
        return self.always_banned + [token for ids in matching for token in ids]
