"""Finds out, after an I/O error, whether a block or its whole disk is bad, and acts on it.

`failed` -> probes of that disk, until one works or `PROBES` in a row don't -> a disk that is gone loses
its blocks, one that takes no writes keeps them. A probe that doesn't come back in `PROBE_DEADLINE_S` is
a disk that hangs: gone at once.
"""

import asyncio
import errno
from functools import partial

from common.disk.io_pool import IoPool
from services.kvstore.disk import Disk, DiskState
from services.kvstore.files import Files
from services.kvstore.space import Space

PROBE_DEADLINE_S = 10.0
PROBES = 3
PAUSE_S = 0.5  # between them: a hiccup must not cost a disk
_NOT_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFAULT, errno.EINVAL, errno.ENOMEM, errno.EAGAIN, errno.EINTR)


class DiskWatch:
    """Belongs to the event loop; probes run in threads of their own, one for each disk."""

    def __init__(self, files: Files, space: Space) -> None:
        self._files = files
        self._space = space
        self.probe_deadline_s = PROBE_DEADLINE_S
        self.pause_s = PAUSE_S
        self._pool = IoPool(len(space.disks), "kvstore-probe", len(space.disks))
        self._probing: dict[int, asyncio.Task[None]] = {}  # by the disk's position

    def failed(self, disk: Disk, error: BaseException) -> None:
        """An operation on the disk failed. Never waits."""
        if not isinstance(error, OSError) or error.errno in _NOT_THE_DISK or disk.state is DiskState.LOST:
            return
        disk.errors += 1
        if disk.position not in self._probing:
            task = self._probing[disk.position] = asyncio.create_task(self._probe(disk))
            task.add_done_callback(lambda _: self._probing.pop(disk.position))

    async def settle(self) -> None:
        """Waits for the probes under way."""
        while self._probing:
            await asyncio.wait(list(self._probing.values()))

    def close(self) -> None:
        self._pool.close()

    async def _probe(self, disk: Disk) -> None:
        event, reason = await self._probe_once(disk)
        for _ in range(PROBES - 1):
            if event in ("works", "hangs"):
                break
            await asyncio.sleep(self.pause_s)
            event, reason = await self._probe_once(disk)
        if not disk.step(event, reason):
            return
        if disk.state is DiskState.LOST:
            await self._space.lose(disk)
        else:
            await self._space.seal(disk)

    async def _probe_once(self, disk: Disk) -> tuple[str, str]:
        batch = self._pool.submit([partial(disk.probe, self._files)])
        await asyncio.wait([batch.done], timeout=self.probe_deadline_s)
        if not batch.done.done():
            return "hangs", f"no answer for {self.probe_deadline_s:g} s"
        (result,) = batch.done.result()
        return ("read_failed", repr(result)) if isinstance(result, BaseException) else result
