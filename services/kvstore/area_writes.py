"""Filling reserved slots for the byte plane.

An item of a write lease takes its whole block, once: `places` gives the place, inside the image of the
slot as it will be written; `commit` returns when it is durable; `abort` takes the place back.
Memory is bounded; what finds no room is refused as FULL.
"""

import asyncio
import errno
from collections.abc import Sequence

from common.disk.buffers import BufferPool
from common.errors import Overloaded
from common.logs import Log
from common.transport.interface import LeaseToken, Part, PartStatus
from common.transport.memory import Checksums
from services.kvstore.chunks import encode_table
from services.kvstore.leases import WriteLease
from services.kvstore.record import PAGE_BYTES
from services.kvstore.slot_pages import SlotPages
from services.kvstore.store import Store
from services.kvstore.write_item import WriteItem, WriteState
from services.kvstore.writer import Seal, SlotWrite

log = Log("writes")


class Writes:
    """The writing half of a `StoreArea`."""

    def __init__(self, store: Store, *, buffer_bytes: int) -> None:
        self.buffers = BufferPool(buffer_bytes)
        self._store = store
        self._metrics = store.metrics
        self._filling: dict[tuple[LeaseToken, int], tuple[WriteLease, WriteItem]] = {}  # by item of a lease
        self._commits: set[asyncio.Task[list[PartStatus]]] = set()

    def places(self, token: LeaseToken, parts: Sequence[Part]) -> list[memoryview | PartStatus]:
        """As `Area.write_buffers`."""
        lease = self._store.leases.get(token)
        if not isinstance(lease, WriteLease):
            self._metrics.rejected_parts += len(parts)
            return [PartStatus.REJECTED] * len(parts)
        return [self._place(token, lease, part) for part in parts]

    def _place(self, token: LeaseToken, lease: WriteLease, part: Part) -> memoryview | PartStatus:
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
        self._filling[token, part.item] = lease, item
        return image[PAGE_BYTES : PAGE_BYTES + geometry.payload_bytes]

    async def commit(self, token: LeaseToken, parts: Sequence[Part], checksums: Sequence[Checksums]) -> list[PartStatus]:
        """As `Area.commit`. Goes on when the caller is cancelled."""
        filled = [self._filling.pop((token, part.item)) for part in parts]
        task = asyncio.create_task(self._commit(filled, checksums))
        self._commits.add(task)
        task.add_done_callback(self._commits.discard)
        return await asyncio.shield(task)

    def abort(self, token: LeaseToken, parts: Sequence[Part]) -> None:
        """As `Area.abort`."""
        for part in parts:
            lease, item = self._filling.pop((token, part.item))
            if lease.ended:
                self._store.intake.given_up(lease, [item], "close")
            else:
                item.step("abort")
            self._drop_image(item)

    async def settle(self) -> None:
        """Waits for commits under way."""
        while self._commits:
            await asyncio.wait(self._commits)

    async def _commit(self, filled: Sequence[tuple[WriteLease, WriteItem]], checksums: Sequence[Checksums]) -> list[PartStatus]:
        if not filled:
            return []
        lease, items = filled[0][0], [item for _, item in filled]
        if lease.ended:
            self._store.intake.given_up(lease, items, "close")
            statuses = [PartStatus.REJECTED] * len(items)
        else:
            for item in items:
                item.step("commit")
            with self._metrics.write_s.time():
                statuses = await self._write(lease, items, checksums)
        for item in items:
            self._drop_image(item)
        return statuses

    async def _write(self, lease: WriteLease, items: Sequence[WriteItem], checksums: Sequence[Checksums]) -> list[PartStatus]:
        """Writes a group and settles its items."""
        writes = [SlotWrite(*lease.shelf.place(item.slot), _image(item)) for item in items]
        written = await self._store.write(writes, self._seal(lease, items, checksums, writes))
        failed = written.failed
        good = [place for place in range(len(items)) if place not in failed] if failed else range(len(items))
        self._store.intake.filled(
            lease, [items[i] for i in good], [checksums[i].whole for i in good], [written.sequences[i] for i in good]
        )
        statuses = [PartStatus.OK] * len(items)
        for place, error in failed.items():
            statuses[place] = self._failed(lease, items[place], error)
        return statuses

    def _seal(
        self, lease: WriteLease, items: Sequence[WriteItem], checksums: Sequence[Checksums], writes: Sequence[SlotWrite]
    ) -> Seal:
        """Makes the headers of a group, as far as they are known without the numbers, and clears what pads the payloads."""
        shelf, images = lease.shelf, [write.image for write in writes]
        end = PAGE_BYTES + shelf.geometry.payload_bytes
        pages = SlotPages(
            [item.key for item in items],
            [item.parent for item in items],
            [checksum.whole for checksum in checksums],
            [(write.segment.number, write.slot) for write in writes],
            namespace=shelf.namespace_bytes,
            payload_bytes=shelf.geometry.payload_bytes,
            tenant=shelf.tenants.digest(lease.tenant),
            written_s=lease.written_s,
            keep_s=lease.keep_s,
        )
        padding = bytes(shelf.geometry.slot_bytes - end)
        for place, image in enumerate(images):
            if table := encode_table(image[PAGE_BYTES:end], checksums[place]):
                pages.put_table(place, table)
            if padding:
                image[end:] = padding

        def seal(places: Sequence[int], sequences: Sequence[int]) -> None:
            pages.seal(places, sequences, [images[place] for place in places])

        return seal

    def _failed(self, lease: WriteLease, item: WriteItem, error: BaseException) -> PartStatus:
        full = isinstance(error, Overloaded) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))
        self._store.intake.given_up(lease, [item], "fail", failed=not full)
        log.warning("write_failed", key=item.key.hex(), reason=str(error))
        if full:
            self._metrics.dropped_writes += 1
            return PartStatus.FULL
        self._metrics.failed_writes += 1
        self._store.watch.failed_on(lease.shelf.place(item.slot)[0], error)
        return PartStatus.FAILED

    def _drop_image(self, item: WriteItem) -> None:
        self.buffers.give_back(_image(item))
        item.image = None

    def check_integrity(self) -> list[str]:
        """What is wrong, in words."""
        filling = sum(len(item.image) for _, item in self._filling.values() if item.image is not None)
        if not self._commits and filling != self.buffers.taken_bytes:
            return [f"{self.buffers.taken_bytes} bytes of write buffers are out, {filling} are being filled"]
        return []


def _image(item: WriteItem) -> memoryview:
    assert item.image is not None
    return item.image
