"""Reads a peer's disk from here: the peer on this host says where, and moves no byte.

1. `read` asks over the connection where its parts lie (LOCATE). The answer brings read-only descriptors.
2. An I/O engine of ours reads the disk and every part is checked against the checksum that came with the
   extent. It reads into the spans where these are on huge pages, else into buffers that are, and copies: that
   takes the processor no longer than to hand the disk a piece for every 4 KiB, and some disks half the time. The lease keeps the peer from writing there; where it ended too early, the checksum
   finds out.
3. What was not located, or didn't match, is read through the connection: there the peer looks itself, and
   it is the peer who decides that a block is bad.
4. The descriptors are closed when no read is in flight.

A caller that stops waiting gets its spans back as in `connection.py`: what the disk has begun is waited for, and
where the disk hangs longer than SETTLE_S the spans are held by the region until it has ended.
"""

import asyncio
import fcntl
import os
import threading
from collections.abc import Sequence

from common.disk.batch import Batch
from common.disk.buffers import BufferPool
from common.disk.engine import Engine
from common.disk.pages import PAGE_BYTES, address, aligned, pages
from common.disk.transfer import Op, Transfer
from common.errors import Overloaded, TransferFailed
from common.logs import Log
from common.transport.connection import SETTLE_S, Connection
from common.transport.counters import Counters
from common.transport.interface import PARTS_MAX, Extent, LeaseToken, Part, PartStatus, Span
from common.transport.located import Located
from common.transport.memory import copy, crc32c
from common.transport.region import Region

log = Log("extents")


class WrongBytes(Exception):
    """The disk has other bytes there than the peer said."""


class ExtentRead:
    """One part on its way from the disk into a span."""

    def __init__(self, extent: Extent, view: memoryview) -> None:
        self.view = view
        self.buffer: memoryview | None = None  # ours, to read through
        self.direct = bool(fcntl.fcntl(extent.fd, fcntl.F_GETFL) & os.O_DIRECT)
        self._extent = extent
        self._wanted = True
        self._copying = threading.Lock()  # held while the span is written to

    @property
    def fits(self) -> bool:
        """Whether the file can be read straight into the span."""
        return not self.direct or (address(self.view) % PAGE_BYTES == 0 and self._extent.offset % PAGE_BYTES == 0)

    def transfer(self) -> Transfer:
        """The read, which results in the number of bytes."""
        if self.buffer is not None:
            return Transfer(Op.READ, self._extent.fd, [self.buffer], self._extent.offset, self._checked_copy)
        whole = len(self.view) // PAGE_BYTES * PAGE_BYTES
        tail = aligned(PAGE_BYTES) if whole < len(self.view) else None

        def check() -> int:
            if tail is not None:
                self.view[whole:] = tail[: len(self.view) - whole]
            return self._checked(self.view)

        buffers = [self.view] if tail is None else [self.view[:whole], tail] if whole else [tail]
        return Transfer(Op.READ, self._extent.fd, buffers, self._extent.offset, check)

    def give_up(self) -> None:
        """Nothing is copied into the span any more."""
        with self._copying:
            self._wanted = False

    def _checked_copy(self) -> int:
        assert self.buffer is not None
        piece = self.buffer[: len(self.view)]
        length = self._checked(piece)
        with self._copying:
            if self._wanted:
                copy(self.view, piece)
        return length

    def _checked(self, data: memoryview) -> int:
        if crc32c(data) != self._extent.checksum:
            raise WrongBytes
        return len(data)


