"""What a prefill worker has to compute, by when it is due, between two of its reports.

As `Backlog` says how much is left, this says of what: the soonest due goes first (common/runs.py), and a run of which a part
was computed is due so much sooner.
"""

import math
from collections.abc import Iterable

from common.runs import QueuedRun, by_class, due_s


class RunQueue:
    """Times are monotonic seconds and never go back."""

    def __init__(self) -> None:
        self._runs: list[QueuedRun] = []

    def report(self, runs: Iterable[QueuedRun], now: float) -> None:
        """The worker says what it has; due times are from now on."""
        self._runs = [QueuedRun(run.tokens, now + run.due_s) for run in runs]

    def add(self, tokens: float, tokens_per_s: float, came_s: float) -> None:
        """A run of so many tokens was sent there."""
        if tokens:
            self._runs.append(QueuedRun(tokens, due_s(came_s, tokens, tokens_per_s)))

    def drain(self, left: float, tokens_per_s: float) -> None:
        """No more than so many tokens are left in all."""
        self._runs.sort(key=lambda run: run.due_s)
        done = math.fsum(run.tokens for run in self._runs) - left
        first = 0
        while done > 0 and first < len(self._runs):
            run = self._runs[first]
            if run.tokens > done:
                self._runs[first] = QueuedRun(run.tokens - done, due_s(run.due_s, -done, tokens_per_s))
                break
            done -= run.tokens
            first += 1
        del self._runs[:first]

    def told(self, now: float) -> tuple[QueuedRun, ...]:
        """In few, due times from now on."""
        return by_class(self._runs, now)
