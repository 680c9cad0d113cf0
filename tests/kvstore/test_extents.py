"""Readers on the store's host that read the SSD themselves, under a lease and against a checksum."""

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from common.disk.engine import Engine, open_engine
from common.transport import extent_desk
from common.transport import pool as pool_module
from common.transport.client import connect
from common.transport.frames import Offers
from common.transport.interface import Endpoint, Extent, LeaseToken, Part, PartStatus, Span
from common.transport.pool import TransportPool
from common.transport.server import serve_bytes
from tests.common.disk.test_engines import Gate
from tests.kvstore.extent_reader import BLOCKS, DEADLINE_S, Reader, segment_fds
from tests.kvstore.faulty import EIO, FailingFiles
from tests.kvstore.support import CAPACITY, LENGTH, NAMESPACE, chain, flip, payload, slot_offset

pytestmark = pytest.mark.usefixtures("engine")
OK, REJECTED = PartStatus.OK, PartStatus.REJECTED


async def test_the_reader_reads_the_disk_and_the_store_moves_no_byte(reader: Reader) -> None:
    token = reader.lease()
    assert await reader.read(token) == [OK] * BLOCKS
    assert [reader.bytes(i) for i in range(BLOCKS)] == [payload(key) for key in reader.keys]
    assert reader.transport.carrier == "extent" and reader.transport.counters.read.bytes == BLOCKS * LENGTH
    metrics = reader.one.store.metrics
    assert (metrics.reads, metrics.located_blocks, metrics.located_bytes) == (0, BLOCKS, BLOCKS * LENGTH)
    reader.one.store.release(token)


async def test_descriptors_are_read_only_and_go_when_the_read_is_over(reader: Reader) -> None:
    token = reader.lease()
    before = segment_fds()
    located = await reader.connection.locate(token, reader.parts, deadline_s=DEADLINE_S)
    assert segment_fds() > before
    for extent in located.parts:
        assert isinstance(extent, Extent)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(extent.fd, bytes(4096), 0)
    located.close()
    located.close()
    kept = segment_fds()  # the store keeps its own
    assert await reader.read(token) == [OK] * BLOCKS
    async with asyncio.timeout(DEADLINE_S):
        while segment_fds() != kept:
            await asyncio.sleep(0)
    reader.one.store.release(token)


async def test_a_range_of_a_block_comes_through_the_store(reader: Reader) -> None:
    token = reader.lease()
    (status,) = await reader.transport.read(token, [Part(2, 100, 900)], [Span(0, 900)], deadline_s=DEADLINE_S)
    assert status is OK and bytes(reader.region.view(Span(0, 900))) == payload(reader.keys[2])[100:1000]
    assert reader.transport.carrier == "shm"
    reader.one.store.release(token)


async def test_a_wrong_ended_or_foreign_token_gets_nothing(reader: Reader) -> None:
    store, before = reader.one.store, segment_fds()
    ended, expired = reader.lease(), reader.lease()
    store.release(ended)
    reader.clock.now += 3600
    other_epoch = LeaseToken(os.urandom(16))
    for token in (ended, expired, other_epoch, LeaseToken(bytes(16))):
        assert await reader.read(token) == [REJECTED] * BLOCKS
    assert (await reader.connection.locate(expired, reader.parts, deadline_s=DEADLINE_S)).parts == [REJECTED] * BLOCKS
    assert segment_fds() == before and not any(reader.bytes(0)) and store.metrics.located_blocks == 0
    store.sweep()


async def test_a_write_lease_has_no_extents(reader: Reader) -> None:
    store = reader.one.store
    from tests.kvstore.support import offers

    reserved = await store.reserve(NAMESPACE, offers(chain(1, "new")), None)
    assert reserved.token is not None
    assert (await reader.read(reserved.token))[0] is REJECTED
    store.release(reserved.token)


async def test_a_reader_that_stalls_past_its_lease_never_takes_another_blocks_bytes(reader: Reader) -> None:
    gate, store = Gate(), reader.one.store
    token = reader.lease()
    reader.files.fail["read"] = gate
    reading = asyncio.create_task(reader.read(token))
    await asyncio.to_thread(gate.entered.acquire)  # it has its extents
    store.release(token)
    while store.space.shelves[NAMESPACE].evict():
        pass
    assert await reader.one.put(chain(CAPACITY, "other")) == [OK] * CAPACITY  # every slot is rewritten
    gate.opened.set()
    assert await reading == [REJECTED] * BLOCKS
    assert store.metrics.corrupt_blocks == 0


async def test_a_damaged_block_is_found_by_the_reader_and_condemned_by_the_store(reader: Reader, tmp_path: Path) -> None:
    path, offset = slot_offset(tmp_path / "data", reader.keys[3])
    flip(path, offset + 4096 + 17)
    token = reader.lease()
    statuses = await reader.read(token)
    assert statuses == [OK] * 3 + [PartStatus.CORRUPT] + [OK] * 2
    assert reader.one.store.metrics.corrupt_blocks == 1
    reader.one.store.release(token)
    assert len(await reader.one.get(reader.keys)) == 3


