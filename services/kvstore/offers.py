"""Which blocks may go: those without stored children and without pins are on offer to the eviction policy.

Invariant (`check_integrity`): on offer are exactly the blocks that may be evicted.
"""

from collections.abc import Sequence

import numpy as np

from services.kvstore.block_terms import BlockTerms
from services.kvstore.column import Column, Slots
from services.kvstore.eviction import EvictionPolicy
from services.kvstore.forest import Forest

COLDEST_AT_ONCE = 64  # of one tenant: finding them looks at every slot


class Offers:
    """Pins of one namespace's blocks, and what follows from them. `held` says which slots hold a block."""

    def __init__(self, policy: EvictionPolicy, forest: Forest, held: Column) -> None:
        self._policy, self._forest, self._held = policy, forest, held
        self._pins = Column(np.uint32)

    @property
    def nbytes(self) -> int:
        return self._pins.nbytes

    @property
    def pins(self) -> int:
        """Of all blocks."""
        return int(self._pins.array.sum())

    def grow(self, slots: int) -> None:
        """Slot numbers up to `slots` may be used."""
        self._pins.grow(slots)

    def evictable(self, slot: int) -> bool:
        """Whether there is a block in the slot that may go."""
        return bool(self._held.view[slot]) and self._forest.is_leaf(slot) and not self._pins.view[slot]

    def pinned(self, slot: int) -> bool:
        return self._pins.view[slot] > 0

    def pin(self, slot: int) -> None:
        """Keeps a block, until `unpin`; as often as it is called."""
        self._pins.view[slot] += 1
        self.withdraw(slot)

    def hold(self, slots: Sequence[int]) -> None:
        """`pin` of many; of one as often as it is named."""
        at = np.array(slots, np.int32)
        np.add.at(self._pins.array, at, 1)
        for slot in slots:
            self.withdraw(slot)

    def unpin(self, slot: int) -> None:
        assert self._pins.view[slot]
        self._pins.view[slot] -= 1
        self.offer(slot)

    def pin_all(self, slots: Sequence[int]) -> None:
        """`pin` of slots that are about to hold a block, all different."""
        at = np.array(slots, np.int32)
        assert not self._held.array[at].any()
        self._pins.array[at] += 1

    def unpin_all(self, slots: Sequence[int]) -> None:
        """`unpin` of many; of one as often as it is named."""
        at = np.array(slots, np.int32)
        assert self._pins.array[at].all()
        np.subtract.at(self._pins.array, at, 1)
        for slot in self._free(at):
            if self._held.view[slot] and not self._policy.on_offer(slot):
                self._policy.offer(slot)

    def offer_new(self, slots: Slots) -> None:
        """Blocks that have just got their places."""
        for slot in self._free(slots):
            self._policy.offer(slot)

    def offer(self, slot: int) -> None:
        """A block, not on offer, may have become free to go."""
        if self.evictable(slot):
            self._policy.offer(slot)

    def withdraw(self, slot: int) -> None:
        """A block may not go any more. Idempotent."""
        if self._policy.on_offer(slot):
            self._policy.withdraw(slot)

    def _free(self, slots: Slots) -> list[int]:
        """Those without pins and without children."""
        free: list[int] = slots[(self._pins.array[slots] == 0) & self._forest.leaves(slots)].tolist()
        return free

    def check_integrity(self) -> list[str]:
        """What is wrong, in words."""
        return [
            f"slot {slot} is {'on' if self._policy.on_offer(slot) else 'not on'} offer"
            for slot in range(len(self._held.array))
            if self._policy.on_offer(slot) != self.evictable(slot)
        ]


class ColdestOfTenant:
    """The blocks on offer of one tenant, longest unused first. Remembers some: to find them is to look at every slot."""

    def __init__(self, policy: EvictionPolicy, terms: BlockTerms) -> None:
        self._policy, self._terms = policy, terms
        self._known: dict[int, list[tuple[int, int]]] = {}  # tenant -> (slot, last use) of some blocks, the next to go last

    def of(self, tenant: int) -> int | None:
        """The one that goes next; None when none may."""
        known = self._known.setdefault(tenant, [])
        while True:
            if not known:
                known += self._find(tenant)
            if not known:
                del self._known[tenant]
                return None
            slot, tick = known.pop()
            if self._policy.on_offer(slot) and self._policy.tick(slot) == tick and self._terms.tenant(slot) == tenant:
                return slot

    def _find(self, tenant: int) -> list[tuple[int, int]]:
        slots = np.flatnonzero(self._policy.all_on_offer() & self._terms.of_tenant(tenant)).astype(np.int32)
        ticks = self._policy.ticks(slots)
        order = np.argsort(ticks, kind="stable")[:COLDEST_AT_ONCE][::-1]
        return list(zip(slots[order].tolist(), ticks[order].tolist(), strict=True))
