"""The workers that a request may go to, best first: the paper's inter-engine rules (arXiv 2602.21548). Pure.

Decode: connected, not draining, of the cluster's namespace, with a pool that the request fits in, and not
known to be full; those with room for it at once before the others. Then in two phases: where
tok_e + len <= Z = 1.05 * (len + sum of tok_e) / |E|, the one with the fewest sequences; where none is under Z,
the one with the fewest tokens.

Prefill: connected, not draining, same namespace. Those with at most beta seconds of compute queued come first
and keep the others out; of them, those with at most alpha seconds of reading queued; then the fewest tokens.
A queue over beta everywhere keeps nobody out: a wait at prefill costs one request time, decode's batch
computing its prompt would cost every request there.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import TypeVar

import msgspec

from services.router.policy.settings import Z_FACTOR, PolicySettings, Scheduler
from services.router.policy.view import ClusterView, DecodeView, PrefillView, Query, WorkerView

W = TypeVar("W", bound=WorkerView)
DECODES_MAX = 2  # of the shortlist: every pair costs a handful of estimates
PREFILLS_MAX = 3  # likewise, without the one that holds most of the prompt
ALTERNATES_MAX = 2  # prefill workers to ask when the chosen one fails: each may cost its silence (decode/prefill_client.py)


class Why(StrEnum):
    UNAVAILABLE = "unavailable"  # no worker is there
    OVERLOADED = "overloaded"  # there are, but all are full
    TOO_LARGE = "too_large"  # the request fits in none, now or later


class Refusal(msgspec.Struct, frozen=True):
    """No worker can take the request."""

    why: Why
    reason: str
    retry_after_s: float = 1.0


class Listed(msgspec.Struct, frozen=True):
    """A decode worker of the shortlist, and why it is on it."""

    worker: DecodeView
    reason: str


def decodes(query: Query, view: ClusterView, now: float, settings: PolicySettings) -> list[Listed] | Refusal:
    """The decode workers worth estimating, at least one."""
    able = _able(query, view, now)
    if isinstance(able, Refusal):
        return able
    if settings.scheduler is Scheduler.ROUND_ROBIN:
        turn = query.turn % len(able)
        return [Listed(able[turn], f"turn {turn + 1} of {len(able)}")]
    limit = Z_FACTOR * (query.prompt_tokens + sum(w.tokens for w in able)) / len(able)
    under = [w for w in able if w.tokens + query.prompt_tokens <= limit]
    if under:
        fewest = min(w.sequences for w in under)
        equal = sorted((w for w in under if w.sequences == fewest), key=lambda w: (w.tokens, w.address))
        reason = f"fewest sequences ({fewest}) of {len(under)} under Z={limit:.0f} tokens"
    else:
        fewest = min(w.tokens for w in able)
        equal = sorted((w for w in able if w.tokens == fewest), key=lambda w: (w.sequences, w.address))
        under = [w for w in able if w.tokens <= fewest + query.prompt_tokens]  # for holders: out of step by one request at most
        reason = f"fewest tokens ({fewest}) of {len(able)}, none under Z={limit:.0f}"
    if settings.scheduler is Scheduler.PAPER:
        return [Listed(equal[0], reason)]
    listed = [Listed(w, reason) for w in equal[:DECODES_MAX]]
    holder = _holder(query, [w for w in under if w not in equal[:DECODES_MAX]])
    return [*listed, *(Listed(w, f"holds {query.resident[w.address]} blocks") for w in holder)]


def _holder(query: Query, workers: Sequence[W]) -> Sequence[W]:
    """The worker that still holds most of the prompt, if one does."""
    best = max(workers, key=lambda w: (query.resident.get(w.address, 0), w.address), default=None)
    return [best] if best is not None and query.resident.get(best.address) else []


def prefills(query: Query, view: ClusterView, settings: PolicySettings) -> tuple[PrefillView, ...]:
    """All that may compute for a request, best first; none for a request that another decode worker began."""
    usable = [] if query.moved else sorted((w for w in view.prefills if view.usable(w)), key=lambda w: w.address)
    if settings.scheduler is Scheduler.ROUND_ROBIN:
        turn = query.turn % max(1, len(usable))
        return (*usable[turn:], *usable[:turn])

    def reads_late(worker: PrefillView) -> bool:
        return over(worker.storage.queue_bytes, worker.storage.bytes_per_s, settings.read_backlog_s)

    usable.sort(key=lambda w: (_computes_late(w, settings), reads_late(w), w.queued_tokens, w.tokens, w.address))
    return tuple(usable)


def shortlist(query: Query, ranked: Sequence[PrefillView], settings: PolicySettings) -> Sequence[PrefillView]:
    """Of these, the prefill workers worth estimating: the first, and who still holds most of the prompt."""
    if settings.scheduler is not Scheduler.EARLIEST_FINISH:
        return ranked[:1]
    free = [w for w in ranked if not _computes_late(w, settings)] or ranked
    return [*free[:PREFILLS_MAX], *_holder(query, free[PREFILLS_MAX:])]


def _computes_late(worker: PrefillView, settings: PolicySettings) -> bool:
    return over(worker.queued_tokens, worker.prefill_tokens_per_s, settings.prefill_backlog_s)


def over(queue: float, per_s: float, limit_s: float) -> bool:
    """Whether a queue takes longer than the limit; one whose rate isn't measured yet doesn't."""
    return per_s > 0 and queue > limit_s * per_s


def _able(query: Query, view: ClusterView, now: float) -> list[DecodeView] | Refusal:
    """Those that could take the request, by address; those with room at once before the others."""
    usable = [w for w in view.decodes if view.usable(w)]
    if not usable:
        return Refusal(Why.UNAVAILABLE, "no decode worker is connected that isn't draining")
    fitting = [w for w in usable if w.pool_tokens == 0 or query.prompt_tokens < w.pool_tokens]
    if not fitting:
        largest = max(w.pool_tokens for w in usable)
        reason = f"the prompt has {query.prompt_tokens} tokens and the largest KV pool holds {largest}"
        return Refusal(Why.TOO_LARGE, reason)
    free = [w for w in fitting if w.full_until <= now]
    if not free:
        wait_s = max(0.1, min(w.full_until for w in fitting) - now)
        return Refusal(Why.OVERLOADED, f"all {len(fitting)} decode workers are full", retry_after_s=wait_s)
    willing = [w for w in free if w.address not in query.avoid] or free
    roomy = [w for w in willing if _has_room(query, w, view.block_tokens)] or willing
    return sorted(roomy, key=lambda w: w.address)


def _has_room(query: Query, worker: DecodeView, block_tokens: int) -> bool:
    """Room in the pool and in the stage for the whole prompt, as of the last report."""
    in_pool = worker.pool_tokens == 0 or worker.tokens + query.prompt_tokens <= worker.pool_tokens
    slots = -(-query.prompt_tokens // block_tokens)
    return in_pool and (worker.stage_slots_total == 0 or slots <= worker.stage_slots_free)
