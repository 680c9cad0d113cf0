"""How long blocks are kept, whose they are, and which are taken in at all: expiry, quotas, second-touch admission."""

from pathlib import Path

import numpy as np
import pytest

from common.errors import Overloaded
from common.storage import Admission, Terms
from common.transport.interface import PartStatus
from services.kvstore.doorkeeper import Doorkeeper
from services.kvstore.store_time import StoreTime
from services.kvstore.tenants import NOBODY, Tenants, digest
from tests.kvstore.support import CAPACITY, NAMESPACE, OTHER, Clock, chain, options, rig

SLOT_BYTES = 12288
ALICE, BOB = Terms(b"alice"), Terms(b"bob")
DAY_S = 86_400


class Wall(Clock):
    """The time of day, which people can set."""

    def __init__(self, now: float = 2e9) -> None:
        self.now = now


# Time


def test_time_goes_on_by_the_monotonic_clock_whatever_the_wall_clock_does() -> None:
    clock, wall = Clock(), Wall()
    time_s = StoreTime(clock, wall)
    wall.now -= DAY_S
    clock.now += 5
    assert time_s() == 2_000_000_005
    wall.now += 10 * DAY_S
    assert time_s() == 2_000_000_005


def test_a_start_takes_the_latest_time_that_the_disk_tells_of() -> None:
    time_s = StoreTime(Clock(), Wall(1000.0))
    time_s.not_before(2000)
    assert time_s() == 2000
    time_s.not_before(1500)
    assert time_s() == 2000


# Expiry


async def test_a_block_is_found_until_its_time_is_over_and_then_goes(tmp_path: Path) -> None:
    clock, keys = Clock(), chain(4)
    async with rig(tmp_path, options(block_ttl_s=60), clock=clock) as one:
        await one.put(keys)
        clock.now += 59
        one.store.sweep()
        assert len(await one.get(keys)) == 4
        clock.now += 1
        assert await one.get(keys) == []
        one.store.sweep()
        assert not one.stored() and one.store.metrics.expired_blocks == 4
        assert await one.put(keys) == [PartStatus.OK] * 4


async def test_the_writer_says_how_long_and_the_store_does_where_it_does_not(tmp_path: Path) -> None:
    clock, short, long, usual = Clock(), chain(1, "short"), chain(1, "long"), chain(1, "usual")
    async with rig(tmp_path, options(block_ttl_s=60), clock=clock) as one:
        await one.put(short, terms=Terms(keep_s=10))
        await one.put(long, terms=Terms(keep_s=1000))
        await one.put(usual)
        left = []
        for now in (1011.0, 1061.0, 2001.0):
            clock.now = now
            one.store.sweep()
            left.append(one.stored())
        assert left == [{*long, *usual}, {*long}, set()]


async def test_without_a_time_blocks_stay(tmp_path: Path) -> None:
    clock, keys = Clock(), chain(2)
    async with rig(tmp_path, clock=clock) as one:
        await one.put(keys)
        clock.now += 100 * 365 * DAY_S
        one.store.sweep()
        assert len(await one.get(keys)) == 2


async def test_a_block_that_is_offered_again_stays_longer_and_so_does_what_hangs_on_it(tmp_path: Path) -> None:
    clock, keys = Clock(), chain(3)
    async with rig(tmp_path, clock=clock) as one:
        await one.put(keys[:1], terms=Terms(keep_s=10))
        await one.put(keys[1:], keys[0], terms=Terms(keep_s=100))
        clock.now += 20
        one.store.sweep()
        assert await one.get(keys) == []
        assert one.stored() == set(keys)
        assert await one.put(keys[:1], terms=Terms(keep_s=10)) == [Admission.PRESENT]
        assert len(await one.get(keys)) == 3
        assert await one.put(keys[:1], terms=Terms(keep_s=1)) == [Admission.PRESENT]
        clock.now += 9
        assert len(await one.get(keys)) == 3


async def test_a_leased_block_outlives_its_time_for_the_lease(tmp_path: Path) -> None:
    clock, keys = Clock(), chain(3)
    async with rig(tmp_path, options(block_ttl_s=5), clock=clock) as one:
        await one.put(keys)
        found = one.store.lookup(NAMESPACE, keys, 30.0, lease=True)
        assert found.token is not None
        clock.now += 10
        one.store.sweep()
        assert one.stored() == set(keys)
        one.store.release(found.token)
        one.store.sweep()
        assert not one.stored()


@pytest.mark.parametrize("clean", [True, False], ids=["checkpoints", "scan"])
@pytest.mark.parametrize("wall_step_s", [-10 * DAY_S, 0])
async def test_expiry_survives_a_restart_and_a_clock_that_was_set_back(tmp_path: Path, clean: bool, wall_step_s: int) -> None:
    keys, clock, wall = chain(2), Clock(), Wall()
    async with rig(tmp_path, options(block_ttl_s=60), clock=clock, wall=wall) as one:
        await one.put(keys)
        clock.now += 50
        await one.put(chain(1, "later"))
        if clean:
            await one.store.drain(1.0)
    wall.now += 50 + wall_step_s
    async with rig(tmp_path, options(), clock=clock, wall=wall) as one:
        assert len(await one.get(keys)) == 2
        clock.now += 11
        one.store.sweep()
        assert one.stored() == {*chain(1, "later")}
        clock.now += 50
        one.store.sweep()
        assert not one.stored()


