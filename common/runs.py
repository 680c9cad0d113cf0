"""The order in which a prefill worker computes, which the router reckons with. Pure.

A run is due `STRETCH` times as long after it came as computing it takes, and who is due soonest goes first. So a turn's short
tail does not wait for a long prompt that is computed from its start, and that prompt waits for no run that comes later than so.
"""

import math
from collections.abc import Iterable

import msgspec

STRETCH = 2.0  # how long after it came a run is due, over the time that computing it takes
# Of due times: the first class ends so far from now, each further one twice as far; the last has no end.
CLASS_S, CLASSES_MAX = 0.125, 12


class QueuedRun(msgspec.Struct, frozen=True):
    """Tokens that wait to be computed, of one run or of some that are due at about the same time: the first of them at `due_s`.

    Times are seconds: on a process's monotonic clock, or in a message from now on.
    """

    tokens: float
    due_s: float


def due_s(came_s: float, tokens: float, tokens_per_s: float) -> float:
    """Until when a run of so many tokens should be computed. Where no speed is known yet, all are due when they come."""
    return came_s + (STRETCH * tokens / tokens_per_s if tokens_per_s else 0.0)


def by_class(runs: Iterable[QueuedRun], now: float) -> tuple[QueuedRun, ...]:
    """The same from now on, in few: those of one class together, as if all were due when the first of them is."""
    classes: dict[int, QueuedRun] = {}
    for run in runs:
        from_now_s = run.due_s - now
        number = min(CLASSES_MAX - 1, max(0, math.ceil(math.log2(max(from_now_s, 1e-9) / CLASS_S))))
        others = classes.get(number, QueuedRun(0, math.inf))
        classes[number] = QueuedRun(others.tokens + run.tokens, min(others.due_s, from_now_s))
    return tuple(classes[number] for number in sorted(classes))
