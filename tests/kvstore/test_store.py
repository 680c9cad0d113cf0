"""The store: admission, leases, space."""

import asyncio
import os
from pathlib import Path

import pytest

from common.errors import LeaseRejected, Overloaded, Unavailable
from common.storage import Admission, BlockMeta
from common.transport.interface import LeaseToken, Part, PartStatus
from common.transport.memory import checksums, crc32c
from services.kvstore.files import Files
from services.kvstore.store import Store
from tests.kvstore.support import (
    CAPACITY,
    LENGTH,
    NAMESPACE,
    OTHER,
    ROOT,
    Clock,
    bytes_on_disk,
    chain,
    offers,
    options,
    payload,
    rig,
    room_for,
    segment_files,
)

pytestmark = pytest.mark.usefixtures("engine")

OK = PartStatus.OK


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("length", [1, LENGTH, 8192])
async def test_what_is_written_is_read_back_and_after_a_restart_too(tmp_path: Path, direct: bool, length: int) -> None:
    chosen, keys = options(direct=direct, budget_bytes=10 << 20), chain(10)
    async with rig(tmp_path, chosen) as one:
        assert await one.put(keys, length=length) == [OK] * 10
        assert await one.get(keys, length=length) == [payload(key, length) for key in keys]
    async with rig(tmp_path, chosen) as one:
        assert await one.get(keys, length=length) == [payload(key, length) for key in keys]


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("shift", [0, 1, 4096])
async def test_blocks_are_read_into_the_callers_memory_wherever_it_lies(tmp_path: Path, direct: bool, shift: int) -> None:
    keys = chain(3)
    async with rig(tmp_path, options(direct=direct)) as one:
        await one.put(keys)
        memory = memoryview(bytearray(4 * 8192))
        into = [memory[shift + i * 8192 : shift + i * 8192 + LENGTH] for i in range(3)]
        found = one.store.lookup(NAMESPACE, keys, None, lease=True)
        assert found.token is not None
        results = await one.area.read(found.token, [Part(i, 0, LENGTH) for i in range(3)], into)
        assert [status for status, _, _ in results] == [OK] * 3
        assert [bytes(view) for view in into] == [payload(key) for key in keys]
        one.store.release(found.token)


async def test_a_range_of_a_block_is_read_with_its_own_checksum(tmp_path: Path) -> None:
    keys = chain(2)
    async with rig(tmp_path) as one:
        await one.put(keys)
        found = one.store.lookup(NAMESPACE, keys, None, lease=True)
        assert found.token is not None
        ((status, view, checksum),) = await one.area.read(found.token, [Part(1, 1000, 2000)], None)
        assert view is not None
        assert (status, bytes(view), checksum) == (OK, payload(keys[1])[1000:3000], crc32c(view))
        one.area.done_reading(found.token, [view])
        one.store.release(found.token)


async def test_each_offered_block_gets_its_own_answer(tmp_path: Path) -> None:
    keys = chain(4)
    async with rig(tmp_path) as one:
        await one.put(keys[:1])
        held = await one.store.reserve(NAMESPACE, offers(keys[:2]), None)
        assert held.admissions == [Admission.PRESENT, Admission.ACCEPTED]
        odd = [
            BlockMeta(keys[2], keys[1], LENGTH + 1),
            BlockMeta(b"short", keys[1], LENGTH),
            BlockMeta(keys[2], b"short", LENGTH),
            BlockMeta(keys[2], keys[2], LENGTH),
            BlockMeta(keys[2], keys[1], 0),
        ]
        again = await one.store.reserve(NAMESPACE, [*offers(keys), *odd, *offers(keys)[3:]], None)
        assert again.admissions == [
            Admission.PRESENT,
            Admission.IN_FLIGHT,
            Admission.ACCEPTED,
            Admission.ACCEPTED,
            *[Admission.INVALID] * 5,
            Admission.IN_FLIGHT,
        ]
        assert held.token is not None and again.token is not None
        one.store.release(held.token)
        one.store.release(again.token)
        assert one.stored() == {keys[0]}


