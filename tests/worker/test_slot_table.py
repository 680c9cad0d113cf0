"""What a stage keeps: who owns a slot, who finds it again, and which goes first."""

from hypothesis import given
from hypothesis import strategies as st

from common.blocks import BlockKey, Namespace, block_keys, chain_root
from services.worker.slot_table import SlotTable

ROOT = chain_root(Namespace("aa" * 32))
KEYS = block_keys(ROOT, range(64), 4)  # of a chain of 16 blocks


def table(slots: int = 8) -> SlotTable:
    return SlotTable(slots, lambda slot: False)


def keep(slots: SlotTable, keys: list[BlockKey]) -> list[int]:
    """Slots that somebody filled with these blocks and gave back."""
    taken = slots.take(len(keys))
    assert taken is not None
    slots.name(taken, keys)
    slots.give_back(taken)
    return taken


def test_what_is_kept_is_found_by_its_key_and_counts_as_free() -> None:
    slots = table()
    kept = keep(slots, KEYS[:5])
    assert (slots.free, slots.named, slots.count(KEYS)) == (8, 5, 5)
    assert slots.adopt(KEYS[:3]) == kept[:3] and slots.free == 5
    assert all(slots.owns(slot) == (slot in kept[:3]) for slot in range(8))
    slots.check_integrity()


def test_the_free_ones_go_first_then_who_was_kept_longest_from_its_end() -> None:
    slots = table()
    first, second = keep(slots, KEYS[:3]), keep(slots, KEYS[8:11])
    assert set(slots.take(2) or ()).isdisjoint((*first, *second))
    assert slots.take(1) == [first[2]] and slots.count(KEYS) == 2
    slots.give_back(slots.adopt(KEYS[:2]))  # used again: now the other goes first
    assert slots.take(3) == second[::-1]
    assert slots.take(2) == first[1::-1] and slots.take(1) is None
    slots.check_integrity()


def test_several_may_own_what_is_kept_and_the_last_one_leaves_it_kept() -> None:
    slots = table(3)
    kept = keep(slots, KEYS[:3])
    one, other = slots.adopt(KEYS[:3]), slots.adopt(KEYS[:2])
    assert one == kept and other == kept[:2] and slots.free == 0 and slots.take(1) is None
    slots.give_back(one)
    assert slots.free == 1 and slots.take(1) == [kept[2]]
    slots.give_back(other)
    assert slots.count(KEYS) == 2
    slots.check_integrity()


def test_the_first_slot_of_a_block_keeps_its_name_and_a_second_is_free() -> None:
    slots = table(4)
    kept, again = keep(slots, KEYS[:2]), keep(slots, KEYS[:2])
    assert slots.adopt(KEYS[:2]) == kept and slots.named == 2
    assert slots.take(2) is not None and not set(kept) & set(again)
    slots.check_integrity()


def test_what_may_still_be_written_is_not_kept_nor_handed_out() -> None:
    writing = {1}
    slots = SlotTable(2, writing.__contains__)
    keep(slots, KEYS[:2])
    assert slots.named == 1 and slots.free == 1 and slots.take(2) is None
    slots.check_integrity()
    writing.clear()
    assert len(slots.take(2) or ()) == 2


def test_what_is_not_trusted_is_found_no_more() -> None:
    slots = table(3)
    kept = keep(slots, KEYS[:3])
    owned = slots.adopt(KEYS[:3])
    slots.forget(owned[1:])
    assert slots.count(KEYS) == 1 and owned == kept
    slots.give_back(owned)
    assert slots.free == 3 and slots.named == 1
    slots.check_integrity()


def test_a_tenant_finds_nothing_of_anothers() -> None:
    slots, tokens = table(), range(32)
    ours, theirs = (block_keys(chain_root(Namespace("aa" * 32), salt), tokens, 4) for salt in (b"ours", b"theirs"))
    keep(slots, ours)
    assert slots.count(theirs) == 0 and slots.adopt(theirs) == [] and slots.count(ours) == 8


@given(st.lists(st.tuples(st.sampled_from(["take", "adopt", "keep", "back", "late"]), st.integers(0, 7)), max_size=60))
def test_every_slot_is_accounted_for_whatever_happens(steps: list[tuple[str, int]]) -> None:
    """Owners take, adopt, name and give back; some slots are written to when they come back."""
    writing: set[int] = set()
    slots, owners = SlotTable(8, writing.__contains__), list[list[int]]()
    held_by: dict[int, BlockKey] = {}  # what a slot was named for last, and is as long as nobody takes it
    for step, number in steps:
        if step == "take" and (taken := slots.take(number)) is not None:
            assert not set(taken) & {slot for owned in owners for slot in owned} and len(taken) == number
            owners.append(taken)
            for slot in taken:
                held_by.pop(slot, None)
        elif step == "adopt":
            adopted = slots.adopt(KEYS[:number])
            assert [held_by[slot] for slot in adopted] == KEYS[: len(adopted)]
            owners.append(adopted)
        elif owners and step in ("keep", "back", "late"):
            owned = owners.pop(number % len(owners))
            fresh = [slot for slot in owned if slot not in held_by]
            if step == "keep":
                slots.name(fresh, KEYS[: len(fresh)])
                held_by |= {slot: key for slot, key in zip(fresh, KEYS, strict=False) if key not in held_by.values()}
            writing = set(owned) if step == "late" else set()
            slots._written = writing.__contains__
            slots.give_back(owned)
            for slot in writing - {slot for others in owners for slot in others}:
                held_by.pop(slot, None)
        slots.check_integrity()
        assert slots.named == len(held_by)
    writing.clear()
    for owned in owners:
        slots.give_back(owned)
    slots.settle()
    assert slots.free == slots.total == 8
    slots.check_integrity()
