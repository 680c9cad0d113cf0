"""Turns at a peer: a few transfers at once, in the order in which their requests came."""

import asyncio
import heapq
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count


class Turns:
    """At most `at_once` turns are held; of those who wait, the one with the lowest number gets the next.

    Requests that share a link fairly are all there when the last one is. In turns, the first is there early and the last no
    later, and what a queue says of a wait is true.

    A peer that has stalled must not cost all of them its patience one after another: who waited for a turn while somebody
    found out is told (`turn`'s value is False), and gives up too.
    """

    def __init__(self, at_once: int) -> None:
        self._free = at_once
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []  # a heap; cancelled ones stay until they are met
        self._serial = count()
        self._stalled_at = -1.0

    def stalled(self) -> None:
        """A transfer waited for the peer as long as one may."""
        self._stalled_at = time.monotonic()

    @asynccontextmanager
    async def turn(self, number: int) -> AsyncIterator[bool]:
        """Whether the peer is worth asking, as far as those know who were before."""
        asked_at = time.monotonic()
        if self._free:
            self._free -= 1
        else:
            await self._wait(number)
        try:
            yield self._stalled_at < asked_at
        finally:
            self._pass_on()

    async def _wait(self, number: int) -> None:
        called = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (number, next(self._serial), called))
        try:
            await called
        except asyncio.CancelledError:
            if not called.cancelled():  # called and cancelled at once
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while self._waiting:
            _, _, called = heapq.heappop(self._waiting)
            if not called.done():
                called.set_result(None)
                return
        self._free += 1
