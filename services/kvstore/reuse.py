"""An estimate of the best possible hit ratio: what an unlimited store would have found of all blocks asked for.

A block that was asked for or offered before is one that such a store would have. Only blocks whose key's hash is
under a threshold are followed (spatial sampling, SHARDS, FAST '15), so a few thousand stand for all: when they are too
many, the threshold is halved and half of them are forgotten. Each counts for as many as the threshold leaves out.
The error is about 1/sqrt(SAMPLES_MAX), a few percent where few blocks are asked for often.
"""

from collections.abc import Sequence

import numpy as np

from services.kvstore.key_table import words

SAMPLES_MAX = 8192
_MIX = np.uint64(0x9E3779B97F4A7C15)
_RANGE = 1 << 32


class ReuseSample:
    """Belongs to the event loop. Bounded by `samples_max` keys."""

    def __init__(self, samples_max: int = SAMPLES_MAX) -> None:
        self._samples_max = samples_max
        self._threshold = _RANGE
        self._seen: set[int] = set()
        self._asked = 0.0
        self._found = 0.0

    @property
    def best_hit_ratio(self) -> float | None:
        """None before anything was asked for."""
        return self._found / self._asked if self._asked else None

    def asked(self, keys: Sequence[bytes]) -> None:
        """A lookup asks for these blocks."""
        tags = self._sampled(keys)
        weight = _RANGE / self._threshold
        self._asked += len(tags) * weight
        self._found += len(tags & self._seen) * weight
        self._add(tags)

    def offered(self, keys: Sequence[bytes]) -> None:
        """A writer has these blocks: an unlimited store has them from now on."""
        self._add(self._sampled(keys))

    def _sampled(self, keys: Sequence[bytes]) -> set[int]:
        tags = (words(b"".join(keys))[:, 3] * _MIX) >> np.uint64(32)
        return set(tags[tags < self._threshold].tolist())

    def _add(self, tags: set[int]) -> None:
        self._seen |= tags
        while len(self._seen) > self._samples_max:
            self._threshold //= 2
            self._seen = {tag for tag in self._seen if tag < self._threshold}
