"""The index: chains, orphans, pins, eviction order."""

import itertools
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.kvstore.entries import ENTRY
from services.kvstore.eviction import NewcomersFirst
from services.kvstore.index import Index
from services.kvstore.key_table import words
from tests.kvstore.support import ROOT, chain

SLOTS = 64


def index_of(keys: list[bytes], parent: bytes = ROOT, into: Index | None = None, first_slot: int = 0) -> Index:
    out = into or new_index()
    for slot, (key, before) in enumerate(zip(keys, [parent, *keys], strict=False), start=first_slot):
        out.insert(slot, key, before, slot, slot)
    return out


def new_index() -> Index:
    out = Index(NewcomersFirst(), itertools.count(1))
    out.grow(SLOTS)
    return out


def evicted(index: Index) -> list[bytes]:
    """The keys that eviction gives up, in its order."""
    by_slot = {slot: key for key, slot in index.stored()}
    return [by_slot[slot] for slot in iter(index.evict, None)]


def test_a_prefix_ends_at_the_first_missing_block() -> None:
    keys = chain(5)
    index = index_of(keys)
    assert index.prefix(keys).tolist() == [0, 1, 2, 3, 4]
    assert index.prefix([*keys[:2], b"x" * 32, *keys[3:]]).tolist() == [0, 1]
    assert index.prefix([b"x" * 32, *keys]).tolist() == []


def test_nothing_is_found_in_an_index_that_holds_nothing_yet() -> None:
    assert Index(NewcomersFirst(), itertools.count(1)).prefix(chain(3)).tolist() == []


def test_stored_keys_that_are_no_chain_are_not_a_prefix() -> None:
    first, second = chain(2, "first"), chain(2, "second")
    index = index_of(second, into=index_of(first), first_slot=10)
    assert index.prefix([first[0], second[1]]).tolist() == [0]
    assert index.prefix([first[0], second[0]]).tolist() == [0]


def test_eviction_takes_tails_first_and_cold_chains_before_warm_ones() -> None:
    cold, warm = chain(3, "cold"), chain(3, "warm")
    index = index_of(warm, into=index_of(cold), first_slot=10)
    index.touch(index.prefix(warm))
    assert evicted(index) == [*reversed(cold), *reversed(warm)]


def test_a_use_makes_the_whole_prefix_warm() -> None:
    older, newer = chain(3, "older"), chain(3, "newer")
    index = index_of(newer, into=index_of(older), first_slot=10)
    index.touch(index.prefix(older))
    assert evicted(index) == [*reversed(newer), *reversed(older)]


def test_a_chain_that_was_found_outlives_newcomers_and_so_does_what_comes_under_it() -> None:
    found, read_once = chain(4, "found"), chain(4, "once")
    index = index_of(found)
    index.touch(index.prefix(found))
    index_of(chain(2, "more", found[-1]), found[-1], index, 4)
    index_of(read_once, ROOT, index, 10)
    assert evicted(index)[:4] == list(reversed(read_once))


def test_newcomers_within_their_share_go_after_what_is_proven() -> None:
    index = index_of(chain(27, "proven"))
    index.touch(index.prefix(chain(27, "proven")))
    newcomers = chain(4, "new")
    index_of(newcomers, ROOT, index, 30)
    gone = evicted(index)
    assert gone[:2] == [newcomers[3], chain(27, "proven")[26]]  # 4 of 31 are too many, 3 of 30 are not
    assert gone[-1] in (newcomers[0], chain(27, "proven")[0])


def test_what_is_proven_stays_so_when_blocks_are_taken_in_again() -> None:
    found, read_once = chain(3, "found"), chain(3, "once")
    index = index_of(read_once, ROOT, index_of(found), 10)
    index.touch(index.prefix(found))
    slots = np.array([10, 11, 12, 0, 1, 2], np.int32)
    again = new_index()
    again.insert_all(slots, index.entries(slots))
    assert again.check_integrity() == []
    assert evicted(again)[:3] == list(reversed(read_once))


def test_a_pinned_block_keeps_its_prefix_but_not_what_hangs_on_it() -> None:
    keys = chain(4)
    index = index_of(keys)
    index.offers.pin(1)
    assert evicted(index) == [keys[3], keys[2]]
    index.offers.unpin(1)
    assert evicted(index) == [keys[1], keys[0]]
    assert index.check_integrity() == []


