"""Reads a peer's disk from here: the peer on this host says where, and moves no byte.

1. `read` asks over the connection where its parts lie (LOCATE). The answer brings read-only descriptors.
2. An I/O engine of ours reads the disk into the spans, and every part is checked against the checksum that
   came with the extent. The lease keeps the peer from writing there; where it ended too early, the checksum
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
from collections.abc import Sequence

from common.disk.batch import Batch
from common.disk.engine import Engine
from common.disk.pages import PAGE_BYTES, address, aligned
from common.disk.transfer import Op, Transfer
from common.errors import Overloaded, TransferFailed
from common.logs import Log
from common.transport.connection import SETTLE_S, Connection
from common.transport.counters import Counters
from common.transport.interface import PARTS_MAX, Extent, LeaseToken, Part, PartStatus, Span
from common.transport.located import Located
from common.transport.memory import crc32c
from common.transport.region import Region

log = Log("extents")


class WrongBytes(Exception):
    """The disk has other bytes there than the peer said."""


class ExtentTransport:
    """A `Transport` over a connection that offers extents. Writes go through the connection."""

    def __init__(self, connection: Connection, region: Region, engine: Engine) -> None:
        self.carrier = "extent"  # of the newest read: the connection's own when nothing came by extents
        self.counters = Counters()
        self._connection, self._region, self._engine = connection, region, engine

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
        try:
            reads = self._readings(located, into)
            batch = self._engine.submit(list(reads.values()), left_s)
        except Overloaded:
            located.close()
            return statuses
        except BaseException:
            located.close()
            raise
        batch.done.add_done_callback(lambda _: located.close())
        await self._wait(batch, [into[i] for i in reads], deadline)
        if not batch.done.done():
            return [PartStatus.EXPIRED] * len(parts)
        for i, outcome in zip(reads, batch.done.result(), strict=True):
            statuses[i] = _status(outcome)
        return statuses

    def _readings(self, located: Located, into: Sequence[Span]) -> dict[int, Transfer]:
        """What can be read from here, by number of the part."""
        reads: dict[int, Transfer] = {}
        for i, (extent, span) in enumerate(zip(located.parts, into, strict=False)):
            if isinstance(extent, Extent) and not self._region.held(span):
                view = self._region.view(span)
                if _fits(extent, view):
                    reads[i] = _reading(extent, view)
        return reads

    async def _wait(self, batch: Batch[int], spans: Sequence[Span], deadline: float) -> None:
        """Returns, or raises, when the batch is done or its spans are held."""
        try:
            await asyncio.wait([batch.done], timeout=max(0.0, deadline - asyncio.get_running_loop().time()))
        finally:
            if not batch.done.done():
                self._engine.abandon(batch)
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


def _fits(extent: Extent, view: memoryview) -> bool:
    """Whether the file can be read straight into this memory."""
    direct = fcntl.fcntl(extent.fd, fcntl.F_GETFL) & os.O_DIRECT
    return not direct or (address(view) % PAGE_BYTES == 0 and extent.offset % PAGE_BYTES == 0)


def _reading(extent: Extent, view: memoryview) -> Transfer:
    whole = len(view) // PAGE_BYTES * PAGE_BYTES
    tail = aligned(PAGE_BYTES) if whole < len(view) else None

    def check() -> int:
        if tail is not None:
            view[whole:] = tail[: len(view) - whole]
        if crc32c(view) != extent.checksum:
            raise WrongBytes
        return len(view)

    buffers = [view] if tail is None else [view[:whole], tail] if whole else [tail]
    return Transfer(Op.READ, extent.fd, buffers, extent.offset, check)


def _status(outcome: int | BaseException) -> PartStatus:
    if isinstance(outcome, int):
        return PartStatus.OK
    return PartStatus.CORRUPT if isinstance(outcome, WrongBytes) else PartStatus.FAILED
