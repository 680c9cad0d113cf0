"""A bound on requests and bytes in flight, first come, first served."""

import asyncio
from collections import deque
from contextlib import suppress


class Budget:
    """`acquire` waits until both bounds hold; a request larger than the bound alone is let through alone."""

    def __init__(self, requests_max: int, bytes_max: int) -> None:
        self.requests_max, self.bytes_max = requests_max, bytes_max
        self.requests, self.bytes = 0, 0
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def acquire(self, size: int) -> None:
        """Takes one request of `size` bytes. Cancelling gives it back."""
        if not self._queue and self._fits(size):
            self._take(size)
            return
        turn = asyncio.get_running_loop().create_future()
        self._queue.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(size)
            else:
                with suppress(ValueError):  # passed over already
                    self._queue.remove((size, turn))
                self._let_in()
            raise

    def release(self, size: int) -> None:
        self.requests -= 1
        self.bytes -= size
        assert self.requests >= 0 and self.bytes >= 0
        self._let_in()

    def _fits(self, size: int) -> bool:
        return not self.requests or (self.requests < self.requests_max and self.bytes + size <= self.bytes_max)

    def _take(self, size: int) -> None:
        self.requests += 1
        self.bytes += size

    def _let_in(self) -> None:
        while self._queue and (self._queue[0][1].cancelled() or self._fits(self._queue[0][0])):
            size, turn = self._queue.popleft()
            if not turn.cancelled():
                self._take(size)
                turn.set_result(None)

    def __repr__(self) -> str:
        return f"Budget({self.requests}/{self.requests_max} requests, {self.bytes}/{self.bytes_max} bytes, {len(self._queue)} waiting)"