async def test_what_a_write_lease_did_not_fill_is_forgotten(tmp_path: Path) -> None:
    keys = chain(3)
    async with rig(tmp_path) as one:
        reserved = await one.store.reserve(NAMESPACE, offers(keys), None)
        assert reserved.token is not None
        assert await one.write(reserved.token, [Part(0, 0, LENGTH)], [payload(keys[0])]) == [OK]
        assert await one.get(keys) == [payload(keys[0])]
        one.store.release(reserved.token)
        one.store.release(reserved.token)
        assert one.store.intake.reserved_bytes == 0
        assert await one.put(keys) == [Admission.PRESENT, OK, OK]


async def test_a_write_item_is_taken_whole_and_once(tmp_path: Path) -> None:
    keys = chain(2)
    async with rig(tmp_path) as one:
        reserved = await one.store.reserve(NAMESPACE, offers(keys), None)
        assert reserved.token is not None
        whole = Part(0, 0, LENGTH)
        refused = [Part(0, 0, 10), Part(0, 1, LENGTH), Part(2, 0, LENGTH), Part(-1, 0, LENGTH)]
        assert one.area.write_buffers(reserved.token, refused) == [PartStatus.REJECTED] * 4
        (place, again) = one.area.write_buffers(reserved.token, [whole, whole])
        assert again is PartStatus.REJECTED and isinstance(place, memoryview)
        one.area.abort(reserved.token, [whole], [place])
        assert await one.write(reserved.token, [whole], [payload(keys[0])]) == [OK]
        assert await one.write(reserved.token, [whole], [payload(keys[0])]) == [PartStatus.REJECTED]
        one.store.release(reserved.token)


async def test_a_lease_that_ends_while_its_bytes_arrive_takes_its_slot_back_only_then(tmp_path: Path) -> None:
    keys, clock = chain(2), Clock()
    async with rig(tmp_path, clock=clock) as one:
        reserved = await one.store.reserve(NAMESPACE, offers(keys), 5.0)
        assert reserved.token is not None
        parts = [Part(0, 0, LENGTH), Part(1, 0, LENGTH)]
        first, second = one.area.write_buffers(reserved.token, parts)
        assert isinstance(first, memoryview) and isinstance(second, memoryview)
        clock.now += 6
        one.store.sweep()
        assert one.store.check_integrity() == []
        assert one.store.intake.reserved_bytes > 0
        assert await one.area.commit(reserved.token, parts[:1], [first], [checksums(first)]) == [PartStatus.REJECTED]
        one.area.abort(reserved.token, parts[1:], [second])
        assert one.store.intake.reserved_bytes == 0
        assert one.stored() == set()


async def test_reading_needs_a_live_lease_and_stays_inside_it(tmp_path: Path) -> None:
    keys, clock = chain(2), Clock()
    whole = Part(0, 0, LENGTH)
    async with rig(tmp_path, clock=clock) as one:
        await one.put(keys)
        reserved = await one.store.reserve(NAMESPACE, offers(chain(1, "other")), None)
        found = one.store.lookup(NAMESPACE, keys[:1], 5.0, lease=True)
        assert found.token is not None and reserved.token is not None
        rejected = [(PartStatus.REJECTED, None, 0)]
        for token in (LeaseToken(bytes(16)), reserved.token):
            assert await one.area.read(token, [whole], None) == rejected
        for part in (Part(1, 0, 1), Part(-1, 0, 1), Part(0, 0, LENGTH + 1), Part(0, -1, 5), Part(0, 0, 0)):
            assert await one.area.read(found.token, [part], None) == rejected
        assert one.area.write_buffers(found.token, [whole]) == [PartStatus.REJECTED]
        clock.now += 5
        assert await one.area.read(found.token, [whole], None) == rejected
        one.store.release(reserved.token)
        one.store.release(found.token)


