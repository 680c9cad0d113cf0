"""Reading the blocks after the one that is asked for, so that the disk works while a lone reader checks what it got.

1. A reader takes the blocks of a lease one by one, in order: from the second on, the next ones are read
   into buffers of ours, if their places are known already.
2. Asked for, a block is taken: checked by then, or when it comes. It costs its reader a copy.
3. When it has come from the disk and at most one more is ahead of its reader, the next RUN begin: together, as some disks
   tell of several only when the last of them is there, and before any check, so that the disk has work meanwhile.
4. What nobody takes within IDLE_S is dropped; its buffer is free again when the disk has let go of it.

At most RUN + 1 blocks are ahead of each lease's reader, and BYTES_MAX in all.
"""

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial

import msgspec

from common.disk.buffers import BufferPool
from common.disk.engine import Engine
from common.disk.pages import pages
from common.errors import Overloaded
from common.transport.extent_read import ExtentRead
from common.transport.interface import Extent, LeaseToken, Part
from common.transport.lease_places import IDLE_S, LeasePlaces, Places

BYTES_MAX = 32 << 20
LEASES_MAX = 64  # whose last block is remembered
RUN = 2  # blocks that are asked of the disk together


class Flight:
    """A block that was asked of the disk before its reader asked for it. `end` it once."""

    def __init__(
        self, engine: Engine, part: Part, extent: Extent, places: Places, buffers: BufferPool, buffer: memoryview
    ) -> None:
        """Raises `Overloaded`."""
        self.part = part
        self.view = buffer[: part.length]  # the block's bytes when `done` says that they are right
        self._places, self._buffers, self._buffer = places, buffers, buffer
        self._thread = threading.get_ident()
        self._delivered = False
        self._then: Callable[[], None] | None = None
        transfer = ExtentRead(extent, self.view, direct=True).transfer()
        self._check = transfer.check
        self.done = engine.submit([msgspec.structs.replace(transfer, check=self._checked)]).done
        self.done.add_done_callback(self._deliver)

    def then(self, call: Callable[[], None]) -> None:
        """Calls when the disk has delivered: before the check, where that is on the loop."""
        if self._delivered:
            call()
        else:
            self._then = call

    def end(self) -> None:
        """The view isn't used any more."""
        self.done.add_done_callback(self._settle)

    def _checked(self) -> int:
        assert self._check is not None
        if threading.get_ident() == self._thread:
            self._deliver()
        return self._check()

    def _deliver(self, _: object = None) -> None:
        self._delivered = True
        call, self._then = self._then, None
        if call is not None:
            call()

    def _settle(self, _: object) -> None:
        self._places.close()
        self._buffers.give_back(self._buffer)


class ReadAhead:
    """Of one connection. `close` when done."""

    def __init__(self, places: LeasePlaces, engine: Engine) -> None:
        self.buffers = BufferPool(BYTES_MAX)
        self._places, self._engine = places, engine
        self._last: OrderedDict[LeaseToken, Part] = OrderedDict()
        self._flights: dict[LeaseToken, deque[Flight]] = {}  # in the order of their blocks; never empty
        self._timers: dict[LeaseToken, asyncio.TimerHandle] = {}

    def take(self, token: LeaseToken, part: Part) -> Flight | None:
        """A lone reader asks for `part`: its flight, the caller's now, if it is there. Then the next ones start."""
        flights = self._flights.get(token)
        if flights is None or flights[0].part != part:
            self._drop(token)
            return None
        flight = flights.popleft()
        if not flights:
            del self._flights[token]
        self._remember(token, part)
        flight.then(partial(self._go_on, token, part))
        return flight

    def follow(self, token: LeaseToken, part: Part) -> None:
        """A lone reader has got `part`, which was not read ahead: if that was its second in order, the next ones are."""
        last = self._remember(token, part)
        if last is not None and _after(last) == part:
            self._go_on(token, part)

    def close(self) -> None:
        """Idempotent."""
        for token in list(self._flights):
            self._drop(token)

    def _remember(self, token: LeaseToken, part: Part) -> Part | None:
        """What the lease's reader asked for last; the one before it."""
        before = self._last.pop(token, None)
        self._last[token] = part
        if len(self._last) > LEASES_MAX:
            self._last.popitem(last=False)
        return before

    def _go_on(self, token: LeaseToken, part: Part) -> None:
        """The reader has come to `part`."""
        flights = self._flights.get(token, deque())
        if len(flights) > 1:
            return
        for _ in range(RUN):
            part = _after(flights[-1].part if flights else part)
            flight = self._start(token, part)
            if flight is None:
                break
            flights.append(flight)
        if flights:
            self._flights[token] = flights
            self._watch(token)

    def _start(self, token: LeaseToken, part: Part) -> Flight | None:
        """None: its place is not known, there is no buffer, or the disk has too much to do."""
        places = self._places.known(token, [part])
        if places is None:
            return None
        (extent,) = places.extents
        buffer = self.buffers.take(pages(part.length))
        if buffer is not None and isinstance(extent, Extent):
            try:
                return Flight(self._engine, part, extent, places, self.buffers, buffer)
            except Overloaded:
                self.buffers.give_back(buffer)
        places.close()
        return None

    def _watch(self, token: LeaseToken) -> None:
        timer = self._timers.pop(token, None)
        if timer is not None:
            timer.cancel()
        self._timers[token] = asyncio.get_running_loop().call_later(IDLE_S, self._drop, token)

    def _drop(self, token: LeaseToken) -> None:
        """Idempotent."""
        timer = self._timers.pop(token, None)
        if timer is not None:
            timer.cancel()
        for flight in self._flights.pop(token, ()):
            flight.end()


def _after(part: Part) -> Part:
    return Part(part.item + 1, 0, part.length)
