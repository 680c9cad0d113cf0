"""Which block goes first: pure, no clock.

A policy hears of every block that comes, is used, or goes, and which blocks may go: those without
stored children and without pins are *on offer*. It keeps exactly these in queues, so a victim is
found without a search. `LeafLru` takes the block that was used, or came on offer, longest ago.
"""

from typing import Protocol

import numpy as np

from services.kvstore.column import NONE, Column, Numbers, Slots


class EvictionPolicy(Protocol):
    """Order of eviction over slot numbers."""

    @property
    def nbytes(self) -> int: ...

    def grow(self, slots: int) -> None:
        """Slot numbers up to `slots` may come."""
        ...

    def insert(self, slot: int, key: bytes, parent: int | None, tick: int) -> None:
        """A block came at `tick`, which never decreases; its parent is stored, or None. Not on offer yet."""
        ...

    def restore(self, slots: Slots, ticks: Numbers, on_offer: Slots) -> None:
        """At start: blocks that were there before, in the order of their ticks; some of them are on offer."""
        ...

    def touch(self, slots: Slots, tick: int) -> None:
        """The blocks of a chain, from its first, were used."""
        ...

    def tick(self, slot: int) -> int:
        """Last use of a block."""
        ...

    def ticks(self, slots: Slots) -> Numbers:
        """Last use of many."""
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

    def evicted(self, slot: int, key: bytes) -> None:
        """The block, a victim, is gone. (One that goes for another reason is just withdrawn.)"""
        ...

    def victim(self) -> int | None:
        """The block that may best go; None when none may."""
        ...


class LeafQueue:
    """Blocks on offer, in order: links between slots, at most one place per slot over all queues of `columns`."""

    def __init__(self, columns: "QueueColumns", number: int) -> None:
        self._columns = columns
        self._number = number
        self._last: int = NONE
        self.first: int = NONE

    def append(self, slot: int) -> None:
        self._enter(slot, self._last, NONE)

    def push_front(self, slot: int) -> None:
        self._enter(slot, NONE, self.first)

    def extend(self, slots: Slots) -> None:
        """Appends many to a queue that is empty."""
        assert self.first == NONE
        if not len(slots):
            return
        columns = self._columns
        columns.queue.array[slots] = self._number
        columns.before.array[slots[1:]] = slots[:-1]
        columns.after.array[slots[:-1]] = slots[1:]
        self.first, self._last = int(slots[0]), int(slots[-1])

    def remove(self, slot: int) -> None:
        before, after = self._columns.before.view, self._columns.after.view
        assert self._columns.queue.view[slot] == self._number
        ahead, behind = before[slot], after[slot]
        if ahead == NONE:
            self.first = behind
        else:
            after[ahead] = behind
        if behind == NONE:
            self._last = ahead
        else:
            before[behind] = ahead
        before[slot] = after[slot] = NONE
        self._columns.queue.view[slot] = 0

    def _enter(self, slot: int, ahead: int, behind: int) -> None:
        columns = self._columns
        assert not columns.queue.view[slot]
        columns.queue.view[slot] = self._number
        columns.before.view[slot], columns.after.view[slot] = ahead, behind
        if ahead == NONE:
            self.first = slot
        else:
            columns.after.view[ahead] = slot
        if behind == NONE:
            self._last = slot
        else:
            columns.before.view[behind] = slot


class QueueColumns:
    """Memory of the queues: per slot, which queue it is in (0: none), and its neighbours there."""

    def __init__(self) -> None:
        self.queue = Column(np.uint8)
        self.before = Column(np.int32, NONE)
        self.after = Column(np.int32, NONE)

    @property
    def nbytes(self) -> int:
        return self.queue.nbytes + self.before.nbytes + self.after.nbytes

    def grow(self, slots: int) -> None:
        for column in (self.queue, self.before, self.after):
            column.grow(slots)


class LeafLru:
    """The block on offer that was used, or came on offer, longest ago."""

    def __init__(self) -> None:
        self._ticks = Column(np.uint64)
        self._columns = QueueColumns()
        self._queue = LeafQueue(self._columns, 1)

    @property
    def nbytes(self) -> int:
        return self._ticks.nbytes + self._columns.nbytes

    def grow(self, slots: int) -> None:
        self._ticks.grow(slots)
        self._columns.grow(slots)

    def insert(self, slot: int, key: bytes, parent: int | None, tick: int) -> None:
        self._ticks.view[slot] = tick

    def restore(self, slots: Slots, ticks: Numbers, on_offer: Slots) -> None:
        self._ticks.array[slots] = ticks
        self._queue.extend(on_offer)

    def touch(self, slots: Slots, tick: int) -> None:
        self._ticks.array[slots] = tick
        last = int(slots[-1])
        if self.on_offer(last):
            self._queue.remove(last)
            self._queue.append(last)

    def tick(self, slot: int) -> int:
        return self._ticks.view[slot]

    def ticks(self, slots: Slots) -> Numbers:
        return self._ticks.array[slots]

    def offer(self, slot: int) -> None:
        self._queue.append(slot)

    def expose(self, slot: int, child: int) -> None:
        if self._ticks.view[slot] > self._ticks.view[child]:
            self._queue.append(slot)  # used since, by a chain that went another way
        else:
            self._queue.push_front(slot)

    def withdraw(self, slot: int) -> None:
        self._queue.remove(slot)

    def on_offer(self, slot: int) -> bool:
        return self._columns.queue.view[slot] != 0

    def evicted(self, slot: int, key: bytes) -> None:
        """Leaves nothing behind."""

    def victim(self) -> int | None:
        return self._queue.first if self._queue.first != NONE else None
