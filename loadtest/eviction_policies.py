"""Eviction policies to compare the store's own with. All evict blocks without children only, so chains stay prefix-closed."""

import numpy as np

from loadtest.eviction_ghost import Ghost
from services.kvstore.column import NONE, Column, Slots
from services.kvstore.eviction import NewcomersFirst
from services.kvstore.leaf_queue import LeafQueue

COUNT_MAX = 15


class Lru(NewcomersFirst):
    """The block that was used, or came on offer, longest ago."""

    def insert(self, slot: int, parent: int | None, tick: int) -> None:
        super().insert(slot, None, tick)

    def touch(self, slots: Slots, tick: int) -> None:
        self._ticks.array[slots] = tick
        last = int(slots[-1])
        if self.on_offer(last):
            self.withdraw(last)
            self.offer(last)


class TwoQueues(NewcomersFirst):
    """2Q: newcomers first, and a child of a proven block is a newcomer like any other."""

    def insert(self, slot: int, parent: int | None, tick: int) -> None:
        super().insert(slot, None, tick)


class S3Fifo(NewcomersFirst):
    """S3-FIFO: a small queue of newcomers and a main one, both first in first out; what was used goes round again.

    From the small queue into the main one after one use; a block that comes back while the ghost remembers it, at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._uses = Column(np.uint8)
        self._ghost = Ghost()

    def grow(self, slots: int) -> None:
        super().grow(slots)
        self._uses.grow(slots)
        self._ghost.grow(slots)

    def insert(self, slot: int, parent: int | None, tick: int) -> None:
        super().insert(slot, None, tick)
        self._uses.view[slot] = 0
        if self._ghost.inserted(slot):
            self._promote(slot)

    def touch(self, slots: Slots, tick: int) -> None:
        self._ticks.array[slots] = tick
        self._uses.array[slots] = np.minimum(self._uses.array[slots] + 1, 3)

    def expose(self, slot: int, child: int) -> None:
        self._queues[self._proven.view[slot]].push_front(slot)

    def remove(self, slot: int) -> None:
        super().remove(slot)
        if not self._proven.view[slot]:
            self._ghost.evicted(slot)

    def victim(self) -> int | None:
        uses = self._uses.view
        while (slot := super().victim()) is not None and uses[slot]:
            self.withdraw(slot)
            if self._proven.view[slot]:
                uses[slot] -= 1
            else:
                uses[slot] = 0
                self._promote(slot)
            self.offer(slot)
        return slot

    def note(self, slot: int, block: int) -> None:
        """Which block comes into the slot next: ghosts know blocks, not slots."""
        self._ghost.block[slot] = block

    def _promote(self, slot: int) -> None:
        self._proven.view[slot] = True
        self._counts[0] -= 1
        self._counts[1] += 1


class S3FifoLineage(S3Fifo):
    """S3-FIFO in which a child of a block that is in the main queue or was used goes into the main queue."""

    def insert(self, slot: int, parent: int | None, tick: int) -> None:
        super().insert(slot, None, tick)
        if parent is not None and (self._proven.view[parent] or self._uses.view[parent]) and not self._proven.view[slot]:
            self._promote(slot)


class Lfu(Lru):
    """Fewest uses first, then least recently used; all counts are halved after as many insertions as there are slots."""

    def __init__(self) -> None:
        super().__init__()
        self._uses = Column(np.uint8)
        self._by_uses = [LeafQueue(self._columns, 1 + uses) for uses in range(COUNT_MAX + 1)]
        self._insertions = 0

    def grow(self, slots: int) -> None:
        super().grow(slots)
        self._uses.grow(slots)

    def insert(self, slot: int, parent: int | None, tick: int) -> None:
        super().insert(slot, None, tick)
        self._uses.view[slot] = 0
        self._insertions += 1
        if self._insertions >= len(self._uses.array):
            self._insertions = 0
            self._halve()

    def touch(self, slots: Slots, tick: int) -> None:
        last = int(slots[-1])
        offered = self.on_offer(last)
        if offered:
            self.withdraw(last)
        self._ticks.array[slots] = tick
        self._uses.array[slots] = np.minimum(self._uses.array[slots] + 1, COUNT_MAX)
        if offered:
            self.offer(last)

    def offer(self, slot: int) -> None:
        self._by_uses[self._uses.view[slot]].append(slot)

    def expose(self, slot: int, child: int) -> None:
        self._by_uses[self._uses.view[slot]].push_front(slot)

    def withdraw(self, slot: int) -> None:
        self._by_uses[self._columns.queue.view[slot] - 1].remove(slot)

    def victim(self) -> int | None:
        return next((queue.first for queue in self._by_uses if queue.first != NONE), None)

    def _halve(self) -> None:
        self._uses.array[:] //= 2
        for queue in self._by_uses[1:]:
            while (slot := queue.first) != NONE and self._uses.view[slot] + 1 != self._columns.queue.view[slot]:
                queue.remove(slot)
                self.offer(slot)
