"""A lease on slots of a stage: who may read and write which of their bytes, and which have come.

A SHARE lease is one whose items the owner and the holder fill between them, each reading what the other did:

    item        a read           a write
    open        waits            fills it
    awaited     waits            OK, dropped: the owner fills it (`await_own`)
    filled      OK               OK, dropped
    given up    MISSING          fills it (`give_up`: the owner could not)
"""

import asyncio
from collections.abc import Iterable, Sequence
from enum import Enum

from common.errors import LeaseRejected
from common.transport.interface import LeaseToken, Part, PartStatus
from services.worker.coverage import Coverage


class Right(Enum):
    READ = "read"
    WRITE = "write"
    SHARE = "share"


class Lease:
    """Item i is `slots[i]`, its first `lengths[i]` bytes. Made by `Stage.grant`."""

    def __init__(
        self, token: LeaseToken, right: Right, slots: Sequence[int], lengths: Sequence[int], expires_at_s: float
    ) -> None:
        self.token, self.right, self.expires_at_s = token, right, expires_at_s
        self.slots, self.lengths = tuple(slots), tuple(lengths)
        self.live = True
        self.coverage = [Coverage() for _ in slots]
        self.awaited: set[int] = set()
        self.given_up: set[int] = set()
        self._changed = [asyncio.Event() for _ in slots]  # set once: filled, or the lease ended

    def is_filled(self, item: int) -> bool:
        return self.coverage[item].contains(0, self.lengths[item])

    @property
    def filled_count(self) -> int:
        return sum(map(self.is_filled, range(len(self.slots))))

    async def filled(self, item: int) -> None:
        """Returns when the item is filled. Raises `LeaseRejected` when the lease ends before."""
        await self._changed[item].wait()
        if not self.is_filled(item):
            raise LeaseRejected(f"lease ended before item {item} was filled: {self.coverage[item]} of {self.lengths[item]} bytes")

    def came(self, part: Part) -> None:
        """The holder has filled a part of an item."""
        self.coverage[part.item].add(part.offset, part.offset + part.length)
        if self.is_filled(part.item):
            self._settled(part.item)

    def end(self) -> None:
        """Nothing more comes: who waits is told. Made by `Stage.release`."""
        self.live = False
        for changed in self._changed:
            changed.set()

    # What the owner does with the items of a SHARE lease. After the lease's end nothing of this matters.

    def await_own(self, items: Iterable[int]) -> None:
        """The owner is going to fill them, also those of which the holder has filled a part."""
        assert self.right is Right.SHARE
        self.awaited.update(item for item in items if not self.is_filled(item))

    def fill(self, item: int) -> None:
        """The owner has filled an item."""
        self.coverage[item].add(0, self.lengths[item])
        self._settled(item)

    def give_up(self, item: int) -> None:
        """The owner can't fill it: the holder may, unless what it had under way has filled it by now."""
        if not self.is_filled(item):
            self.given_up.add(item)
            self._settled(item)

    def _settled(self, item: int) -> None:
        self.awaited.discard(item)
        self._changed[item].set()

    async def readable(self, part: Part, until: float) -> PartStatus:
        """OK when the part can be read; EXPIRED when it can't by `until` (of the event loop's clock)."""
        if self.right is Right.READ or self.coverage[part.item].contains(part.offset, part.offset + part.length):
            return PartStatus.OK
        try:
            async with asyncio.timeout_at(until):
                await self._changed[part.item].wait()
        except TimeoutError:
            return PartStatus.EXPIRED
        if not self.live:
            return PartStatus.REJECTED
        return PartStatus.OK if self.is_filled(part.item) else PartStatus.MISSING

    def check_integrity(self) -> None:
        assert not self.awaited & self.given_up, self
        assert not any(self.is_filled(item) for item in self.awaited), self

    def __repr__(self) -> str:
        return f"Lease({self.right.value}, slots={self.slots}, filled={self.filled_count}, live={self.live})"
