"""What a worker's link or engine has still to do, as the router knows it between two reports.

A fluid: it drains at the rate that was measured, and what the router sends there is poured in at once. A
report replaces the level, but for what was sent so shortly before it arrived that it can't tell of it.
Whatever report and rate say, no more is left than the pours whose KV is not there yet, and what the last report
had beyond ours: a request that ended takes all of its own with it.
"""

from collections import deque

REPORT_LAG_S = 0.1  # a report is at most this old when it comes: one hop over gRPC or NATS
POURS_MAX = 1024  # remembered for a late report; the oldest are forgotten first


class Pour:
    """What one request added."""

    def __init__(self, backlog: "Backlog", amount: float, at: float, shared: bool) -> None:
        self._backlog = backlog
        self.amount = amount
        self.at = at
        self.shared = shared

    def done(self) -> None:
        """All of it has been moved. Idempotent."""
        self._backlog.take_out(self)
        self.amount, self.shared = 0.0, False


class Backlog:
    """Bytes or tokens. Times are monotonic seconds and never go back."""

    def __init__(self) -> None:
        self.per_s = 0.0  # measured; 0: not known
        self.used_at = 0.0  # of the last pour
        self.moved = 0.0  # by requests that are done
        self._level = 0.0
        self._at = 0.0
        self._under_way = 0.0  # of pours that aren't done
        self._shared = 0  # of these, pours that are shared
        self._others = 0.0  # of the last report, what can't be ours
        self._pours: deque[Pour] = deque(maxlen=POURS_MAX)

    def __repr__(self) -> str:
        return f"<Backlog {self._level:.0f} at {self.per_s:.0f}/s>"

    def pour(self, amount: float, now: float, *, shared: bool = False) -> Pour:
        """So much was just sent there. `shared`: with another link or engine, in parts that only they will know; until one of both has it,
        the worker reports it whole."""
        pour = Pour(self, amount, now, shared and amount > 0)
        if amount > 0:
            self._shared += pour.shared
            self._level = self.left(now) + amount
            self._under_way += amount
            self._at = self.used_at = now
            self._pours.append(pour)
        return pour

    def report(self, amount: float, per_s: float, now: float) -> None:
        """The worker says what it has to do, and how fast it is if it has measured that."""
        while self._pours and self._pours[0].at < now - REPORT_LAG_S:
            self._pours.popleft()
        self.per_s = per_s or self.per_s
        recent = sum(pour.amount for pour in self._pours)
        self._level = amount + recent
        self._others = 0.0 if self._shared else max(0.0, self._level - self._under_way)
        self._at = now

    def measured(self, amount: float, seconds: float) -> None:
        """What one request saw, until the worker reports a rate."""
        if not self.per_s and amount and seconds > 0:
            self.per_s = amount / seconds

    @property
    def recent(self) -> list[Pour]:
        """What was poured in since the last report, or so shortly before that it can't tell of it, and isn't done."""
        return [pour for pour in self._pours if pour.amount]

    def take_out(self, pour: Pour) -> None:
        """A pour is done."""
        self.moved += pour.amount
        self._under_way = max(0.0, self._under_way - pour.amount)
        self._shared -= pour.shared

    def left(self, now: float) -> float:
        drained = self._level - self.per_s * (now - self._at)
        return max(0.0, min(drained, self._others + self._under_way))
