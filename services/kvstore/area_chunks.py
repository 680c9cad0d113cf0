"""Chunk tables of leased blocks: read from their slot pages when first needed, kept as long as the lease.

A slot page is believed when it is the one that the index knows of. Where it isn't, can't be read, or has no
table, there is none: the block is then read whole, and that read says what is wrong.
"""

import asyncio
from collections.abc import Sequence

from common.disk.buffers import BufferPool
from common.disk.transfer import Transfer
from common.errors import Overloaded
from services.kvstore.area_targets import Target
from services.kvstore.chunks import decode_table
from services.kvstore.leases import ReadLease
from services.kvstore.record import PAGE_BYTES, SlotHeader, decode_slot
from services.kvstore.store import Store


class ChunkTables:
    """Fills `ReadLease.chunks`."""

    def __init__(self, store: Store, buffers: BufferPool, deadline_s: float) -> None:
        self._store, self._buffers, self._deadline_s = store, buffers, deadline_s

    async def learn(self, lease: ReadLease, targets: Sequence[Target]) -> None:
        """Sees to it that the lease knows the tables of all targets that are ranges. Their slots are pinned."""
        unknown = {target.slot: target for target in targets if not target.whole and target.slot not in lease.chunks}
        if not unknown:
            return
        pages: list[memoryview] | None = None
        try:
            async with asyncio.timeout(self._deadline_s):
                pages = await self._buffers.take_all([PAGE_BYTES] * len(unknown))
        except TimeoutError:
            pass
        if pages is not None:
            await self._read(lease, list(unknown.values()), pages)

    async def _read(self, lease: ReadLease, targets: list[Target], pages: list[memoryview]) -> None:
        taken = pages

        def give_back(_: object) -> None:
            for page in taken:
                self._buffers.give_back(page)

        transfers = [_page_read(lease, target, page) for target, page in zip(targets, pages, strict=True)]
        try:
            batch = self._store.readers.submit(transfers, self._deadline_s)
        except Overloaded:
            give_back(None)
            return
        batch.done.add_done_callback(give_back)
        await asyncio.wait([batch.done], timeout=self._deadline_s)


def _page_read(lease: ReadLease, target: Target, page: memoryview) -> Transfer:
    segment, within = target.shelf.place(target.slot)

    def keep() -> int:
        header = decode_slot(page)
        known = (segment.namespace, target.shelf.index.key(target.slot), target.sequence, segment.number, within)
        table = None
        if isinstance(header, SlotHeader) and known == (
            header.namespace,
            header.key,
            header.sequence,
            header.segment,
            header.slot,
        ):
            table = decode_table(page, header.payload_bytes)
        lease.chunks[target.slot] = table
        return len(page)

    return segment.header_read(within, page, keep)