class ExtentTransport:
    """A `Transport` over a connection that offers extents. Writes go through the connection."""

    def __init__(self, connection: Connection, region: Region, engine: Engine, buffers: BufferPool | None) -> None:
        """`buffers`: on huge pages, to read through; None: straight into the region."""
        self.carrier = "extent"  # of the newest read: the connection's own when nothing came by extents
        self.counters = Counters()
        self._connection, self._region, self._engine, self._buffers = connection, region, engine, buffers

    @property
    def usable(self) -> bool:
        return self._connection.usable

    @property
    def in_flight_bytes(self) -> int:
        return self._connection.in_flight_bytes

    async def read(
        self, token: LeaseToken, parts: Sequence[Part], into: Sequence[Span], *, deadline_s: float
    ) -> list[PartStatus]:
        deadline = asyncio.get_running_loop().time() + deadline_s
        with self.counters.read.transfer():
            statuses: list[PartStatus] = []
            for first in range(0, len(parts), PARTS_MAX):
                chosen = slice(first, first + PARTS_MAX)
                statuses += await self._read_disk(token, parts[chosen], into[chosen], deadline)
            left = [i for i, status in enumerate(statuses) if status not in (PartStatus.OK, PartStatus.EXPIRED)]
            self.carrier = "extent" if len(left) < len(parts) else self._connection.carrier
            if left:
                rest_s = max(0.0, deadline - asyncio.get_running_loop().time())
                again = await self._connection.read(token, [parts[i] for i in left], [into[i] for i in left], deadline_s=rest_s)
                for i, status in zip(left, again, strict=True):
                    statuses[i] = status
        self.counters.read.count(statuses, [part.length for part in parts])
        return statuses

    async def write(
        self, token: LeaseToken, parts: Sequence[Part], source: Sequence[Span], *, deadline_s: float
    ) -> list[PartStatus]:
        return await self._connection.write(token, parts, source, deadline_s=deadline_s)

    async def close(self) -> None:
        await self._connection.close()

    def __repr__(self) -> str:
        return f"ExtentTransport({self._connection!r}, {self._engine.name})"

    async def _read_disk(
        self, token: LeaseToken, parts: Sequence[Part], into: Sequence[Span], deadline: float
    ) -> list[PartStatus]:
        """OK: the bytes are there, checked. EXPIRED: no time is left. Anything else: to be read in the usual way."""
        left_s = deadline - asyncio.get_running_loop().time()
        try:
            located = await self._connection.locate(token, parts, deadline_s=left_s)
        except TimeoutError:
            return [PartStatus.EXPIRED] * len(parts)
        except TransferFailed:
            return [PartStatus.FAILED] * len(parts)
        statuses = [PartStatus.FAILED] * len(parts)
        reads: dict[int, ExtentRead] = {}
        try:
            reads = self._readings(located, into)
            await self._take_buffers([read for read in reads.values() if read.direct], deadline)
            batch = self._engine.submit([read.transfer() for read in reads.values()], left_s)
        except BaseException as error:
            located.close()
            self._give_back(reads)
            if isinstance(error, TimeoutError):
                return [PartStatus.EXPIRED] * len(parts)
            if isinstance(error, Overloaded):
                return statuses
            raise

        def ended(_: object) -> None:
            located.close()
            self._give_back(reads)

        batch.done.add_done_callback(ended)
        await self._wait(batch, reads, [into[i] for i in reads], deadline)
        if not batch.done.done():
            return [PartStatus.EXPIRED] * len(parts)
        for i, outcome in zip(reads, batch.done.result(), strict=True):
            statuses[i] = _status(outcome)
        return statuses

    async def _take_buffers(self, reads: Sequence[ExtentRead], deadline: float) -> None:
        """Raises `TimeoutError`. A request that no buffers could ever hold goes straight into the region."""
        if self._buffers is None or not reads:
            return
        async with asyncio.timeout_at(deadline):
            taken = await self._buffers.take_all([pages(len(read.view)) for read in reads])
        for read, buffer in zip(reads, taken or (), strict=False):
            read.buffer = buffer

    def _give_back(self, reads: dict[int, ExtentRead]) -> None:
        for read in reads.values():
            if read.buffer is not None and self._buffers is not None:
                self._buffers.give_back(read.buffer)
                read.buffer = None

    def _readings(self, located: Located, into: Sequence[Span]) -> dict[int, ExtentRead]:
        """What can be read from here, by number of the part."""
        reads: dict[int, ExtentRead] = {}
        for i, (extent, span) in enumerate(zip(located.parts, into, strict=False)):
            if isinstance(extent, Extent) and not self._region.held(span):
                read = ExtentRead(extent, self._region.view(span))
                if read.fits:
                    reads[i] = read
        return reads

    async def _wait(self, batch: Batch[int], reads: dict[int, ExtentRead], spans: Sequence[Span], deadline: float) -> None:
        """Returns, or raises, when the batch is done, nothing lands in its spans any more, or they are held."""
        try:
            await asyncio.wait([batch.done], timeout=max(0.0, deadline - asyncio.get_running_loop().time()))
        finally:
            if not batch.done.done():
                self._engine.abandon(batch)
                for read in reads.values():
                    read.give_up()
                straight = [span for read, span in zip(reads.values(), spans, strict=True) if read.buffer is None]
                if straight:
                    await self._settle(batch, straight)

    async def _settle(self, batch: Batch[int], spans: Sequence[Span]) -> None:
        """The disk may still write to the spans."""
        try:
            await asyncio.wait([batch.done], timeout=SETTLE_S)
        finally:
            if not batch.done.done():
                self._hold(batch, spans)

    def _hold(self, batch: Batch[int], spans: Sequence[Span]) -> None:
        log.warning("disk_hangs", spans=len(spans), effect="they stay held until it answers")
        for span in spans:
            self._region.hold(span)

        def unhold(_: object) -> None:
            for span in spans:
                self._region.unhold(span)

        batch.done.add_done_callback(unhold)


def _status(outcome: int | BaseException) -> PartStatus:
    if isinstance(outcome, int):
        return PartStatus.OK
    return PartStatus.CORRUPT if isinstance(outcome, WrongBytes) else PartStatus.FAILED