@pytest.mark.parametrize("fault", [EIO, lambda *_: 0, lambda *_: 512], ids=["EIO", "nothing", "short"])
async def test_a_reader_whose_disk_access_fails_reads_through_the_store(reader: Reader, fault: object) -> None:
    token = reader.lease()
    reader.files.fail["read"] = fault  # type: ignore[assignment]
    assert await reader.read(token) == [OK] * BLOCKS
    assert [reader.bytes(i) for i in range(BLOCKS)] == [payload(key) for key in reader.keys]
    assert reader.transport.carrier == "shm" and reader.one.store.metrics.reads == BLOCKS
    reader.one.store.release(token)


async def test_spans_stay_held_while_a_hanging_disk_may_still_write_there(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.transport.extents.SETTLE_S", 0.01)
    gate, token = Gate(), reader.lease()
    reader.files.fail["read"] = gate
    assert await reader.read(token, deadline_s=0.05) == [PartStatus.EXPIRED] * BLOCKS
    assert all(reader.region.held(span) is (reader.buffers is None) for span in reader.spans)
    del reader.files.fail["read"]
    if reader.buffers is not None:  # the disk writes to these, and nothing is copied any more
        gate.opened.set()
        async with asyncio.timeout(DEADLINE_S):
            while reader.buffers.taken_bytes:
                await asyncio.sleep(0)
        assert not any(reader.bytes(0)) and await reader.read(token) == [OK] * BLOCKS
        reader.one.store.release(token)
        return
    assert await reader.transport.read(token, reader.parts[:1], reader.spans[:1], deadline_s=DEADLINE_S) == [PartStatus.FULL]
    gate.opened.set()
    async with asyncio.timeout(DEADLINE_S):
        while any(reader.region.held(span) for span in reader.spans):
            await asyncio.sleep(0)
    assert await reader.read(token) == [OK] * BLOCKS
    reader.one.store.release(token)


async def test_a_cancelled_read_returns_when_nothing_lands_any_more(reader: Reader) -> None:
    gate, token = Gate(), reader.lease()
    reader.files.fail["read"] = gate
    reading = asyncio.create_task(reader.read(token))
    await asyncio.to_thread(gate.entered.acquire)
    reading.cancel()
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await reading
    if reader.buffers is None:
        assert reader.engine.pending == 0 or all(reader.region.held(span) for span in reader.spans)
    reader.one.store.release(token)


async def test_blocks_in_more_files_than_one_answer_carries_are_read_through_the_store(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extent_desk, "EXTENT_FILES_MAX", 1)  # six blocks lie in two segments of four
    token = reader.lease()
    assert await reader.read(token) == [OK] * BLOCKS
    assert 0 < reader.one.store.metrics.reads < BLOCKS
    reader.one.store.release(token)


async def test_a_segment_that_cannot_be_opened_for_readers_is_read_through_the_store(reader: Reader) -> None:
    class Closed(FailingFiles):
        def open(self, path: Path, flags: int) -> int:
            raise OSError(errno.EMFILE, "too many open files")

    for segment in reader.one.store.space.shelves[NAMESPACE].segments.values():
        segment._files = Closed()
    token = reader.lease()
    assert await reader.read(token) == [OK] * BLOCKS
    assert reader.one.store.metrics.reads == BLOCKS
    reader.one.store.release(token)


async def test_a_pool_takes_extents_by_itself_on_one_host_and_not_where_shm_or_tcp_is_asked_for(
    reader: Reader, tmp_path: Path
) -> None:
    token = reader.lease()
    server = await serve_bytes(reader.one.area, tcp=("127.0.0.1", 0), shm_path=tmp_path / "pool")
    tcp_only = Endpoint(tcp=server.endpoint.tcp)
    for prefer, endpoint, carrier in (
        ("auto", server.endpoint, "extent"),
        ("extent", server.endpoint, "extent"),
        ("shm", server.endpoint, "shm"),
        ("tcp", server.endpoint, "tcp"),
        ("auto", tcp_only, "tcp"),
    ):
        pool = TransportPool(reader.region, prefer=prefer)  # type: ignore[arg-type]
        transport = pool.transport(endpoint)
        assert await transport.read(token, reader.parts, reader.spans, deadline_s=DEADLINE_S) == [OK] * BLOCKS
        assert transport.carrier == carrier
        await pool.close()
    over_tcp = await connect(tcp_only, reader.region)
    assert over_tcp.offers is Offers.NOTHING
    await over_tcp.close()
    await server.close()
    reader.one.store.release(token)


async def test_a_pool_has_no_more_reads_of_extents_at_the_disk_than_it_may(
    reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, depths = reader.lease(), []
    server = await serve_bytes(reader.one.area, tcp=("127.0.0.1", 0), shm_path=tmp_path / "pool")

    def opened(*rest: Any, depth: int, **more: Any) -> Engine:
        depths.append(depth)
        return open_engine(*rest, depth=depth, **more)

    monkeypatch.setattr(pool_module, "open_engine", opened)
    pool = TransportPool(reader.region, prefer="extent", disk_reads=3)
    statuses = await pool.transport(server.endpoint).read(token, reader.parts, reader.spans, deadline_s=DEADLINE_S)
    assert statuses == [OK] * BLOCKS and depths == [3]
    await pool.close()
    await server.close()
    reader.one.store.release(token)
