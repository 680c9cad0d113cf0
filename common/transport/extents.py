"""Reads a peer's disk from here: the peer on this host says where, and moves no byte.

1. `read` asks over the connection where its parts lie (LOCATE), unless an answer of before says so
   (lease_places.py). The answer brings read-only descriptors.
2. An I/O engine of ours reads the disk and every part is checked against the checksum that came with the
   extent. It reads into the spans where these are on huge pages, else into buffers that are, and copies: that
   takes the processor no longer than to hand the disk a piece for every 4 KiB, and some disks half the time. The lease keeps the peer from writing there; where it ended too early, the checksum
   finds out.
3. What was not located, or didn't match, is read through the connection: there the peer looks itself, and
   it is the peer who decides that a block is bad.
4. The descriptors are closed when no read is in flight and none is likely to come.

Who reads the blocks of a lease one by one finds the next ones read already (read_ahead.py).

A caller that stops waiting gets its spans back as in `connection.py`: what the disk has begun is waited for, and
where the disk hangs longer than SETTLE_S the spans are held by the region until it has ended.
"""

import asyncio
from collections.abc import Sequence

from common.disk.batch import Batch
from common.disk.buffers import BufferPool
from common.disk.engine import Engine
from common.disk.pages import pages
from common.errors import Overloaded, TransferFailed
from common.logs import Log
from common.transport.connection import SETTLE_S, Connection
from common.transport.counters import Counters
from common.transport.extent_read import ExtentRead, WrongBytes, reads_directly
from common.transport.interface import PARTS_MAX, Extent, LeaseToken, Part, PartStatus, Span
from common.transport.lease_places import LeasePlaces, Places
from common.transport.memory import copy
from common.transport.read_ahead import Flight, ReadAhead
from common.transport.region import Region

log = Log("extents")
FIRST_BYTES = 8 << 20
CHUNK_BYTES_MAX = 64 << 20  # of buffers, where there are any, two chunks have room


class ExtentTransport:
    """A `Transport` over a connection that offers extents. Writes go through the connection."""

    def __init__(self, connection: Connection, region: Region, engine: Engine, buffers: BufferPool | None) -> None:
        """`buffers`: on huge pages, to read through; None: straight into the region."""
        self.carrier = "extent"  # of the newest read: the connection's own when nothing came by extents
        self.counters = Counters()
        self._connection, self._region, self._engine, self._buffers = connection, region, engine, buffers
        self._places = LeasePlaces(connection)
        self._ahead = ReadAhead(self._places, engine)

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
            chunks = _chunks(parts)
            if len(chunks) == 1:
                statuses = await self._read_located(token, parts, into, deadline)
            else:
                reads: list[asyncio.Task[list[PartStatus]]] = []
                async with asyncio.TaskGroup() as group:
                    for chunk in chunks:
                        reads.append(group.create_task(self._read_located(token, parts[chunk], into[chunk], deadline)))
                        await asyncio.sleep(0)  # its question leaves before the next one is made
                statuses = [status for read in reads for status in read.result()]
            left = [i for i, status in enumerate(statuses) if status not in (PartStatus.OK, PartStatus.EXPIRED)]
            self.carrier = "extent" if len(left) < len(parts) else self._connection.carrier
            if left:
                self._places.forget(token)
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
        self._ahead.close()
        self._places.close()
        await self._connection.close()

    def __repr__(self) -> str:
        return f"ExtentTransport({self._connection!r}, {self._engine.name})"

    async def _read_located(
        self, token: LeaseToken, parts: Sequence[Part], into: Sequence[Span], deadline: float
    ) -> list[PartStatus]:
        """OK: the bytes are there, checked. EXPIRED: no time is left. Anything else: to be read in the usual way."""
        flight = self._ahead.take(token, parts[0]) if len(parts) == 1 else None
        if flight is not None:
            return [await self._land(flight, into[0], deadline)]
        try:
            left_s = deadline - asyncio.get_running_loop().time()
            places = await self._places.find(token, parts, deadline_s=left_s)
        except TimeoutError:
            return [PartStatus.EXPIRED] * len(parts)
        except TransferFailed:
            return [PartStatus.FAILED] * len(parts)
        statuses = await self._read_disk(places, into, deadline)
        if statuses == [PartStatus.OK]:
            self._ahead.follow(token, parts[0])
        return statuses

    async def _land(self, flight: Flight, span: Span, deadline: float) -> PartStatus:
        """Brings a block that was read ahead to its span."""
        try:
            async with asyncio.timeout_at(deadline):
                outcome = (await asyncio.shield(flight.done))[0]
            if not isinstance(outcome, int) or self._region.held(span):
                return PartStatus.FAILED
            copy(self._region.view(span), flight.view)
            return PartStatus.OK
        except TimeoutError:
            return PartStatus.EXPIRED
        finally:
            flight.end()

    async def _read_disk(self, places: Places, into: Sequence[Span], deadline: float) -> list[PartStatus]:
        """As `_read_located`. Closes the places."""
        statuses = [PartStatus.FAILED] * len(into)
        reads: dict[int, ExtentRead] = {}
        try:
            reads = self._readings(places, into)
            await self._take_buffers([read for read in reads.values() if read.direct], deadline)
            left_s = deadline - asyncio.get_running_loop().time()
            batch = self._engine.submit([read.transfer() for read in reads.values()], left_s)
        except BaseException as error:
            places.close()
            self._give_back(reads)
            if isinstance(error, TimeoutError):
                return [PartStatus.EXPIRED] * len(into)
            if isinstance(error, Overloaded):
                return statuses
            raise

        def ended(_: object) -> None:
            places.close()
            self._give_back(reads)

        batch.done.add_done_callback(ended)
        await self._wait(batch, reads, [into[i] for i in reads], deadline)
        if not batch.done.done():
            return [PartStatus.EXPIRED] * len(into)
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

    def _readings(self, places: Places, into: Sequence[Span]) -> dict[int, ExtentRead]:
        """What can be read from here, by number of the part."""
        reads: dict[int, ExtentRead] = {}
        direct: dict[int, bool] = {}
        for i, (extent, span) in enumerate(zip(places.extents, into, strict=False)):
            if isinstance(extent, Extent) and not self._region.held(span):
                if extent.fd not in direct:
                    direct[extent.fd] = reads_directly(extent.fd)
                read = ExtentRead(extent, self._region.view(span), direct[extent.fd])
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


def _chunks(parts: Sequence[Part]) -> list[slice]:
    """What is asked for and read together: little at first, so that the disk has work while the rest is asked for."""
    chunks: list[slice] = []
    first, room = 0, FIRST_BYTES
    for index, part in enumerate(parts):
        if index > first and (part.length > room or index - first == PARTS_MAX):
            chunks.append(slice(first, index))
            first, room = index, CHUNK_BYTES_MAX
        room -= part.length
    return [*chunks, slice(first, len(parts))]


def _status(outcome: int | BaseException) -> PartStatus:
    if isinstance(outcome, int):
        return PartStatus.OK
    return PartStatus.CORRUPT if isinstance(outcome, WrongBytes) else PartStatus.FAILED
