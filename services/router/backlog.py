"""What a worker's link or engine has still to do, as the router knows it between two reports.

A fluid: it drains at the rate that was measured, and what the router sends there is poured in at once. A
report replaces the level, but for what was sent so shortly before it arrived that it can't tell of it.
"""

from collections import deque

REPORT_LAG_S = 0.1  # a report is at most this old when it comes: one hop over gRPC or NATS
POURS_MAX = 1024  # remembered for a late report; the oldest are forgotten first


class Backlog:
    """Bytes or tokens. `now` is monotonic and never goes back."""

    def __init__(self) -> None:
        self.per_s = 0.0  # measured; 0: not known, nothing drains
        self.used_at = 0.0  # of the last pour
        self._level = 0.0
        self._at = 0.0
        self._pours: deque[tuple[float, float]] = deque(maxlen=POURS_MAX)

    def __repr__(self) -> str:
        return f"<Backlog {self._level:.0f} at {self.per_s:.0f}/s>"

    def pour(self, amount: float, now: float) -> None:
        """So much was just sent there."""
        if amount > 0:
            self._level = self.left(now) + amount
            self._at = self.used_at = now
            self._pours.append((now, amount))

    def report(self, amount: float, per_s: float, now: float) -> None:
        """The worker says what it has to do, and how fast it is."""
        while self._pours and self._pours[0][0] < now - REPORT_LAG_S:
            self._pours.popleft()
        self.per_s = per_s
        self._level = amount + sum(poured for _, poured in self._pours)
        self._at = now

    def left(self, now: float) -> float:
        return max(0.0, self._level - self.per_s * (now - self._at))