async def test_a_token_of_another_run_is_rejected(tmp_path: Path) -> None:
    keys = chain(1)
    async with rig(tmp_path) as one:
        await one.put(keys)
        token, epoch = one.store.lookup(NAMESPACE, keys, None, lease=True).token, one.store.epoch
    assert token is not None
    async with rig(tmp_path) as one:
        assert one.store.epoch != epoch
        assert await one.area.read(token, [Part(0, 0, LENGTH)], None) == [(PartStatus.REJECTED, None, 0)]
        with pytest.raises(LeaseRejected, match="another run"):
            one.store.renew(token, 5.0)


async def test_a_renewed_lease_lives_on_and_an_expired_one_does_not_come_back(tmp_path: Path) -> None:
    keys, clock = chain(1), Clock()
    async with rig(tmp_path, options(lease_s_max=8.0), clock=clock) as one:
        await one.put(keys)
        found = one.store.lookup(NAMESPACE, keys, 5.0, lease=True)
        assert found.token is not None and found.ttl_s == 5.0
        clock.now += 4
        assert one.store.renew(found.token, 60.0) == 8.0
        clock.now += 7.5
        one.store.sweep()
        assert len(one.store.leases) == 1
        clock.now += 1
        with pytest.raises(LeaseRejected):
            one.store.renew(found.token, 5.0)
        one.store.sweep()
        assert len(one.store.leases) == 0 and one.store.metrics.expired_leases == 1


async def test_leases_are_bounded(tmp_path: Path) -> None:
    keys = chain(1)
    async with rig(tmp_path, options(leases_max=1)) as one:
        await one.put(keys)
        held = one.store.lookup(NAMESPACE, keys, None, lease=True)
        with pytest.raises(Overloaded, match="at most 1"):
            one.store.lookup(NAMESPACE, keys, None, lease=True)
        with pytest.raises(Overloaded):
            await one.store.reserve(NAMESPACE, offers(chain(1, "more")), None)
        assert one.store.lookup(NAMESPACE, keys, None, lease=False).blocks == 1
        assert held.token is not None
        one.store.release(held.token)