def test_an_orphan_is_adopted_when_its_parent_comes() -> None:
    keys = chain(3)
    index = new_index()
    index.insert(2, keys[2], keys[1], 0, 0)
    index.insert(0, keys[0], ROOT, 0, 1)
    assert index.prefix(keys).tolist() == [0]
    index.insert(1, keys[1], keys[0], 0, 2)
    assert index.prefix(keys).tolist() == [0, 1, 2]
    assert index.check_integrity() == []
    assert evicted(index) == [keys[2], keys[1], keys[0]]


def test_removing_a_parent_leaves_orphans_that_its_return_adopts() -> None:
    keys = chain(3)
    index = index_of(keys)
    index.remove(1)
    assert index.prefix(keys).tolist() == [0]
    assert index.check_integrity() == []
    index.insert(7, keys[1], keys[0], 0, 9)
    assert index.prefix(keys).tolist() == [0, 7, 2]
    assert index.check_integrity() == []


def test_blocks_that_claim_to_be_each_others_parents_can_still_be_evicted() -> None:
    index = new_index()
    a, b = b"a" * 32, b"b" * 32
    index.insert(0, a, b, 0, 0)
    index.insert(1, b, a, 0, 1)
    assert index.check_integrity() == []
    assert sorted(evicted(index)) == [a, b]


def test_a_subtree_is_everything_that_hangs_on_a_block() -> None:
    trunk = chain(2)
    left, right = chain(2, "left", trunk[1]), chain(1, "right", trunk[1])
    index = index_of(right, trunk[1], index_of(left, trunk[1], index_of(trunk), 10), 20)
    assert set(index.subtree([1])) == {1, 10, 11, 20}
    assert set(index.subtree([0, 11])) == {0, 1, 10, 11, 20}


KEYS = [chain(4, f"chain{i}") for i in range(4)]
KEYS += [chain(3, f"branch{i}", KEYS[i][1]) for i in range(2)]
PARENT = {
    key: before
    for i, keys in enumerate(KEYS)
    for key, before in zip(keys, [ROOT if i < 4 else KEYS[i - 4][1], *keys], strict=False)
}


class IndexAgainstModel(RuleBasedStateMachine):
    """The index against a dict of what is stored: key -> slot, and the pins."""

    def __init__(self) -> None:
        super().__init__()
        self.index = new_index()
        self.slots: dict[bytes, int] = {}
        self.pins: list[bytes] = []
        self.sequence = 0

    @rule(key=st.sampled_from(sorted(PARENT)))
    def insert(self, key: bytes) -> None:
        if key not in self.slots:
            slot = min(set(range(SLOTS)) - set(self.slots.values()))
            self.sequence += 1
            self.index.insert(slot, key, PARENT[key], self.sequence, self.sequence)
            self.slots[key] = slot

    @rule(key=st.sampled_from(sorted(PARENT)))
    def remove(self, key: bytes) -> None:
        if key in self.slots and key not in self.pins:
            assert self.index.remove(self.slots.pop(key)) == key

    @rule(key=st.sampled_from(sorted(PARENT)))
    def pin(self, key: bytes) -> None:
        if key in self.slots:
            self.index.offers.pin(self.slots[key])
            self.pins.append(key)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.pins))
        self.pins.remove(key)
        self.index.offers.unpin(self.slots[key])

    @rule(keys=st.sampled_from(KEYS))
    def use(self, keys: list[bytes]) -> None:
        slots = self.index.prefix(keys)
        assert slots.tolist() == [self.slots[key] for key in itertools.takewhile(self.slots.__contains__, keys)]
        if len(slots):
            self.index.touch(slots)

    @rule()
    def evict(self) -> None:
        evictable = {key for key in self.slots if key not in self.pins and not self.children(key)}
        slot = self.index.evict()
        assert (slot is None) == (not evictable)
        if slot is not None:
            (key,) = (key for key, at in self.slots.items() if at == slot)
            assert key in evictable
            del self.slots[key]

    def children(self, key: bytes) -> list[bytes]:
        return [other for other in self.slots if PARENT[other] == key]

    @invariant()
    def agrees(self) -> None:
        assert dict(self.index.stored()) == self.slots
        assert self.index.check_integrity() == []


IndexAgainstModel.TestCase.settings = settings(max_examples=40, stateful_step_count=60, deadline=None, derandomize=True)
TestIndexAgainstModel = IndexAgainstModel.TestCase


