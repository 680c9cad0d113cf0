"""What all connections to one area share: bounds, epoch, counters, and how they end together."""

import asyncio
import os
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import msgspec

from common.transport.budget import Budget
from common.transport.counters import Counters
from common.transport.frames import EPOCH_BYTES, REQUEST_BYTES_MAX
from common.transport.interface import Area

if TYPE_CHECKING:
    from common.transport.session import Session


class Limits(msgspec.Struct, frozen=True):
    """Bounds of a byte-plane server.

    Attributes:
        requests_max, bytes_max: in flight on one connection; announced to the client.
        requests_total_max, bytes_total_max: in flight on all; beyond, connections wait their turn.
        connections_max: more are told FULL and closed.
        deadline_s_max: a request that asks for more gets this.
        stall_s: how long after a request's deadline its bytes may still be on the way.
        body_s: for the rest of a frame whose header has come, and for HELLO.
        drain_s: how long `close` waits for requests in flight.
    """

    requests_max: int = 32
    bytes_max: int = 2 * REQUEST_BYTES_MAX
    requests_total_max: int = 256
    bytes_total_max: int = 8 * REQUEST_BYTES_MAX
    connections_max: int = 256
    deadline_s_max: float = 120.0
    stall_s: float = 2.0
    body_s: float = 10.0
    drain_s: float = 5.0


class Reception:
    """Admits sessions to an area and drains them.

    1. Carriers `admit` each connection as it comes, and run its session here.
    2. `drain` says goodbye to all, waits for what is in flight, then cuts what is left.
    """

    def __init__(self, area: Area, limits: Limits | None = None) -> None:
        self.area = area
        self.limits = limits or Limits()
        self.epoch = os.urandom(EPOCH_BYTES)
        self.budget = Budget(self.limits.requests_total_max, self.limits.bytes_total_max)
        self.counters = Counters()
        self.copying = asyncio.Lock()  # one write after the other, so that the disk has the first while the next is copied
        self.draining = False
        self.sessions: set[Session] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def full(self) -> bool:
        return len(self.sessions) >= self.limits.connections_max

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs a connection's coroutine as a task that `drain` waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self) -> None:
        """Ends all sessions; idempotent."""
        self.draining = True
        for session in list(self.sessions):
            session.say_goodbye()
        await self._ended(self.limits.drain_s)
        for session in list(self.sessions):
            session.cut()
        await self._ended(self.limits.drain_s)

    async def _ended(self, timeout_s: float) -> None:
        sessions = [session.ended.wait() for session in self.sessions]
        tasks: set[asyncio.Future[Any]] = {asyncio.ensure_future(wait) for wait in sessions} | set(self._tasks)
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)
        for task in tasks - set(self._tasks):
            task.cancel()

    def check_integrity(self) -> None:
        """When idle: nothing in flight, nothing taken from the bounds."""
        if not self.sessions:
            assert not self.budget.requests and not self.budget.bytes, self.budget