async def test_a_full_store_evicts_the_coldest_tails_and_keeps_the_budget(tmp_path: Path) -> None:
    old, hot, new = chain(CAPACITY // 2, "old"), chain(CAPACITY // 2, "hot"), chain(10, "new")
    async with rig(tmp_path) as one:
        await one.put(old)
        await one.put(hot)
        await one.get(hot)
        assert await one.put(new) == [OK] * 10
        assert one.stored() == {*old[:-10], *hot, *new}
        assert one.store.metrics.evictions == 10
        assert bytes_on_disk(tmp_path) <= one.store.options.budget_bytes


async def test_leased_blocks_are_never_evicted_and_what_finds_no_space_is_dropped(tmp_path: Path) -> None:
    held, more = chain(CAPACITY - 2, "held"), chain(4, "more")
    async with rig(tmp_path) as one:
        await one.put(held)
        lease = one.store.lookup(NAMESPACE, held, None, lease=True)
        assert lease.token is not None
        assert await one.put(more) == [OK, OK, Admission.DROPPED, Admission.DROPPED]
        assert set(held) <= one.stored()
        assert one.store.metrics.dropped_writes == 2
        one.store.release(lease.token)
        assert await one.put(more) == [Admission.PRESENT, Admission.PRESENT, OK, OK]


async def test_the_blocks_that_a_new_block_hangs_on_are_not_evicted_for_it(tmp_path: Path) -> None:
    trunk = chain(CAPACITY)
    async with rig(tmp_path) as one:
        await one.put(trunk)
        branch = chain(5, "branch", trunk[-1])
        assert await one.put(branch, trunk[-1]) == [Admission.DROPPED] * 5
        assert one.stored() == set(trunk)


async def test_reserved_space_is_bounded(tmp_path: Path) -> None:
    keys = chain(5)
    async with rig(tmp_path, options(reserved_bytes_max=3 * 12288)) as one:
        reserved = await one.store.reserve(NAMESPACE, offers(keys), None)
        assert reserved.admissions == [*[Admission.ACCEPTED] * 3, *[Admission.DROPPED] * 2]
        assert (await one.store.reserve(NAMESPACE, offers(chain(1, "x")), None)).admissions == [Admission.DROPPED]
        assert reserved.token is not None
        one.store.release(reserved.token)


async def test_a_block_larger_than_the_budget_is_dropped(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        assert await one.put(chain(1), length=1 << 20) == [Admission.DROPPED]
        assert await one.put(chain(1)) == [OK]


async def test_write_memory_is_bounded_and_more_is_refused_as_full(tmp_path: Path) -> None:
    keys = chain(3)
    async with rig(tmp_path, buffer_bytes=2 * 12288) as one:
        assert await one.put(keys) == [OK, OK, PartStatus.FULL]


async def test_reads_wait_for_memory_and_a_read_that_can_never_fit_is_refused(tmp_path: Path) -> None:
    keys = chain(4)
    async with rig(tmp_path, buffer_bytes=3 * 12288) as one:
        for i in range(4):
            await one.put(keys[i : i + 1], keys[i - 1] if i else ROOT)
        assert await one.get(keys[:4]) == [payload(key) for key in keys]
        found = one.store.lookup(NAMESPACE, keys, None, lease=True)
        assert found.token is not None
        part = [Part(0, 0, LENGTH)]
        held = [await one.area.read(found.token, part * 2, None) for _ in range(2)]
        waiting = asyncio.create_task(one.area.read(found.token, part * 2, None))
        await asyncio.sleep(0)
        assert not waiting.done()
        one.area.done_reading(found.token, [view for _, view, _ in held[0] if view is not None])
        held[0] = await waiting
        assert [status for status, _, _ in held[0]] == [OK, OK]
        for results in held:
            one.area.done_reading(found.token, [view for _, view, _ in results if view is not None])
        assert [status for status, _, _ in await one.area.read(found.token, part * 5, None)] == [PartStatus.FULL] * 5
        one.store.release(found.token)


async def test_namespaces_are_apart(tmp_path: Path) -> None:
    keys = chain(3)
    async with rig(tmp_path) as one:
        await one.put(keys)
        assert await one.get(keys, OTHER) == []
        assert await one.put(keys[:1], namespace=OTHER) == [OK]
        assert one.store.lookup(OTHER, keys, None, lease=False).blocks == 1


async def test_a_new_namespace_takes_the_coldest_segments_of_an_old_one(tmp_path: Path) -> None:
    old, new = chain(CAPACITY, "old"), chain(12, "new")
    async with rig(tmp_path) as one:
        await one.put(old)
        assert await one.put(new, namespace=OTHER) == [OK] * 12
        assert one.stored(OTHER) == set(new)
        assert len(segment_files(tmp_path, OTHER)) == 3
        assert len(await one.get(old)) == len(one.stored()) == CAPACITY - 12
    async with rig(tmp_path) as one:
        assert await one.readable([*old, *new], OTHER) == set(new)


async def test_a_segment_with_a_leased_block_or_its_ancestors_is_not_taken(tmp_path: Path) -> None:
    old, new = chain(CAPACITY, "old"), chain(4, "new")
    async with rig(tmp_path) as one:
        await one.put(old)
        lease = one.store.lookup(NAMESPACE, old, None, lease=True)
        assert await one.put(new, namespace=OTHER) == [Admission.DROPPED] * 4
        assert lease.token is not None
        one.store.release(lease.token)
        assert await one.put(new, namespace=OTHER) == [OK] * 4


async def test_blocks_of_a_chain_lie_one_after_the_other_also_where_others_were(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        for name in ("first", "second"):
            keys = chain(8, name)
            await one.put(chain(CAPACITY, f"{name}, before"))
            await one.put(keys)
            slots = [one.store.space.shelves[NAMESPACE].slot_of(key) for key in keys]
            assert slots[0] is not None and slots == list(range(slots[0], slots[0] + 8))


async def test_a_block_offered_twice_at_once_that_finds_no_slot_is_dropped_twice(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        keys = chain(CAPACITY + 1)
        twice = [*offers(keys), offers(keys)[-1], offers(keys)[0]]
        reserved = await one.store.reserve(NAMESPACE, twice, None)
        last = [Admission.DROPPED, Admission.DROPPED, Admission.IN_FLIGHT]
        assert reserved.admissions == [Admission.ACCEPTED] * CAPACITY + last
        assert reserved.token is not None
        one.store.release(reserved.token)


async def test_a_lowered_budget_is_met_at_start(tmp_path: Path) -> None:
    keys = chain(CAPACITY)
    async with rig(tmp_path) as one:
        await one.put(keys)
    async with rig(tmp_path, options(budget_bytes=room_for(3))) as one:
        assert one.store.space.used_bytes <= room_for(3)
        assert len(segment_files(tmp_path)) == 3
        left = await one.get(keys)
        assert left == [payload(key) for key in keys[: len(left)]] and len(left) == 12


async def test_use_decides_what_goes_and_not_the_order_of_writing(tmp_path: Path) -> None:
    chains = [chain(CAPACITY // 4, f"c{i}") for i in range(4)]
    async with rig(tmp_path) as one:
        for keys in chains:
            await one.put(keys)
        for i in (1, 0, 3):
            await one.get(chains[i])
        await one.put(chain(CAPACITY // 8, "new"))
        assert one.stored() & set(chains[2]) == set(chains[2][: CAPACITY // 8])
        assert set(chains[0]) | set(chains[1]) | set(chains[3]) <= one.stored()


async def test_a_draining_store_refuses_new_leases_and_waits_for_those_that_are_out(tmp_path: Path) -> None:
    keys = chain(1)
    async with rig(tmp_path) as one:
        await one.put(keys)
        found = one.store.lookup(NAMESPACE, keys, None, lease=True)
        draining = asyncio.create_task(one.store.drain(60.0))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="draining"):
            one.store.lookup(NAMESPACE, keys, None, lease=True)
        with pytest.raises(Unavailable, match="draining"):
            await one.store.reserve(NAMESPACE, offers(keys), None)
        assert found.token is not None
        results = await one.area.read(found.token, [Part(0, 0, LENGTH)], None)
        assert results[0][0] is OK and results[0][1] is not None
        one.area.done_reading(found.token, [results[0][1]])
        one.store.release(found.token)
        assert await draining


async def test_a_cancelled_reserve_leaves_nothing_behind(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        asking = asyncio.create_task(one.store.reserve(NAMESPACE, offers(chain(3)), None))
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await one.check()
        assert one.store.intake.reserved_bytes == 0
        assert await one.put(chain(3)) == [OK] * 3


async def test_many_writers_of_the_same_blocks_store_each_once(tmp_path: Path) -> None:
    keys = chain(12)
    async with rig(tmp_path) as one:
        outcomes = await asyncio.gather(*(one.put(keys) for _ in range(5)))
        flat = [outcome for each in outcomes for outcome in each]
        assert flat.count(OK) == 12
        assert set(flat) <= {OK, Admission.IN_FLIGHT, Admission.PRESENT}
        assert await one.get(keys) == [payload(key) for key in keys]


async def test_one_sync_serves_many_commits(tmp_path: Path) -> None:
    class Counting(Files):
        syncs = 0

        def sync(self, fd: int) -> None:
            Counting.syncs += 1
            super().sync(fd)

    chains = [chain(2, f"c{i}") for i in range(10)]
    async with rig(tmp_path, options(segment_bytes=1 << 20, budget_bytes=16 << 20), files=Counting()) as one:
        await one.put(chain(1, "first"))
        Counting.syncs = 0
        await asyncio.gather(*(one.put(keys) for keys in chains))
        assert Counting.syncs < len(chains)


def test_a_second_process_on_the_folder_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    first = Store.open(tmp_path, options())
    with pytest.raises(Unavailable, match=f"process {os.getpid()}: stop it"):
        Store.open(tmp_path, options())
    first.close()
    Store.open(tmp_path, options()).close()
