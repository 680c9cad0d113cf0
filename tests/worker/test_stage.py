"""The stage: slots, leases, what counts as filled, and what a lease's end guarantees."""

import asyncio
import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.blocks import BlockKey
from common.errors import InvalidRequest, LeaseRejected, Overloaded
from common.transport.interface import LeaseToken, Part, PartStatus, Span
from common.transport.memory import checksums, crc32c
from services.worker.coverage import Coverage
from services.worker.lease import Lease, Right
from services.worker.stage import Stage

SLOT = 5000  # not a multiple of a page
OK, REJECTED, FULL = PartStatus.OK, PartStatus.REJECTED, PartStatus.FULL


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stage(clock: Clock) -> Iterator[Stage]:
    stage = Stage(8, SLOT, clock=clock)
    yield stage
    stage.check_integrity()
    stage.close()


def buffers(stage: Stage, lease: Lease, *parts: Part) -> list[memoryview]:
    given = stage.write_buffers(lease.token, parts)
    assert all(isinstance(buffer, memoryview) for buffer in given), given
    return [buffer for buffer in given if isinstance(buffer, memoryview)]


async def write(stage: Stage, lease: Lease, part: Part, data: bytes) -> PartStatus:
    (buffer,) = stage.write_buffers(lease.token, [part])
    if isinstance(buffer, PartStatus):
        return buffer
    buffer[:] = data
    return (await stage.commit(lease.token, [part], [buffer], [checksums(data)]))[0]


def test_slots_are_reserved_whole_or_refused_at_once(stage: Stage) -> None:
    first = stage.reserve(5)
    with pytest.raises(Overloaded, match="4 slots asked for, 3 of 8 are free"):
        stage.reserve(4)
    second = stage.reserve(3)
    assert sorted(first + second) == list(range(8)) and stage.slots_free == 0
    stage.free(first)
    assert stage.slots_free == 5


def test_slots_are_disjoint_page_aligned_memory(stage: Stage) -> None:
    slots = stage.reserve(8)
    for slot in slots:
        stage.view(slot)[:] = bytes([slot]) * SLOT
    assert all(bytes(stage.view(slot)) == bytes([slot]) * SLOT for slot in slots)
    assert all(stage.span(slot).offset % 4096 == 0 for slot in slots)
    assert stage.span(slots[0], 10, 20) == Span(stage.span(slots[0]).offset + 10, 20)
    with pytest.raises(InvalidRequest, match="expected an owned slot"):
        stage.span(slots[0], 1, SLOT)
    stage.free(slots)
    with pytest.raises(InvalidRequest):
        stage.view(slots[0])


