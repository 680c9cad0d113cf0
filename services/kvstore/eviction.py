"""Which block goes first: pure, no clock.

A policy sees slots, offered when they may be evicted, and the tick of their last use. It doesn't
know why a slot may or may not go: `victim` asks. `LeafLru` takes the least recently used.
"""

import heapq
from array import array
from collections.abc import Callable
from typing import Protocol


class EvictionPolicy(Protocol):
    """Order of eviction over slot numbers."""

    def grow(self, slots: int) -> None:
        """Slot numbers up to `slots` may come."""
        ...

    def touch(self, slot: int, tick: int) -> None:
        """The slot was used or filled at `tick`, which never decreases."""
        ...

    def tick(self, slot: int) -> int:
        """Last use of a slot."""
        ...

    def offer(self, slot: int) -> None:
        """The slot may be evictable from now on. Idempotent."""
        ...

    def victim(self, evictable: Callable[[int], bool]) -> int | None:
        """The slot to evict next, which is then no longer offered; None when there is none."""
        ...

    def coldest_tick(self, evictable: Callable[[int], bool]) -> int | None:
        """Last use of the slot that `victim` would return."""
        ...


class LeafLru:
    """Least recently used first. A heap with at most one entry per slot, refreshed when popped."""

    def __init__(self) -> None:
        self._ticks = array("Q")
        self._heap: list[tuple[int, int]] = []
        self._offered = bytearray()

    def grow(self, slots: int) -> None:
        missing = slots - len(self._ticks)
        if missing > 0:
            self._ticks.extend(array("Q", bytes(8 * missing)))
            self._offered.extend(bytes(missing))

    def touch(self, slot: int, tick: int) -> None:
        self._ticks[slot] = tick

    def tick(self, slot: int) -> int:
        return self._ticks[slot]

    def offer(self, slot: int) -> None:
        if not self._offered[slot]:
            self._offered[slot] = 1
            heapq.heappush(self._heap, (self._ticks[slot], slot))

    def victim(self, evictable: Callable[[int], bool]) -> int | None:
        if self.coldest_tick(evictable) is None:
            return None
        _, slot = heapq.heappop(self._heap)
        self._offered[slot] = 0
        return slot

    def coldest_tick(self, evictable: Callable[[int], bool]) -> int | None:
        heap = self._heap
        while heap:
            tick, slot = heap[0]
            if not evictable(slot):
                heapq.heappop(heap)
                self._offered[slot] = 0
            elif tick != self._ticks[slot]:
                heapq.heapreplace(heap, (self._ticks[slot], slot))
            else:
                return tick
        return None
