"""The store's time in seconds since 1970, by which blocks expire: it never goes back, and within a run never jumps.

It starts at the wall clock's time, or at the latest time that anything on disk tells of if that is later, and then
follows the monotonic clock. So a wall clock that is set back, while the store runs or between two runs, neither
expires a block early nor keeps one for longer than its time; one that is set ahead matters at the next start only,
where it can't be told from a long pause.
"""

from collections.abc import Callable


class StoreTime:
    """`clock` is monotonic, `wall` the time of day; both in seconds."""

    def __init__(self, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        self._clock = clock
        self._ahead_s = wall() - clock()

    def __call__(self) -> int:
        return int(self._clock() + self._ahead_s)

    def not_before(self, time_s: int) -> None:
        """At start: the disk tells of this time, so it is past."""
        self._ahead_s = max(self._ahead_s, time_s - self._clock())
