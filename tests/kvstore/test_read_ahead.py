"""Readers who come again under one lease: they ask less often where blocks lie, and find the next one read."""

import asyncio

import pytest

from common.transport import extents, lease_places
from common.transport.interface import LeaseToken, Part, PartStatus
from tests.common.disk.test_engines import Gate
from tests.kvstore.extent_reader import BLOCKS, DEADLINE_S, STRIDE, Reader, segment_fds
from tests.kvstore.faulty import EIO
from tests.kvstore.support import CAPACITY, LENGTH, NAMESPACE, chain, flip, payload, slot_offset

pytestmark = pytest.mark.usefixtures("engine")
OK = PartStatus.OK


async def lone(reader: Reader, token: LeaseToken, item: int) -> PartStatus:
    """Reads one block; if that went well, its bytes are right."""
    reader.region.view(reader.spans[item])[:] = bytes(LENGTH)
    (status,) = await reader.transport.read(token, [reader.parts[item]], [reader.spans[item]], deadline_s=DEADLINE_S)
    assert status is not OK or reader.bytes(item) == payload(reader.keys[item])
    return status


async def fds_of_the_store(reader: Reader, token: LeaseToken) -> int:
    """How many segments' descriptors it keeps when it has told of every block."""
    (await reader.connection.locate(token, reader.parts, deadline_s=DEADLINE_S)).close()
    return segment_fds()


async def gone(reader: Reader, fds: int) -> None:
    """Waits until only so many descriptors are left, and no buffer is out."""
    async with asyncio.timeout(DEADLINE_S):
        while segment_fds() > fds or reader.transport._ahead.buffers.taken_bytes:
            await asyncio.sleep(0.001)


async def test_who_reads_block_by_block_asks_twice_and_gets_every_block(reader: Reader) -> None:
    token = reader.lease()
    located = []
    for item in range(BLOCKS):
        assert await lone(reader, token, item) is OK
        located.append(reader.one.store.metrics.located_blocks)
    assert located == [1, BLOCKS] + [BLOCKS] * (BLOCKS - 2)  # the second answer told of all that follow
    assert reader.transport.carrier == "extent" and reader.one.store.metrics.reads == 0
    reader.one.store.release(token)


async def test_who_jumps_asks_where_his_own_blocks_lie_and_no_others(reader: Reader) -> None:
    token = reader.lease()
    located = []
    for item in (0, 2, 1, 3):
        assert await lone(reader, token, item) is OK
        located.append(reader.one.store.metrics.located_blocks)
    assert located == [1, 2, 3, 4]
    reader.one.store.release(token)


async def test_the_third_block_in_order_is_read_before_it_is_asked_for(reader: Reader) -> None:
    token = reader.lease()
    assert [await lone(reader, token, item) for item in (0, 1)] == [OK, OK]
    async with asyncio.timeout(DEADLINE_S):
        while reader.engine.pending:
            await asyncio.sleep(0)
    reader.files.fail["read"] = EIO  # nothing more comes from the disk, and yet
    assert await lone(reader, token, 2) is OK
    reader.one.store.release(token)


async def test_so_many_blocks_are_ahead_of_a_reader_and_no_more(reader: Reader) -> None:
    token = reader.lease()
    for item, ahead in enumerate([0, 2, 3, 2, 1, 0]):  # of six blocks, in runs of two
        assert await lone(reader, token, item) is OK
        async with asyncio.timeout(DEADLINE_S):
            while reader.engine.pending or reader.transport._ahead.buffers.taken_bytes != ahead * STRIDE:
                await asyncio.sleep(0)
    reader.one.store.release(token)


async def test_nothing_is_read_ahead_for_who_jumps_or_reads_several_at_once(reader: Reader) -> None:
    token = reader.lease()
    for item in (0, 2, 4, 1, 5):
        assert await lone(reader, token, item) is OK
    assert await reader.read(token) == [OK] * BLOCKS
    assert reader.transport._ahead.buffers.taken_bytes == 0
    reader.one.store.release(token)


