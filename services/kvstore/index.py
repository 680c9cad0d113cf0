"""Which block lies in which slot, for one namespace, in memory.

A slot number is `segment * slots_per_segment + slot in the segment`. Per stored block: the key, the
checksum and the sequence of its bytes, its links to other blocks (`Forest`), pins (`Offers`), and what the
eviction policy knows of it: about 108 bytes, in arrays, whatever is stored (docs/benchmarks.md).

Invariant (`check_integrity`): only a block without stored children and without pins is evicted, so every chain that was
prefix-closed stays so. A pin on the last block of a prefix therefore keeps the whole prefix.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from services.kvstore.block_terms import BlockTerms
from services.kvstore.column import NO_SLOTS, NONE, Column, Numbers, Slots
from services.kvstore.entries import ENTRY, PROVEN, Entries
from services.kvstore.eviction import EvictionPolicy
from services.kvstore.forest import Forest
from services.kvstore.key_table import KeyTable, words
from services.kvstore.offers import ColdestOfTenant, Offers

_STRIDES = (64, 448, 3584)  # keys probed at once: a short prefix doesn't pay for a long question


class Index:
    """Blocks of one namespace by key. Not thread-safe: it belongs to the event loop."""

    def __init__(self, policy: EvictionPolicy, ticks: Iterator[int], slots_expected: int = 0) -> None:
        """`ticks` counts the uses of all blocks of the store, so that namespaces compare."""
        self._policy = policy
        self._ticks = ticks
        self._table = KeyTable(slots_expected)
        self._forest = Forest()
        self._checksums = Column(np.uint32)
        self._sequences = Column(np.uint64)
        self._held = Column(np.bool_)  # whether the slot holds a block
        self.terms = BlockTerms()
        self.offers = Offers(policy, self._forest, self._held)
        self._coldest = ColdestOfTenant(policy, self.terms)

    def __len__(self) -> int:
        return len(self._table)

    def __repr__(self) -> str:
        return f"Index(blocks={len(self)}, bytes={self.nbytes})"

    @property
    def nbytes(self) -> int:
        """Memory held, the policy's included."""
        columns = (self._checksums, self._sequences, self.offers, self._held, self.terms)
        return self._table.nbytes + self._forest.nbytes + self._policy.nbytes + sum(column.nbytes for column in columns)

    def grow(self, slots: int) -> None:
        """Slot numbers up to `slots` may be used."""
        for part in (self._table, self._forest, self._policy, self.terms, self.offers):
            part.grow(slots)
        for column in (self._checksums, self._sequences, self._held):
            column.grow(slots)

    def find(self, key: bytes) -> int | None:
        return self._table.find(key)

    def find_all(self, keys: Sequence[bytes]) -> Slots:
        """The slot of each key, NONE where there is none."""
        return self._table.find_all(words(b"".join(keys)))

    def key(self, slot: int) -> bytes | None:
        """The block in a slot; None when there is none."""
        return self._table.key(slot) if self._held.view[slot] else None

    def holds(self, slot: int) -> bool:
        """Whether there is a block in a slot."""
        return bool(self._held.view[slot])

    def checksum(self, slot: int) -> int:
        return self._checksums.view[slot]

    def sequence(self, slot: int) -> int:
        """Identifies one filling of a slot: it changes when the slot gets another block."""
        return self._sequences.view[slot]

    def parent(self, slot: int) -> int | None:
        """The slot of the block that this one hangs on; None when that isn't stored."""
        return self._forest.parent(slot)

    def sequences(self, slots: Slots) -> Numbers:
        return self._sequences.array[slots]

    def prefix(self, keys: Sequence[bytes]) -> Slots:
        """Slots of the longest stored prefix of a chain."""
        found: list[Slots] = []
        start, before = 0, NONE
        while start < len(keys):
            stop = start + _STRIDES[min(len(found), len(_STRIDES) - 1)]
            slots = self._table.find_all(words(b"".join(keys[start:stop])))
            good = slots != NONE
            if not good[0]:
                break
            good[1:] &= self._forest.parents(slots[1:]) == slots[:-1]
            good[0] &= start == 0 or (slots[0] != NONE and self._forest.parent(int(slots[0])) == before)
            length = len(slots) if good.all() else int(good.argmin())
            found.append(slots[:length])
            if length < len(slots):
                break
            start, before = stop, int(slots[-1])
        return np.concatenate(found) if found else NO_SLOTS

    def touch(self, slots: Slots) -> None:
        """Notes a use of a prefix."""
        self._policy.touch(slots, next(self._ticks))

    def insert(
        self, slot: int, key: bytes, parent_key: bytes, checksum: int, sequence: int, tenant: int = 0, expires_s: int = 0
    ) -> None:
        """A block is stored in a slot that was free. Links it, and adopts chain heads that name it."""
        self.insert_many([slot], [key], [parent_key], [checksum], [sequence], tenant, expires_s)

    def insert_many(
        self,
        slots: Sequence[int],
        keys: Sequence[bytes],
        parent_keys: Sequence[bytes],
        checksums: Sequence[int],
        sequences: Sequence[int],
        tenant: int = 0,
        expires_s: int = 0,
    ) -> None:
        """`insert` of a group, all different, one use."""
        at, packed = np.array(slots, np.int32), words(b"".join(keys))
        assert not self._held.array[at].any()
        self._table.put_many(at, packed)
        self._held.array[at] = True
        self._checksums.array[at] = checksums
        self._sequences.array[at] = sequences
        self.terms.put_many(at, tenant, expires_s)
        tick = next(self._ticks)
        slot_before, key_before = None, b""
        for slot, key, parent_key in zip(slots, keys, parent_keys, strict=True):
            parent = slot_before if parent_key == key_before else self._table.find(parent_key)
            self._hang(slot, key, parent, parent_key)
            self._policy.insert(slot, self._forest.parent(slot), tick)
            slot_before, key_before = slot, key
        self.offers.offer_new(at)

    def _hang(self, slot: int, key: bytes, parent: int | None, parent_key: bytes) -> None:
        """Gives a new block its place, and what has waited for it. Its parent may be of its group, and have no place yet."""
        if parent is None or not self._forest.has_place(parent):
            self._forest.hang_head(slot, parent_key)
        else:
            self.offers.withdraw(parent)
            self._forest.hang(slot, parent)
        self._forest.adopt(slot, key)

    def insert_all(self, slots: Slots, entries: Entries, tenants: Numbers | int = 0) -> None:
        """At start: `insert` of many blocks, all different, into an empty index."""
        assert not len(self)
        self._table.put_all(slots, entries["key"])
        self._held.array[slots] = True
        self._checksums.array[slots] = entries["checksum"]
        self._sequences.array[slots] = entries["sequence"]
        self.terms.put_all(slots, tenants, entries["expires_s"])
        self._forest.hang_all(slots, self._table.find_all(entries["parent"]), entries["parent"])
        order = np.argsort(entries["tick"], kind="stable")
        proven = entries["flags"][order] & PROVEN != 0
        self._policy.restore(slots[order], entries["tick"][order], proven, self._forest.leaves(slots[order]))

    def entries(self, slots: Slots) -> Entries:
        """What `insert_all` needs to have these blocks again; `slot` and `tenant` are left to the caller."""
        out = np.zeros(len(slots), ENTRY)
        out["key"] = self._table.keys(slots)
        out["checksum"] = self._checksums.array[slots]
        out["sequence"] = self._sequences.array[slots]
        out["tick"] = self._policy.ticks(slots)
        out["expires_s"] = self.terms.expiries_s(slots)
        out["flags"] = np.where(self._policy.proven(slots), PROVEN, 0)
        parents = self._forest.parents(slots)
        out["parent"] = self._table.keys(np.maximum(parents, 0))
        for i in np.flatnonzero(parents < 0).tolist():
            key = self._forest.parent_key(int(slots[i]))
            assert key is not None
            out["parent"][i] = words(key)
        return out

    def remove(self, slot: int) -> bytes:
        """Forgets the block in a slot. Children that it has become chain heads. Returns its key."""
        key, parent = self._forget(slot)
        if parent is not None:
            self.offers.offer(parent)
        return key

    def evict(self) -> int | None:
        """Removes the block that may best go; its slot, or None when none may."""
        return next(iter(self.evict_many(1)), None)

    def evict_many(self, count: int) -> list[int]:
        """Removes up to `count` blocks, each the one that may best go by then; their slots."""
        gone: list[int] = []
        while len(gone) < count and (slot := self._policy.victim()) is not None:
            self._withdraw(slot)
            gone.append(slot)
        if not gone:
            return gone
        slots = np.array(gone, np.int32)
        self._table.remove_many(slots)
        self._held.array[slots] = False
        return gone

    def evict_of(self, tenant: int) -> int | None:
        """`evict`, of the tenant's blocks the one that was used longest ago."""
        slot = self._coldest.of(tenant)
        if slot is not None:
            self._evict(slot)
        return slot

    def proven(self, slot: int) -> bool:
        """Whether a lookup has found the block, or one that it hangs on."""
        return bool(self._policy.proven(np.array([slot]))[0])

    def expire(self, now_s: int) -> list[int]:
        """Removes expired blocks on which nothing hangs that isn't expired, and which aren't pinned; their slots.

        An expired block that stays is no longer found, and what hangs on it isn't either.
        """
        if now_s < self.terms.next_expiry_s:
            return []
        over = set(self.terms.expired(self._held.array, now_s))
        gone: list[int] = []
        for start in list(over):
            slot: int | None = start
            while slot is not None and slot in over and self.offers.evictable(slot):
                over.remove(slot)
                gone.append(slot)
                slot = self._evict(slot)
        self.terms.find_next_expiry(self._held.array)
        return gone

    def coldest_tick(self) -> int | None:
        """Last use of the block that `evict` would take."""
        slot = self._policy.victim()
        return self._policy.tick(slot) if slot is not None else None

    def subtree(self, slots: Sequence[int]) -> list[int]:
        """The blocks in `slots` and everything under them, each once."""
        return self._forest.subtree([slot for slot in slots if self._held.view[slot]])

    def stored(self) -> Iterator[tuple[bytes, int]]:
        return ((self._table.key(slot), slot) for slot in self._table.slots().tolist())

    def _evict(self, slot: int) -> int | None:
        """Removes a block that is on offer; its parent's slot."""
        parent = self._withdraw(slot)
        self._table.remove(slot)
        self._held.view[slot] = False
        return parent

    def _withdraw(self, slot: int) -> int | None:
        """Takes a block that is on offer from its parent, which may go next; the parent's slot."""
        parent = self._forest.parent(slot)
        self._policy.withdraw(slot)
        self._policy.remove(slot)
        self._forest.take_down(slot)
        if parent is not None and self.offers.evictable(parent):
            self._policy.expose(parent, slot)
        return parent

    def _forget(self, slot: int) -> tuple[bytes, int | None]:
        """Takes a block out; its key and its parent's slot."""
        assert self._held.view[slot]
        key, parent = self._table.key(slot), self._forest.parent(slot)
        self.offers.withdraw(slot)
        self._policy.remove(slot)
        self._forest.release(slot, key)
        self._table.remove(slot)
        self._held.view[slot] = False
        return key, parent

    def check_integrity(self) -> list[str]:
        """What is wrong, in words; empty when all is well."""
        slots = self._table.slots()
        problems = self._table.check_integrity() + self._forest.check_integrity(slots)
        if not np.array_equal(np.sort(slots), np.flatnonzero(self._held.array)):
            problems.append(f"the table has {len(slots)} blocks, {int(self._held.array.sum())} slots hold one")
        return problems + self.offers.check_integrity()
