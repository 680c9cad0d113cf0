"""The store in this process, as its byte plane drives it: `StoreArea` under leases, no wire.

A read brings verified blocks into spans of our memory. Requests of a reader's usual size queue, so that `depth` of
their blocks are always at the kernel; or (`read_closed`) `depth` requests of one block each are in flight, and the
next is made when one has ended, which is what latencies are of. A write request
brings BATCH_BYTES: space is reserved, and from the moment that the blocks are in the store's buffers (which is
the carrier's work) they are committed, and answered when durable. Enough requests are in flight to keep `depth` writes at the kernel.
"""

import asyncio
import hashlib
import random
import resource
import time
from collections.abc import Sequence
from pathlib import Path

from common.disk.engine import EngineChoice
from common.disk.pages import address
from common.storage import Admission, BlockMeta
from common.transport.interface import LeaseToken, Part, PartStatus, Span
from common.transport.memory import copy
from common.transport.region import Region
from loadtest.store.blocks import NAMESPACE, Blocks, keys
from loadtest.store.fio import BATCH_BYTES, Sample, blocks_per_read, requests_in_flight
from loadtest.store.slices import Slice
from services.kvstore.area import StoreArea
from services.kvstore.checkpoint import footprint_bytes
from services.kvstore.disk import OWN_FILES_BYTES
from services.kvstore.options import StoreOptions
from services.kvstore.record import Geometry
from services.kvstore.store import Reserved, Store

LEASE_S = 600.0
SEGMENT_BYTES = 64 << 20


class LocalStore:
    """A store full of blocks."""

    def __init__(self, folder: Path, block_bytes: int, total_bytes: int, depth: int, io: EngineChoice) -> None:
        slot_bytes = Geometry(block_bytes, 1).slot_bytes
        per_segment = SEGMENT_BYTES // slot_bytes
        segments = max(8, total_bytes // (per_segment * slot_bytes))
        options = StoreOptions(
            budget_bytes=segments * footprint_bytes(Geometry(block_bytes, per_segment)) + OWN_FILES_BYTES,
            segment_bytes=SEGMENT_BYTES,
            read_depth=depth,
            write_depth=depth,
            io=io,
        )
        self.store = Store.open([folder], options)
        self.area = StoreArea(self.store, read_buffer_bytes=128 << 20, write_buffer_bytes=512 << 20, read_deadline_s=30)
        self.capacity = segments * per_segment
        self.blocks = Blocks(block_bytes)
        self.depth = depth
        self._block_bytes = block_bytes
        self._per_read = blocks_per_read(block_bytes)
        self._requests = max(2, 2 * depth // self._per_read)
        self._region = Region(max(depth, self._requests * self._per_read) * block_bytes)
        self._chain = self.blocks.chain(0)
        self._filled: set[int] = set()  # addresses of the store's buffers that hold a block's bytes already

    async def fill(self) -> None:
        """Writes one chain over all slots: what `read` reads."""
        self._chain = self.blocks.chain(self.capacity)
        step = max(1, BATCH_BYTES // self._block_bytes)
        for first in range(0, self.capacity, step):
            await self._write(self._chain[first : first + step])

    async def fill_scattered(self) -> None:
        """Writes a block over each slot, one by one in random order: so they go, and slots that are free at once aren't neighbours."""
        chain = self.blocks.chain(self.capacity)
        alone = [BlockMeta(block.key, hashlib.sha256(block.key).digest(), block.length) for block in chain]
        reserved = [await self.store.reserve(NAMESPACE, [block], LEASE_S) for block in alone]
        random.shuffle(reserved)
        at_once = BATCH_BYTES // self._block_bytes
        for first in range(0, self.capacity, at_once):
            await asyncio.gather(*(self._fill_slots(one, 1) for one in reserved[first : first + at_once]))

    async def close(self) -> None:
        await self.area.settle()
        await self.store.settle()
        self.store.close()
        self._region.close()

    async def read(self, ramp_s: float, seconds: float) -> Sample:
        return await self._read(self._requests, self._per_read, ramp_s, seconds)

    async def read_closed(self, ramp_s: float, seconds: float) -> Sample:
        return await self._read(self.depth, 1, ramp_s, seconds)

    async def _read(self, requests: int, blocks: int, ramp_s: float, seconds: float) -> Sample:
        found = self.store.lookup(NAMESPACE, keys(self._chain), LEASE_S, lease=True)
        assert found.token is not None and found.blocks == self.capacity, f"{found.blocks} of {self.capacity} blocks"
        clock = Slice(ramp_s, seconds, _cpu_s)
        await asyncio.gather(*(self._read_on(clock, found.token, number, blocks) for number in range(requests)))
        sample = clock.sample()
        self.store.release(found.token)
        return sample

    async def _read_on(self, clock: Slice, token: LeaseToken, number: int, blocks: int) -> None:
        size = self._block_bytes
        views = [self._region.view(Span((number * blocks + i) * size, size)) for i in range(blocks)]
        while clock.running:
            began = time.perf_counter()
            parts = [Part(random.randrange(self.capacity), 0, size) for _ in range(blocks)]
            results = await self.area.read(token, parts, views)
            assert all(status is PartStatus.OK for status, _, _ in results), results
            clock.note(began, blocks * size)

    async def write(self, ramp_s: float, seconds: float) -> Sample:
        """Overwrites the coldest slots with new chains."""
        per_request = max(1, BATCH_BYTES // self._block_bytes)
        requests = requests_in_flight(self._block_bytes, self.depth)
        clock = Slice(ramp_s, seconds, _cpu_s)
        await asyncio.gather(*(self._write_on(clock, per_request) for _ in range(requests)))
        return clock.sample()

    async def _write_on(self, clock: Slice, count: int) -> None:
        while clock.running:
            began = time.perf_counter()
            await self._write(self.blocks.chain(count))
            clock.note(began, count * self._block_bytes)

    async def _write(self, chain: Sequence[BlockMeta]) -> None:
        await self._fill_slots(await self.store.reserve(NAMESPACE, chain, LEASE_S), len(chain))

    async def _fill_slots(self, reserved: Reserved, count: int) -> None:
        assert reserved.token is not None and set(reserved.admissions) == {Admission.ACCEPTED}, reserved.admissions
        parts = [Part(i, 0, self._block_bytes) for i in range(count)]
        buffers: list[memoryview] = []
        for buffer in self.area.write_buffers(reserved.token, parts):
            assert isinstance(buffer, memoryview), buffer
            if address(buffer) not in self._filled:
                copy(buffer, self.blocks.payload)
                self._filled.add(address(buffer))
            buffers.append(buffer)
        statuses = await self.area.commit(reserved.token, parts, buffers, [self.blocks.checksums] * count)
        assert set(statuses) == {PartStatus.OK}, statuses
        self.store.release(reserved.token)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
