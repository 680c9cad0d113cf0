"""When segments get checkpoints, and lose them.

- Before the first write to a segment its checkpoint is discarded (`open_for_writing`).
- A segment that hasn't been written to for `QUIET_S` gets one (`save_quiet`, one at a time), so that a crash costs
  the scan of those segments only that were being written to.
- A clean end saves all that have none (`save_all`), so that the next start reads no segment.

One change of a segment runs at a time (`Segment.changing`). What a checkpoint tells is gathered inside of it, and in the same moment
the segment counts as checkpointed: between that and the next write to the segment, which waits for the change and discards the
checkpoint first, nothing changes but that blocks are evicted, and finding those again is harmless.
"""

import asyncio
from collections.abc import Callable, Iterable
from functools import partial

from common.disk.io_pool import IoPool
from common.errors import Overloaded
from common.logs import Log
from services.kvstore import checkpoint
from services.kvstore.checkpoint import Checkpoint
from services.kvstore.disk import DiskState
from services.kvstore.files import Files
from services.kvstore.segment import Segment
from services.kvstore.shelf import Shelf
from services.kvstore.space import Space

log = Log("checkpoint")
QUIET_S = 30.0  # a segment that is being filled is written to far more often


class Checkpoints:
    """Belongs to the event loop; files are written in the pool."""

    def __init__(self, files: Files, space: Space, pool: IoPool, clock: Callable[[], float], time_s: Callable[[], int]) -> None:
        """`clock` is monotonic; `time_s` is the store's time, which checkpoints carry."""
        self._files = files
        self._space = space
        self._pool = pool
        self._clock = clock
        self._time_s = time_s
        self._saving: asyncio.Task[None] | None = None

    async def open_for_writing(self, segments: Iterable[Segment]) -> dict[Segment, BaseException]:
        """Nothing vouches for these segments any more. Those that can't be written to, and why."""
        failed: dict[Segment, BaseException] = {}
        for segment in segments:
            segment.written_s = self._clock()
            if not segment.checkpointed:
                continue
            async with segment.changing:
                if segment.checkpointed:
                    error = await self._run(partial(_discard, self._files, segment))
                    if error is not None:
                        failed[segment] = error
        return failed

    def save_quiet(self) -> None:
        """Begins to save a segment that has been quiet; one at a time."""
        if self._saving is not None and not self._saving.done():
            return
        before_s = self._clock() - QUIET_S
        for shelf, position in self._lacking():
            if shelf.segments[position].written_s < before_s:
                self._saving = asyncio.create_task(self._save(shelf, position))
                return

    async def save_all(self) -> None:
        """Saves what has no checkpoint; for the end, when nothing is written any more."""
        for shelf, position in self._lacking():
            if position in shelf.segments:
                await self._save(shelf, position)

    async def settle(self) -> None:
        """Waits for what `save_quiet` began."""
        if self._saving is not None:
            await asyncio.wait([self._saving])

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
            error = await self._run(partial(_save, self._files, segment, Checkpoint(entries, self._time_s())))
            if error is not None:
                segment.written_s = self._clock()  # not again at once
                log.warning("checkpoint_not_saved", path=str(segment.path), reason=str(error))

    async def _run(self, call: Callable[[], bool]) -> BaseException | None:
        try:
            (result,) = await self._pool.submit([call]).done
        except Overloaded as refused:
            return refused
        return result if isinstance(result, BaseException) else None


def _discard(files: Files, segment: Segment) -> bool:
    checkpoint.discard(files, segment)
    return True


def _save(files: Files, segment: Segment, made: Checkpoint) -> bool:
    checkpoint.save(files, segment, made)
    return True
