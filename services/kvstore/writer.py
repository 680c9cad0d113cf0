"""Durable writes: numbered, written at depth, made durable in groups.

1. A batch gets consecutive sequence numbers when the window has room: at most `WINDOW` numbers are
   open at once, which is what lets a restart know which blocks may be torn.
2. Each slot image (header page, payload, padding) is written whole. Images of slots that lie one after the other go in one
   transfer; if that fails they are tried one by one, so that a bad place costs its own block only.
3. One sync of each segment follows. Batches that come to a disk meanwhile share the next ones (group commit).
4. The numbers are closed, whatever the outcome; and when their disk is lost, so that writes that never come back hold up
   no others. A restart goes by each disk's own last number (scan.py), and nothing is written to a lost disk any more.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from common.disk.engine import Engine
from common.errors import Overloaded
from services.kvstore.scan import WINDOW
from services.kvstore.segment import Segment

BATCH_MAX = 64  # slots of one disk that share one entry into the window
RUN_BYTES_MAX = 1 << 20  # of one transfer: longer ones gain nothing, and fewer would be on their way at once
Seal = Callable[[Sequence[int], Sequence[int]], None]


class SlotWrite(msgspec.Struct, frozen=True, gc=False):
    """What goes where."""

    segment: Segment
    slot: int  # within the segment
    image: memoryview


class Written(msgspec.Struct, frozen=True):
    """What became of a group, by place in it: the numbers, and why those that aren't durable aren't."""

    sequences: list[int]
    failed: dict[int, BaseException]


class Writer:
    """Writes groups of slots. Belongs to the event loop."""

    def __init__(self, engine: Engine, *, durable: bool) -> None:
        self._engine = engine
        self.next_sequence = 1
        self._durable = durable
        self._open: dict[int, int] = {}  # sequence numbers in order -> disk
        self._entering = asyncio.Lock()
        self._room = asyncio.Event()
        self._syncs: dict[int, _GroupSync] = {}  # by disk

    @property
    def open_writes(self) -> int:
        return len(self._open)

    async def write(self, writes: Sequence[SlotWrite], seal: Seal, refused: Mapping[Segment, BaseException]) -> Written:
        """Writes a group, but for the `refused` segments; never raises for a write.

        `seal(places, sequences)` puts the headers with these numbers into the images at these places.
        """
        written = Written([0] * len(writes), {})
        by_disk: dict[int, list[int]] = {}
        for place, write in enumerate(writes):
            if write.segment in refused:
                written.failed[place] = refused[write.segment]
            else:
                by_disk.setdefault(write.segment.disk, []).append(place)
        batches = [places[i : i + BATCH_MAX] for places in by_disk.values() for i in range(0, len(places), BATCH_MAX)]
        await _all(self._write_batch(writes, batch, seal, written) for batch in batches)
        return written

    async def _write_batch(self, writes: Sequence[SlotWrite], places: Sequence[int], seal: Seal, written: Written) -> None:
        numbers = await self._enter(len(places), writes[places[0]].segment.disk)
        try:
            for place, number in zip(places, numbers, strict=True):
                written.sequences[place] = number
            seal(places, numbers)
            written.failed.update(await self._carry_out(writes, places))
            good = [place for place in places if place not in written.failed]
            if self._durable and good:
                failed = await self._sync(writes[good[0]].segment.disk, {writes[place].segment for place in good})
                written.failed.update({place: failed[s] for place in good if (s := writes[place].segment) in failed})
        finally:
            for number in numbers:
                self._open.pop(number, None)
            self._room.set()

    async def _carry_out(self, writes: Sequence[SlotWrite], places: Sequence[int]) -> dict[int, BaseException]:
        """Writes images, neighbours together; the errors by place."""
        runs = _runs(writes, places)
        errors = await self._submit(writes, runs)
        failed = {run[0]: error for run, error in zip(runs, errors, strict=True) if error is not None and len(run) == 1}
        alone = [[place] for run, error in zip(runs, errors, strict=True) if error is not None and len(run) > 1 for place in run]
        if alone:
            again = await self._submit(writes, alone)
            failed |= {place: error for (place,), error in zip(alone, again, strict=True) if error is not None}
        return failed

    async def _submit(self, writes: Sequence[SlotWrite], runs: Sequence[Sequence[int]]) -> list[BaseException | None]:
        """One transfer for each run."""
        firsts = [writes[run[0]] for run in runs]
        transfers = [
            first.segment.slots_write(first.slot, [writes[place].image for place in run])
            for first, run in zip(firsts, runs, strict=True)
        ]
        try:
            results = await self._engine.submit(transfers).done
        except Overloaded as refused:
            return [refused] * len(runs)
        return [result if isinstance(result, BaseException) else None for result in results]

    def close_numbers(self, disk: int) -> None:
        """The disk at this position is lost."""
        self._open = {number: place for number, place in self._open.items() if place != disk}
        self._room.set()

    async def _enter(self, count: int, disk: int) -> range:
        async with self._entering:
            while self._open and self.next_sequence + count - next(iter(self._open)) > WINDOW:
                self._room.clear()
                await self._room.wait()
            numbers = range(self.next_sequence, self.next_sequence + count)
            self.next_sequence += count
            self._open |= dict.fromkeys(numbers, disk)
            return numbers

    async def _sync(self, disk: int, segments: Iterable[Segment]) -> Mapping[Segment, BaseException]:
        syncs = self._syncs.get(disk)
        if syncs is None:
            syncs = self._syncs[disk] = _GroupSync(self._engine)
        return await syncs.sync(segments)


def _runs(writes: Sequence[SlotWrite], places: Sequence[int]) -> list[list[int]]:
    """The places in runs whose slots lie one after the other, each short enough for one transfer."""
    runs: list[list[int]] = []
    before: SlotWrite | None = None
    for place in sorted(places, key=lambda place: (id(writes[place].segment), writes[place].slot)):
        write = writes[place]
        follows = before is not None and write.segment is before.segment and write.slot == before.slot + 1
        if follows and (len(runs[-1]) + 1) * len(write.image) <= RUN_BYTES_MAX:
            runs[-1].append(place)
        else:
            runs.append([place])
        before = write
    return runs


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """`gather`, without a task where there is but one."""
    coroutines = list(work)
    if len(coroutines) == 1:
        await coroutines[0]
    else:
        await asyncio.gather(*coroutines)


class _GroupSync:
    """Syncs of one disk's files, in rounds: at most one runs, and everyone who comes meanwhile shares the next."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._wanted: set[Segment] = set()  # in the next round
        self._running: asyncio.Task[Mapping[Segment, BaseException]] | None = None
        self._following: asyncio.Task[Mapping[Segment, BaseException]] | None = None

    async def sync(self, segments: Iterable[Segment]) -> Mapping[Segment, BaseException]:
        """Returns after syncs that began after this call: of the round's files those that failed, and why."""
        self._wanted.update(segments)
        if self._following is None:
            self._following = asyncio.create_task(self._round(self._running))
        return await asyncio.shield(self._following)

    async def _round(self, before: "asyncio.Task[Mapping[Segment, BaseException]] | None") -> Mapping[Segment, BaseException]:
        if before is not None:
            await asyncio.wait([before])
        self._running, self._following = self._following, None
        segments, self._wanted = list(self._wanted), set()
        results: Sequence[int | BaseException]
        try:
            results = await self._engine.submit([segment.sync_transfer() for segment in segments]).done
        except Overloaded as refused:
            results = [refused] * len(segments)
        return {segment: result for segment, result in zip(segments, results, strict=True) if isinstance(result, BaseException)}