async def test_an_item_is_filled_when_all_its_slices_have_come_in_any_order(stage: Stage) -> None:
    slots = stage.reserve(2)
    lease = stage.grant(slots, Right.WRITE, 10)
    waiting = asyncio.create_task(lease.filled(1))
    for start in (4000, 0, 2000, 3000):
        assert await write(stage, lease, Part(1, start, 1000), bytes([start // 1000]) * 1000) is OK
    await asyncio.sleep(0)
    assert not waiting.done() and lease.filled_count == 0
    assert await write(stage, lease, Part(1, 1000, 1000), b"\x01" * 1000) is OK
    await waiting
    assert (lease.is_filled(0), lease.is_filled(1), lease.filled_count) == (False, True, 1)
    assert bytes(stage.view(slots[1])) == b"".join(bytes([i]) * 1000 for i in range(5))
    assert stage.counters.write.bytes == SLOT


async def test_a_partial_last_block_is_filled_at_its_announced_length(stage: Stage) -> None:
    lease = stage.grant(stage.reserve(2), Right.WRITE, 10, lengths=[SLOT, 100])
    assert await write(stage, lease, Part(1, 0, 101), bytes(101)) is REJECTED
    assert await write(stage, lease, Part(1, 0, 100), bytes(100)) is OK
    await lease.filled(1)


async def test_what_is_committed_is_never_overwritten(stage: Stage) -> None:
    (slot,) = stage.reserve(1)
    lease = stage.grant([slot], Right.WRITE, 10)
    assert await write(stage, lease, Part(0, 0, 100), b"a" * 100) is OK
    assert stage.write_buffers(lease.token, [Part(0, 0, 100), Part(0, 20, 30), Part(0, 50, 100)]) == [OK, OK, REJECTED]
    (out,) = buffers(stage, lease, Part(0, 100, 100))
    assert stage.write_buffers(lease.token, [Part(0, 150, 100)]) == [REJECTED]  # somebody is writing there
    stage.abort(lease.token, [Part(0, 100, 100)], [out])
    assert await write(stage, lease, Part(0, 150, 100), b"b" * 100) is OK
    assert bytes(stage.view(slot, 0, 100)) == b"a" * 100


async def test_a_lease_gives_its_right_over_its_items_until_its_time(stage: Stage, clock: Clock) -> None:
    slots = stage.reserve(2)
    reading, writing = stage.grant(slots, Right.READ, 10), stage.grant(slots, Right.WRITE, 10)
    part = [Part(1, 0, SLOT)]
    assert [r[0] for r in await stage.read(reading.token, part, None)] == [OK]
    for token, parts in (
        (writing.token, part),
        (LeaseToken(os.urandom(16)), part),
        (reading.token, [Part(2, 0, 1)]),
        (reading.token, [Part(0, SLOT, 1)]),
    ):
        assert [r[0] for r in await stage.read(token, parts, None)] == [REJECTED]
    assert stage.write_buffers(reading.token, part) == [REJECTED]
    clock.now_s = 9.0
    stage.renew(reading.token, 10)
    clock.now_s = 10.0
    assert [r[0] for r in await stage.read(reading.token, part, None)] == [OK]
    assert stage.write_buffers(writing.token, part) == [REJECTED]
    with pytest.raises(LeaseRejected):
        stage.renew(writing.token, 10)


async def test_reading_gives_bytes_and_their_checksum_into_the_caller_s_memory_too(stage: Stage) -> None:
    (slot,) = stage.reserve(1)
    stage.view(slot)[:] = os.urandom(SLOT)
    lease = stage.grant([slot], Right.READ, 10)
    ((status, view, checksum),) = await stage.read(lease.token, [Part(0, 10, 90)], None)
    assert view is not None
    assert (status, bytes(view), checksum) == (OK, bytes(stage.view(slot, 10, 90)), crc32c(stage.view(slot, 10, 90)))
    into = memoryview(bytearray(90))
    assert await stage.read(lease.token, [Part(0, 10, 90)], [into]) == [(OK, into, checksum)]
    assert into == stage.view(slot, 10, 90)


async def test_the_end_of_a_lease_wakes_who_waits_and_takes_buffers_back(stage: Stage, clock: Clock) -> None:
    slots = stage.reserve(3)
    for end in (lambda lease: stage.release(lease.token), lambda lease: setattr(clock, "now_s", clock.now_s + 11)):
        lease = stage.grant(slots, Right.WRITE, 10)
        waiting = asyncio.create_task(lease.filled(0))
        part = Part(0, 0, SLOT)
        (out,) = buffers(stage, lease, part)
        out[:4] = b"good"
        await asyncio.sleep(0)
        end(lease)
        stage.sweep()
        with pytest.raises(LeaseRejected, match="before item 0 was filled"):
            await waiting
        with pytest.raises(ValueError, match="released memoryview"):
            out[:4] = b"late"
        assert bytes(stage.view(slots[0], 0, 4)) == b"good"
        assert await stage.commit(lease.token, [part], [out], [checksums(b"")]) == [REJECTED]
        stage.abort(lease.token, [part], [out])
        assert not stage.counters.write.in_flight


async def test_revoke_waits_for_a_thread_that_is_writing_to_the_slot(stage: Stage) -> None:
    (slot,) = stage.reserve(1)
    lease = stage.grant([slot], Right.WRITE, 10)
    part = Part(0, 0, SLOT)
    (out,) = buffers(stage, lease, part)
    pin = struct.iter_unpack("B", out)  # pins the buffer as a system call in a thread does
    revoking = asyncio.create_task(stage.revoke(lease.token))
    await asyncio.sleep(0)
    assert not revoking.done()
    del pin
    assert await stage.commit(lease.token, [part], [out], [checksums(b"")]) == [REJECTED]
    await revoking
    await stage.revoke(lease.token)
    assert not lease.is_filled(0)


async def test_a_freed_slot_that_may_still_be_written_is_not_handed_out(stage: Stage) -> None:
    slots = stage.reserve(8)
    lease = stage.grant(slots, Right.WRITE, 10)
    part = Part(3, 0, SLOT)
    (out,) = buffers(stage, lease, part)
    pin = struct.iter_unpack("B", out)  # pins the buffer as a system call in a thread does
    stage.free(slots)
    assert stage.slots_free == 7 and not lease.live
    stage.check_integrity()
    del pin
    stage.abort(lease.token, [part], [out])
    assert stage.slots_free == 8


def test_a_freed_slot_that_a_hung_peer_holds_is_not_handed_out(stage: Stage) -> None:
    slots = stage.reserve(8)
    held = stage.span(slots[2], 100, 50)
    stage.region.hold(held)
    lease = stage.grant(slots, Right.WRITE, 10)
    assert stage.write_buffers(lease.token, [Part(2, 0, SLOT)]) == [FULL]
    stage.free(slots)
    assert stage.slots_free == 7
    with pytest.raises(Overloaded):
        stage.reserve(8)
    stage.region.unhold(held)
    assert len(stage.reserve(8)) == 8


ranges = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 15)).map(lambda r: (r[0], r[0] + r[1])), max_size=30)


