"""Routing policy: which workers serve a request and where its KV comes from. Pure.

`route(request, view, now)` reads nothing but its arguments. `now` and every `*_until` in the view
are seconds on one monotonic clock. The rules, in the order they apply:

1. Decode worker: connected, not draining, of the cluster's namespace, with a pool the request fits
   in, and not known to be full. Among those the paper's two-phase rule (arXiv 2602.21548): where
   tok_e + len <= Z = 1.05 * (len + sum of tok_e) / |E|, the one with the fewest sequences; where none is
   under Z, the one with the fewest tokens.
2. Prefill worker: connected, not draining, same namespace, with no more than `PREFILL_BACKLOG_S_MAX`
   (beta) seconds of its own compute queued; of those, ones with at most `READ_BACKLOG_S_MAX` (alpha)
   seconds of reading queued come first; then the fewest tokens.
3. Source: `direct` when the uncached tail is short, or when there is no prefill worker and
   something is stored; `storage_to_prefill` for a longer tail behind a stored prefix; `recompute`
   otherwise, by prefill when the prompt is longer than what decode takes on itself.
4. kvstore: rendezvous hashing of the chain's first block key, so that every router and every turn
   of a conversation names the same store, and a store's loss moves only its own chains.
"""

import hashlib
from collections.abc import Iterable, Sequence
from enum import StrEnum

import msgspec

from common.routes import Leg, Order, Plan, Source, plan_of

Z_FACTOR = 1.05  # the paper's slack over the mean
PREFILL_BACKLOG_S_MAX = 5.0  # beta of the paper
READ_BACKLOG_S_MAX = 3.0  # alpha of the paper
DIRECT_TAIL_TOKENS = 512  # where prefill speed is not known yet
DIRECT_TAIL_S = 0.25  # of decode's own compute that a tail may take from the running batch
DIRECT_TAIL_TOKENS_MIN, DIRECT_TAIL_TOKENS_MAX = 128, 4096


class DecodeView(msgspec.Struct, frozen=True):
    """A decode worker as far as the router knows. `tokens` and `sequences` include what was just sent there."""

    address: str
    id: str
    namespace: str
    sequences: int = 0
    tokens: int = 0
    pool_tokens: int = 0  # what its pool holds in all; 0: not known
    prefill_tokens_per_s: float = 0.0
    connected: bool = True
    draining: bool = False
    full_until: float = 0.0  # it refused a request and asked to be left alone until then


class PrefillView(msgspec.Struct, frozen=True):
    address: str
    id: str
    namespace: str
    tokens: int = 0
    prefill_tokens_per_s: float = 0.0  # 0: not measured
    read_bytes_per_s: float = 0.0  # 0: not measured
    read_queue_bytes: int = 0
    connected: bool = True
    draining: bool = False


class ClusterView(msgspec.Struct, frozen=True):
    """One moment of the cluster. `kvstores` are the addresses of those that answer."""

    namespace: str
    block_tokens: int
    decodes: tuple[DecodeView, ...] = ()
    prefills: tuple[PrefillView, ...] = ()
    kvstores: tuple[str, ...] = ()


class Query(msgspec.Struct, frozen=True):
    """What the policy needs of a request.

    Attributes:
        prompt_tokens: everything whose KV must be there before the next token: prompt, and the output of a moved request.
        stored_blocks: leading blocks that are stored and leased.
        kvstore: address of the store that holds them, and takes the new ones; empty: none.
        avoid: decode workers that failed this request; taken only when there is no other.
        direct_tail_tokens: the setting; None: from measured speed.
    """

    prompt_tokens: int
    stored_blocks: int = 0
    kvstore: str = ""
    avoid: frozenset[str] = frozenset()
    direct_tail_tokens: int | None = None


class Route(msgspec.Struct, frozen=True):
    """The decision. Empty `prefill`: decode computes itself; empty `kvstore`: nothing is stored."""

    decode: str
    plan: Plan
    legs: tuple[Leg, ...]
    order: Order
    prefill: str
    kvstore: str
    reason: str

    @property
    def stored_blocks(self) -> int:
        """Blocks that are loaded."""
        return sum(leg.blocks for leg in self.legs)


class Why(StrEnum):
    UNAVAILABLE = "unavailable"  # no worker is there
    OVERLOADED = "overloaded"  # there are, but all are full
    TOO_LARGE = "too_large"  # the request fits in none, now or later


class Refusal(msgspec.Struct, frozen=True):
    """No worker can take the request."""

    why: Why
    reason: str
    retry_after_s: float = 1.0


def route(request: Query, view: ClusterView, now: float) -> Route | Refusal:
    """Places a request, or says why it can't be placed."""
    decode = place_decode(request, view, now)
    if isinstance(decode, Refusal):
        return decode
    chosen, why_decode = decode
    prefill = place_prefill(view)
    tail_max = direct_tail_tokens(request, chosen)
    tail = request.prompt_tokens - request.stored_blocks * view.block_tokens
    source, by_prefill, why_source = _source(request, tail, tail_max, prefill is not None)
    legs = () if source is Source.RECOMPUTE else (Leg(0, request.stored_blocks, source),)
    return Route(
        decode=chosen.address,
        plan=plan_of((source,), Order.FORWARD, by_prefill),
        legs=legs,
        order=Order.FORWARD,
        prefill=prefill.address if prefill is not None and by_prefill else "",
        kvstore=request.kvstore,
        reason=f"{why_source}; {why_decode}",
    )


