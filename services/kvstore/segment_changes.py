"""Which segments a shelf gets and loses while the store runs: new ones, other namespaces' colder ones, those that are cleared.

A disk on which a file is made or removed for longer than `PATIENCE_S` is set aside: the others' turns come, and its own end in their time.
Work that was begun goes on when its caller is cancelled: a segment that was made must be accounted for.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from common.blocks import Namespace
from common.logs import Log
from services.kvstore.checkpoint import footprint_bytes
from services.kvstore.coldest import coldest_segment, heat, stored_slots
from services.kvstore.disk import Disk, DiskState
from services.kvstore.metrics import Metrics
from services.kvstore.segment import Segment
from services.kvstore.segment_files import SegmentFiles
from services.kvstore.shelf import Shelf

log = Log("space")
COMPARE_PAUSE_S = 5.0  # comparing namespaces looks at every block of the others
PATIENCE_S = 1.0  # making a segment takes milliseconds


class SegmentChanges:
    """Of all shelves. Belongs to the event loop."""

    def __init__(
        self,
        disks: Sequence[Disk],
        shelves: Mapping[Namespace, Shelf],
        files: SegmentFiles,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._disks, self._shelves, self._files = disks, shelves, files
        self._metrics = metrics
        self._clock = clock
        self._changing = asyncio.Lock()
        self._compare_again_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def _serving(self) -> list[Disk]:
        return [disk for disk in self._disks if disk.state is DiskState.SERVING]

    def may_grow(self, shelf: Shelf) -> bool:
        """Whether `prepare` may get a segment: in a full store of one namespace it can't, and needn't be asked."""
        footprint = footprint_bytes(shelf.geometry)
        return len(self._shelves) > 1 or bool(self._tasks) or any(disk.has_room(footprint) for disk in self._disks)

    async def prepare(self, shelf: Shelf, slots: int) -> None:
        """Gets free slots by new segments, as far as that is right. `take` may evict beyond.

        Goes on when the caller is cancelled: a segment that was made must be accounted for.
        """
        if shelf.free_slots >= slots and self._narrow(shelf, slots) is None:
            return
        await asyncio.shield(self._begin(shelf, self._prepare(shelf, slots)))

    async def clear(self, shelf: Shelf) -> tuple[int, int]:
        """Removes every segment of a namespace in which, and under which, nothing is leased or on its way.

        How many blocks went, and the bytes of the files.
        """
        async with self._changing:
            before, freed_bytes = len(shelf.index), 0
            for position, segment in list(shelf.segments.items()):
                serving = self._disks[segment.disk].state is DiskState.SERVING and segment.writable
                if serving and position in shelf.segments and heat(shelf, position) is not None:
                    removed = self.empty(shelf, position)
                    freed_bytes += removed.geometry.segment_bytes
                    await self._patiently(self._begin(shelf, self._files.remove(removed)))
            return before - len(shelf.index), freed_bytes

    async def settle(self) -> None:
        """Waits until no segment is being made or removed."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _prepare(self, shelf: Shelf, slots: int) -> None:
        async with self._changing:
            while (disk := self._narrow(shelf, slots)) is not None:
                await self._patiently(self._begin(shelf, self._grow(shelf, disk)))
            while shelf.free_slots < slots:
                roomy = [disk for disk in self._disks if disk.has_room(footprint_bytes(shelf.geometry))]
                ready = [disk for disk in roomy if not self._files.paused(disk)]
                if ready:
                    roomiest = max(ready, key=lambda disk: disk.budget_bytes - disk.used_bytes)
                    await self._patiently(self._begin(shelf, self._grow(shelf, roomiest)))
                elif roomy or not await self._take_over(shelf):
                    return

    def _narrow(self, shelf: Shelf, slots: int) -> Disk | None:
        """A disk that has room, but not yet its part of the free slots that `slots` blocks in turn would take."""
        serving = self._serving
        part = -(-slots // max(1, len(serving)))
        footprint = footprint_bytes(shelf.geometry)
        for disk in serving:
            room = disk.has_room(footprint) and not self._files.paused(disk)
            if room and shelf.free_on(disk.position) < part:
                return disk
        return None

    async def _grow(self, shelf: Shelf, disk: Disk) -> None:
        """A new segment on a disk; where that fails, the disk is paused or doesn't serve any more."""
        segment = await self._files.make(shelf, disk)
        if segment is not None:
            shelf.free(reversed(shelf.add_segment(segment)))

    def _begin(self, shelf: Shelf, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Work for a shelf, to its end, whether or not somebody waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        shelf.preparing += 1

        def ended(_: object) -> None:
            self._tasks.discard(task)
            shelf.preparing -= 1

        task.add_done_callback(ended)
        return task

    async def _patiently(self, work: asyncio.Task[None]) -> bool:
        """Whether it ended in time."""
        done, _ = await asyncio.wait([work], timeout=PATIENCE_S)
        for one in done:
            one.result()
        return bool(done)

    async def _take_over(self, shelf: Shelf) -> bool:
        """Removes another namespace's segment if all in it is colder than what `shelf` would evict."""
        own = shelf.index.coldest_tick()
        others = [other for other in self._shelves.values() if other is not shelf]
        if not others or (own is not None and self._clock() < self._compare_again_s):
            return False
        chosen = coldest_segment(others, self._disks)
        if chosen is None or (own is not None and chosen[2].tick >= own):
            self._compare_again_s = self._clock() + COMPARE_PAUSE_S
            return False
        other, position, _ = chosen
        segment = self.empty(other, position)
        log.event("segment_taken", path=str(segment.path), by=shelf.namespace)
        return await self._patiently(self._begin(shelf, self._files.remove(segment)))

    def empty(self, shelf: Shelf, position: int) -> Segment:
        """Forgets what is in a segment and hangs on it; the segment, which the shelf has no more."""
        for slot in shelf.index.subtree(stored_slots(shelf, position)):
            shelf.forget(slot)
            self._metrics.segment_evictions += 1
        return shelf.remove_segment(position)
