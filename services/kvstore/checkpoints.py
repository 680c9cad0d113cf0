"""When segments get checkpoints, and lose them.

- Before the first write to a segment its checkpoint is discarded (`open_for_writing`).
- A segment that hasn't been written to for `QUIET_S` gets one (`save_quiet`, one at a time on each disk), so that a crash costs
  the scan of those segments only that were being written to.
- A clean end saves all that have none (`save_all`), so that the next start reads no segment.

One change of a segment runs at a time (`Segment.changing`). What a checkpoint tells is gathered inside of it, and in the same moment
the segment counts as checkpointed: between that and the next write to the segment, which waits for the change and discards the
checkpoint first, nothing changes but that blocks are evicted, and finding those again is harmless.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from common.logs import Log
from services.kvstore import checkpoint
from services.kvstore.checkpoint import Checkpoint
from services.kvstore.disk import DiskState
from services.kvstore.file_calls import FileCalls
from services.kvstore.files import Files
from services.kvstore.segment import Segment
from services.kvstore.shelf import Shelf
from services.kvstore.space import Space

log = Log("checkpoint")
QUIET_S = 30.0  # a segment that is being filled is written to far more often


class Checkpoints:
    """Belongs to the event loop."""

    def __init__(
        self, files: Files, space: Space, calls: FileCalls, clock: Callable[[], float], time_s: Callable[[], int]
    ) -> None:
        """`clock` is monotonic; `time_s` is the store's time, which checkpoints carry."""
        self._files = files
        self._space = space
        self._calls = calls
        self._clock = clock
        self._time_s = time_s
        self._saving: dict[int, asyncio.Task[None]] = {}  # by the disk's position

    async def open_for_writing(self, segments: Iterable[Segment]) -> dict[Segment, BaseException]:
        """Nothing vouches for these segments any more. Those that can't be written to, and why."""
        discarding: list[Segment] = []
        for segment in segments:
            segment.written_s = self._clock()
            if segment.checkpointed:
                discarding.append(segment)
        if not discarding:
            return {}
        errors = await asyncio.gather(*(self._discard(segment) for segment in discarding))
        return {segment: error for segment, error in zip(discarding, errors, strict=True) if error is not None}

    def save_quiet(self) -> None:
        """Begins to save segments that have been quiet; one at a time on each disk."""
        before_s = self._clock() - QUIET_S
        for shelf, position in self._lacking():
            segment = shelf.segments[position]
            if segment.written_s < before_s and segment.disk not in self._saving:
                task = self._saving[segment.disk] = asyncio.create_task(self._save(shelf, position))
                task.add_done_callback(partial(self._saved, segment.disk))

    async def save_all(self) -> None:
        """Saves what has no checkpoint; for the end, when nothing is written any more."""
        by_disk: dict[int, list[tuple[Shelf, int]]] = {}
        for shelf, position in self._lacking():
            by_disk.setdefault(shelf.segments[position].disk, []).append((shelf, position))
        await asyncio.gather(*(self._save_each(segments) for segments in by_disk.values()))

    async def settle(self) -> None:
        """Waits for what `save_quiet` began."""
        while self._saving:
            await asyncio.wait(list(self._saving.values()))

    def _saved(self, disk: int, _: object) -> None:
        del self._saving[disk]

    async def _save_each(self, segments: Sequence[tuple[Shelf, int]]) -> None:
        for shelf, position in segments:
            if position in shelf.segments:
                await self._save(shelf, position)

    def _lacking(self) -> list[tuple[Shelf, int]]:
        return [
            (shelf, position)
            for shelf in self._space.shelves.values()
            for position, segment in shelf.segments.items()
            if segment.writable and not segment.checkpointed and self._space.disks[segment.disk].state is DiskState.SERVING
        ]

    async def _save(self, shelf: Shelf, position: int) -> None:
        segment = shelf.segments[position]
        async with segment.changing:
            if shelf.segments.get(position) is not segment or segment.checkpointed:
                return
            entries = shelf.entries(position)
            if entries is None:
                return
            segment.checkpointed = True  # before anything else runs: whoever writes from now on waits, and discards it
            saved = await self._calls.run(segment.disk, partial(_save, self._files, segment, Checkpoint(entries, self._time_s())))
            if isinstance(saved, BaseException):
                segment.written_s = self._clock()  # not again at once
                log.warning("checkpoint_not_saved", path=str(segment.path), reason=str(saved))

    async def _discard(self, segment: Segment) -> BaseException | None:
        """Discards the segment's checkpoint if it has one; why that isn't possible."""
        async with segment.changing:
            if not segment.checkpointed:
                return None
            discarded = await self._calls.run(segment.disk, partial(_discard, self._files, segment))
        return discarded if isinstance(discarded, BaseException) else None


def _discard(files: Files, segment: Segment) -> bool:
    checkpoint.discard(files, segment)
    return True


def _save(files: Files, segment: Segment, made: Checkpoint) -> bool:
    checkpoint.save(files, segment, made)
    return True