def place_decode(request: Query, view: ClusterView, now: float) -> tuple[DecodeView, str] | Refusal:
    """The two-phase rule over the decode workers that could take the request."""
    usable = [w for w in view.decodes if w.connected and not w.draining and w.namespace == view.namespace]
    if not usable:
        return Refusal(Why.UNAVAILABLE, "no decode worker is connected that isn't draining")
    fitting = [w for w in usable if w.pool_tokens == 0 or request.prompt_tokens < w.pool_tokens]
    if not fitting:
        largest = max(w.pool_tokens for w in usable)
        reason = f"the prompt has {request.prompt_tokens} tokens and the largest KV pool holds {largest}"
        return Refusal(Why.TOO_LARGE, reason)
    free = [w for w in fitting if w.full_until <= now]
    if not free:
        wait_s = max(0.1, min(w.full_until for w in fitting) - now)
        return Refusal(Why.OVERLOADED, f"all {len(fitting)} decode workers are full", retry_after_s=wait_s)
    candidates = [w for w in free if w.address not in request.avoid] or free
    total = request.prompt_tokens + sum(w.tokens for w in candidates)
    limit = Z_FACTOR * total / len(candidates)
    under = [w for w in candidates if w.tokens + request.prompt_tokens <= limit]
    if under:
        best = min(under, key=lambda w: (w.sequences, w.tokens, w.address))
        return best, f"decode {best.id}: fewest sequences ({best.sequences}) of {len(under)} under Z={limit:.0f} tokens"
    best = min(candidates, key=lambda w: (w.tokens, w.sequences, w.address))
    return best, f"decode {best.id}: fewest tokens ({best.tokens}) of {len(candidates)}, none under Z={limit:.0f}"


def place_prefill(view: ClusterView) -> PrefillView | None:
    """The prefill worker to hand a prompt to, or None when none has room."""
    usable = [
        w
        for w in view.prefills
        if w.connected
        and not w.draining
        and w.namespace == view.namespace
        and w.tokens <= _or_inf(PREFILL_BACKLOG_S_MAX * w.prefill_tokens_per_s)
    ]
    return min(usable, key=lambda w: (_reads_late(w), w.tokens, w.address), default=None)


def direct_tail_tokens(request: Query, decode: DecodeView) -> int:
    """The longest uncached tail that decode computes inside its own batch."""
    if request.direct_tail_tokens is not None:
        return request.direct_tail_tokens
    if decode.prefill_tokens_per_s <= 0:
        return DIRECT_TAIL_TOKENS
    measured = int(DIRECT_TAIL_S * decode.prefill_tokens_per_s)
    return max(DIRECT_TAIL_TOKENS_MIN, min(DIRECT_TAIL_TOKENS_MAX, measured))


def pick_kvstore(first_key: bytes, kvstores: Sequence[str]) -> str:
    """Rendezvous hashing: the store with the highest hash of (store, key); empty when there is none."""
    return max(kvstores, key=lambda address: hashlib.sha256(address.encode() + b"\0" + first_key).digest(), default="")


def cluster_namespace(namespaces: Iterable[str], current: str) -> str:
    """The namespace most decode workers have; the current one wins a tie, so that it doesn't flap."""
    counts: dict[str, int] = {}
    for namespace in namespaces:
        counts[namespace] = counts.get(namespace, 0) + 1
    return max(counts, key=lambda name: (counts[name], name == current, name), default=current)


def _source(request: Query, tail: int, tail_max: int, prefill: bool) -> tuple[Source, bool, str]:
    """(source, whether prefill takes part, why)."""
    if request.stored_blocks and tail <= tail_max:
        return Source.STORAGE_TO_DECODE, False, f"tail of {tail} tokens is at most {tail_max}"
    if request.stored_blocks and not prefill:
        return Source.STORAGE_TO_DECODE, False, f"tail of {tail} tokens, but no prefill worker has room"
    if request.stored_blocks:
        return Source.STORAGE_TO_PREFILL, True, f"tail of {tail} tokens is over {tail_max}"
    if prefill and tail > tail_max:
        return Source.RECOMPUTE, True, f"nothing stored, {tail} tokens are over {tail_max}"
    why = "worth no hand-over" if tail <= tail_max else "but no prefill worker has room"
    return Source.RECOMPUTE, False, f"nothing stored, {tail} tokens, {why}"


def _reads_late(worker: PrefillView) -> bool:
    return worker.read_queue_bytes > _or_inf(READ_BACKLOG_S_MAX * worker.read_bytes_per_s)


def _or_inf(limit: float) -> float:
    """A limit whose rate isn't measured yet doesn't bind."""
    return limit if limit > 0 else float("inf")