async def test_descriptors_and_blocks_that_nobody_comes_for_are_let_go(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.transport.read_ahead.IDLE_S", 0.01)
    monkeypatch.setattr(lease_places, "IDLE_S", 0.01)
    token = reader.lease()
    kept = await fds_of_the_store(reader, token)
    assert [await lone(reader, token, item) for item in (0, 1, 2, 3)] == [OK] * 4
    await gone(reader, kept)
    assert await lone(reader, token, 4) is OK
    reader.one.store.release(token)


async def test_a_closed_transport_lets_all_go(reader: Reader) -> None:
    token = reader.lease()
    kept = await fds_of_the_store(reader, token)
    assert [await lone(reader, token, item) for item in (0, 1, 2)] == [OK] * 3
    await reader.transport.close()
    await gone(reader, kept)
    reader.one.store.release(token)


async def test_a_block_read_ahead_whose_reader_goes_elsewhere_is_dropped(reader: Reader) -> None:
    token = reader.lease()
    for item in (0, 1, 4, 0):
        assert await lone(reader, token, item) is OK
    async with asyncio.timeout(DEADLINE_S):
        while reader.transport._ahead.buffers.taken_bytes:
            await asyncio.sleep(0)
    reader.one.store.release(token)


async def test_a_lease_that_ended_gives_what_was_its_or_nothing(reader: Reader) -> None:
    store, token = reader.one.store, reader.lease()
    gate = Gate()
    assert [await lone(reader, token, item) for item in (0, 1, 2)] == [OK] * 3
    async with asyncio.timeout(DEADLINE_S):
        while reader.engine.pending:  # what was read ahead has come
            await asyncio.sleep(0)
    reader.files.fail["read"] = gate
    reading = asyncio.create_task(lone(reader, token, 4))  # known, not read ahead
    await asyncio.to_thread(gate.entered.acquire)
    store.release(token)
    while store.space.shelves[NAMESPACE].evict():
        pass
    assert await reader.one.put(chain(CAPACITY, "other")) == [OK] * CAPACITY  # every slot is rewritten
    gate.opened.set()
    assert await reading is PartStatus.REJECTED
    assert await lone(reader, token, 5) is PartStatus.REJECTED
    assert store.metrics.corrupt_blocks == 0


async def test_a_damaged_block_read_ahead_is_condemned_by_the_store_alone(reader: Reader) -> None:
    path, offset = slot_offset(reader.one.store.disks[0].folder, reader.keys[2])
    flip(path, offset + 4096 + 17)
    token = reader.lease()
    statuses = [await lone(reader, token, item) for item in range(BLOCKS)]
    assert statuses == [OK, OK, PartStatus.CORRUPT, OK, OK, OK]
    assert reader.one.store.metrics.corrupt_blocks == 1
    reader.one.store.release(token)


async def test_a_reader_that_waits_no_longer_gets_expired_and_its_span_is_untouched(reader: Reader) -> None:
    gate, token = Gate(), reader.lease()
    assert await lone(reader, token, 0) is OK
    reads = iter([None])  # the second block comes, the third, read ahead, hangs

    def hang(*_: object) -> None:
        if next(reads, gate) is gate:
            gate()

    reader.files.fail["read"] = hang
    assert await lone(reader, token, 1) is OK
    span = reader.region.view(reader.spans[2])
    span[:] = b"\x05" * LENGTH
    status = await reader.transport.read(token, [reader.parts[2]], [reader.spans[2]], deadline_s=0.02)
    assert status == [PartStatus.EXPIRED] and not reader.region.held(reader.spans[2])
    gate.opened.set()
    async with asyncio.timeout(DEADLINE_S):
        while reader.transport._ahead.buffers.taken_bytes:
            await asyncio.sleep(0.001)
    assert bytes(span) == b"\x05" * LENGTH
    reader.one.store.release(token)


async def test_what_is_known_of_leases_is_bounded(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_places, "LEASES_MAX", 2)
    monkeypatch.setattr("common.transport.read_ahead.LEASES_MAX", 2)
    tokens = [reader.lease() for _ in range(4)]
    for item in range(3):
        for token in tokens:
            assert await lone(reader, token, item) is OK
    assert len(reader.transport._places._leases) == 2 and len(reader.transport._ahead._last) == 2
    for token in tokens:
        reader.one.store.release(token)


def test_a_long_read_begins_with_little_and_keeps_to_what_one_frame_and_the_buffers_hold() -> None:
    mib = 1 << 20
    parts = [Part(i, 0, 2 * mib) for i in range(128)]
    sizes = [chunk.stop - chunk.start for chunk in extents._chunks(parts)]
    assert sizes == [4, 32, 32, 32, 28]
    assert [(c.start, c.stop) for c in extents._chunks(parts[:4])] == [(0, 4)]
    assert [(c.start, c.stop) for c in extents._chunks([Part(0, 0, 256 * mib)])] == [(0, 1)]
    small = [Part(i, 0, 4096) for i in range(10_000)]
    assert max(c.stop - c.start for c in extents._chunks(small)) == 4096
    assert extents._chunks([]) == [slice(0, 0)]


async def test_a_read_in_several_chunks_brings_every_block_where_it_belongs(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extents, "FIRST_BYTES", 1)
    monkeypatch.setattr(extents, "CHUNK_BYTES_MAX", 2 * LENGTH)
    token = reader.lease()
    assert await reader.read(token) == [OK] * BLOCKS
    assert [reader.bytes(i) for i in range(BLOCKS)] == [payload(key) for key in reader.keys]
    assert reader.one.store.metrics.located_blocks == BLOCKS
    reader.one.store.release(token)
