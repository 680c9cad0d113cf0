"""A lease on slots of a stage: who may read and write which of their bytes, and which have come.

A SHARE lease is one whose items the owner and the holder fill between them, each reading what the other did:

    item        a read           a write
    open        waits            fills it
    awaited     waits            OK, dropped: the owner fills it (`await_own`)
    filled      OK               OK, dropped
    given up    MISSING          fills it (`give_up`: the owner could not)
"""

import asyncio
from collections.abc import Sequence
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

    def wake(self, item: int) -> None:
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
