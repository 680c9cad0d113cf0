"""Counter-based random numbers: u(seed, position), the same on every machine, in every batch, after every move.

SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014) in its published
form; its n-th output needs no state but the seed. A request's seed is mixed once before it becomes the
generator's seed, so that neighbouring seeds give unrelated streams.

    >>> [splitmix64(1234567, n) for n in range(2)]
    [6457827717110365317, 3203168211198807973]
"""

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def splitmix64(seed: int, n: int) -> int:
    """The n-th output (from 0) of SplitMix64 seeded with `seed`."""
    z = (seed + (n + 1) * _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def uniform(seed: int, position: int) -> float:
    """In [0, 1), 53 bits, for the token at `position` of a sequence (counted from the prompt's first token)."""
    return (splitmix64(splitmix64(seed & _MASK, 0), position) >> 11) * 2.0**-53
