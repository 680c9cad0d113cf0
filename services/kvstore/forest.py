"""Which block hangs on which: the chains of one namespace, as links between slots.

A block whose parent is stored is that block's child; any other is a *head* and hangs on its parent's
key: a chain's first block on the chain's root, an orphan on a parent that may yet come, and then adopts it.

Invariants (`check_integrity`):
- Every block has one place: among a block's children, or among the heads of one key.
- Links form a forest: a block that claims an ancestor as its child isn't linked under itself.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from services.kvstore.column import NONE, Column, Flags, Slots
from services.kvstore.key_table import Words

_HEAD = -2  # parent of a head: _HEAD - number of its key


class Forest:
    """Links between slots. Memory: four numbers per slot, and a key per chain root and lost parent."""

    def __init__(self) -> None:
        self._parent = Column(np.int32, NONE)
        self._first_child = Column(np.int32, NONE)
        self._next = Column(np.int32, NONE)
        self._previous = Column(np.int32, NONE)
        self._number: dict[bytes, int] = {}  # key that heads hang on -> its number
        self._key: dict[int, bytes] = {}
        self._first_head: dict[int, int] = {}
        self._unused: list[int] = []

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in (self._parent, self._first_child, self._next, self._previous))

    def grow(self, slots: int) -> None:
        for column in (self._parent, self._first_child, self._next, self._previous):
            column.grow(slots)

    def parent(self, slot: int) -> int | None:
        """The slot of the parent; None for a head."""
        parent = self._parent.view[slot]
        return parent if parent >= 0 else None

    def parents(self, slots: Slots) -> Slots:
        """Slots of the parents; negative for heads."""
        parents: Slots = self._parent.array[slots]
        return parents

    def parent_key(self, slot: int) -> bytes | None:
        """What a head hangs on; None when its parent is stored."""
        parent = self._parent.view[slot]
        return self._key[_HEAD - parent] if parent <= _HEAD else None

    def has_place(self, slot: int) -> bool:
        return self._parent.view[slot] != NONE

    def is_leaf(self, slot: int) -> bool:
        return self._first_child.view[slot] == NONE

    def leaves(self, slots: Slots) -> Flags:
        """Which of these have no stored children."""
        leaves: Flags = self._first_child.array[slots] == NONE
        return leaves

    def children(self, slot: int) -> Iterator[int]:
        child = self._first_child.view[slot]
        while child != NONE:
            yield child
            child = self._next.view[child]

    def subtree(self, slots: Sequence[int]) -> list[int]:
        """These blocks and everything under them, each once."""
        found: dict[int, None] = {}
        todo = list(slots)
        while todo:
            slot = todo.pop()
            if slot not in found:
                found[slot] = None
                todo.extend(self.children(slot))
        return list(found)

    def hang(self, slot: int, parent: int) -> None:
        """A block that has no place becomes a child."""
        first = self._first_child.view
        self._parent.view[slot] = parent
        self._push(slot, first[parent])
        first[parent] = slot

    def hang_head(self, slot: int, parent_key: bytes) -> None:
        """A block that has no place becomes a head."""
        number = self._number.get(parent_key)
        if number is None:
            number = self._number[parent_key] = self._unused.pop() if self._unused else len(self._key)
            self._key[number] = parent_key
        self._parent.view[slot] = _HEAD - number
        self._push(slot, self._first_head.get(number, NONE))
        self._first_head[number] = slot

    def adopt(self, slot: int, key: bytes) -> None:
        """Heads that hang on the key of a new block become its children, unless it hangs on them."""
        number = self._number.get(key)
        head = self._first_head[number] if number is not None else NONE
        while head != NONE:
            following = self._next.view[head]
            if not self._is_ancestor(head, slot):
                self.take_down(head)
                self.hang(head, slot)
            head = following

    def release(self, slot: int, key: bytes) -> None:
        """A block goes: its children become heads that hang on its key."""
        for child in list(self.children(slot)):
            self.take_down(child)
            self.hang_head(child, key)
        self.take_down(slot)

    def take_down(self, slot: int) -> None:
        """The block has no place any more."""
        parent, before, after = self._parent.view[slot], self._previous.view[slot], self._next.view[slot]
        if after != NONE:
            self._previous.view[after] = before
        if before != NONE:
            self._next.view[before] = after
        elif parent >= 0:
            self._first_child.view[parent] = after
        elif after != NONE:
            self._first_head[_HEAD - parent] = after
        else:
            self._drop_key(_HEAD - parent)
        self._parent.view[slot] = self._previous.view[slot] = self._next.view[slot] = NONE

    def hang_all(self, slots: Slots, parents: Slots, parent_keys: Words) -> None:
        """Gives many blocks their places in an empty forest. `parents` are NONE where not stored."""
        parents = np.where(self._on_cycle(slots, parents), np.int32(NONE), parents)
        linked = np.flatnonzero(parents != NONE)
        linked = linked[np.argsort(parents[linked], kind="stable")]
        children, under = slots[linked], parents[linked]
        self._parent.array[children] = under
        first = np.ones(len(linked), np.bool_)
        first[1:] = under[1:] != under[:-1]
        self._first_child.array[under[first]] = children[first]
        behind = np.flatnonzero(~first)
        self._previous.array[children[behind]] = children[behind - 1]
        self._next.array[children[behind - 1]] = children[behind]
        heads = np.flatnonzero(parents == NONE)
        for slot, key in zip(slots[heads].tolist(), parent_keys[heads], strict=True):
            self.hang_head(slot, key.tobytes())

    def _on_cycle(self, slots: Slots, parents: Slots) -> Flags:
        """Which blocks have no head above them: jumps twice as far each time, until past the longest chain."""
        above = np.full(len(self._parent.array), NONE, np.int32)
        above[slots] = parents
        for _ in range(len(above).bit_length()):
            if (above == NONE).all():
                break
            above = np.where(above == NONE, np.int32(NONE), above[above])
        lost: Flags = above[slots] != NONE
        return lost

    def _push(self, slot: int, follower: int) -> None:
        self._previous.view[slot] = NONE
        self._next.view[slot] = follower
        if follower != NONE:
            self._previous.view[follower] = slot

    def _drop_key(self, number: int) -> None:
        del self._first_head[number]
        del self._number[self._key.pop(number)]
        self._unused.append(number)

    def _is_ancestor(self, ancestor: int, slot: int) -> bool:
        while slot >= 0 and slot != ancestor:
            slot = self._parent.view[slot]
        return slot == ancestor

    def check_integrity(self, slots: Slots) -> list[str]:
        """`slots` are those of all blocks. What is wrong, in words."""
        problems: list[str] = []
        places = sum(self._count(slot, head) for slot, head in self._first_head.items())
        for slot in slots.tolist():
            parent = self._parent.view[slot]
            if parent == NONE:
                problems.append(f"slot {slot} is neither a head nor a child")
            for child in self.children(slot):
                places += 1
                if self._parent.view[child] != slot:
                    problems.append(f"slot {child} is a child of {slot} that doesn't know")
        if places != len(slots):
            problems.append(f"{places} places for {len(slots)} blocks")
        return problems

    def _count(self, number: int, head: int) -> int:
        heads = 0
        while head != NONE and self._parent.view[head] == _HEAD - number:
            heads += 1
            head = self._next.view[head]
        return heads
