"""The routes a request could take, each with its estimate, and the rules that choose among them. Pure.

Decode's inter-token latency comes first: while there is a prefill worker, decode computes no more than
`direct_tail_tokens` inside its own batch, those queued there included, and isn't read from when more than
`serve_backlog_s` of reads already wait for it.
"""

from collections.abc import Iterable, Sequence

from common.routes import Plan
from services.router.policy.estimates import Estimate, Pair
from services.router.policy.plans import PLACE, SHAPES
from services.router.policy.rates import rates_of
from services.router.policy.settings import PolicySettings, Scheduler
from services.router.policy.view import ClusterView, DecodeView, PrefillView, Query

SMALL_S = 0.005  # estimates are no finer: what a message takes on a busy machine
DIRECT_TAIL_TOKENS = 512  # where decode's speed is not known yet
DIRECT_TAIL_TOKENS_MIN, DIRECT_TAIL_TOKENS_MAX = 128, 4096


def candidates(
    query: Query,
    view: ClusterView,
    settings: PolicySettings,
    decodes: Iterable[DecodeView],
    prefills: Sequence[PrefillView],
) -> list[Estimate]:
    """Every admissible route over these workers; at least one. In order of decode, prefill and plan."""
    rates = rates_of(view)
    found: list[Estimate] = []
    for decode in decodes:
        for prefill in (None, *prefills):
            pair = Pair(query, view, settings, rates, decode, prefill)
            made = [pair.estimate(plan) for plan in _plans(settings, "prefill" if prefill else "decode", pair.stored_blocks > 0)]
            found += [e for e in made if e is not None and (not prefills or _spares(e, decode, settings))]
    return found


def choose(found: Sequence[Estimate], settings: PolicySettings) -> tuple[Estimate, str]:
    """The route to take, and why."""
    if settings.scheduler is Scheduler.EARLIEST_FINISH:
        return _earliest(found, settings)
    return _shorter_queue(found)


def direct_tail_tokens(decode: DecodeView, settings: PolicySettings) -> int:
    """The most that decode computes inside its own batch for others' first tokens."""
    if settings.direct_tail_tokens is not None:
        return settings.direct_tail_tokens
    if decode.prefill_tokens_per_s <= 0:
        return DIRECT_TAIL_TOKENS
    measured = int(settings.direct_tail_s * decode.prefill_tokens_per_s)
    return max(DIRECT_TAIL_TOKENS_MIN, min(DIRECT_TAIL_TOKENS_MAX, measured))


def _plans(settings: PolicySettings, computer: str, loads: bool) -> Sequence[Plan]:
    """Those to estimate; `loads`: there is something that is stored or held, and needn't be computed."""
    if not loads:
        return (Plan.RECOMPUTE,)
    allowed = {*settings.plans, Plan.RECOMPUTE}
    return [
        plan
        for plan, shape in SHAPES.items()
        if plan in allowed and computer in shape.computers and (settings.layerwise or not shape.meets)
    ]


def _spares(estimate: Estimate, decode: DecodeView, settings: PolicySettings) -> bool:
    """Whether decode's batch can bear it."""
    if not estimate.prefill:
        return estimate.computed_tokens + decode.queued_tokens <= direct_tail_tokens(decode, settings)
    return estimate.serve_wait_s <= settings.serve_backlog_s


def _earliest(found: Sequence[Estimate], settings: PolicySettings) -> tuple[Estimate, str]:
    """Of those at about the earliest finish, the one that computes least; of these, the one that keeps links least busy: a few
    milliseconds of compute are no reason to leave what a worker holds."""
    insured = _insured(found)
    earliest = min(map(_reckoned_s, insured))
    limit = earliest + max(SMALL_S, earliest * settings.error_band)
    near = [e for e in insured if _reckoned_s(e) <= limit]
    best = min(near, key=lambda e: (e.computed_tokens, e.moving_s, e.finish_s, PLACE[e.plan], e.decode, e.prefill))
    why = f"finishes in {best.finish_s:.3f} s, earliest of {len(found)}"
    if _reckoned_s(best) > earliest:
        why = f"finishes in {best.finish_s:.3f} s and costs the least of {len(near)} at about {earliest:.3f} s"
    return best, why + (", by a guess" if best.guess else "")


def _reckoned_s(estimate: Estimate) -> float:
    """A load by a guess that others bet on already is reckoned at its worst: who can do about as well by what is known, does."""
    if not estimate.busy_guess:
        return estimate.finish_s
    late_s = estimate.load_s * (1 + estimate.error)
    return estimate.finish_s + max(late_s, estimate.wait_s) - max(estimate.load_s, estimate.wait_s)


def _insured(found: Sequence[Estimate]) -> Sequence[Estimate]:
    """A guess that others bet on already is taken with compute going on beside the load, where that may be: a wrong one costs less."""
    meeting = {(e.decode, e.prefill, SHAPES[e.plan].loads) for e in found if SHAPES[e.plan].meets}
    return [
        e for e in found if not e.busy_guess or SHAPES[e.plan].meets or (e.decode, e.prefill, SHAPES[e.plan].loads) not in meeting
    ]


def _shorter_queue(found: Sequence[Estimate]) -> tuple[Estimate, str]:
    """As the paper: what is stored is loaded, over the shorter read queue; a short tail stays with decode."""
    whole = {(e.plan, bool(e.prefill)): e for e in found}
    if direct := whole.get((Plan.DIRECT, False)):
        return direct, f"a tail of {direct.computed_tokens} tokens stays with decode"
    loads = [e for e in found if e.plan is not Plan.RECOMPUTE]
    if loads:
        best = min(loads, key=lambda e: (e.read_wait_s, PLACE[e.plan]))
        return best, f"the shorter read queue ({best.read_wait_s:.3f} s) of {len(loads)}"
    best = whole.get((Plan.RECOMPUTE, False)) or whole[Plan.RECOMPUTE, True]
    return best, f"nothing to load, {best.computed_tokens} tokens to compute"
