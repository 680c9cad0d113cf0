"""Which block lies in which slot, for one namespace, in memory.

A slot number is `segment * slots_per_segment + slot in the segment`. Per stored block: the key, the
checksum and the sequence of its bytes, the parent's slot, its siblings, its first child, pins.

Invariants (`check_integrity`):
- A block whose parent is stored is linked under it; any other heads a chain (`parent == NONE`): it
  is a first block, whose parent is a chain root, or an orphan that its parent's return adopts.
- Only a block without stored children and without pins is evicted, so every chain that was
  prefix-closed stays so. A pin on the last block of a prefix therefore keeps the whole prefix.
- Links form a forest: a block that claims an ancestor as its child isn't linked.
"""

from array import array
from collections.abc import Iterator, Sequence

from services.kvstore.eviction import EvictionPolicy

NONE = -1  # inside the link columns only


class Index:
    """Blocks of one namespace by key. Not thread-safe: it belongs to the event loop."""

    def __init__(self, policy: EvictionPolicy, ticks: Iterator[int]) -> None:
        """`ticks` counts the uses of all blocks of the store, so that namespaces compare."""
        self._policy = policy
        self._ticks = ticks
        self._slot_of: dict[bytes, int] = {}
        self._keys: list[bytes | None] = []
        self._checksums = array("I")
        self._sequences = array("Q")
        self._pins = array("I")
        self._parent = array("i")
        self._first_child = array("i")
        self._next = array("i")
        self._previous = array("i")
        self._heads: dict[bytes, int] = {}  # parent key -> first of the chain heads that name it
        self._parent_key: dict[int, bytes] = {}  # chain head -> parent key

    def __len__(self) -> int:
        return len(self._slot_of)

    def __repr__(self) -> str:
        return f"Index(blocks={len(self)}, heads={len(self._parent_key)})"

    def grow(self, slots: int) -> None:
        """Slot numbers up to `slots` may be used."""
        missing = slots - len(self._keys)
        if missing <= 0:
            return
        self._keys.extend([None] * missing)
        self._policy.grow(slots)
        for column in (self._checksums, self._sequences, self._pins):
            column.frombytes(bytes(missing * column.itemsize))
        for column in (self._parent, self._first_child, self._next, self._previous):
            column.extend(array("i", [NONE]) * missing)

    def find(self, key: bytes) -> int | None:
        return self._slot_of.get(key)

    def key(self, slot: int) -> bytes | None:
        """The block in a slot; None when there is none."""
        return self._keys[slot]

    def checksum(self, slot: int) -> int:
        return self._checksums[slot]

    def sequence(self, slot: int) -> int:
        """Identifies one filling of a slot: it changes when the slot gets another block."""
        return self._sequences[slot]

    def prefix(self, keys: Sequence[bytes]) -> list[int]:
        """Slots of the longest stored prefix of a chain."""
        find, parents = self._slot_of.get, self._parent
        slots: list[int] = []
        previous = NONE
        for key in keys:
            slot = find(key)
            if slot is None or (slots and parents[slot] != previous):
                break
            slots.append(slot)
            previous = slot
        return slots

    def touch(self, slots: Sequence[int]) -> None:
        """Notes a use of blocks."""
        tick = next(self._ticks)
        for slot in slots:
            self._policy.touch(slot, tick)

    def insert(self, slot: int, key: bytes, parent_key: bytes, checksum: int, sequence: int) -> None:
        """A block is stored in a slot that was free. Links it, and adopts chain heads that name it."""
        assert key not in self._slot_of and self._keys[slot] is None
        self._slot_of[key] = slot
        self._keys[slot] = key
        self._checksums[slot] = checksum
        self._sequences[slot] = sequence
        parent = self._slot_of.get(parent_key) if parent_key != key else None
        if parent is None:
            self._link_head(slot, parent_key)
        else:
            self._link(slot, parent)
        self._adopt(slot, key)
        self.touch((slot,))
        self._policy.offer(slot)

    def remove(self, slot: int) -> bytes:
        """Forgets the block in a slot. Children that it has become chain heads. Returns its key."""
        key = self._keys[slot]
        assert key is not None
        for child in list(self.children(slot)):
            self._unlink(child)
            self._link_head(child, key)
        parent = self._parent[slot]
        self._unlink(slot)
        del self._slot_of[key]
        self._keys[slot] = None
        if parent != NONE and self._evictable(parent):
            self._policy.offer(parent)
        return key

    def pin(self, slot: int) -> None:
        self._pins[slot] += 1

    def unpin(self, slot: int) -> None:
        assert self._pins[slot]
        self._pins[slot] -= 1
        if self._evictable(slot):
            self._policy.offer(slot)

    def pinned(self, slot: int) -> bool:
        return self._pins[slot] > 0

    def evict(self) -> int | None:
        """Removes the block that may best go; its slot, or None when none may."""
        slot = self._policy.victim(self._evictable)
        if slot is not None:
            self.remove(slot)
        return slot

    def coldest_tick(self) -> int | None:
        """Last use of the block that `evict` would take."""
        return self._policy.coldest_tick(self._evictable)

    def children(self, slot: int) -> Iterator[int]:
        child = self._first_child[slot]
        while child != NONE:
            yield child
            child = self._next[child]

    def subtree(self, slots: Sequence[int]) -> list[int]:
        """The blocks in `slots` and everything under them, each once."""
        found: dict[int, None] = {}
        todo = [slot for slot in slots if self._keys[slot] is not None]
        while todo:
            slot = todo.pop()
            if slot not in found:
                found[slot] = None
                todo.extend(self.children(slot))
        return list(found)

    def stored(self) -> Iterator[tuple[bytes, int]]:
        return iter(self._slot_of.items())

    def pins_total(self) -> int:
        return sum(self._pins)

    def _evictable(self, slot: int) -> bool:
        return self._keys[slot] is not None and self._first_child[slot] == NONE and not self._pins[slot]

    def _link(self, slot: int, parent: int) -> None:
        self._parent[slot] = parent
        self._push(slot, self._first_child[parent])
        self._first_child[parent] = slot

    def _link_head(self, slot: int, parent_key: bytes) -> None:
        self._parent[slot] = NONE
        self._parent_key[slot] = parent_key
        self._push(slot, self._heads.get(parent_key, NONE))
        self._heads[parent_key] = slot

    def _push(self, slot: int, follower: int) -> None:
        self._previous[slot] = NONE
        self._next[slot] = follower
        if follower != NONE:
            self._previous[follower] = slot

    def _unlink(self, slot: int) -> None:
        before, after, parent = self._previous[slot], self._next[slot], self._parent[slot]
        if after != NONE:
            self._previous[after] = before
        if before != NONE:
            self._next[before] = after
        elif parent != NONE:
            self._first_child[parent] = after
        elif after != NONE:
            self._heads[self._parent_key[slot]] = after
        else:
            del self._heads[self._parent_key[slot]]
        self._parent_key.pop(slot, None)
        self._parent[slot] = self._previous[slot] = self._next[slot] = NONE

    def _adopt(self, slot: int, key: bytes) -> None:
        head = self._heads.get(key, NONE)
        while head != NONE:
            following = self._next[head]
            if not self._is_ancestor(head, slot):
                self._unlink(head)
                self._link(head, slot)
            head = following

    def _is_ancestor(self, ancestor: int, slot: int) -> bool:
        while slot != NONE and slot != ancestor:
            slot = self._parent[slot]
        return slot == ancestor

    def check_integrity(self) -> list[str]:
        """What is wrong, in words; empty when all is well."""
        problems: list[str] = []
        if len(self._slot_of) != sum(key is not None for key in self._keys):
            problems.append("keys and slots differ in number")
        linked = 0
        for key, slot in self._slot_of.items():
            if self._keys[slot] != key:
                problems.append(f"slot {slot} holds another key than the index says")
            if (self._parent[slot] == NONE) != (slot in self._parent_key):
                problems.append(f"slot {slot} is neither a head nor linked, or both")
            for child in self.children(slot):
                linked += 1
                if self._parent[child] != slot or self._keys[child] is None:
                    problems.append(f"slot {child} is a child of {slot} that doesn't know")
        if linked + len(self._parent_key) != len(self._slot_of):
            problems.append(f"{linked} linked and {len(self._parent_key)} heads of {len(self._slot_of)} blocks")
        return problems
