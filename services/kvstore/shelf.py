"""One namespace: its segments, its slots and what each of them is used for, its index.

What a slot's life is, slot_states.py says.

A slot number is `position * slots_per_segment + slot in the segment`. A segment's position counts the
segments of the namespace over all disks; the number in its file name counts those on its own disk.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from common.blocks import Namespace
from services.kvstore.entries import Entries
from services.kvstore.eviction import EvictionPolicy
from services.kvstore.free_slots import FreeSlots
from services.kvstore.index import Index
from services.kvstore.record import Geometry
from services.kvstore.segment import Segment
from services.kvstore.slot_states import SlotState, SlotStates
from services.kvstore.tenants import Tenants
from services.kvstore.write_item import WriteItem


class Shelf:
    """Segments and blocks of one namespace. Belongs to the event loop."""

    def __init__(
        self,
        namespace: Namespace,
        geometry: Geometry,
        policy: EvictionPolicy,
        ticks: Iterator[int],
        tenants: Tenants,
        slots_expected: int = 0,
    ) -> None:
        self.namespace = namespace
        self.namespace_bytes = bytes.fromhex(namespace)
        self.geometry = geometry
        self.policy = policy
        self.tenants = tenants
        self.index = Index(policy, ticks, slots_expected)
        self.segments: dict[int, Segment] = {}  # by position
        self.in_flight: dict[bytes, WriteItem] = {}
        self.preparing = 0  # requests that wait for space here
        self._states = SlotStates()
        self._free = FreeSlots(lambda slot: self.place(slot)[0].disk)

    def __repr__(self) -> str:
        return f"Shelf({self.namespace[:8]}, segments={len(self.segments)}, blocks={len(self.index)}, free={self.free_slots})"

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def free_on(self, disk: int) -> int:
        """Free slots on one disk."""
        return self._free.on(disk)

    def state(self, slot: int) -> SlotState:
        return self._states[slot]

    def next_segment_number(self, disk: int, taken: Callable[[int], bool]) -> int:
        """The lowest number that no segment on `disk` has and `taken` doesn't claim."""
        numbers = {segment.number for segment in self.segments.values() if segment.disk == disk}
        number = 0
        while number in numbers or taken(number):
            number += 1
        return number

    def add_segment(self, segment: Segment) -> range:
        """Takes a segment in, all its slots RETIRED until `free` or `store_found`; their numbers."""
        assert segment.geometry == self.geometry
        position = next(position for position in range(len(self.segments) + 1) if position not in self.segments)
        self.segments[position] = segment
        slots = self.segment_slots(position)
        self._states.add(slots)
        self.index.grow(slots.stop)
        return slots

    def remove_segment(self, position: int) -> Segment:
        """Lets go of a segment whose slots are all FREE or RETIRED."""
        slots = self.segment_slots(position)
        self._states.remove(slots)
        self._free.drop(slots)
        return self.segments.pop(position)

    def place(self, slot: int) -> tuple[Segment, int]:
        """The segment of a slot, and the slot's number in it."""
        position, within = divmod(slot, self.geometry.slots_per_segment)
        return self.segments[position], within

    def slot_of(self, key: bytes) -> int | None:
        """Where a block lies or is about to lie; None when it is neither stored nor on its way."""
        slot = self.index.find(key)
        if slot is None and key in self.in_flight:
            return self.in_flight[key].slot
        return slot

    def take(self, disks: Sequence[int]) -> list[int]:
        """Free slots to write into, one on each of `disks` if there is one; fewer when there are no more."""
        slots = self._free.take(disks)
        self._states.move_all(slots, SlotState.FREE, SlotState.IN_FLIGHT)
        return slots

    def evict(self, count: int = 1) -> int:
        """Frees the slots of up to `count` blocks, each the one that may best go by then; how many."""
        gone = self.index.evict_many(count)
        self._gone_all(gone)
        return len(gone)

    def evict_of(self, tenant: int) -> int | None:
        """`evict`, of one tenant's blocks."""
        slot = self.index.evict_of(tenant)
        if slot is not None:
            self._gone(slot)
        return slot

    def expire(self, now_s: int) -> int:
        """Frees the slots of expired blocks, as far as they may go; how many."""
        gone = self.index.expire(now_s)
        for slot in gone:
            self._gone(slot)
        return len(gone)

    def forget(self, slot: int) -> None:
        """Frees the slot of a stored block, whatever hangs on it."""
        self.index.remove(slot)
        self._gone(slot)

    def store(
        self, items: Sequence[WriteItem], checksums: Sequence[int], sequences: Sequence[int], tenant: int, expires_s: int
    ) -> None:
        """The items' blocks are durable in their slots: visible from now on."""
        slots, keys = [item.slot for item in items], [item.key for item in items]
        self._states.move_all(slots, SlotState.IN_FLIGHT, SlotState.STORED)
        for key in keys:
            del self.in_flight[key]
        self.index.insert_many(slots, keys, [item.parent for item in items], checksums, sequences, tenant, expires_s)

    def give_back(self, item: WriteItem, tenant: int, *, failed: bool) -> None:
        """The item's slot will not be filled; after an I/O error it isn't used again."""
        del self.in_flight[item.key]
        self.tenants.charge(tenant, -self.geometry.slot_bytes)
        self._vacate(item.slot, SlotState.IN_FLIGHT, usable=not failed)

    def condemn(self, slot: int) -> None:
        """A stored block turned out bad, or isn't wanted: it is a miss from now on. `erased` follows."""
        self.index.remove(slot)
        self._refund(slot)
        self._states.move(slot, SlotState.STORED, SlotState.ERASING)

    def condemn_coldest(self) -> int | None:
        """Condemns the block that may best go; its slot, or None when none may."""
        slot = self.index.evict()
        if slot is not None:
            self._refund(slot)
            self._states.move(slot, SlotState.STORED, SlotState.ERASING)
        return slot

    def erased(self, slot: int, *, usable: bool) -> None:
        """The header of a condemned block is gone, or (not usable) can't be erased."""
        self._vacate(slot, SlotState.ERASING, usable=usable)

    def free(self, slots: Iterable[int]) -> None:
        """While a segment is taken in: nothing of use is in these slots."""
        for slot in slots:
            self._states.move(slot, SlotState.RETIRED, SlotState.FREE)
            self._free.add(slot)

    def store_found(self, found: Sequence[tuple[Segment, Entries]]) -> None:
        """While opening: these blocks, all different, are in these segments."""
        starts = {id(segment): self.segment_slots(position).start for position, segment in self.segments.items()}
        entries = np.concatenate([rows for _, rows in found])
        slots = np.concatenate([rows["slot"].astype(np.int32) + starts[id(segment)] for segment, rows in found])
        self._states.move_all(slots, SlotState.RETIRED, SlotState.STORED)
        numbers = self.tenants.numbers(entries["tenant"])
        for number, blocks in enumerate(np.bincount(numbers).tolist()):
            if blocks:
                self.tenants.charge(number, blocks * self.geometry.slot_bytes)
        self.index.insert_all(slots, entries, numbers)
        for segment, rows in found:
            if not segment.writable:
                for slot in rows["slot"].tolist():
                    self.index.offers.pin(starts[id(segment)] + slot)

    def entries(self, position: int) -> Entries | None:
        """The blocks in a segment; None while there is a slot in it that is neither STORED nor FREE."""
        slots = self.segment_slots(position)
        within = self._states.within(slots, SlotState.STORED)
        if len(within) + len(self._states.within(slots, SlotState.FREE)) != len(slots):
            return None
        out = self.index.entries((within + slots.start).astype(np.int32))
        out["slot"] = within
        out["tenant"] = self.tenants.digests(self.index.terms.tenants((within + slots.start).astype(np.int32)))
        return out

    def lose(self, slots: range) -> int:
        """The disk under these slots is gone: their blocks are misses, and nothing is written there. How many blocks."""
        self._free.drop(slots)
        lost = 0
        for slot in slots:
            state = self._states[slot]
            if state is SlotState.STORED:
                self.index.remove(slot)
                self._refund(slot)
                lost += 1
            if state in (SlotState.STORED, SlotState.FREE):
                self._states.move(slot, state, SlotState.RETIRED)
        return lost

    def seal(self, slots: range) -> None:
        """Nothing can be written to these slots any more: their blocks stay, as evicting them gains nothing."""
        self._free.drop(slots)
        for slot in slots:
            if self._states[slot] is SlotState.STORED:
                self.index.offers.pin(slot)
            elif self._states[slot] is SlotState.FREE:
                self._states.move(slot, SlotState.FREE, SlotState.RETIRED)

    def segment_slots(self, position: int) -> range:
        per_segment = self.geometry.slots_per_segment
        return range(position * per_segment, (position + 1) * per_segment)

    def _gone(self, slot: int) -> None:
        """The block that was stored in the slot is no longer in the index."""
        self._refund(slot)
        self._vacate(slot, SlotState.STORED)

    def _gone_all(self, slots: Sequence[int]) -> None:
        """`_gone` of many, all different, that were evicted: where nothing can be written all blocks are pinned."""
        by_disk: dict[int, list[int]] = {}
        for slot in slots:
            segment = self.segments[slot // self.geometry.slots_per_segment]
            assert segment.writable, f"{segment} lost slot {slot} to eviction, which gains nothing there"
            by_disk.setdefault(segment.disk, []).append(slot)
        self._states.move_all(slots, SlotState.STORED, SlotState.FREE)
        for disk, freed in by_disk.items():
            self._free.add_all(disk, freed)
        for number, blocks in enumerate(np.bincount(self.index.terms.tenants(np.array(slots, np.int32))).tolist()):
            if blocks:
                self.tenants.charge(number, -blocks * self.geometry.slot_bytes)

    def _refund(self, slot: int) -> None:
        self.tenants.charge(self.index.terms.tenant(slot), -self.geometry.slot_bytes)

    def _vacate(self, slot: int, old: SlotState, *, usable: bool = True) -> None:
        """Nothing of use is in the slot any more: FREE where it can be written, else RETIRED."""
        usable = usable and self.place(slot)[0].writable
        self._states.move(slot, old, SlotState.FREE if usable else SlotState.RETIRED)
        if usable:
            self._free.add(slot)

    def check_integrity(self) -> list[str]:
        """Every slot is accounted for once; what is wrong, in words."""
        problems = [f"{self.namespace[:8]}: {problem}" for problem in self.index.check_integrity()]
        counts = self._states.counts()
        stored = {slot for _, slot in self.index.stored()}
        flying = {item.slot for item in self.in_flight.values()}
        for name, slots, state in (
            ("stored", stored, SlotState.STORED),
            ("in flight", flying, SlotState.IN_FLIGHT),
            ("free", set(self._free), SlotState.FREE),
        ):
            if len(slots) != counts[state] or any(self._states[slot] is not state for slot in slots):
                problems.append(f"{self.namespace[:8]}: {len(slots)} slots are {name}, {counts[state]} marked {state.name}")
        if len(self._free) != len(set(self._free)):
            problems.append(f"{self.namespace[:8]}: a slot is free twice")
        total = len(self.segments) * self.geometry.slots_per_segment
        if sum(counts[state] for state in SlotState if state is not SlotState.ABSENT) != total:
            problems.append(f"{self.namespace[:8]}: {total} slots, but {counts}")
        return problems
