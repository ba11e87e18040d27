"""
A 64-bit integer hash. All seeds and the order of the training data are derived from it.
"""


def splitmix64(x: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, Fast Splittable Pseudorandom Number
    Generators, 2014): every bit of the 64-bit result depends on every bit of x."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return x ^ (x >> 31)
