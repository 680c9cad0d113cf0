"""Which block goes first: pure, no clock.

A policy hears of every block that comes, is used, or goes, and which blocks may go: those without
stored children and without pins are *on offer*. It keeps exactly these in queues, so a victim is
found without a search.
"""

from typing import Protocol

import numpy as np

from services.kvstore.column import NONE, Column, Flags, Numbers, Slots
from services.kvstore.leaf_queue import LeafQueue, QueueColumns

NEWCOMERS_SHARE = 0.1  # as S3-FIFO's; 0.2 gave up to 4 points fewer hits and never more (docs/benchmarks.md)


class EvictionPolicy(Protocol):
    """Order of eviction over slot numbers."""

    @property
    def nbytes(self) -> int: ...

    def grow(self, slots: int) -> None:
        """Slot numbers up to `slots` may come."""
        ...

    def insert(self, slot: int, parent: int | None, tick: int) -> None:
        """A block came at `tick`, which never decreases; its parent is stored, or None. Not on offer yet."""
        ...

    def restore(self, slots: Slots, ticks: Numbers, proven: Flags, on_offer: Flags) -> None:
        """At start: blocks that were there before, in the order of their ticks; some of them are on offer."""
        ...

    def touch(self, slots: Slots, tick: int) -> None:
        """The blocks of a chain, from its first, were found by a lookup."""
        ...

    def tick(self, slot: int) -> int:
        """Last use of a block."""
        ...

    def ticks(self, slots: Slots) -> Numbers:
        """Last use of many."""
        ...

    def proven(self, slots: Slots) -> Flags:
        """Which blocks have been useful, as `restore` takes it."""
        ...

    def offer(self, slot: int) -> None:
        """The block may go from now on."""
        ...

    def expose(self, slot: int, child: int) -> None:
        """The block may go from now on, because `child`, the last that hung on it, was evicted."""
        ...

    def withdraw(self, slot: int) -> None:
        """The block, which was on offer, may not go."""
        ...

    def on_offer(self, slot: int) -> bool: ...

    def all_on_offer(self) -> Flags:
        """By slot."""
        ...

    def remove(self, slot: int) -> None:
        """The block, which is not on offer, is gone."""
        ...

    def victim(self) -> int | None:
        """The block that may best go; None when none may."""
        ...


class NewcomersFirst:
    """Least recently used first, and newcomers first of all, while they are more than their share.

    A block is *proven* when it was found by a lookup, or came under one that is: an agent's turn adds blocks under a
    prefix that was just found, and they will be found themselves at the next turn. Any other is a newcomer: most of what is
    read once and never again stays one, and goes first.
    """

    def __init__(self) -> None:
        self._ticks = Column(np.uint64)
        self._proven = Column(np.bool_)
        self._columns = QueueColumns()
        self._queues = (LeafQueue(self._columns, 1), LeafQueue(self._columns, 2))  # newcomers, proven
        self._counts = [0, 0]  # blocks on offer and not

    @property
    def nbytes(self) -> int:
        return self._ticks.nbytes + self._proven.nbytes + self._columns.nbytes

    def grow(self, slots: int) -> None:
        self._ticks.grow(slots)
        self._proven.grow(slots)
        self._columns.grow(slots)

    def insert(self, slot: int, parent: int | None, tick: int) -> None:
        proven = parent is not None and bool(self._proven.view[parent])
        self._ticks.view[slot] = tick
        self._proven.view[slot] = proven
        self._counts[proven] += 1

    def restore(self, slots: Slots, ticks: Numbers, proven: Flags, on_offer: Flags) -> None:
        self._ticks.array[slots] = ticks
        self._proven.array[slots] = proven
        for rank, queue in enumerate(self._queues):
            self._counts[rank] = int((proven == rank).sum())
            queue.extend(slots[on_offer & (proven == rank)])

    def touch(self, slots: Slots, tick: int) -> None:
        last = int(slots[-1])
        offered = self.on_offer(last)  # those before it have children
        if offered:
            self.withdraw(last)
        self._ticks.array[slots] = tick
        newcomers = len(slots) - int(self._proven.array[slots].sum())
        self._proven.array[slots] = True
        self._counts[0] -= newcomers
        self._counts[1] += newcomers
        if offered:
            self.offer(last)

    def tick(self, slot: int) -> int:
        return self._ticks.view[slot]

    def ticks(self, slots: Slots) -> Numbers:
        return self._ticks.array[slots]

    def proven(self, slots: Slots) -> Flags:
        return self._proven.array[slots]

    def offer(self, slot: int) -> None:
        self._queues[self._proven.view[slot]].append(slot)

    def expose(self, slot: int, child: int) -> None:
        queue = self._queues[self._proven.view[slot]]
        if self._ticks.view[slot] > self._ticks.view[child]:
            queue.append(slot)  # used since, by a chain that went another way
        else:
            queue.push_front(slot)

    def withdraw(self, slot: int) -> None:
        self._queues[self._proven.view[slot]].remove(slot)

    def on_offer(self, slot: int) -> bool:
        return self._columns.queue.view[slot] != 0

    def all_on_offer(self) -> Flags:
        flags: Flags = self._columns.queue.array != 0
        return flags

    def remove(self, slot: int) -> None:
        self._counts[self._proven.view[slot]] -= 1

    def victim(self) -> int | None:
        newcomers, proven = self._counts
        first, second = self._queues
        if newcomers <= NEWCOMERS_SHARE * (newcomers + proven):
            first, second = second, first
        slot = first.first if first.first != NONE else second.first
        return slot if slot != NONE else None
