"""
SplitMix64: a 64-bit integer hash, from which all seeds are derived.
"""


def splitmix64(x: int) -> int:
    """A 64-bit hash in which every bit depends on every bit (the finalizer of SplitMix64)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return x ^ (x >> 31)
