"""What the measured jobs show together: the ratios that the experiment is for. Pure.

A ratio that can't be formed, because a mode of it wasn't measured, is left out rather than guessed.
"""

import statistics
from collections.abc import Mapping, Sequence

import msgspec

from loadtest.dualpath.figures import Figures, Slo, dual_bound, figures, one_request_bound_s
from loadtest.dualpath.jobs import Measured
from loadtest.dualpath.links import topology
from loadtest.dualpath.model import SETUPS
from loadtest.dualpath.trajectories import PAPER_AGENTS_OVER_BASIC

BASIC, FULL, ORACLE, RECOMPUTE = "basic", "full", "oracle", "recompute"
RATE_ROUNDING = 0.001  # of rates that were tried
SINGLE_SOURCES = ("direct", "storage_to_decode", "storage_to_prefill")


class Crossing(msgspec.Struct, frozen=True):
    """TTFT medians at one storage rate, in seconds.

    Attributes:
        over_better: ours over the quicker of the two, request by request, as they took turns; the median.
    """

    rate: float
    load_s: float
    recompute_s: float
    full_s: float
    over_better: float


def ratios(found: Sequence[Measured], slo: Slo) -> dict[str, float]:
    """The JSON line's figures. A key without a topology is of 1P1D."""
    every = [figures(measured, slo) for measured in found]
    out: dict[str, float] = {}
    for name in sorted({one.topology for one in every}):
        here = [one for one in every if one.topology == name]
        out |= _offline([one for one in here if one.part == "offline"], name)
        out |= _online([one for one in here if one.part == "online"], name, slo)
        out |= _one_request([measured for measured in found if (measured.part, measured.topology) == ("one-request", name)], name)
        crossed = crossings([measured for measured in found if (measured.part, measured.topology) == ("crossing", name)])
        if crossed:
            out[_key("crossing_worst_over_better", name)] = max(point.over_better for point in crossed)
    return {key: round(value, 3) for key, value in out.items()}


def _offline(here: Sequence[Figures], name: str) -> dict[str, float]:
    by_mode = {one.mode: one for one in here}
    basic, key = by_mode.get(BASIC), f"offline_{name.lower()}"
    out: dict[str, float] = {}
    if basic is None:
        return out
    for mode, one in by_mode.items():
        if mode not in (BASIC, FULL):
            out[f"{key}_{_word(mode)}_over_basic"] = basic.wall_s / one.wall_s
    full = by_mode.get(FULL)
    if full is not None:
        shape = topology(name)
        oracle = by_mode.get(ORACLE)
        bound = dual_bound(shape.prefills, shape.decodes, basic.wall_s, oracle.wall_s if oracle else None)
        gain = basic.wall_s / full.wall_s
        out |= {f"{key}_over_basic": gain, f"{key}_bound": bound, f"{key}_over_bound": gain / bound}
        out[_key("link_load_max_over_avg", name)] = full.max_over_avg
    return out


def _online(here: Sequence[Figures], name: str, slo: Slo) -> dict[str, float]:
    modes = dict.fromkeys(one.mode for one in here)
    best = {mode: capacity_of([one for one in here if one.mode == mode], slo) for mode in modes}
    out = {_key(f"online_aps_{_word(mode)}", name): one.step for mode, one in best.items() if one is not None}
    basic, full = best.get(BASIC), best.get(FULL)
    if basic is not None and full is not None:
        out[_key("online_aps_over_basic", name)] = full.step / basic.step
        out |= _tpot_over(basic, full, _key("tpot_over_basic", name))
        good = attained([one for one in here if one.mode == FULL], slo)
        least = (1 - RATE_ROUNDING) * PAPER_AGENTS_OVER_BASIC * basic.step
        asked = min((one for one in good if one.step >= least), key=lambda one: one.step, default=None)
        if asked is not None:
            out |= _tpot_over(basic, asked, _key("tpot_over_basic_at_paper_gain", name))
    return out


