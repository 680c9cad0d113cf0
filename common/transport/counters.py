"""What moved: bytes and seconds per direction, for metrics and for the router's bandwidth estimates."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from common.transport.interface import PartStatus


class Flow:
    """One direction. `busy_s` counts time in which at least one transfer was under way, once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.bytes = 0
        self.parts_ok = 0
        self.parts_failed = 0
        self.in_flight = 0
        self._busy_s = 0.0
        self._since = 0.0
        self._clock = clock

    @property
    def busy_s(self) -> float:
        return self._busy_s + (self._clock() - self._since if self.in_flight else 0.0)

    def begin(self) -> None:
        """A transfer starts; `end` it once."""
        if not self.in_flight:
            self._since = self._clock()
        self.in_flight += 1

    def end(self) -> None:
        self.in_flight -= 1
        assert self.in_flight >= 0
        if not self.in_flight:
            self._busy_s += self._clock() - self._since

    @contextmanager
    def transfer(self) -> Iterator[None]:
        """Wraps a transfer, for `busy_s`."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def count(self, statuses: Sequence[PartStatus], lengths: Sequence[int]) -> None:
        """Adds the outcome of some parts."""
        for status, length in zip(statuses, lengths, strict=True):
            if status is PartStatus.OK:
                self.parts_ok += 1
                self.bytes += length
            else:
                self.parts_failed += 1

    def __repr__(self) -> str:
        return f"Flow(bytes={self.bytes}, busy_s={self.busy_s:.3f}, ok={self.parts_ok}, failed={self.parts_failed})"


class Counters:
    """Of a transport: as its caller sees it. Of a server: as its clients see it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.read = Flow(clock)
        self.write = Flow(clock)
