"""Rates to reckon with: measured ones, what others measured, or a guess that gets itself measured.

A rate that a worker has not measured is taken from those that have measured theirs (the median), else
from the priors below; a low rate that was measured over a few blocks only is mixed with these. A link that was
passed over for `STALE_S` may have become quicker since: a bold plan, in which compute goes on beside a load that
turns out late, reckons with twice its rate, and twice as much again for every further `STALE_S`, so that no bad
measurement shuts a link for ever.

An unmeasured rate and a stale one are *guesses*. The first request that bets on one brings the measurement that
replaces it. Those that come meanwhile (`Pipe.busy_guess`) reckon with loads that take twice the time, and let
compute go on beside them.
"""

import math
from collections.abc import Iterable
from statistics import median

import msgspec

from common.runs import due_s
from services.router.policy.view import ClusterView, Link, PrefillView, WorkerView

PRIOR_STORAGE_BYTES_PER_S = 1e9  # one NVMe read through a good reader gives 1 to 6 (docs/benchmarks.md)
PRIOR_PEER_BYTES_PER_S = 2e9  # a plain socket on one host
PRIOR_TOKENS_PER_S = 2000.0  # a small model on a few cores; GPUs are measured soon enough
EVIDENCE_BYTES = 8e6  # a few blocks: the first ones pay for connections and cold caches
STALE_S = 60.0
UNDER_WAY_S = 0.15  # what is left of the step that prefill computes when a run comes: half of its quota (prefill/quota.py)
_DOUBLINGS_MAX = 64.0  # more is beyond every prior


class Pipe(msgspec.Struct, frozen=True):
    """`wait_s` until it is ours, then `per_s` bytes, blocks or tokens a second.

    `guess`: the rate is not a measurement. `busy_guess`: nor will we be the first to measure it.
    """

    wait_s: float
    per_s: float
    guess: bool = False
    busy_guess: bool = False

    def over_s(self, amount: float) -> float:
        """Seconds that it is busy with so much."""
        return amount / self.per_s

    def in_units_of(self, amount: float) -> "Pipe":
        """The same in pieces of so many."""
        return Pipe(self.wait_s, self.per_s / amount, self.guess, self.busy_guess)

    def then(self, other: "Pipe") -> "Pipe":
        """Two in a row: the slower sets the pace, and both must be free."""
        return Pipe(
            max(self.wait_s, other.wait_s),
            min(self.per_s, other.per_s),
            self.guess or other.guess,
            self.busy_guess or other.busy_guess,
        )


class Rates(msgspec.Struct, frozen=True):
    """What stands in for rates that were not measured."""

    storage_bytes_per_s: float
    peer_bytes_per_s: float
    tokens_per_s: float

    def storage(self, worker: WorkerView, bold: bool) -> Pipe:
        return _pipe(worker.storage, self.storage_bytes_per_s, bold)

    def peer_read(self, decode: WorkerView, prefill: WorkerView, bold: bool) -> Pipe:
        """Prefill reads out of decode's stage; whichever end has measured it counts."""
        return _between(decode.peer_read, prefill.peer_read, self.peer_bytes_per_s, bold)

    def peer_write(self, decode: WorkerView, prefill: WorkerView, bold: bool) -> Pipe:
        return _between(decode.peer_write, prefill.peer_write, self.peer_bytes_per_s, bold)

    def compute(self, worker: WorkerView, tokens: int) -> Pipe:
        """For a run of so many tokens: what is due before it is computed before it, and what is due after it lets it past."""
        measured = worker.prefill_tokens_per_s
        rate = measured or self.tokens_per_s
        runs = worker.queued_runs if isinstance(worker, PrefillView) else ()
        later = math.fsum(run.tokens for run in runs if run.due_s > due_s(0.0, tokens, rate))
        passed = max(0.0, later - UNDER_WAY_S * rate)
        wait_s = max(0.0, worker.queued_tokens - passed) / rate
        return Pipe(wait_s, rate, not measured, not measured and worker.queued_tokens > 0)


def rates_of(view: ClusterView) -> Rates:
    workers = (*view.decodes, *view.prefills)
    peers = (link for w in workers for link in (w.peer_read, w.peer_write))
    return Rates(
        storage_bytes_per_s=_middle((w.storage.bytes_per_s for w in workers), PRIOR_STORAGE_BYTES_PER_S),
        peer_bytes_per_s=_middle((link.bytes_per_s for link in peers), PRIOR_PEER_BYTES_PER_S),
        tokens_per_s=_middle((w.prefill_tokens_per_s for w in workers), PRIOR_TOKENS_PER_S),
    )


def _middle(measured: Iterable[float], prior: float) -> float:
    known = [rate for rate in measured if rate > 0]
    return median(known) if known else prior


def _pipe(link: Link, prior: float, bold: bool) -> Pipe:
    rate = _trusted(link, prior) if link.bytes_per_s else prior
    stale = bold and rate < prior and link.idle_s > STALE_S
    guess = stale or not link.bytes_per_s
    if stale:
        rate = min(prior, rate * 2.0 ** min(link.idle_s / STALE_S, _DOUBLINGS_MAX))
    return Pipe(link.queue_bytes / rate, rate, guess, guess and link.queue_bytes > 0)


def _trusted(link: Link, prior: float) -> float:
    """A low rate counts for as much as was moved at it: as if `EVIDENCE_BYTES` had been moved at the prior before."""
    if link.bytes_per_s >= prior or link.moved_bytes == math.inf:
        return link.bytes_per_s
    moved = EVIDENCE_BYTES + link.moved_bytes
    return moved / (EVIDENCE_BYTES / prior + link.moved_bytes / link.bytes_per_s)


def _between(ours: Link, theirs: Link, prior: float, bold: bool) -> Pipe:
    """One transfer seen from both of its ends. An end that has measured nothing only adds its queue."""
    measured = [link for link in (ours, theirs) if link.bytes_per_s]
    pipes = [_pipe(link, prior, bold) for link in measured or (ours, theirs)]
    pipe = pipes[0].then(pipes[-1])
    queue = max(ours.queue_bytes, theirs.queue_bytes)
    return Pipe(max(pipe.wait_s, queue / pipe.per_s), pipe.per_s, pipe.guess, pipe.guess and queue > 0)
