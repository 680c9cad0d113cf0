"""Settings of the policy; the router's settings carry them under the same names."""

from enum import StrEnum

import msgspec

from common.routes import Plan
from services.router.policy.plans import PLANS

Z_FACTOR = 1.05  # the paper's slack over the mean number of tokens


class Scheduler(StrEnum):
    """How workers and plan are chosen (docs/dualpath.md)."""

    ROUND_ROBIN = "round_robin"  # workers in turn; stored blocks over the shorter read queue
    PAPER = "paper"  # workers by the paper's alpha, beta and Z; stored blocks over the shorter read queue
    EARLIEST_FINISH = "earliest_finish"  # the paper's rules make the shortlist, the earliest estimated finish decides


class PolicySettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the policy may do.

    Attributes:
        plans: those it may use; recompute is always one of them.
        layerwise: compute a layer as soon as its KV is there, and hand it over while the next computes.
        prefill_backlog_s: beta: prefill workers with more queued compute are avoided.
        read_backlog_s: alpha: prefill workers with more queued reading come after the others.
        direct_tail_tokens: what decode may have to compute inside its own batch; None: `direct_tail_s` of its speed.
        direct_tail_s: see there.
        serve_backlog_s: decode workers with more queued for prefill workers to read are not read from.
        error_band: relative difference of two estimates under which the plan that costs less is taken.
    """

    plans: tuple[Plan, ...] = PLANS
    layerwise: bool = True
    scheduler: Scheduler = Scheduler.EARLIEST_FINISH
    prefill_backlog_s: float = 5.0  # the paper's
    read_backlog_s: float = 3.0  # the paper's
    direct_tail_tokens: int | None = None
    direct_tail_s: float = 0.25
    serve_backlog_s: float = 1.0
    error_band: float = 0.05