async def test_blocks_whose_time_passed_between_two_runs_are_not_found(tmp_path: Path) -> None:
    wall = Wall()
    async with rig(tmp_path, options(block_ttl_s=60), wall=wall) as one:
        await one.put(chain(2))
    wall.now += 61
    async with rig(tmp_path, wall=wall) as one:
        assert not one.stored() and one.store.metrics.expired_blocks == 2


# Quotas


async def test_a_tenant_at_its_quota_evicts_its_own_blocks_and_nobody_elses(tmp_path: Path) -> None:
    hers, his = chain(10, "hers"), chain(8, "his")
    async with rig(tmp_path, options(tenant_quota_bytes=8 * SLOT_BYTES)) as one:
        await one.put(his, terms=BOB)
        await one.put(hers[:8], terms=ALICE)
        await one.put(chain(4, "new"), terms=ALICE)
        assert one.stored() == {*his, *hers[:4], *chain(4, "new")}
        assert one.store.metrics.quota_evictions == 4
        assert one.store.tenants.used_bytes(one.store.tenants.number(digest(b"alice"))) == 8 * SLOT_BYTES


async def test_a_quota_holds_over_namespaces_and_blocks_of_nobody_have_none(tmp_path: Path) -> None:
    async with rig(tmp_path, options(tenant_quota_bytes=4 * SLOT_BYTES)) as one:
        assert await one.put(chain(3), terms=ALICE) == [PartStatus.OK] * 3
        assert await one.put(chain(3, "other"), namespace=OTHER, terms=ALICE) == [
            PartStatus.OK,
            Admission.DROPPED,
            Admission.DROPPED,
        ]
        assert await one.put(chain(10, "nobody")) == [PartStatus.OK] * 10


async def test_leased_blocks_are_not_evicted_for_a_quota(tmp_path: Path) -> None:
    keys = chain(4)
    async with rig(tmp_path, options(tenant_quota_bytes=4 * SLOT_BYTES)) as one:
        await one.put(keys, terms=ALICE)
        assert one.store.lookup(NAMESPACE, keys, 30.0, lease=True).blocks == 4
        assert await one.put(chain(1, "new"), terms=ALICE) == [Admission.DROPPED]
        assert one.stored() == set(keys)


@pytest.mark.parametrize("clean", [True, False], ids=["checkpoints", "scan"])
async def test_a_quota_that_was_lowered_is_met_at_the_start(tmp_path: Path, clean: bool) -> None:
    async with rig(tmp_path) as one:
        await one.put(chain(6), terms=ALICE)
        await one.put(chain(6, "his"), terms=BOB)
        await one.put(chain(6, "nobody"))
        if clean:
            await one.store.drain(1.0)
    async with rig(tmp_path, options(tenant_quota_bytes=4 * SLOT_BYTES)) as one:
        assert one.stored() == {*chain(4), *chain(4, "his"), *chain(6, "nobody")}


