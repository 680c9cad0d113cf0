"""How disk transfers are carried out: an io_uring where the machine lets us, else threads that block.

Both have one contract (tests/common/disk/test_engines.py): results in order, bounded, deadlines, short and
interrupted transfers finished. `open_engine` chooses once, by trying, and logs the choice and its reason.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, Protocol

from common.disk.batch import Batch
from common.disk.io_pool import IoPool
from common.disk.ring import Ring, RingUnavailable, open_ring
from common.disk.ring_engine import CHAIN_MAX, RingEngine
from common.disk.transfer import DiskCalls, SystemCalls, Transfer, carry_out
from common.errors import SettingsError
from common.logs import Log

log = Log("disk")
EngineChoice = Literal["auto", "io_uring", "threads"]


class Engine(Protocol):
    """Carries transfers out. Submit from one event loop.

    Attributes:
        name: "io_uring" or "threads".
        depth: transfers at the kernel at once.
        pending: transfers queued or running, at most `pending_max`.
    """

    name: str
    depth: int

    @property
    def pending(self) -> int: ...

    def submit(self, transfers: Sequence[Transfer], deadline_s: float | None = None) -> Batch[int]:
        """Queues transfers; one result each, in order. Raises `Overloaded`.

        What was not started by the deadline results in `NotStarted`; what was started is waited for.
        """
        ...

    def abandon(self, batch: Batch[int]) -> None:
        """Gives up the transfers of a batch that were not started. Idempotent."""
        ...

    def close(self) -> None:
        """Ends the engine when what is queued is done. Blocks; idempotent."""
        ...


class Disk(DiskCalls, Protocol):
    """The machine's ways to a file. Tests pass one that fails on demand."""

    def ring(self, entries: int) -> Ring:
        """Raises `RingUnavailable`."""
        ...


class Machine(SystemCalls):
    """The real ways."""

    def ring(self, entries: int) -> Ring:
        return open_ring(entries)


class ThreadEngine:
    """An `Engine` of `depth` threads, one blocking transfer each."""

    name = "threads"

    def __init__(self, calls: DiskCalls, depth: int, pending_max: int, label: str) -> None:
        self.depth = depth
        self._calls = calls
        self._pool = IoPool(depth, label, pending_max)

    @property
    def pending(self) -> int:
        return self._pool.pending

    def submit(self, transfers: Sequence[Transfer], deadline_s: float | None = None) -> Batch[int]:
        return self._pool.submit([partial(carry_out, self._calls, transfer) for transfer in transfers], deadline_s)

    def abandon(self, batch: Batch[int]) -> None:
        self._pool.abandon(batch)

    def close(self) -> None:
        self._pool.close()


def open_engine(disk: Disk, choice: EngineChoice, *, label: str, depth: int, pending_max: int) -> Engine:
    """The engine of that name, or (`auto`) the best that works. Raises `SettingsError` for one that doesn't."""
    reason = "by choice"
    if choice != "threads":
        try:
            ring = disk.ring(depth * CHAIN_MAX)
        except RingUnavailable as error:
            if choice == "io_uring":
                raise SettingsError(f"io = 'io_uring': {error}; use 'auto' or 'threads'") from error
            reason = str(error)
        else:
            log.event("io_engine", engine=RingEngine.name, use=label, depth=depth)
            return RingEngine(ring, depth, pending_max)
    log.event("io_engine", engine=ThreadEngine.name, use=label, depth=depth, reason=reason)
    return ThreadEngine(disk, depth, pending_max, label)
