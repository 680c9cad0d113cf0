"""Blocking calls on the files of each disk, off the event loop: segments made and removed, checkpoints, headers erased.

Every disk has threads of its own, so one that hangs holds up no other's. A call that takes longer than `LATE_S` is
reported as a failure of its disk, again and again, and is waited for all the same: its bytes count until the kernel answers.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from common.disk.io_pool import IoPool
from common.errors import Overloaded
from services.kvstore.disk import Disk

T = TypeVar("T")
LATE_S = 15.0  # then the disk is probed; as long as for a write of a block
_THREADS = 2  # of each disk: a checkpoint that is saved doesn't hold up a segment that is made
_PENDING_MAX = 65_536  # of each disk: a whole segment of bad headers may be erased at once


class FileCalls:
    """Belongs to the event loop."""

    def __init__(self, disks: Sequence[Disk], failed: Callable[[Disk, BaseException], None]) -> None:
        """`failed` is told of calls that are late."""
        self._disks = disks
        self._failed = failed
        self._pools = [IoPool(_THREADS, f"kvstore-files-{disk.position}", _PENDING_MAX) for disk in disks]

    async def run(self, disk: int, call: Callable[[], T]) -> T | BaseException:
        """What the call returns (not None) or raises; `Overloaded` when too many calls on the disk are waiting."""
        try:
            batch = self._pools[disk].submit([call])
        except Overloaded as refused:
            return refused
        while not (await asyncio.wait([batch.done], timeout=LATE_S))[0]:
            self._failed(self._disks[disk], TimeoutError(f"a call takes more than {LATE_S:g} s"))
        (result,) = batch.done.result()
        return result

    def close(self) -> None:
        """Ends the threads when what is queued is done. Blocks; idempotent."""
        for pool in self._pools:
            pool.close()
