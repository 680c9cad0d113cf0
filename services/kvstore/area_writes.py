"""Filling reserved slots for the byte plane.

An item of a write lease takes its whole block, once: `places` gives the place, inside the image of the
slot as it will be written; `commit` returns when it is durable; `abort` takes the place back.
Memory is bounded; what finds no room is refused as FULL.
"""

import asyncio
import errno
from collections.abc import Sequence

from common.disk.buffers import BufferPool
from common.disk.pages import address
from common.errors import Overloaded
from common.logs import Log
from common.transport.interface import LeaseToken, Part, PartStatus
from services.kvstore.chunks import encode_table
from services.kvstore.leases import WriteLease
from services.kvstore.record import PAGE_BYTES, SlotHeader, encode_slot
from services.kvstore.shelf import Shelf
from services.kvstore.store import Store
from services.kvstore.write_item import WriteItem, WriteState
from services.kvstore.writer import Outcome, SlotWrite

log = Log("writes")


class Writes:
    """The writing half of a `StoreArea`."""

    def __init__(self, store: Store, *, buffer_bytes: int) -> None:
        self.buffers = BufferPool(buffer_bytes)
        self._store = store
        self._metrics = store.metrics
        self._filling: dict[int, tuple[WriteLease, WriteItem]] = {}  # by address of the payload's place
        self._commits: set[asyncio.Task[list[PartStatus]]] = set()

    def places(self, token: LeaseToken, parts: Sequence[Part]) -> list[memoryview | PartStatus]:
        """As `Area.write_buffers`."""
        lease = self._store.leases.get(token)
        if not isinstance(lease, WriteLease):
            self._metrics.rejected_parts += len(parts)
            return [PartStatus.REJECTED] * len(parts)
        return [self._write_buffer(lease, part) for part in parts]

    def _write_buffer(self, lease: WriteLease, part: Part) -> memoryview | PartStatus:
        geometry = lease.shelf.geometry
        item = lease.items[part.item] if 0 <= part.item < len(lease.items) else None
        whole = part.offset == 0 and part.length == geometry.payload_bytes
        if item is None or not whole or item.state is not WriteState.RESERVED:
            self._metrics.rejected_parts += 1
            return PartStatus.REJECTED
        image = self.buffers.take(geometry.slot_bytes)
        if image is None:
            return PartStatus.FULL
        item.image = image
        item.step("receive")
        place = image[PAGE_BYTES : PAGE_BYTES + geometry.payload_bytes]
        self._filling[address(place)] = (lease, item)
        return place

    async def commit(self, buffers: Sequence[memoryview], checksums: Sequence[int]) -> list[PartStatus]:
        """As `Area.commit`. Goes on when the caller is cancelled."""
        task = asyncio.create_task(self._commit(buffers, checksums))
        self._commits.add(task)
        task.add_done_callback(self._commits.discard)
        return await asyncio.shield(task)

    def abort(self, buffers: Sequence[memoryview]) -> None:
        """As `Area.abort`."""
        for buffer in buffers:
            lease, item = self._filling.pop(address(buffer))
            if lease.ended:
                self._store.intake.given_up(lease.shelf, item, "close")
            else:
                item.step("abort")
            self._drop_image(item)

    async def settle(self) -> None:
        """Waits for commits under way."""
        while self._commits:
            await asyncio.wait(self._commits)

    async def _commit(self, buffers: Sequence[memoryview], checksums: Sequence[int]) -> list[PartStatus]:
        filled = [self._filling.pop(address(buffer)) for buffer in buffers]
        statuses = [PartStatus.REJECTED] * len(filled)
        writes: list[SlotWrite] = []
        positions: list[int] = []
        for i, ((lease, item), checksum) in enumerate(zip(filled, checksums, strict=True)):
            if lease.ended:
                self._store.intake.given_up(lease.shelf, item, "close")
                self._drop_image(item)
                continue
            item.step("commit")
            writes.append(_slot_write(lease.shelf, item, checksum))
            positions.append(i)
        with self._metrics.write_s.time():
            outcomes = await self._store.write(writes)
        for i, outcome in zip(positions, outcomes, strict=True):
            lease, item = filled[i]
            statuses[i] = self._settle_write(lease, item, checksums[i], outcome)
            self._drop_image(item)
        return statuses

    def _settle_write(self, lease: WriteLease, item: WriteItem, checksum: int, outcome: Outcome) -> PartStatus:
        if outcome.error is None:
            self._store.intake.filled(lease, item, checksum, outcome.sequence)
            return PartStatus.OK
        full = isinstance(outcome.error, Overloaded) or (
            isinstance(outcome.error, OSError) and outcome.error.errno in (errno.ENOSPC, errno.EDQUOT)
        )
        self._store.intake.given_up(lease.shelf, item, "fail", failed=not full)
        log.warning("write_failed", key=item.key.hex(), reason=str(outcome.error))
        if full:
            self._metrics.dropped_writes += 1
            return PartStatus.FULL
        self._metrics.failed_writes += 1
        self._store.watch.failed_on(lease.shelf.place(item.slot)[0], outcome.error)
        return PartStatus.FAILED

    def _drop_image(self, item: WriteItem) -> None:
        assert item.image is not None
        self.buffers.give_back(item.image)
        item.image = None

    def check_integrity(self) -> list[str]:
        """What is wrong, in words."""
        filling = sum(len(item.image) for _, item in self._filling.values() if item.image is not None)
        if not self._commits and filling != self.buffers.taken_bytes:
            return [f"{self.buffers.taken_bytes} bytes of write buffers are out, {filling} are being filled"]
        return []


def _slot_write(shelf: Shelf, item: WriteItem, checksum: int) -> SlotWrite:
    segment, within = shelf.place(item.slot)
    image = item.image
    assert image is not None
    length = shelf.geometry.payload_bytes
    tenant = shelf.tenants.digest(item.tenant)
    chunk_table = encode_table(image[PAGE_BYTES : PAGE_BYTES + length])

    def seal(sequence: int) -> None:
        header = SlotHeader(
            shelf.namespace_bytes,
            item.key,
            item.parent,
            sequence,
            length,
            checksum,
            within,
            segment.number,
            tenant,
            item.written_s,
            item.keep_s,
        )
        image[:PAGE_BYTES] = encode_slot(header, chunk_table)
        image[PAGE_BYTES + length :] = bytes(len(image) - PAGE_BYTES - length)

    return SlotWrite(segment, within, image, seal)
