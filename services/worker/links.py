"""How fast bytes come over one kind of link, and how many are asked for: what routing estimates are made of."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SAMPLE_BYTES = 4 << 20  # a busy link is measured every so often
# After so many more bytes, or so much more busy time, what was measured before counts half: bytes for a quick link, which moves
# many in a moment; time for one that became slow, which would take minutes to move them.
HALF_LIFE_BYTES, HALF_LIFE_S = 32 << 20, 2.0
PATIENCE_S = 10.0  # a transfer that takes longer has failed, unless so much is queued that it may
PATIENCE_FACTOR = 4.0


class Link:
    """One link of this worker. The rate is of busy time: transfers that share the link don't slow each other down in it.

    Invariant: `queued_bytes` is what the `queued` blocks under way still wait for.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.bytes_per_s = 0.0  # 0 until measured
        self.queued_bytes = 0
        self._clock = clock
        self._under_way = 0
        self._since = 0.0
        self._bytes = 0  # since then

    @property
    def patience_s(self) -> float:
        """How long a transfer may take before its peer counts as stalled: well over what the queue explains."""
        return max(PATIENCE_S, PATIENCE_FACTOR * self.queued_bytes / self.bytes_per_s if self.bytes_per_s else 0.0)

    @contextmanager
    def queued(self, size: int) -> Iterator["Queued"]:
        """So many bytes are asked for. At the end of the block none are left."""
        queued = Queued(self)
        queued.more(size)
        try:
            yield queued
        finally:
            queued.less(queued.left)
            assert self.queued_bytes >= 0

    @contextmanager
    def moving(self) -> Iterator[Callable[[int], None]]:
        """A transfer; the value takes the bytes that came."""
        if not self._under_way:
            self._since, self._bytes = self._clock(), 0
        self._under_way += 1
        try:
            yield self._came
        finally:
            self._under_way -= 1
            if self._bytes and not self._under_way:
                self._measure()

    def _came(self, size: int) -> None:
        self._bytes += size
        if self._bytes >= SAMPLE_BYTES:
            self._measure()

    def _measure(self) -> None:
        now = self._clock()
        seconds = max(now - self._since, 1e-6)
        rate = self._bytes / seconds
        half_lives = max(self._bytes / HALF_LIFE_BYTES, seconds / HALF_LIFE_S)
        weight = 1.0 - 0.5**half_lives if self.bytes_per_s else 1.0
        self.bytes_per_s += (rate - self.bytes_per_s) * weight
        self._since, self._bytes = now, 0

    def __repr__(self) -> str:
        return f"Link({self.bytes_per_s / 1e6:.1f} MB/s, queued={self.queued_bytes})"


class Queued:
    """What one request still waits for at a link."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.left = 0

    def more(self, size: int) -> None:
        self.left += size
        self._link.queued_bytes += size

    def less(self, size: int) -> None:
        """So many came, or will not."""
        size = min(size, self.left)
        self.left -= size
        self._link.queued_bytes -= size
