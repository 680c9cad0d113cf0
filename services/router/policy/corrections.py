"""What finished requests teach about the estimates: actual over estimated, as an EWMA. Bounded.

All plans rest on the same rates, so what one plan took teaches about all: half of a lesson is kept as common to all, half as the plan's
own. Else the plan that is in use, whose estimates have been put right, looks worse than others that nobody tried, by as much as
theirs are wrong too.

A correction is within [1/2, 2] whatever was seen, so that it can spoil an estimate by no more than that, and
each half goes half of its way back to 1 every `FORGET_S` in which nothing is learnt for it: a plan that was unlucky once is
tried again. `SMALL_S` is added to both sides of the ratio: a request of a few milliseconds tells about
the fixed costs of its machine, not about rates.
"""

import math

from common.routes import Plan

WEIGHT = 0.1  # of one request: the mean of about the last ten
SHARED = 0.5  # of what it teaches, for all plans
FORGET_S = 60.0
SMALL_S = 0.05
CORRECTION_MAX = 2.0
_LIMIT = math.log(CORRECTION_MAX)
_ALL = None  # in place of a plan


class Corrections:
    """One per router. Logarithms inside, so that half as long and twice as long weigh the same."""

    def __init__(self) -> None:
        self._learned: dict[Plan | None, tuple[float, float]] = {}  # plan -> (its part of the ratio's log, when it was last seen)

    def observe(self, plan: Plan, modelled_s: float, actual_s: float, now: float) -> None:
        """A request took `actual_s` where the model, without correction, said `modelled_s`."""
        common, own = self._part(_ALL, now), self._part(plan, now)
        seen = math.log((actual_s + SMALL_S) / (modelled_s + SMALL_S))
        lesson = WEIGHT * (_bounded(seen) - common - own)
        self._learned[_ALL] = common + SHARED * lesson, now
        self._learned[plan] = own + (1.0 - SHARED) * lesson, now

    def factors(self, now: float) -> dict[Plan, float]:
        """What to multiply estimates with; empty before the first lesson."""
        if not self._learned:
            return {}
        common = self._part(_ALL, now)
        return {plan: math.exp(_bounded(common + self._part(plan, now))) for plan in Plan}

    def _part(self, plan: Plan | None, now: float) -> float:
        log, at = self._learned.get(plan, (0.0, now))
        return log * math.pow(0.5, (now - at) / FORGET_S)


def _bounded(log: float) -> float:
    return max(-_LIMIT, min(_LIMIT, log))
