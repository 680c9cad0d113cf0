"""Operations submitted together, and what became of each."""

import asyncio
from typing import Generic, TypeVar

T = TypeVar("T")


class NotStarted(Exception):
    """The operation was never made: its deadline passed in the queue, or nobody waits any more."""


class Batch(Generic[T]):
    """`done` resolves, on the loop, when no operation is queued or running: one result each, in order.

    An exception of an operation is its result, never raised. Operations are started in order, settled in any.
    """

    def __init__(self, count: int, loop: asyncio.AbstractEventLoop) -> None:
        self.done: asyncio.Future[list[T | BaseException]] = loop.create_future()
        self.loop = loop
        self.timer: asyncio.TimerHandle | None = None
        self._results: list[T | BaseException | None] = [None] * count
        self.next = 0  # first operation that was not started
        self._running = 0

    @property
    def left(self) -> int:
        """Operations that were not started."""
        return len(self._results) - self.next

    @property
    def settled(self) -> bool:
        return not self.left and not self._running

    def start(self) -> int:
        """The index of the next operation, which runs now."""
        self.next += 1
        self._running += 1
        return self.next - 1

    def settle(self, index: int, result: T | BaseException) -> None:
        self._results[index] = result
        self._running -= 1

    def give_up(self) -> int:
        """What was not started won't be; how many that are."""
        left = self.left
        for index in range(self.next, len(self._results)):
            self._results[index] = NotStarted()
        self.next = len(self._results)
        return left

    def finish(self) -> None:
        """On the loop, when settled."""
        assert self.settled
        if self.timer is not None:
            self.timer.cancel()
        if not self.done.done():
            self.done.set_result([result for result in self._results if result is not None])
