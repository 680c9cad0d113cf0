"""A few stage slots set aside for one purpose, lent a few at a time.

Unlike a reservation out of the stage at large, waiting for these is fine: they come back as soon
as the bytes in them have been sent.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager


class SlotPool:
    """Invariant: every slot is either free or lent to exactly one holder."""

    def __init__(self, slots: Sequence[int]) -> None:
        self._free = list(slots)
        self._returned = asyncio.Condition()
        self.size = len(slots)

    @asynccontextmanager
    async def lend(self, count: int) -> AsyncIterator[list[int]]:
        """`count` slots for the length of the block; waits for them. `count` is at most `size`."""
        assert 0 < count <= self.size, (count, self.size)
        async with self._returned:
            await self._returned.wait_for(lambda: len(self._free) >= count)
            slots = [self._free.pop() for _ in range(count)]
        try:
            yield slots
        finally:
            self._free += slots  # without the lock: no await, so a cancelled holder gives back too
            asyncio.get_running_loop().create_task(self._announce())

    async def _announce(self) -> None:
        async with self._returned:
            self._returned.notify_all()

    def check_integrity(self) -> None:
        """When nothing is lent, everything is here once."""
        assert len(set(self._free)) == len(self._free) <= self.size
