"""What decode may pull of the legs that prefill reads out of its stage, and what came of it.

Orders FORWARD and WHOLE: everything, at once, from the front. Order MEET: prefill owns the claims on blocks, and grants them
from each leg's end, a batch at a time (`PrefillProgress.pull_from`); what it does not grant it computes.
"""

import asyncio
from collections import deque
from collections.abc import Sequence

from common.routes import Leg, Order, Source
from services.worker.lease import Lease


class Grants:
    """Of one request. `following` is the `Batches` of its pull.

    Invariant: an item is awaited of us, in the lease, from its grant until it landed.
    """

    def __init__(self, lease: Lease, legs: Sequence[Leg], order: Order) -> None:
        self._lease = lease
        self._legs = [leg for leg in legs if leg.source is Source.STORAGE_TO_DECODE]
        self._from = [leg.last_block for leg in self._legs]  # granted so far: [this, leg.last_block)
        self._granted: deque[Sequence[int]] = deque()  # and not asked for
        self._news = asyncio.Event()
        self._closed = False
        if order is not Order.MEET:
            for leg in self._legs:
                self._grant(range(leg.first_block, leg.last_block))
            self.close()

    @property
    def blocks(self) -> int:
        """How many there are to be granted at most."""
        return sum(leg.blocks for leg in self._legs)

    def granted(self, pull_from: Sequence[int]) -> None:
        """Prefill says how far each leg may be pulled."""
        for number, (leg, first) in enumerate(zip(self._legs, pull_from, strict=False)):
            if leg.first_block <= first < self._from[number]:
                self._grant(range(first, self._from[number]))
                self._from[number] = first

    def close(self) -> None:
        """Nothing more is granted."""
        self._closed = True
        self._news.set()

    async def following(self, most: int) -> Sequence[int]:
        while not self._granted and not self._closed:
            self._news.clear()
            await self._news.wait()
        if not self._granted:
            return ()
        blocks = self._granted.popleft()
        if len(blocks) > most:
            self._granted.appendleft(blocks[most:])
        return blocks[:most]

    def landed(self, came: Sequence[int], failed: Sequence[int]) -> None:
        for block in came:
            self._lease.fill(block)
        for block in failed:
            self._lease.give_up(block)

    def _grant(self, blocks: Sequence[int]) -> None:
        self._lease.await_own(blocks)
        if blocks:
            self._granted.append(blocks)
        self._news.set()
