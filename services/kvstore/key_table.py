"""Slots by block key: open addressing over one array, with the keys of all slots in another.

An entry is 64 bits: the key's tag in the upper half, slot + 1 in the lower, 0 when empty. An entry lies
at its tag's home, `tag * places >> 32`, or in the next places without a gap (linear probing, around the
end). Removing an entry moves those behind it up, so there are no tombstones.

A tag is the upper half of a sum of the key's four words, each times a secret odd number: keys are
digests, so one word would do, but a peer may send any 32 bytes and must not be able to choose places.

A chain is looked up all keys at once: every step of the probing is a handful of numpy calls over those
keys that are not settled yet.
"""

import secrets
import struct

import numpy as np
import numpy.typing as npt

from common.blocks import KEY_BYTES
from services.kvstore.column import NONE, Column, Flags, Slots

Words = npt.NDArray[np.uint64]  # [key, 4]
PLACES_PER_SLOT = 1.6  # a key is found in 1.8 steps on average, and its absence in 3.9
_WORDS = struct.Struct("<4Q")
FEW_KEYS = 24  # one by one is quicker for what is left
_U32 = 0xFFFF_FFFF
_LOWER = np.uint64(_U32)
_HALF = np.uint64(32)


def words(packed: bytes | memoryview) -> Words:
    """Keys laid end to end, as the table takes them."""
    return np.frombuffer(packed, "<u8").reshape(-1, KEY_BYTES // 8)


class KeyTable:
    """Which slot holds which key; one slot per key at most."""

    def __init__(self, slots_expected: int = 0) -> None:
        """Beyond the slots expected the table still grows, by entering everything anew."""
        self._secret = tuple(secrets.randbits(64) | 1 for _ in range(4))
        self._secrets = np.array(self._secret, np.uint64)
        self._keys = Column(np.uint64)
        self._key_bytes = memoryview(b"")
        self._entries = Column(np.uint64)
        self._places = 0
        self._count = 0
        self._reserve(slots_expected)

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._entries.nbytes

    def grow(self, slots: int) -> None:
        """Slot numbers up to `slots` may be used."""
        if slots * 4 <= len(self._keys.array):
            return
        self._key_bytes.release()
        self._keys.grow(slots * 4)
        self._key_bytes = self._keys.view.cast("B")
        if slots * PLACES_PER_SLOT > self._places:
            held = self.slots()
            self._reserve(slots + slots // 4)
            self._place(held)

    def key(self, slot: int) -> bytes:
        """What was last put into the slot."""
        return bytes(self._key_bytes[slot * KEY_BYTES : (slot + 1) * KEY_BYTES])

    def keys(self, slots: Slots) -> Words:
        return self._rows[slots]

    def slots(self) -> Slots:
        """All slots that hold a key, in no order."""
        entries = self._entries.array
        slots: Slots = (entries[entries != 0] & _LOWER).astype(np.int32) - 1
        return slots

    def find(self, key: bytes) -> int | None:
        if not self._count or len(key) != KEY_BYTES:
            return None
        return self._find(self._tag(key), key)

    def _find(self, tag: int, key: bytes) -> int | None:
        entries = self._entries.view
        at = tag * self._places >> 32
        while entry := entries[at]:
            if entry >> 32 == tag and self._holds(slot := (entry & _U32) - 1, key):
                return slot
            at = at + 1 if at + 1 < self._places else 0
        return None

    def find_all(self, sought: Words) -> Slots:
        """The slot of each key, NONE where there is none."""
        found = np.full(len(sought), NONE, np.int32)
        if not self._count:
            return found
        entries, places = self._entries.array, self._places
        tags = self._tags(sought)
        at = (tags * np.uint64(places) >> _HALF).astype(np.int64)
        todo = np.arange(len(sought))
        while len(todo) > FEW_KEYS:
            entry = entries.take(at)
            same = np.flatnonzero((entry >> _HALF == tags) & (entry != 0))
            slots = (entry.take(same) & _LOWER).astype(np.int32) - 1
            right = self._hold(slots, sought.take(todo.take(same), axis=0))
            found[todo[same[right]]] = slots[right]
            going = entry != 0
            going[same[right]] = False
            todo, tags, at = todo[going], tags[going], at[going] + 1
            at[at == places] = 0
        packed = sought[todo].tobytes()
        for i, (place, tag) in enumerate(zip(todo.tolist(), tags.tolist(), strict=True)):
            slot = self._find(tag, packed[i * KEY_BYTES : (i + 1) * KEY_BYTES])
            if slot is not None:
                found[place] = slot
        return found

    def put_many(self, slots: Slots, keys: Words) -> None:
        """Keys that the table doesn't have, all different, are now in slots that hold none."""
        self._rows[slots] = keys
        for slot, tag in zip(slots.tolist(), self._tags(keys).tolist(), strict=True):
            self._enter(tag, slot)

    def put_all(self, slots: Slots, keys: Words) -> None:
        """`put_many` of so many that everything is entered anew."""
        held = self.slots()
        self._rows[slots] = keys
        self._entries.array[:] = 0
        self._count = 0
        self._place(np.concatenate([held, slots]))

    def remove(self, slot: int) -> None:
        """The slot, which holds a key, holds none."""
        self._leave(self._tag(self.key(slot)), slot)

    def remove_many(self, slots: Slots) -> None:
        """`remove` of some, all different."""
        for slot, tag in zip(slots.tolist(), self._tags(self._rows[slots]).tolist(), strict=True):
            self._leave(tag, slot)

    def _leave(self, tag: int, slot: int) -> None:
        entries, places = self._entries.view, self._places
        wanted = tag << 32 | slot + 1
        hole = tag * places >> 32
        while entries[hole] != wanted:
            assert entries[hole], f"slot {slot} is not in the table"
            hole = hole + 1 if hole + 1 < places else 0
        at = hole
        while True:
            at = at + 1 if at + 1 < places else 0
            entry = entries[at]
            if not entry:
                break
            home = (entry >> 32) * places >> 32
            if (at - home) % places >= (at - hole) % places:
                entries[hole] = entry
                hole = at
        entries[hole] = 0
        self._count -= 1

    @property
    def _rows(self) -> Words:
        return self._keys.array.reshape(-1, 4)

    def _reserve(self, slots: int) -> None:
        self._places = round(slots * PLACES_PER_SLOT)
        self._entries = Column(np.uint64)
        self._entries.grow(self._places)
        self._count = 0

    def _hold(self, slots: Slots, keys: Words) -> Flags:
        equal = self._rows.take(slots, axis=0) == keys
        all_four: Flags = equal.view(np.uint32).reshape(-1) == 0x01010101  # `all(axis=1)` takes ten times as long
        return all_four

    def _holds(self, slot: int, key: bytes) -> bool:
        return self._key_bytes[slot * KEY_BYTES : (slot + 1) * KEY_BYTES] == key

    def _tag(self, key: bytes) -> int:
        a, b, c, d = _WORDS.unpack(key)
        w, x, y, z = self._secret
        tag: int = (a * w + b * x + c * y + d * z >> 32) & _U32
        return tag

    def _tags(self, keys: Words) -> Words:
        tags: Words = (keys @ self._secrets) >> _HALF
        return tags

    def _enter(self, tag: int, slot: int) -> None:
        entries = self._entries.view
        at = tag * self._places >> 32
        while entry := entries[at]:
            assert entry >> 32 != tag or not self._holds((entry & _U32) - 1, self.key(slot)), (
                f"slot {slot}: the key is there already"
            )
            at = at + 1 if at + 1 < self._places else 0
        entries[at] = tag << 32 | slot + 1
        self._count += 1

    def _place(self, slots: Slots) -> None:
        """Enters many slots into an empty table: in order of home, each at its home or behind the one before."""
        tags = self._tags(self._rows[slots])
        order = np.argsort(tags)
        tags, slots = tags[order], slots[order]
        home = ((tags * np.uint64(self._places)) >> _HALF).astype(np.int64)
        rank = np.arange(len(slots))
        at = rank + np.maximum.accumulate(home - rank) if len(slots) else rank
        inside = at < self._places
        self._entries.array[at[inside]] = tags[inside] << _HALF | (slots[inside] + 1).astype(np.uint64)
        self._count = int(inside.sum())
        for tag, slot in zip(tags[~inside].tolist(), slots[~inside].tolist(), strict=True):
            self._enter(tag, slot)

    def check_integrity(self) -> list[str]:
        """Every entry can be found by its key; what is wrong, in words."""
        slots = self.slots()
        problems = [] if len(slots) == self._count else [f"{len(slots)} entries, {self._count} counted"]
        lost = int((self.find_all(self._rows[slots]) != slots).sum())
        return [*problems, f"{lost} entries are not found by their keys"] if lost else problems
