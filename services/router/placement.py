"""Routing policy: which workers serve a request and where its KV comes from. Pure.

`route(query, view, now, settings)` reads nothing but its arguments. `now` and every `*_until` in the view
are seconds on one monotonic clock. The rules, in the order they apply (docs/dualpath.md has the sums):

1. Workers: a shortlist of decode and of prefill workers by the paper's rules (`policy/workers.py`).
2. Candidates: every plan that may be used, over every pair of the shortlist, with its estimated finish
   (`policy/estimates.py`), but for those that would cost decode's running requests too much (`policy/candidates.py`).
3. Choice: the earliest finish; of those within the error band of it, the one that costs least.
4. Alternates: the prefill workers that come next by the paper's rules. By the time one is asked, estimates are stale.
5. kvstore: rendezvous hashing of the chain's first block key (`rendezvous.py`), before the lookup.
"""

from collections.abc import Iterable

import msgspec

from common.routes import Leg, Order, Plan
from services.router.policy.candidates import candidates, choose, direct_tail_tokens
from services.router.policy.estimates import Estimate
from services.router.policy.settings import PolicySettings
from services.router.policy.view import ClusterView, Query
from services.router.policy.workers import ALTERNATES_MAX, Refusal, decodes, prefills, shortlist


class Route(msgspec.Struct, frozen=True):
    """The decision.

    Attributes:
        kvstore: takes the chain's new blocks; empty: nothing is stored.
        estimate: the candidate that was chosen; it names workers, plan and legs.
        candidates: all that were considered.
        alternates: prefill workers to ask when the chosen one fails, best first; empty when decode computes.
        tail_tokens: what decode had better compute itself than ask another for.
    """

    kvstore: str
    reason: str
    estimate: Estimate
    candidates: tuple[Estimate, ...]
    alternates: tuple[str, ...] = ()
    tail_tokens: int = 0

    @property
    def decode(self) -> str:
        return self.estimate.decode

    @property
    def prefill(self) -> str:
        """Empty: decode computes itself."""
        return self.estimate.prefill

    @property
    def plan(self) -> Plan:
        return self.estimate.plan

    @property
    def order(self) -> Order:
        return self.estimate.order

    @property
    def legs(self) -> tuple[Leg, ...]:
        return self.estimate.legs

    @property
    def loads(self) -> bool:
        """Whether stored blocks are needed."""
        return bool(self.legs)


def route(query: Query, view: ClusterView, now: float, settings: PolicySettings = PolicySettings()) -> Route | Refusal:
    """Places a request, or says why it can't be placed."""
    listed = decodes(query, view, now, settings)
    if isinstance(listed, Refusal):
        return listed
    ranked = prefills(query, view, settings)
    found = candidates(query, view, settings, [one.worker for one in listed], shortlist(query, ranked, settings))
    chosen, why = choose(found, settings)
    decode = next(one for one in listed if one.worker.address == chosen.decode)
    others = [worker.address for worker in ranked if worker.address != chosen.prefill] if chosen.prefill else []
    return Route(
        query.kvstore,
        f"{why}; decode {decode.worker.id}: {decode.reason}",
        chosen,
        tuple(found),
        tuple(others[:ALTERNATES_MAX]),
        direct_tail_tokens(decode.worker, settings),
    )


def cluster_namespace(namespaces: Iterable[str], current: str) -> str:
    """The namespace most decode workers have; the current one wins a tie, so that it doesn't flap."""
    counts: dict[str, int] = {}
    for namespace in namespaces:
        counts[namespace] = counts.get(namespace, 0) + 1
    return max(counts, key=lambda name: (counts[name], name == current, name), default=current)
