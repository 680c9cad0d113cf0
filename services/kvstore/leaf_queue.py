"""Blocks on offer to eviction, in order: doubly linked lists over slot numbers."""

import numpy as np

from services.kvstore.column import NONE, Column, Slots


class LeafQueue:
    """One list. A slot has at most one place in all lists that share `columns`."""

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
