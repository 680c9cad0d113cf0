"""Until when the block in each slot is kept, and whose it is.

Times are the store's, in seconds since 1970; 0 is never. Tenants are numbers (tenants.py).
"""

import math

import numpy as np

from services.kvstore.column import Column, Flags, Numbers, Slots


class BlockTerms:
    """By slot number. `next_expiry_s`: nothing expires before."""

    def __init__(self) -> None:
        self.next_expiry_s: float = math.inf
        self._expires_s = Column(np.uint32)
        self._tenants = Column(np.uint16)

    @property
    def nbytes(self) -> int:
        return self._expires_s.nbytes + self._tenants.nbytes

    def grow(self, slots: int) -> None:
        self._expires_s.grow(slots)
        self._tenants.grow(slots)

    def put_many(self, slots: Slots, tenant: int, expires_s: int) -> None:
        """The terms of blocks that came together."""
        self._tenants.array[slots] = tenant
        self._expires_s.array[slots] = expires_s
        if expires_s:
            self.next_expiry_s = min(self.next_expiry_s, expires_s)

    def put_all(self, slots: Slots, tenants: Numbers | int, expires_s: Numbers) -> None:
        """The terms of many."""
        self._tenants.array[slots] = tenants
        self._expires_s.array[slots] = expires_s
        if expires_s.any():
            self.next_expiry_s = 0

    def tenant(self, slot: int) -> int:
        """Whose the block is, or was that was there last."""
        return self._tenants.view[slot]

    def tenants(self, slots: Slots) -> Numbers:
        return self._tenants.array[slots]

    def of_tenant(self, tenant: int) -> Flags:
        """By slot."""
        flags: Flags = self._tenants.array == tenant
        return flags

    def expiries_s(self, slots: Slots) -> Numbers:
        return self._expires_s.array[slots]

    def unexpired(self, prefix: Slots, now_s: int) -> Slots:
        """The part of a prefix before its first expired block."""
        if now_s < self.next_expiry_s:
            return prefix
        expires_s = self._expires_s.array[prefix]
        gone = (expires_s != 0) & (expires_s <= now_s)
        return prefix[: int(gone.argmax())] if gone.any() else prefix

    def keep_until(self, slot: int, expires_s: int) -> None:
        """The block was offered again, to be kept until then (0: for ever): it stays as long as anyone asked for."""
        held_s = self._expires_s.view[slot]
        if held_s and (expires_s > held_s or not expires_s):
            self._set_expiry(slot, expires_s)

    def expired(self, held: Flags, now_s: int) -> list[int]:
        """The slots, of those that hold a block, whose time is over."""
        expires_s = self._expires_s.array
        return np.flatnonzero(held & (expires_s != 0) & (expires_s <= now_s)).tolist()

    def find_next_expiry(self, held: Flags) -> None:
        """After blocks went: when the next may."""
        left = self._expires_s.array[held & (self._expires_s.array != 0)]
        self.next_expiry_s = float(left.min()) if len(left) else math.inf

    def _set_expiry(self, slot: int, expires_s: int) -> None:
        self._expires_s.view[slot] = expires_s
        if expires_s:
            self.next_expiry_s = min(self.next_expiry_s, expires_s)
