"""Durable writes: numbered, written at depth, made durable in groups.

1. A batch gets consecutive sequence numbers when the window has room: at most `WINDOW` numbers are
   open at once, which is what lets a restart know which blocks may be torn.
2. Each slot image (header page, payload, padding) is one write.
3. One sync per segment follows. Batches that come meanwhile share the next one (group commit).
4. The numbers are closed, whatever the outcome; and when their disk is lost, so that writes that never come back hold up
   no others. A restart goes by each disk's own last number (scan.py), and nothing is written to a lost disk any more.
"""

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from common.disk.engine import Engine
from common.errors import Overloaded
from services.kvstore.scan import WINDOW
from services.kvstore.segment import Segment

BATCH_MAX = 64  # slots of one disk that share one entry into the window


class SlotWrite(msgspec.Struct, frozen=True):
    """What goes where. `seal` puts the header for a sequence number into the image."""

    segment: Segment
    slot: int  # within the segment
    image: memoryview
    seal: Callable[[int], None]


class Outcome(msgspec.Struct, frozen=True):
    """A write that is durable, or the error that it isn't."""

    sequence: int
    error: BaseException | None


class Writer:
    """Writes batches of slots. Belongs to the event loop."""

    def __init__(self, engine: Engine, *, durable: bool) -> None:
        self._engine = engine
        self.next_sequence = 1
        self._durable = durable
        self._open: dict[int, int] = {}  # sequence numbers in order -> disk
        self._entering = asyncio.Lock()
        self._room = asyncio.Event()
        self._syncs: dict[int, _GroupSync] = {}

    @property
    def open_writes(self) -> int:
        return len(self._open)

    async def write(self, writes: Sequence[SlotWrite]) -> list[Outcome]:
        """One outcome per write, in order. Never raises for a write."""
        by_disk: dict[int, list[int]] = {}
        for i, write in enumerate(writes):
            by_disk.setdefault(write.segment.disk, []).append(i)
        batches = [places[i : i + BATCH_MAX] for places in by_disk.values() for i in range(0, len(places), BATCH_MAX)]
        outcomes = await asyncio.gather(*(self._write_batch([writes[i] for i in batch]) for batch in batches))
        settled = {
            i: outcome for batch, done in zip(batches, outcomes, strict=True) for i, outcome in zip(batch, done, strict=True)
        }
        return [settled[i] for i in range(len(writes))]

    async def _write_batch(self, writes: Sequence[SlotWrite]) -> list[Outcome]:
        numbers = await self._enter([write.segment.disk for write in writes])
        try:
            for write, number in zip(writes, numbers, strict=True):
                write.seal(number)
            results: list[int | BaseException]
            try:
                results = await self._engine.submit([write.segment.slot_write(write.slot, write.image) for write in writes]).done
            except Overloaded as refused:
                results = [refused] * len(writes)
            touched = {write.segment for write, result in zip(writes, results, strict=True) if isinstance(result, int)}
            synced = dict(zip(touched, await asyncio.gather(*(self._sync(one) for one in touched)), strict=True))
            return [
                Outcome(number, result if isinstance(result, BaseException) else synced[write.segment])
                for write, number, result in zip(writes, numbers, results, strict=True)
            ]
        finally:
            for number in numbers:
                self._open.pop(number, None)
            self._room.set()

    def close_numbers(self, disk: int) -> None:
        """The disk at this position is lost."""
        self._open = {number: place for number, place in self._open.items() if place != disk}
        self._room.set()

    async def _enter(self, disks: Sequence[int]) -> range:
        count = len(disks)
        async with self._entering:
            while self._open and self.next_sequence + count - next(iter(self._open)) > WINDOW:
                self._room.clear()
                await self._room.wait()
            numbers = range(self.next_sequence, self.next_sequence + count)
            self.next_sequence += count
            self._open |= zip(numbers, disks, strict=True)
            return numbers

    async def _sync(self, segment: Segment) -> BaseException | None:
        if not self._durable:
            return None
        group = self._syncs.get(id(segment))
        if group is None:
            group = self._syncs[id(segment)] = _GroupSync(self._engine, segment)
        try:
            return await group.sync()
        finally:
            if group.idle:
                self._syncs.pop(id(segment), None)


class _GroupSync:
    """Syncs of one file: at most one runs, and everyone who comes meanwhile shares the next."""

    def __init__(self, engine: Engine, segment: Segment) -> None:
        self._engine = engine
        self._segment = segment
        self._running: asyncio.Task[BaseException | None] | None = None
        self._following: asyncio.Task[BaseException | None] | None = None

    @property
    def idle(self) -> bool:
        return self._running is None and self._following is None

    async def sync(self) -> BaseException | None:
        """Returns after a sync that began after this call: None, or why it failed."""
        if self._running is None:
            task = self._running = asyncio.create_task(self._run(None))
        elif self._following is None:
            task = self._following = asyncio.create_task(self._run(self._running))
        else:
            task = self._following
        return await asyncio.shield(task)

    async def _run(self, before: "asyncio.Task[BaseException | None] | None") -> BaseException | None:
        if before is not None:
            await asyncio.wait([before])
            self._running, self._following = self._following, None
        result: int | BaseException
        try:
            (result,) = await self._engine.submit([self._segment.sync_transfer()]).done
        except Overloaded as refused:
            result = refused
        finally:
            if self._following is None:
                self._running = None
        return result if isinstance(result, BaseException) else None
