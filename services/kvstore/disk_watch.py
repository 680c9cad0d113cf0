"""Finds out, after an I/O error, whether a block or its whole disk is bad, and acts on it.

`failed` -> probes of that disk, until one works or `PROBES` in a row don't -> a disk that can't be read
loses its blocks, one that takes no writes keeps them. A probe that doesn't come back in
`PROBE_DEADLINE_S` has failed.
"""

import asyncio
import errno
from collections.abc import Callable
from functools import partial

from common.disk.io_pool import IoPool
from services.kvstore.disk import Disk, DiskState
from services.kvstore.files import Files
from services.kvstore.segment import Segment
from services.kvstore.space import Space

PROBE_DEADLINE_S = 10.0
PROBES = 3
PAUSE_S = 0.5  # between them: a hiccup must not cost a disk
_NOT_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFAULT, errno.EINVAL, errno.ENOMEM, errno.EAGAIN, errno.EINTR)


class DiskWatch:
    """Belongs to the event loop; probes run in threads of their own, so many that hanging ones hold up no others."""

    def __init__(self, files: Files, space: Space, lost: Callable[[Disk], None]) -> None:
        """`lost` is told of a disk that is lost, before its blocks go."""
        self._files = files
        self._space = space
        self._lost = lost
        self.probe_deadline_s = PROBE_DEADLINE_S
        self.pause_s = PAUSE_S
        self._pool = IoPool(PROBES * len(space.disks), "kvstore-probe", 2 * PROBES * len(space.disks))
        self._probing: dict[int, asyncio.Task[None]] = {}  # by the disk's position

    def failed(self, disk: Disk, error: BaseException) -> None:
        """An operation on the disk failed. Never waits."""
        if not isinstance(error, OSError) or error.errno in _NOT_THE_DISK or disk.state is DiskState.LOST:
            return
        disk.errors += 1
        if disk.position not in self._probing:
            task = self._probing[disk.position] = asyncio.create_task(self._probe(disk))
            task.add_done_callback(lambda _: self._probing.pop(disk.position))

    def failed_on(self, segment: Segment, error: BaseException) -> None:
        """A read or write of a segment failed, or took too long: is it the disk?"""
        self.failed(self._space.disks[segment.disk], error)

    async def settle(self) -> None:
        """Waits for the probes under way."""
        while self._probing:
            await asyncio.wait(list(self._probing.values()))

    def close(self) -> None:
        self._pool.close()

    async def _probe(self, disk: Disk) -> None:
        for attempt in range(PROBES):
            if attempt:
                await asyncio.sleep(self.pause_s)
            event, reason = "read_failed", await self._answer(disk.probe_read)
            if not reason:
                event, reason = "write_failed", await self._answer(disk.probe_write)
            if not reason:
                return
        if not disk.step(event, reason):
            return
        if disk.state is DiskState.LOST:
            self._lost(disk)
            await self._space.lose(disk)
        else:
            await self._space.seal(disk)

    async def _answer(self, probe: Callable[[Files], str]) -> str:
        """Why the probe failed; empty: it didn't."""
        batch = self._pool.submit([partial(probe, self._files)])
        await asyncio.wait([batch.done], timeout=self.probe_deadline_s)
        if not batch.done.done():
            return f"no answer for {self.probe_deadline_s:g} s"
        (result,) = batch.done.result()
        return repr(result) if isinstance(result, BaseException) else result
