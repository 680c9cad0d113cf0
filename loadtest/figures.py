"""Figures of a load test from its samples. Pure."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import get_args

import msgspec

from loadtest.samples import Kind, Sample


class Spread(msgspec.Struct, frozen=True):
    """How one time was distributed, in milliseconds."""

    n: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class Group(msgspec.Struct, frozen=True):
    """Finished requests that belong together. A spread is None when nothing was measured.

    Attributes:
        gap: between one event of a stream and the next; TPOT is its mean over a request.
        hit_rate: cached tokens over prompt tokens.
    """

    name: str
    requests: int
    ttft: Spread | None
    tpot: Spread | None
    gap: Spread | None
    total: Spread | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    hit_rate: float


class Summary(msgspec.Struct, frozen=True):
    """Counts and rates over `window_s`: from the first request sent to the end of the last one."""

    window_s: float
    finished: int
    refused: int
    cut: int
    errors: dict[str, int]
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    all: Group
    kinds: list[Group]
    routes: list[Group]
    turns: dict[str, list[Group]]  # by kind; the first is turn 1


def summarize(samples: Sequence[Sample]) -> Summary:
    finished = [sample for sample in samples if sample.outcome == "ok"]
    by_outcome = Counter(sample.outcome for sample in samples)
    begin = min((sample.sent_s for sample in samples), default=0.0)
    window = max((sample.sent_s + sample.total_s for sample in samples), default=0.0) - begin
    everything = group("all", finished)
    of_kind = {kind: [sample for sample in finished if sample.kind == kind] for kind in kinds(finished)}
    return Summary(
        window_s=round(window, 3),
        finished=len(finished),
        refused=by_outcome["refused"],
        cut=by_outcome["cut"],
        errors=dict(Counter(sample.code for sample in samples if sample.outcome == "error").most_common()),
        requests_per_s=_rate(len(finished), window),
        output_tokens_per_s=_rate(everything.output_tokens, window),
        prompt_tokens_per_s=_rate(everything.prompt_tokens, window),
        all=everything,
        kinds=[group(kind, own) for kind, own in of_kind.items()],
        routes=groups(finished, lambda sample: sample.route or "-"),
        turns={kind: _turns(own) for kind, own in of_kind.items()},
    )


def kinds(samples: Sequence[Sample]) -> list[str]:
    return [kind for kind in get_args(Kind) if any(sample.kind == kind for sample in samples)]


def groups(samples: Iterable[Sample], key: Callable[[Sample], str]) -> list[Group]:
    """One group per key; the largest first."""
    found: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        found[key(sample)].append(sample)
    return [group(name, found[name]) for name in sorted(found, key=lambda name: (-len(found[name]), name))]


def group(name: str, samples: Sequence[Sample]) -> Group:
    prompt = sum(sample.prompt_tokens for sample in samples)
    cached = sum(sample.cached_tokens for sample in samples)
    return Group(
        name=name,
        requests=len(samples),
        ttft=spread([sample.ttft_s for sample in samples]),
        tpot=spread([sample.tpot_s for sample in samples]),
        gap=spread([gap for sample in samples for gap in sample.gaps_s]),
        total=spread([sample.total_s for sample in samples]),
        prompt_tokens=prompt,
        cached_tokens=cached,
        output_tokens=sum(sample.output_tokens for sample in samples),
        hit_rate=round(cached / prompt, 4) if prompt else 0.0,
    )


def spread(seconds: Iterable[float | None]) -> Spread | None:
    values = sorted(value * 1e3 for value in seconds if value is not None)
    if not values:
        return None
    p50, p90, p99 = (round(percentile(values, share), 3) for share in (0.5, 0.9, 0.99))
    return Spread(len(values), round(math.fsum(values) / len(values), 3), p50, p90, p99, round(values[-1], 3))


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of values in ascending order, with linear interpolation (Hyndman and Fan's type 7, numpy's default)."""
    assert ordered and 0 <= share <= 1
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def _turns(samples: Sequence[Sample]) -> list[Group]:
    """One group per turn number, without gaps: a turn nobody finished is an empty group."""
    last = max((sample.turn for sample in samples), default=0)
    return [group(str(turn), [sample for sample in samples if sample.turn == turn]) for turn in range(1, last + 1)]


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 3) if seconds > 0 else 0.0