@given(ranges, st.integers(0, 55), st.integers(1, 15))
def test_coverage_is_the_set_of_bytes_added(added: list[tuple[int, int]], start: int, length: int) -> None:
    coverage, model = Coverage(), set[int]()
    for low, high in added:
        coverage.add(low, high)
        model |= set(range(low, high))
    asked = set(range(start, start + length))
    assert coverage.contains(start, start + length) == (asked <= model)
    assert coverage.overlaps(start, start + length) == bool(asked & model)
    flat = [edge for pair in coverage.ranges() for edge in pair]
    assert flat == sorted(set(flat))


# Keeping


def test_what_is_kept_is_there_again_for_who_knows_its_key(stage: Stage) -> None:
    slots, keys = stage.reserve(3), [BlockKey(bytes([i]) * 32) for i in range(3)]
    for slot in slots:
        stage.view(slot)[:] = bytes([slot]) * SLOT
    stage.keep(slots[:2], keys[:2])
    stage.free(slots)
    assert stage.slots_free == 8 and stage.held_blocks(keys) == 2 and stage.held_blocks(keys[1:]) == 1
    with pytest.raises(InvalidRequest, match="expected an owned slot"):
        stage.view(slots[0])
    assert stage.adopt(keys) == slots[:2]
    assert all(bytes(stage.view(slot)) == bytes([slot]) * SLOT for slot in slots[:2])
    stage.check_integrity()
    with pytest.raises(Overloaded, match="7 slots asked for, 6 of 8 are free"):
        stage.reserve(7)
    stage.free(slots[:2])
    assert len(stage.reserve(8)) == 8 and stage.held_blocks(keys) == 0, "nothing is refused because of what is kept"
    stage.check_integrity()


async def test_a_lease_ends_with_the_last_owner_of_one_of_its_slots(stage: Stage) -> None:
    slots, key = stage.reserve(2), BlockKey(bytes(32))
    stage.keep(slots[:1], [key])
    lease = stage.grant(slots, Right.READ, 10)
    stage.free(stage.adopt([key]))
    assert lease.live
    stage.free(slots)
    assert not lease.live
    stage.check_integrity()


# Sharing: the owner fills some items, the holder the others


async def share(stage: Stage, count: int = 3) -> Lease:
    return stage.grant(stage.reserve(count), Right.SHARE, 60)


