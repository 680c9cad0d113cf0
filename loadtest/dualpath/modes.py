"""The modes: one build, the same processes; only what the router's policy may use differs. And the oracle, whose workers simulate loads.

The ablation adds one thing at a time, in the paper's order (arXiv 2602.21548, its figure of completion times):

    basic       storage->prefill, whole prompt at once, workers in turn
    layerwise   ... layer by layer
    dual        ... storage->prefill or storage->decode, a request as a whole, by the shorter read queue
    scheduler   ... workers by the paper's alpha, beta and Z
    full        what the paper leaves open: every plan, by the earliest estimated finish
    oracle      scheduler, and loads cost nothing: what computing alone takes. (Estimates have no place there: no load is ever measured.)

The others allow one plan each, by the scheduler that asks no estimate.
"""

import msgspec

from common.routes import Plan

SCHEDULER, LAYERWISE, WHOLE = "--scheduler", "--layerwise", "--no-layerwise"


class Mode(msgspec.Struct, frozen=True):
    """`router` are the router's flags; `workers` is empty but for the oracle."""

    name: str
    about: str
    router: tuple[str, ...]
    workers: tuple[str, ...] = ()


def _plans(*plans: Plan) -> tuple[str, str]:
    return "--plans", ",".join(plans)


def _only(plan: Plan) -> Mode:
    return Mode(plan, f"only {plan}", (*_plans(plan), LAYERWISE, SCHEDULER, "round_robin"))


_EITHER = _plans(Plan.STORAGE_TO_PREFILL, Plan.STORAGE_TO_DECODE)
_ALL = (*_plans(*Plan), LAYERWISE, SCHEDULER, "earliest_finish")
_SINGLES = (Plan.RECOMPUTE, Plan.DIRECT, Plan.STORAGE_TO_DECODE, Plan.STORAGE_TO_PREFILL, Plan.SPLIT, Plan.SPLIT_MEET)

MODES = {
    mode.name: mode
    for mode in (
        Mode("basic", "storage to prefill, whole prompt at once; workers in turn",
             (*_plans(Plan.STORAGE_TO_PREFILL), WHOLE, SCHEDULER, "round_robin")),
        Mode("layerwise", "the same, layer by layer", (*_plans(Plan.STORAGE_TO_PREFILL), LAYERWISE, SCHEDULER, "round_robin")),
        Mode("dual", "and storage to decode, a request as a whole, by the shorter read queue", (*_EITHER, LAYERWISE, SCHEDULER, "round_robin")),
        Mode("scheduler", "and workers by the paper's rules", (*_EITHER, LAYERWISE, SCHEDULER, "paper")),
        Mode("full", "every plan, by the earliest estimated finish", _ALL),
        Mode("oracle", "as scheduler, and loads cost nothing (simulated)", (*_EITHER, LAYERWISE, SCHEDULER, "paper"), ("--simulate-free-loads",)),
        *(_only(plan) for plan in _SINGLES),
    )
}  # fmt: skip
ABLATION = ("basic", "layerwise", "dual", "scheduler", "full", "oracle")
ONLINE_MODES = ("basic", "full")
ONE_REQUEST_MODES = (*map(str, _SINGLES), "full")
CROSSING_MODES = (str(Plan.RECOMPUTE), str(Plan.SPLIT), "full")
