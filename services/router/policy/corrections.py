"""What finished requests teach about the estimates: per plan, actual over estimated, as an EWMA. Bounded.

A correction is within [1/2, 2] whatever was seen, so that it can spoil an estimate by no more than that, and
halves its distance from 1 every `FORGET_S` in which its plan is not used: a plan that was unlucky once is
tried again. `SMALL_S` is added to both sides of the ratio: a request of a few milliseconds tells about
the fixed costs of its machine, not about rates.
"""

import math

from common.routes import Plan

WEIGHT = 0.1  # of one request: the mean of about the last ten
FORGET_S = 60.0
SMALL_S = 0.05
CORRECTION_MAX = 2.0
_LIMIT = math.log(CORRECTION_MAX)


class Corrections:
    """One per router. Logarithms inside, so that half as long and twice as long weigh the same."""

    def __init__(self) -> None:
        self._learned: dict[Plan, tuple[float, float]] = {}  # plan -> (log of the ratio, when it was last seen)

    def observe(self, plan: Plan, modelled_s: float, actual_s: float, now: float) -> None:
        """A request took `actual_s` where the model, without correction, said `modelled_s`."""
        old = self._log(plan, now)
        seen = math.log((actual_s + SMALL_S) / (modelled_s + SMALL_S))
        self._learned[plan] = (old + WEIGHT * (max(-_LIMIT, min(_LIMIT, seen)) - old), now)

    def factors(self, now: float) -> dict[Plan, float]:
        """What to multiply estimates with."""
        return {plan: math.exp(self._log(plan, now)) for plan in self._learned}

    def _log(self, plan: Plan, now: float) -> float:
        log, at = self._learned.get(plan, (0.0, now))
        return log * math.pow(0.5, (now - at) / FORGET_S)
