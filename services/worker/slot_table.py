"""Who owns each slot of a stage, and which slots can be found again by the block they hold.

Life of a slot:

    free  --take--> owned --free--> free, kept when it has a name, or limbo while somebody may still write to it
    kept  --adopt--> owned          by one owner more: what it holds is used again where it is
    kept  --take--> owned, nameless the free ones are gone, and memory is worth more than what might be wanted again
    limbo --settle--> free

Invariants:
- A named slot holds the whole KV of the block whose key it has, and nobody writes to it: it is named by its last writer, when
  that is done. So any number of owners may read it at once: agents that share a beginning share its slots.
- What is kept counts as free: nothing is refused because of it.
- Who was kept longest goes first, and of one prompt the last block: without its beginning the rest can't be found.
- A slot that goes through limbo loses its name.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from common.blocks import BlockKey
from services.worker.engine.allocator import BlockAllocator


class SlotTable:
    """Bookkeeping over slots `[0, slots)`. `written`: whether somebody may still write to a slot that its owner gives back."""

    def __init__(self, slots: int, written: Callable[[int], bool]) -> None:
        self._places = BlockAllocator(slots)  # whose idle blocks are our kept slots
        self._written = written
        self._owners: Counter[int] = Counter()
        self._limbo: set[int] = set()  # the table holds these itself

    @property
    def total(self) -> int:
        return self._places.total

    @property
    def free(self) -> int:
        """That can be taken; kept ones among them."""
        return self._places.free

    @property
    def named(self) -> int:
        return self._places.named

    def owns(self, slot: int) -> bool:
        return slot in self._owners

    def take(self, count: int) -> list[int] | None:
        """So many slots with one owner each; None: there are too few."""
        self.settle()
        taken = self._places.take(count)
        self._owners.update(taken or ())
        return taken

    def adopt(self, keys: Sequence[BlockKey]) -> list[int]:
        """One owner more for the slots of the longest prefix of `keys` that is named."""
        adopted = self._places.claim(keys)
        self._owners.update(adopted)
        return adopted

    def count(self, keys: Sequence[BlockKey]) -> int:
        """How many leading ones of `keys` are named now."""
        return self._places.count(keys)

    def name(self, slots: Sequence[int], keys: Sequence[BlockKey]) -> None:
        """These slots hold the whole KV of these blocks, and their owners are done with writing."""
        for slot, key in zip(slots, keys, strict=True):
            self._places.name(slot, key)

    def forget(self, slots: Sequence[int]) -> None:
        """What these owned slots hold can't be trusted."""
        self._places.forget(slots)

    def give_back(self, slots: Sequence[int]) -> set[int]:
        """One owner less; `slots` in the order of their prompt. Those that have no owner now."""
        assert len(set(slots)) == len(slots) and all(map(self.owns, slots)), f"not owned, or twice: {slots}"
        gone = {slot for slot in slots if self._owners[slot] == 1}
        self._owners.subtract(slots)
        for slot in gone:
            del self._owners[slot]
        late = set(filter(self._written, gone))
        self._places.forget(late)
        self._limbo |= late
        self._places.release([slot for slot in slots if slot not in late])
        return gone

    def settle(self) -> None:
        """Frees slots in limbo that nobody writes to any more."""
        for slot in sorted(slot for slot in self._limbo if not self._written(slot)):
            self._limbo.discard(slot)
            self._places.release([slot])

    def check_integrity(self) -> None:
        """Raises `AssertionError` when a slot is in two states, in none, or has a name that it must not have."""
        assert not any(map(self.owns, self._limbo)), self
        self._places.check_integrity([*self._owners.elements(), *self._limbo])

    def __repr__(self) -> str:
        return f"free={self.free}, owned={len(self._owners)}, limbo={len(self._limbo)}, named={self.named}"
