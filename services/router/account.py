"""What one worker has to do, as the router knows it: its last report, and what the router sent there and saw end since.

Life of a `Stay`, a request at one worker: sent -> (grown)* -> loaded -> ended; `loaded` and `ended` may come at any time, and
again. Invariant: an account counts a stay as live from `sent` to `ended`.
"""

from collections.abc import Mapping

from common.membership import MemberLoad
from common.runs import QueuedRun
from services.router.backlog import Backlog, Pour
from services.router.policy.estimates import Demand
from services.router.run_queue import RunQueue

LINK_FIELDS = {"storage": "read", "peer_read": "peer_read", "peer_write": "peer_write"}  # of a MemberLoad: *_bytes_per_s, ...


class Account:
    """Of one worker. Times are monotonic seconds."""

    def __init__(self) -> None:
        self.sequences_live = 0
        self.tokens_live = 0
        self.compute = Backlog()
        self.links = {name: Backlog() for name in LINK_FIELDS}
        self._load = MemberLoad()
        self._queue = RunQueue()  # of what `compute` counts
        self._reported_at = 0.0
        self._sequences_sent = 0  # since the report, and not ended
        self._tokens_sent = 0

    @property
    def sequences(self) -> int:
        return max(self.sequences_live, self._load.running + self._load.waiting + self._sequences_sent)

    @property
    def tokens(self) -> int:
        return max(self.tokens_live, self._load.tokens + self._tokens_sent)

    def report(self, load: MemberLoad, now: float) -> None:
        """The worker says how it is."""
        self._load, self._reported_at = load, now
        self._sequences_sent = self._tokens_sent = 0
        self.compute.report(load.queued_tokens, load.prefill_tokens_per_s, now)
        self._queue.report(load.queued_runs, now)
        for pour in self.compute.recent:
            self._queue.add(pour.amount, self.compute.per_s, pour.at)
        for name, field in LINK_FIELDS.items():
            rate = getattr(load, f"{field}_bytes_per_s")
            self.links[name].report(getattr(load, f"{field}_queue_bytes"), rate, now)

    def send(self, demand: Demand, now: float) -> "Stay":
        """A request was handed to the worker that asks so much of it."""
        self.sequences_live += 1
        self.tokens_live += demand.tokens
        self._sequences_sent += 1
        self._tokens_sent += demand.tokens
        amounts = {
            "storage": demand.storage_bytes,
            "peer_read": demand.peer_read_bytes,
            "peer_write": demand.peer_write_bytes,
        }
        self._queue.drain(self.compute.left(now), self.compute.per_s)
        self._queue.add(demand.computed_tokens, self.compute.per_s, now)
        pours = [self.links[name].pour(amount, now, shared=demand.shared) for name, amount in amounts.items()]
        pours.append(self.compute.pour(demand.computed_tokens, now, shared=demand.shared))
        return Stay(self, demand.tokens, now, pours)

    def runs(self, now: float) -> tuple[QueuedRun, ...]:
        """What a prefill worker has to compute, by when it is due from now on."""
        self._queue.drain(self.compute.left(now), self.compute.per_s)
        return self._queue.told(now)

    def measured(self, flows: Mapping[str, tuple[int, float]]) -> None:
        """What a request's bytes took, per link: a first idea of rates that the worker has not reported yet."""
        for name, (amount, seconds) in flows.items():
            self.links[name].measured(amount, seconds)

    def end(self, tokens: int, sent_tokens: int, sent_at: float) -> None:
        """A stay is over (`Stay.ended`)."""
        self.sequences_live -= 1
        self.tokens_live -= tokens
        if sent_at > self._reported_at:
            self._sequences_sent -= 1
            self._tokens_sent -= sent_tokens
        assert self.sequences_live >= 0 and self.tokens_live >= 0 and self._sequences_sent >= 0 and self._tokens_sent >= 0


class Stay:
    """A request at one worker, counted there until it ends."""

    def __init__(self, account: Account, tokens: int, sent_at: float, pours: list[Pour]) -> None:
        self._account = account
        self._sent_tokens = self._tokens = tokens
        self._sent_at = sent_at
        self._pours = pours
        self._live = True

    def grown(self, tokens: int) -> None:
        """It generated so many tokens."""
        self._tokens += tokens
        self._account.tokens_live += tokens

    def loaded(self) -> None:
        """Its prompt's KV is there: nothing of it is queued any more. Idempotent."""
        for pour in self._pours:
            pour.done()
        self._pours = []

    def ended(self) -> None:
        """It is over. Idempotent."""
        self.loaded()
        if self._live:
            self._live = False
            self._account.end(self._tokens, self._sent_tokens, self._sent_at)