async def read_one(stage: Stage, lease: Lease, item: int, length: int = SLOT) -> PartStatus:
    [(status, view, _)] = await stage.read(lease.token, [Part(item, 0, length)], None)
    assert (view is not None) == (status is PartStatus.OK)
    return status


async def test_a_read_waits_until_the_owner_has_filled_the_item(stage: Stage) -> None:
    lease = await share(stage)
    lease.await_own([0, 1])
    reading = asyncio.create_task(read_one(stage, lease, 0))
    await asyncio.sleep(0)
    assert not reading.done()
    lease.fill(0)
    assert await reading is PartStatus.OK
    stage.check_integrity()


async def test_a_read_of_what_does_not_come_is_answered_in_time(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.worker.stage.PARK_S", 0.0)
    lease = await share(stage)
    lease.await_own([0])
    assert await read_one(stage, lease, 0) is PartStatus.EXPIRED
    assert await read_one(stage, lease, 1) is PartStatus.EXPIRED  # not known yet to be the owner's


async def test_what_the_owner_gives_up_is_missing_and_the_holders_to_fill(stage: Stage) -> None:
    lease = await share(stage)
    lease.await_own([0])
    waiting = asyncio.create_task(read_one(stage, lease, 0))
    await asyncio.sleep(0)
    lease.give_up(0)
    assert await waiting is PartStatus.MISSING
    assert isinstance(stage.write_buffers(lease.token, [Part(0, 0, SLOT)])[0], memoryview)


async def test_a_write_to_what_the_owner_fills_is_dropped(stage: Stage) -> None:
    lease = await share(stage)
    lease.await_own([0])
    assert stage.write_buffers(lease.token, [Part(0, 0, 8)]) == [PartStatus.OK]
    lease.fill(0)
    assert stage.write_buffers(lease.token, [Part(0, 0, 8)]) == [PartStatus.OK]
    assert isinstance(stage.write_buffers(lease.token, [Part(1, 0, 8)])[0], memoryview)


@pytest.mark.parametrize("ends", ["fill", "give_up"])
async def test_the_owner_takes_over_an_item_that_the_holder_began(ends: str, stage: Stage) -> None:
    """As when prefill hands over a layer, its step breaks off, and a loader claims the block (order MEET)."""
    lease = await share(stage)
    first, rest = Part(0, 0, 8), Part(0, 8, SLOT - 8)
    (buffer,) = stage.write_buffers(lease.token, [first])
    assert isinstance(buffer, memoryview)
    assert await stage.commit(lease.token, [first], [buffer], [0]) == [PartStatus.OK]
    (late,) = stage.write_buffers(lease.token, [rest])  # under way while the owner takes over
    assert isinstance(late, memoryview)
    lease.await_own([0])
    assert stage.write_buffers(lease.token, [rest]) == [PartStatus.OK]
    stage.check_integrity()
    getattr(lease, ends)(0)
    assert lease.is_filled(0) is (ends == "fill")
    assert await stage.commit(lease.token, [rest], [late], [0]) == [PartStatus.OK]
    assert lease.is_filled(0) and await read_one(stage, lease, 0) is PartStatus.OK
    stage.check_integrity()


async def test_what_the_holder_completes_meanwhile_is_not_given_up(stage: Stage) -> None:
    lease = await share(stage)
    whole = Part(0, 0, SLOT)
    (buffer,) = stage.write_buffers(lease.token, [whole])
    assert isinstance(buffer, memoryview)
    lease.await_own([0])
    assert await stage.commit(lease.token, [whole], [buffer], [0]) == [PartStatus.OK]
    stage.check_integrity()
    lease.give_up(0)
    stage.check_integrity()
    assert await read_one(stage, lease, 0) is PartStatus.OK


async def test_reads_that_wait_end_with_their_lease(stage: Stage) -> None:
    lease = await share(stage)
    lease.await_own([0])
    reading = asyncio.create_task(read_one(stage, lease, 0))
    await asyncio.sleep(0)
    stage.free(list(lease.slots))
    assert await reading is PartStatus.REJECTED
    lease.fill(0)  # the owner's own pull may end later: it matters to nobody
