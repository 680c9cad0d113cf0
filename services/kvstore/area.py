"""The byte plane's view of the store: prefixes are looked up, leased blocks are read, reserved slots are filled."""

from collections.abc import Sequence

from common.blocks import Namespace
from common.transport.interface import Extent, LeaseToken, Part, PartStatus
from common.transport.lookups import Prefix
from common.transport.memory import Checksums
from services.kvstore.area_extents import locate
from services.kvstore.area_reads import ReadResult, Reads
from services.kvstore.area_writes import Writes
from services.kvstore.store import Store


class StoreArea:
    """An `Area` over a `Store`. Belongs to the event loop."""

    def __init__(self, store: Store, *, read_buffer_bytes: int, write_buffer_bytes: int, read_deadline_s: float) -> None:
        self._store = store
        self.reads = Reads(store, buffer_bytes=read_buffer_bytes, deadline_s=read_deadline_s)
        self.writes = Writes(store, buffer_bytes=write_buffer_bytes)

    @property
    def epoch(self) -> bytes:
        return self._store.epoch

    def lookup(self, namespace: Namespace, keys: Sequence[bytes], lease_s: float) -> Prefix:
        return self._store.lookup(namespace, keys, lease_s, lease=lease_s > 0)

    async def read(self, token: LeaseToken, parts: Sequence[Part], into: Sequence[memoryview] | None) -> list[ReadResult]:
        return await self.reads.read(token, parts, into)

    def locate(self, token: LeaseToken, parts: Sequence[Part]) -> list[Extent | PartStatus]:
        return locate(self._store, token, parts)

    def done_reading(self, token: LeaseToken, views: Sequence[memoryview]) -> None:
        self.reads.done_reading(views)

    def write_buffers(self, token: LeaseToken, parts: Sequence[Part]) -> list[memoryview | PartStatus]:
        return self.writes.places(token, parts)

    async def commit(
        self, token: LeaseToken, parts: Sequence[Part], buffers: Sequence[memoryview], checksums: Sequence[Checksums]
    ) -> list[PartStatus]:
        return await self.writes.commit(token, parts, checksums)

    def abort(self, token: LeaseToken, parts: Sequence[Part], buffers: Sequence[memoryview]) -> None:
        self.writes.abort(token, parts)

    async def settle(self) -> None:
        """Waits for commits under way."""
        await self.writes.settle()

    def check_integrity(self) -> list[str]:
        """Buffers and items agree; what is wrong, in words."""
        return self.reads.check_integrity() + self.writes.check_integrity()