def _tpot_over(basic: Figures, one: Figures, key: str) -> dict[str, float]:
    return {key: one.tpot.mean / basic.tpot.mean} if basic.tpot and one.tpot else {}


def attained(trials: Sequence[Figures], slo: Slo) -> list[Figures]:
    """Those in which enough requests attained the objective, and none failed."""
    return [one for one in trials if one.slo_share >= slo.share and not one.failed]


def capacity_of(trials: Sequence[Figures], slo: Slo) -> Figures | None:
    """The trial with the highest rate that attained the objective."""
    return max(attained(trials, slo), key=lambda one: one.step, default=None)


def _one_request(here: Sequence[Measured], name: str) -> dict[str, float]:
    """Against the sum of the rates. What a single source's request takes beside its load, the others take too: its tail attends to
    all that was loaded, so it is computed afterwards."""
    ttft = {one.mode: median_ttft_s(one) for one in here}
    out = {_key(f"one_request_{_word(mode)}_ttft_s", name): seconds for mode, seconds in ttft.items()}
    single = min((ttft[mode] for mode in SINGLE_SOURCES if mode in ttft), default=None)
    if single is None or RECOMPUTE not in ttft:
        return out
    kv_bytes = statistics.mean(s.prompt_tokens for s in here[0].done.samples) * SETUPS[here[0].setup].kv_bytes_per_token
    storage = here[0].rates.storage or float("inf")
    beside_s, made = max(0.0, single - kv_bytes / storage), kv_bytes / ttft[RECOMPUTE]
    bounds = {
        "split": one_request_bound_s(kv_bytes, [storage, storage], beside_s),
        "split+meet": one_request_bound_s(kv_bytes, [storage, storage, made], beside_s),
        FULL: one_request_bound_s(kv_bytes, [storage, storage, made], beside_s),
    }
    for mode, bound_s in bounds.items():
        if mode in ttft:
            out[_key(f"one_request_{_word(mode)}_over_sum_of_rates", name)] = ttft[mode] / bound_s
            out[_key(f"one_request_{_word(mode)}_over_best_single", name)] = ttft[mode] / min(single, ttft[RECOMPUTE])
    return out


def crossings(here: Sequence[Measured]) -> list[Crossing]:
    """One point per storage rate at which all three sides were measured."""
    out = []
    for step in sorted({one.step for one in here}):
        at = {one.mode: one for one in here if one.step == step}
        loads = [mode for mode in at if mode not in (FULL, RECOMPUTE)]
        if loads and RECOMPUTE in at and FULL in at:
            load, recompute, full = at[min(loads, key=lambda mode: median_ttft_s(at[mode]))], at[RECOMPUTE], at[FULL]
            better = min(load, recompute, key=median_ttft_s)
            over = statistics.median(ours / theirs for ours, theirs in zip(ttfts_s(full), ttfts_s(better), strict=False))
            rate = full.rates.storage or float("inf")
            out.append(Crossing(rate, median_ttft_s(load), median_ttft_s(recompute), median_ttft_s(full), over))
    return out


def near(first: Mapping[str, Measured], far: float) -> list[str]:
    """The modes of a crossing's round without those that are `far` from the quicker side: what they take exactly matters no more."""
    sides = {mode: median_ttft_s(one) for mode, one in first.items() if mode != FULL}
    return [mode for mode in first if mode == FULL or sides[mode] < far * min(sides.values())]


def median_ttft_s(of: Measured) -> float:
    return statistics.median(ttfts_s(of))


def ttfts_s(of: Measured) -> list[float]:
    return [sample.ttft_s or float("inf") for sample in of.done.samples]


def _word(mode: str) -> str:
    return mode.replace("+", "_")


def _key(text: str, topology_name: str) -> str:
    return text if topology_name == "1P1D" else f"{topology_name.lower()}_{text}"
