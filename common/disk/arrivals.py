"""Transfers that have landed: checked on the loop, about a MiB at a time, with a look at the disk between two checks."""

import asyncio
from collections import deque
from collections.abc import Callable

from common.disk.flights import Flight

TURN_BYTES = 1 << 20  # of checks before the loop gets its turn: about 100 us


class Arrivals:
    """What an engine's disk is done with, until its batch knows. Belongs to the event loop."""

    def __init__(self, look: Callable[[], None]) -> None:
        """`look` is called before each check: what has landed meanwhile makes room, so that the disk isn't idle."""
        self._look = look
        self._waiting: deque[tuple[Flight, OSError | None]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, flight: Flight, error: OSError | None) -> None:
        """The flight ended; `error`: not well."""
        self._waiting.append((flight, error))

    def check(self) -> None:
        """Settles what is here; the rest of a long queue in the loop's next turn."""
        checked = 0
        while self._waiting:
            if checked >= TURN_BYTES:
                asyncio.get_running_loop().call_soon(self.check)
                return
            self._look()
            flight, error = self._waiting.popleft()
            outcome: int | BaseException = flight.done if error is None else error
            if error is None and flight.transfer.check is not None:
                checked += flight.done
                try:
                    outcome = flight.transfer.check()
                except Exception as raised:
                    outcome = raised
            flight.batch.settle(flight.index, outcome)
            if flight.batch.settled:
                flight.batch.finish()