async def test_what_goes_for_other_reasons_is_no_longer_charged(tmp_path: Path) -> None:
    clock = Clock()
    async with rig(tmp_path, options(tenant_quota_bytes=1000 * SLOT_BYTES), clock=clock) as one:
        tenants = one.store.tenants
        await one.put(chain(CAPACITY), terms=ALICE)
        await one.put(chain(CAPACITY // 2, "his"), terms=Terms(b"bob", 10))
        hers, his = (tenants.number(digest(name)) for name in (b"alice", b"bob"))
        assert [tenants.used_bytes(one_) for one_ in (hers, his)] == [CAPACITY // 2 * SLOT_BYTES] * 2
        clock.now += 11
        one.store.sweep()
        reserved = await one.store.reserve(NAMESPACE, [], None, ALICE)
        assert reserved.token is None
        assert [tenants.used_bytes(one_) for one_ in (hers, his)] == [CAPACITY // 2 * SLOT_BYTES, 0]


def test_many_digests_get_their_numbers_also_when_they_begin_alike() -> None:
    tenants = Tenants(0)
    digests = [digest(b"a"), bytes(16), b"same....one.....", b"same....another.", digest(b"a")]
    numbers = tenants.numbers(np.array(digests, "V16"))
    assert numbers.tolist() == [tenants.number(one) for one in digests]
    assert [one.tobytes() for one in tenants.digests(numbers)] == digests
    assert tenants.numbers(np.zeros(3, "V16")).tolist() == [NOBODY] * 3


def test_numbers_of_tenants_are_bounded_and_given_out_again() -> None:
    tenants = Tenants(0)
    first = tenants.number(digest(b"first"))
    tenants.charge(first, 5)
    for i in range(1 << 16):
        tenants.number(digest(b"%d" % i))
    assert tenants.number(digest(b"first")) == first != NOBODY
    assert tenants.number(digest(b"one more")) != NOBODY
    assert tenants.used_bytes(first) == 5


# Pins


async def test_a_pinned_prefix_is_not_evicted_until_its_time_is_over(tmp_path: Path) -> None:
    clock, kept = Clock(), chain(4, "kept")
    async with rig(tmp_path, clock=clock) as one:
        await one.put(kept)
        assert one.store.pins.keep(NAMESPACE, [*kept, *chain(1)], 60) == 4
        await one.put(chain(2 * CAPACITY, "more"))
        assert set(kept) <= one.stored()
        clock.now += 61
        one.store.sweep()
        assert not len(one.store.pins)
        await one.put(chain(CAPACITY, "others"))
        assert not set(kept) & one.stored()


async def test_a_pin_can_be_ended_and_what_is_not_stored_cannot_be_pinned(tmp_path: Path) -> None:
    keys = chain(3)
    async with rig(tmp_path) as one:
        assert one.store.pins.keep(NAMESPACE, keys, 60) == 0
        await one.put(keys)
        assert one.store.pins.keep(OTHER, keys, 60) == 0
        assert one.store.pins.keep(NAMESPACE, keys, 60) == 3
        assert one.store.pins.keep(NAMESPACE, keys, 10) == 3 and len(one.store.pins) == 1
        assert one.store.pins.keep(NAMESPACE, keys, 0) == 3 and not len(one.store.pins)
        assert one.store.pins.keep(NAMESPACE, keys, 0) == 0


async def test_a_pinned_block_keeps_those_before_it_and_nothing_behind(tmp_path: Path) -> None:
    keys = chain(6)
    async with rig(tmp_path) as one:
        assert one.store.pins.keep_block(keys[3], 60) == 0
        await one.put(keys)
        assert one.store.pins.keep_block(keys[3], 60) == 4
        assert one.store.pins.keep(NAMESPACE, keys[:4], 60) == 4 and len(one.store.pins) == 1  # the same one
        for i in range(3):
            await one.put(chain(CAPACITY, f"more{i}"))
        assert set(keys) & one.stored() == set(keys[:4])
        assert one.store.pins.keep_block(keys[1], 0) == 0  # no pin ends there
        assert one.store.pins.keep_block(keys[3], 0) == 4 and not len(one.store.pins)


async def test_pins_keep_at_most_half_of_the_budget_and_count_shared_blocks_once(tmp_path: Path) -> None:
    kept = options().budget_bytes // 2 // SLOT_BYTES
    trunk = chain(kept - 2)
    async with rig(tmp_path) as one:
        await one.put(trunk)
        for name in ("a", "b", "c"):
            await one.put(chain(1, name, trunk[-1]), trunk[-1])
        for name in ("a", "b"):
            assert one.store.pins.keep(NAMESPACE, [*trunk, *chain(1, name, trunk[-1])], 60)
        with pytest.raises(Overloaded, match="at most 1024 pins and 50% of the budget"):
            one.store.pins.keep(NAMESPACE, [*trunk, *chain(1, "c", trunk[-1])], 60)
        assert len(one.store.pins) == 2 and one.store.pins.kept_bytes == kept * SLOT_BYTES


async def test_a_pinned_block_that_turns_out_bad_goes_and_its_slot_is_not_kept(tmp_path: Path) -> None:
    keys = chain(2)
    async with rig(tmp_path) as one:
        await one.put(keys)
        one.store.pins.keep(NAMESPACE, keys, 60)
        shelf = one.store.space.shelves[NAMESPACE]
        slot = shelf.index.find(keys[1])
        assert slot is not None
        one.store.erasures.condemn(shelf, slot, shelf.index.sequence(slot), "a test says so")
        await one.store.settle()
        one.store.sweep()
        assert not len(one.store.pins) and not shelf.index.offers.pins


# Admission


async def test_with_second_touch_a_block_is_taken_in_when_it_is_offered_again(tmp_path: Path) -> None:
    keys = chain(4)
    async with rig(tmp_path, options(admission="second_touch")) as one:
        assert await one.put(keys) == [Admission.DROPPED] * 4
        assert await one.put(keys) == [PartStatus.OK] * 4
        assert one.store.metrics.first_touches == 4


async def test_with_second_touch_what_continues_a_chain_that_was_read_is_taken_in_at_once(tmp_path: Path) -> None:
    keys = chain(6)
    async with rig(tmp_path, options(admission="second_touch")) as one:
        for _ in range(2):
            await one.put(keys[:2])
        assert await one.put(keys[2:], keys[1]) == [Admission.DROPPED] * 4
        await one.get(keys)
        more = chain(3, "more", keys[1])
        assert await one.put(more, keys[1]) == [PartStatus.OK] * 3


def test_the_doorkeeper_forgets_and_stays_small() -> None:
    door = Doorkeeper(places=4)
    keys = chain(100)
    assert not any(door.knocked_before(key) for key in keys)
    assert sum(door.knocked_before(key) for key in reversed(keys)) <= 4