@given(stored=st.lists(st.sampled_from(sorted(PARENT)), unique=True), last=st.randoms(use_true_random=False))
@settings(deadline=None, derandomize=True)
def test_blocks_taken_in_together_are_as_if_taken_in_one_by_one(stored: list[bytes], last: random.Random) -> None:
    together, one_by_one = new_index(), new_index()
    slots = last.sample(range(SLOTS), len(stored))
    for tick, (slot, key) in enumerate(zip(slots, stored, strict=True)):
        one_by_one.insert(slot, key, PARENT[key], tick, tick)
    take_in(together, slots, stored, [PARENT[key] for key in stored])
    assert together.check_integrity() == []
    assert dict(together.stored()) == dict(one_by_one.stored())
    for keys in KEYS:
        assert together.prefix(keys).tolist() == one_by_one.prefix(keys).tolist()
    noted = together.entries(np.array(slots, np.int32))
    assert [row.tobytes() for row in noted["key"]] == stored
    assert [row.tobytes() for row in noted["parent"]] == [PARENT[key] for key in stored]
    assert noted["sequence"].tolist() == noted["tick"].tolist() == list(range(len(stored)))
    assert set(evicted(together)) == set(stored)


def test_taken_in_together_cold_chains_go_first_and_tails_before_their_parents() -> None:
    cold, warm = chain(3, "cold"), chain(3, "warm")
    index = new_index()
    take_in(index, list(range(6)), [*cold, *warm], [ROOT, *cold[:2], ROOT, *warm[:2]])
    assert evicted(index) == [*reversed(cold), *reversed(warm)]


def test_taken_in_together_blocks_that_claim_to_be_each_others_parents_can_still_be_evicted() -> None:
    a, b, c = b"a" * 32, b"b" * 32, b"c" * 32
    index = new_index()
    take_in(index, [0, 1, 2], [a, b, c], [b, a, b])
    assert index.check_integrity() == []
    assert sorted(evicted(index)) == [a, b, c]


@given(
    stored=st.lists(st.sampled_from(sorted(PARENT)), unique=True),
    held=st.sets(st.sampled_from(sorted(PARENT))),
    count=st.integers(0, 4),
)
@settings(deadline=None, derandomize=True)
def test_a_group_that_comes_or_goes_is_as_if_its_blocks_came_or_went_one_by_one(
    stored: list[bytes], held: set[bytes], count: int
) -> None:
    """In any order, some of them beside blocks that were there before."""
    together, one_by_one = new_index(), new_index()
    slots = {key: slot for slot, key in enumerate(sorted(PARENT))}
    before, group = [key for key in stored if key in held], [key for key in stored if key not in held]
    for index in (together, one_by_one):
        for key in before:
            index.insert(slots[key], key, PARENT[key], 0, 0)
    for key in group:
        one_by_one.insert(slots[key], key, PARENT[key], 7, slots[key])
    at = [slots[key] for key in group]
    together.offers.pin_all(at)
    together.insert_many(at, group, [PARENT[key] for key in group], [7] * len(at), at)
    assert together.check_integrity() == []
    together.offers.unpin_all(at)
    assert together.check_integrity() == []
    assert dict(together.stored()) == dict(one_by_one.stored())
    for keys in KEYS:
        assert together.prefix(keys).tolist() == one_by_one.prefix(keys).tolist()
    gone = together.evict_many(count)
    assert len(gone) == len(set(gone)) == min(count, len(stored))
    assert together.check_integrity() == []
    assert len(evicted(together)) == len(stored) - len(gone)


def test_a_group_of_blocks_that_claim_to_be_each_others_parents_can_still_be_evicted() -> None:
    a, b, c = b"a" * 32, b"b" * 32, b"c" * 32
    index = new_index()
    index.insert_many([0, 1, 2], [a, b, c], [b, a, b], [0, 0, 0], [0, 1, 2])
    assert index.check_integrity() == []
    assert sorted(evicted(index)) == [a, b, c]


def take_in(index: Index, slots: list[int], keys: list[bytes], parents: list[bytes]) -> None:
    entries = np.zeros(len(slots), ENTRY)
    entries["key"], entries["parent"] = words(b"".join(keys)), words(b"".join(parents))
    entries["checksum"] = entries["sequence"] = entries["tick"] = np.arange(len(slots))
    index.insert_all(np.array(slots, np.int32), entries)
