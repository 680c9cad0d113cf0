"""What a worker's link or engine has still to do, as the router knows it between two reports.

A fluid: it drains at the rate that was measured, and what the router sends there is poured in at once. A
report replaces the level, but for what was sent so shortly before it arrived that it can't tell of it.
Where no rate is known nothing drains, and a pour leaves when its request's KV is there.
"""

from collections import deque

REPORT_LAG_S = 0.1  # a report is at most this old when it comes: one hop over gRPC or NATS
POURS_MAX = 1024  # remembered for a late report; the oldest are forgotten first


class Pour:
    """What one request added."""

    def __init__(self, backlog: "Backlog", amount: float, at: float) -> None:
        self._backlog = backlog
        self.amount = amount
        self.at = at

    def done(self) -> None:
        """All of it has been moved. Idempotent."""
        self._backlog.take_out(self)
        self.amount = 0.0


class Backlog:
    """Bytes or tokens. Times are monotonic seconds and never go back."""

    def __init__(self) -> None:
        self.per_s = 0.0  # measured; 0: not known
        self.used_at = 0.0  # of the last pour
        self.moved = 0.0  # by requests that are done
        self._level = 0.0
        self._at = 0.0
        self._reported_at = 0.0
        self._pours: deque[Pour] = deque(maxlen=POURS_MAX)

    def __repr__(self) -> str:
        return f"<Backlog {self._level:.0f} at {self.per_s:.0f}/s>"

    def pour(self, amount: float, now: float) -> Pour:
        """So much was just sent there."""
        pour = Pour(self, amount, now)
        if amount > 0:
            self._level = self.left(now) + amount
            self._at = self.used_at = now
            self._pours.append(pour)
        return pour

    def report(self, amount: float, per_s: float, now: float) -> None:
        """The worker says what it has to do, and how fast it is if it has measured that."""
        while self._pours and self._pours[0].at < now - REPORT_LAG_S:
            self._pours.popleft()
        self.per_s = per_s or self.per_s
        self._level = amount + sum(pour.amount for pour in self._pours)
        self._at = self._reported_at = now

    def measured(self, amount: float, seconds: float) -> None:
        """What one request saw, until the worker reports a rate."""
        if not self.per_s and amount and seconds > 0:
            self.per_s = amount / seconds

    def take_out(self, pour: Pour) -> None:
        """A pour is done. At a known rate the level has drained already."""
        self.moved += pour.amount
        if self.per_s:
            return
        if pour.at > self._reported_at or pour in self._pours:  # the latter: on top of a report that can't tell of it
            self._level = max(0.0, self._level - pour.amount)

    def left(self, now: float) -> float:
        return max(0.0, self._level - self.per_s * (now - self._at))
