"""Blocks that are bad, or that an operator wants gone: misses at once, and erased on disk, so that no start finds them.

1. `condemn` takes a bad block out of the index; its slot is ERASING (slot_states.py).
2. `erase` zeroes headers of condemned slots, after the segment's checkpoint, and syncs.
3. The slots are free again, or retired where that failed or nothing can be written.
"""

import asyncio
from collections.abc import Sequence
from functools import partial

from common.logs import Log
from services.kvstore.checkpoints import Checkpoints
from services.kvstore.disk_watch import DiskWatch
from services.kvstore.file_calls import FileCalls
from services.kvstore.metrics import Metrics
from services.kvstore.segment import Segment
from services.kvstore.shelf import Shelf

log = Log("store")


class Erasures:
    """Belongs to the event loop."""

    def __init__(self, checkpoints: Checkpoints, calls: FileCalls, watch: DiskWatch, metrics: Metrics) -> None:
        self._checkpoints = checkpoints
        self._calls = calls
        self._watch = watch
        self._metrics = metrics
        self._tasks: set[asyncio.Task[bool]] = set()

    def condemn(self, shelf: Shelf, slot: int, sequence: int, reason: str) -> None:
        """A block's bytes can't be had, or are wrong. Nothing happens when the slot has another block by now."""
        key = shelf.index.key(slot)
        if key is None or shelf.index.sequence(slot) != sequence:
            return
        segment, within = shelf.place(slot)
        log.warning("block_dropped", key=key.hex(), path=str(segment.path), slot=within, reason=reason)
        self._metrics.corrupt_blocks += 1
        if not segment.writable:
            shelf.index.offers.unpin(slot)
        shelf.condemn(slot)
        self.erase(shelf, segment, [slot])

    def erase(self, shelf: Shelf, segment: Segment, slots: Sequence[int]) -> "asyncio.Task[bool]":
        """Makes condemned slots of one segment empty on disk; whether it worked."""
        task = asyncio.create_task(self._erase(shelf, segment, slots))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def settle(self) -> None:
        """Waits for what was begun."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _erase(self, shelf: Shelf, segment: Segment, slots: Sequence[int]) -> bool:
        usable = False
        if segment.writable:
            within = [shelf.place(slot)[1] for slot in slots]
            refused = await self._checkpoints.open_for_writing([segment])
            erased: bool | BaseException | None = refused.get(segment)
            if erased is None:
                erased = await self._calls.run(segment.disk, partial(_erase_slots, segment, within))
            usable = erased is True
            if isinstance(erased, BaseException):
                self._watch.failed_on(segment, erased)
        for slot in slots:
            shelf.erased(slot, usable=usable)
        return usable


def _erase_slots(segment: Segment, slots: Sequence[int]) -> bool:
    for slot in slots:
        segment.erase(slot)
    segment.sync()
    return True
