"""The routing policy: golden routes as text, and what holds for every cluster."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from common.routes import Plan
from services.router.placement import (
    PREFILL_BACKLOG_S_MAX,
    Z_FACTOR,
    ClusterView,
    DecodeView,
    PrefillView,
    Query,
    Refusal,
    Route,
    Why,
    cluster_namespace,
    pick_kvstore,
    route,
)

NS = "aa"


def decode(name: str, **facts: object) -> DecodeView:
    return DecodeView(address=f"{name}:1", id=name, namespace=NS, **facts)  # type: ignore[arg-type]


def prefill(name: str, **facts: object) -> PrefillView:
    return PrefillView(address=f"{name}:1", id=name, namespace=NS, **facts)  # type: ignore[arg-type]


def view(*workers: DecodeView | PrefillView) -> ClusterView:
    return ClusterView(
        namespace=NS,
        block_tokens=16,
        decodes=tuple(w for w in workers if isinstance(w, DecodeView)),
        prefills=tuple(w for w in workers if isinstance(w, PrefillView)),
    )


def text(decision: Route | Refusal) -> str:
    if isinstance(decision, Refusal):
        return f"refused ({decision.why}): {decision.reason}"
    return (
        f"{decision.decode} {decision.plan} blocks={decision.stored_blocks} prefill={decision.prefill or '-'}: {decision.reason}"
    )


GOLDEN = [
    (
        Query(prompt_tokens=1000, stored_blocks=60),
        view(decode("d0"), prefill("p0")),
        "d0:1 direct blocks=60 prefill=-: tail of 40 tokens is at most 512; "
        "decode d0: fewest sequences (0) of 1 under Z=1050 tokens",
    ),
    (
        Query(prompt_tokens=1000, stored_blocks=10),
        view(decode("d0"), prefill("p0")),
        "d0:1 storage_to_prefill blocks=10 prefill=p0:1: tail of 840 tokens is over 512; "
        "decode d0: fewest sequences (0) of 1 under Z=1050 tokens",
    ),
    (
        Query(prompt_tokens=1000, stored_blocks=10),
        view(decode("d0")),
        "d0:1 direct blocks=10 prefill=-: tail of 840 tokens, but no prefill worker has room; "
        "decode d0: fewest sequences (0) of 1 under Z=1050 tokens",
    ),
    (
        Query(prompt_tokens=1000),
        view(decode("d0"), prefill("p0")),
        "d0:1 recompute blocks=0 prefill=p0:1: nothing stored, 1000 tokens are over 512; "
        "decode d0: fewest sequences (0) of 1 under Z=1050 tokens",
    ),
    (
        Query(prompt_tokens=100),
        view(decode("d0"), prefill("p0")),
        "d0:1 recompute blocks=0 prefill=-: nothing stored, 100 tokens, worth no hand-over; "
        "decode d0: fewest sequences (0) of 1 under Z=105 tokens",
    ),
    (
        Query(prompt_tokens=1000),
        view(decode("d0"), prefill("p0", tokens=6000, prefill_tokens_per_s=1000.0)),
        "d0:1 recompute blocks=0 prefill=-: nothing stored, 1000 tokens, but no prefill worker has room; "
        "decode d0: fewest sequences (0) of 1 under Z=1050 tokens",
    ),
    (
        Query(prompt_tokens=1000, direct_tail_tokens=0),
        view(decode("d0"), prefill("p0", tokens=10, read_queue_bytes=400, read_bytes_per_s=100.0), prefill("p1", tokens=500)),
        "d0:1 recompute blocks=0 prefill=p1:1: nothing stored, 1000 tokens are over 0; "
        "decode d0: fewest sequences (0) of 1 under Z=1050 tokens",
    ),
    (
        Query(prompt_tokens=100),
        view(decode("d0", sequences=1, tokens=9000), decode("d1", sequences=9, tokens=100), decode("d2", sequences=5, tokens=90)),
        "d2:1 recompute blocks=0 prefill=-: nothing stored, 100 tokens, worth no hand-over; "
        "decode d2: fewest sequences (5) of 2 under Z=3252 tokens",
    ),
    (
        Query(prompt_tokens=9000),
        view(decode("d0", sequences=1, tokens=500), decode("d1", sequences=9, tokens=400)),
        "d1:1 recompute blocks=0 prefill=-: nothing stored, 9000 tokens, but no prefill worker has room; "
        "decode d1: fewest tokens (400) of 2, none under Z=5198",
    ),
    (
        Query(prompt_tokens=10),
        view(decode("d0", full_until=7.0), decode("d1", full_until=8.0)),
        "refused (overloaded): all 2 decode workers are full",
    ),
    (
        Query(prompt_tokens=10),
        view(decode("d0", draining=True), decode("d1", connected=False)),
        "refused (unavailable): no decode worker is connected that isn't draining",
    ),
    (
        Query(prompt_tokens=4096),
        view(decode("d0", pool_tokens=2048)),
        "refused (too_large): the prompt has 4096 tokens and the largest KV pool holds 2048",
    ),
]


def test_routes_are_as_written_down() -> None:
    for query, cluster, expected in GOLDEN:
        assert text(route(query, cluster, 5.0)) == expected


def test_a_worker_that_failed_the_request_is_taken_only_when_there_is_no_other() -> None:
    two = view(decode("d0"), decode("d1", sequences=50, tokens=10))
    assert route(Query(10, avoid=frozenset({"d0:1"})), two, 0.0).decode == "d1:1"  # type: ignore[union-attr]
    assert route(Query(10, avoid=frozenset({"d0:1"})), view(decode("d0")), 0.0).decode == "d0:1"  # type: ignore[union-attr]


def test_the_tail_decode_takes_follows_its_measured_speed() -> None:
    stored = Query(prompt_tokens=1600 + 300, stored_blocks=100)
    for speed, plan in ((400.0, Plan.STORAGE_TO_PREFILL), (4000.0, Plan.DIRECT)):
        decision = route(stored, view(decode("d0", prefill_tokens_per_s=speed), prefill("p0")), 0.0)
        assert isinstance(decision, Route) and decision.plan is plan


def test_a_refusal_says_when_the_first_full_worker_is_free_again() -> None:
    refusal = route(Query(10), view(decode("d0", full_until=7.5), decode("d1", full_until=9.0)), 5.0)
    assert isinstance(refusal, Refusal) and refusal.why is Why.OVERLOADED and refusal.retry_after_s == 2.5


tokens = st.integers(0, 100_000)
decodes = st.builds(
    DecodeView,
    address=st.uuids().map(str),
    id=st.just("d"),
    namespace=st.sampled_from([NS, "bb"]),
    sequences=st.integers(0, 64),
    tokens=tokens,
    pool_tokens=st.sampled_from([0, 1024, 65536]),
    prefill_tokens_per_s=st.floats(0, 1e5),
    connected=st.booleans(),
    draining=st.booleans(),
    full_until=st.floats(0, 10),
)
prefills = st.builds(
    PrefillView,
    address=st.uuids().map(str),
    id=st.just("p"),
    namespace=st.sampled_from([NS, "bb"]),
    tokens=tokens,
    prefill_tokens_per_s=st.floats(0, 1e5),
    read_bytes_per_s=st.floats(0, 1e10),
    read_queue_bytes=st.integers(0, 1 << 40),
    connected=st.booleans(),
    draining=st.booleans(),
)
clusters = st.builds(
    ClusterView,
    namespace=st.just(NS),
    block_tokens=st.just(16),
    decodes=st.lists(decodes, max_size=6).map(tuple),
    prefills=st.lists(prefills, max_size=6).map(tuple),
)
queries = st.integers(1, 50_000).flatmap(
    lambda size: st.builds(Query, prompt_tokens=st.just(size), stored_blocks=st.integers(0, (size - 1) // 16))
)


@given(queries, clusters)
def test_a_route_names_only_workers_that_can_serve_it(query: Query, cluster: ClusterView) -> None:
    decision = route(query, cluster, 5.0)
    able = {
        w.address
        for w in cluster.decodes
        if w.connected
        and not w.draining
        and w.namespace == NS
        and w.full_until <= 5
        and not 0 < w.pool_tokens <= query.prompt_tokens
    }
    if isinstance(decision, Refusal):
        assert not able and decision.reason
        return
    assert decision.decode in able
    helpers = {w.address: w for w in cluster.prefills if w.connected and not w.draining and w.namespace == NS}
    if decision.prefill:
        helper = helpers[decision.prefill]
        assert helper.prefill_tokens_per_s == 0 or helper.tokens <= PREFILL_BACKLOG_S_MAX * helper.prefill_tokens_per_s
    assert (decision.plan is Plan.DIRECT) <= (decision.stored_blocks > 0 and not decision.prefill)
    assert (decision.plan is Plan.STORAGE_TO_PREFILL) <= (decision.stored_blocks > 0 and bool(decision.prefill))
    assert (decision.plan is Plan.RECOMPUTE) == (query.stored_blocks == 0) == (decision.stored_blocks == 0)
    assert decision.reason


@given(queries, clusters)
def test_decode_is_under_the_papers_limit_whenever_one_is(query: Query, cluster: ClusterView) -> None:
    free = [
        w
        for w in cluster.decodes
        if w.connected
        and not w.draining
        and w.namespace == NS
        and w.full_until <= 5
        and not 0 < w.pool_tokens <= query.prompt_tokens
    ]
    decision = route(query, cluster, 5.0)
    if isinstance(decision, Refusal):
        return
    limit = Z_FACTOR * (query.prompt_tokens + sum(w.tokens for w in free)) / len(free)
    under = [w for w in free if w.tokens + query.prompt_tokens <= limit]
    chosen = next(w for w in free if w.address == decision.decode)
    if under:
        assert chosen in under and chosen.sequences == min(w.sequences for w in under)
    else:
        assert chosen.tokens == min(w.tokens for w in free)


@given(queries, clusters)
def test_the_same_view_gives_the_same_route_whatever_its_order(query: Query, cluster: ClusterView) -> None:
    turned = msgspec.structs.replace(cluster, decodes=cluster.decodes[::-1], prefills=cluster.prefills[::-1])
    assert route(query, cluster, 5.0) == route(query, turned, 5.0)


@given(st.binary(min_size=32, max_size=32), st.lists(st.uuids().map(str), min_size=2, max_size=8, unique=True))
def test_losing_a_kvstore_moves_only_its_own_chains(key: bytes, stores: list[str]) -> None:
    chosen = pick_kvstore(key, stores)
    assert chosen == pick_kvstore(key, stores[::-1])
    for lost in stores:
        if lost != chosen:
            assert pick_kvstore(key, [store for store in stores if store != lost]) == chosen


def test_without_a_kvstore_none_is_named() -> None:
    assert pick_kvstore(b"k" * 32, ()) == ""


def test_the_namespace_of_most_workers_is_the_clusters_and_a_tie_changes_nothing() -> None:
    assert cluster_namespace(["a", "b", "b"], "a") == "b"
    assert cluster_namespace(["a", "b"], "a") == "a"
    assert cluster_namespace(["a", "b"], "b") == "b"
    assert cluster_namespace([], "b") == "b"
