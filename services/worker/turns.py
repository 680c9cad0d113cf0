"""Turns at a link: a few transfers at once, in the order in which their requests came."""

import asyncio
import heapq
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count


class Turns:
    """At most `at_once` turns are held; of those who wait, the one with the lowest number gets the next.

    Requests that share a link fairly are all there when the last one is. In turns, the first is there early and the last no
    later, and what a queue says of a wait is true.
    """

    def __init__(self, at_once: int) -> None:
        self._free = at_once
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []  # a heap; cancelled ones stay until they are met
        self._serial = count()

    @asynccontextmanager
    async def turn(self, number: int) -> AsyncIterator[None]:
        if self._free:
            self._free -= 1
        else:
            await self._wait(number)
        try:
            yield
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
