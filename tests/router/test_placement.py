"""The routing policy: golden routes as text, and what holds for every cluster."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from common.routes import Leg, Order, Plan, Source
from common.runs import QueuedRun
from services.router.placement import Route, cluster_namespace, route
from services.router.policy.candidates import SMALL_S, direct_tail_tokens
from services.router.policy.plans import PLANS, SHAPES
from services.router.policy.rates import STALE_S
from services.router.policy.settings import Z_FACTOR, PolicySettings, Scheduler
from services.router.policy.view import ClusterView, DecodeView, Link, Query
from services.router.policy.workers import ALTERNATES_MAX, Refusal, Why
from tests.router.clusters import BLOCK_BYTES, BLOCK_TOKENS, cases, decode, measured, prefill, text, view, written_down

M = measured
OURS = PolicySettings()
PAPER = PolicySettings(
    scheduler=Scheduler.PAPER, plans=(Plan.STORAGE_TO_DECODE, Plan.STORAGE_TO_PREFILL, Plan.RECOMPUTE), layerwise=False
)
TURNS = msgspec.structs.replace(PAPER, scheduler=Scheduler.ROUND_ROBIN)
WHOLE = PolicySettings(plans=(Plan.STORAGE_TO_DECODE, Plan.STORAGE_TO_PREFILL))

LONG = Query(prompt_tokens=10_000, stored_blocks=600)  # 9,600 tokens stored, 400 to compute
SHORT_TAIL = Query(prompt_tokens=9_700, stored_blocks=600)
FRESH = Query(prompt_tokens=1000)
PAIR = view(decode("d0", **M()), prefill("p0", **M()))

ROUTES: dict[str, tuple[Query, ClusterView, PolicySettings]] = {
    "alone and idle: both links and the compute share the prefix": (LONG, PAIR, OURS),
    "storage is quick: a short tail stays with decode": (
        SHORT_TAIL,
        view(decode("d0", **M(storage=20e9)), prefill("p0", **M(storage=20e9))),
        OURS,
    ),
    "decode has its fill of tails: prefill computes": (
        SHORT_TAIL,
        view(decode("d0", queued_tokens=200, **M(storage=20e9)), prefill("p0", **M(storage=20e9))),
        OURS,
    ),
    "prefill would be late with it: decode computes": (
        SHORT_TAIL,
        view(decode("d0", **M(storage=1e9)), prefill("p0", queued_tokens=4000, **M(storage=1e9))),
        OURS,
    ),
    "decode's storage link is backlogged: prefill's takes more": (
        LONG,
        view(decode("d0", **M(storage_queue=200e6)), prefill("p0", queued_tokens=3000, **M())),
        OURS,
    ),
    "decode's storage link is hopeless: prefill's and the compute": (
        LONG,
        view(decode("d0", **M(storage_queue=900e6)), prefill("p0", **M())),
        OURS,
    ),
    "prefill's storage link is hopeless, and its compute late": (
        LONG,
        view(decode("d0", **M(storage=1e9)), prefill("p0", queued_tokens=3000, **M(storage_queue=900e6))),
        OURS,
    ),
    "decode serves enough already: nobody reads from it": (
        LONG,
        view(decode("d0", **M(storage=1e9, read_queue=2e9)), prefill("p0", **M())),
        OURS,
    ),
    "the way back to decode is slow: little over prefill": (
        LONG,
        view(decode("d0", **M()), prefill("p0", **M() | {"peer_write": Link(20e6)})),
        OURS,
    ),
    "storage is far slower than computing": (
        LONG,
        view(decode("d0", **M(storage=1e6)), prefill("p0", **M(50_000, storage=1e6))),
        OURS,
    ),
    "nothing is measured yet": (LONG, view(decode("d0"), prefill("p0")), OURS),
    "another request is measuring prefill's link": (
        LONG,
        view(decode("d0", **M()), prefill("p0", **M() | {"storage": Link(0, 5e6)})),
        OURS,
    ),
    "a slow link that was long passed over may be twice as quick": (
        LONG,
        view(decode("d0", **M() | {"storage": Link(50e6, 0, 100.0)}), prefill("p0", **M(storage=200e6))),
        OURS,
    ),
    "experience says that split takes longer than the model": (
        LONG,
        view(*PAIR.decodes, *PAIR.prefills, corrections={Plan.SPLIT: 1.8, Plan.SPLIT_MEET: 1.8}),
        OURS,
    ),
    "stored at a quarter of the size: worth loading": (
        LONG,
        view(*PAIR.decodes, *PAIR.prefills, stored_bytes=BLOCK_BYTES // 4),
        OURS,
    ),
    "a long prompt is queued at prefill, due later than a short tail: that overtakes it": (
        SHORT_TAIL,
        view(
            decode("d0", queued_tokens=200, **M(storage=20e9)),
            prefill("p0", queued_tokens=4000, queued_runs=(QueuedRun(4000, 8.0),), **M(storage=20e9)),
        ),
        OURS,
    ),
    "a long prompt is queued at prefill, and is late: a short tail waits for it": (
        SHORT_TAIL,
        view(
            decode("d0", queued_tokens=200, **M(storage=20e9)),
            prefill("p0", queued_tokens=4000, queued_runs=(QueuedRun(4000, -1.0),), **M(storage=20e9)),
        ),
        OURS,
    ),
    "who is busy with a long prompt is free for a tail, who is busy with tails is not": (
        SHORT_TAIL,
        view(
            decode("d0", queued_tokens=200, **M(storage=20e9)),
            prefill("p0", queued_tokens=4000, queued_runs=(QueuedRun(4000, 8.0),), **M(storage=20e9)),
            prefill("p1", queued_tokens=800, queued_runs=(QueuedRun(800, 0.1),), **M(storage=20e9)),
        ),
        OURS,
    ),
    "no prefill worker: decode loads, computes and meets": (LONG, view(decode("d0", **M())), OURS),
    "nothing stored, long": (FRESH, PAIR, OURS),
    "nothing stored, short": (Query(prompt_tokens=100), PAIR, OURS),
    "prefill over beta is waited for all the same": (
        FRESH,
        view(decode("d0", **M()), prefill("p0", queued_tokens=6000, **M())),
        OURS,
    ),
    "prefill under beta comes before one over it": (
        FRESH,
        view(decode("d0", **M()), prefill("p0", queued_tokens=6000, **M()), prefill("p1", queued_tokens=4000, **M())),
        OURS,
    ),
    "decode still holds all that is stored": (
        msgspec.structs.replace(SHORT_TAIL, resident={"d1:1": 600}),
        view(decode("d0", **M()), decode("d1", sequences=3, tokens=900, **M()), prefill("p0", **M())),
        OURS,
    ),
    "decode still holds a part, and the rest is long: prefill reads that from decode, and the rest is shared": (
        msgspec.structs.replace(LONG, resident={"d0:1": 400}),
        PAIR,
        OURS,
    ),
    "decode still holds all that is stored, and more": (
        Query(prompt_tokens=20_000, stored_blocks=100, resident={"d0:1": 700}),
        view(decode("d0", **M(storage=1e6)), prefill("p0", **M(storage=1e6))),
        OURS,
    ),
    "what decode holds is not worth a slow way to prefill": (
        msgspec.structs.replace(LONG, stored_blocks=0, resident={"d0:1": 600}),
        view(decode("d0", **M() | {"peer_read": Link(20e6)}), prefill("p0", **M())),
        OURS,
    ),
    "paper: what decode holds, prefill reads": (msgspec.structs.replace(LONG, resident={"d0:1": 600}), PAIR, PAPER),
    "prefill still holds all that is stored: it is handed over, and nothing is loaded": (
        msgspec.structs.replace(LONG, resident={"p0:1": 600}),
        PAIR,
        OURS,
    ),
    "prefill still holds a part: the rest is shared": (msgspec.structs.replace(LONG, resident={"p0:1": 400}), PAIR, OURS),
    "prefill still holds more than is stored": (
        Query(prompt_tokens=20_000, stored_blocks=100, resident={"p0:1": 700}),
        view(decode("d0", **M(storage=1e6)), prefill("p0", **M(storage=1e6))),
        OURS,
    ),
    "decode holds a part, and prefill more of it": (
        msgspec.structs.replace(LONG, resident={"d0:1": 200, "p0:1": 500}),
        PAIR,
        OURS,
    ),
    "prefill holds a part, and decode more of it: prefill reads the difference": (
        msgspec.structs.replace(LONG, resident={"d0:1": 600, "p0:1": 500}),
        PAIR,
        OURS,
    ),
    "an agent's next turn goes to the prefill worker that holds its context, though others are idler": (
        msgspec.structs.replace(LONG, resident={"p4:1": 580}),
        view(
            decode("d0", **M()),
            *(prefill(f"p{i}", **M()) for i in range(4)),
            prefill("p4", tokens=500, queued_tokens=900, **M()),
        ),
        OURS,
    ),
    "who holds the context is so busy that loading elsewhere is quicker": (
        msgspec.structs.replace(LONG, resident={"p4:1": 580}),
        view(
            decode("d0", **M()),
            *(prefill(f"p{i}", **M()) for i in range(4)),
            prefill("p4", tokens=500, queued_tokens=4900, **M()),
        ),
        OURS,
    ),
    "what prefill holds is not worth a slow way to decode": (
        msgspec.structs.replace(LONG, resident={"p1:1": 600}),
        view(decode("d0", **M()), prefill("p0", **M()), prefill("p1", **M() | {"peer_write": Link(20e6)})),
        OURS,
    ),
    "paper: what prefill holds is handed over": (msgspec.structs.replace(LONG, resident={"p0:1": 600}), PAIR, PAPER),
    "begun elsewhere: decode does it all": (msgspec.structs.replace(LONG, moved=True), PAIR, OURS),
    "only whole loads are allowed": (LONG, view(decode("d0", **M()), prefill("p0", **M(storage=150e6))), WHOLE),
    "paper: the shorter read queue is decode's": (
        LONG,
        view(decode("d0", **M()), prefill("p0", **M(storage_queue=50e6))),
        PAPER,
    ),
    "paper: the shorter read queue is prefill's": (
        LONG,
        view(decode("d0", **M(storage_queue=50e6)), prefill("p0", **M())),
        PAPER,
    ),
    "paper: alpha passes over who reads much": (
        LONG,
        view(
            decode("d0", **M(storage_queue=900e6)),
            prefill("p0", **M(storage_queue=400e6)),
            prefill("p1", tokens=500, **M(storage_queue=200e6)),
        ),
        PAPER,
    ),
    "paper: nothing stored": (FRESH, PAIR, PAPER),
    "in turn": (
        msgspec.structs.replace(LONG, turn=3),
        view(decode("d0", **M()), decode("d1", **M()), prefill("p0", **M()), prefill("p1", **M())),
        TURNS,
    ),
    "fewest sequences under Z": (
        Query(100),
        view(decode("d0", sequences=1, tokens=9000), decode("d1", sequences=9, tokens=100), decode("d2", sequences=5, tokens=90)),
        OURS,
    ),
    "fewest tokens over Z": (
        Query(9000),
        view(decode("d0", sequences=1, tokens=500), decode("d1", sequences=9, tokens=400)),
        OURS,
    ),
    "room in the pool comes first": (
        Query(1000),
        view(decode("d0", tokens=7500, pool_tokens=8192), decode("d1", sequences=9, tokens=90_000, pool_tokens=1 << 20)),
        OURS,
    ),
    "room in the stage comes first": (
        Query(1000),
        view(
            decode("d0", stage_slots_free=62, stage_slots_total=80),
            decode("d1", sequences=9, stage_slots_free=63, stage_slots_total=80),
        ),
        OURS,
    ),
    "all are full": (Query(10), view(decode("d0", full_until=7.0), decode("d1", full_until=8.0)), OURS),
    "nobody is there": (Query(10), view(decode("d0", draining=True), decode("d1", connected=False)), OURS),
    "larger than any pool": (Query(4096), view(decode("d0", pool_tokens=2048)), OURS),
}


def test_routes_are_as_written_down() -> None:
    decisions = {what: route(query, cluster, 5.0, settings) for what, (query, cluster, settings) in ROUTES.items()}
    assert "".join(f"{what}\n  {text(decision)}\n" for what, decision in decisions.items()) == written_down("routes.txt")


def test_a_worker_that_failed_the_request_is_taken_only_when_there_is_no_other() -> None:
    two = view(decode("d0"), decode("d1", sequences=50, tokens=10))
    assert placed(route(Query(10, avoid=frozenset({"d0:1"})), two, 0.0)).decode == "d1:1"
    assert placed(route(Query(10, avoid=frozenset({"d0:1"})), view(decode("d0")), 0.0)).decode == "d0:1"


def test_the_tail_decode_takes_follows_its_measured_speed() -> None:
    for tokens_per_s, tail in ((0.0, 512), (100.0, 128), (4000.0, 1000), (1e6, 4096)):
        assert direct_tail_tokens(decode("d0", prefill_tokens_per_s=tokens_per_s), OURS) == tail
    assert direct_tail_tokens(decode("d0"), PolicySettings(direct_tail_tokens=7)) == 7


def test_a_worker_that_is_quicker_by_little_is_no_reason_to_leave_what_another_holds() -> None:
    """It would save four milliseconds of computing and load for three."""
    holder, quicker = decode("d0", **M(tokens_per_s=10_000)), decode("d1", **M(tokens_per_s=10_500, storage=1e9))
    query = Query(800 + 3 * BLOCK_TOKENS, stored_blocks=3, resident={"d0:1": 3})
    taken = placed(route(query, view(holder, quicker), 0.0))
    assert taken.decode == "d0:1" and taken.estimate.moving_s == 0
    assert any(e.finish_s < taken.estimate.finish_s and e.computed_tokens == 800 for e in taken.candidates)


def test_a_refusal_says_when_the_first_full_worker_is_free_again() -> None:
    refusal = route(Query(10), view(decode("d0", full_until=7.5), decode("d1", full_until=9.0)), 5.0)
    assert isinstance(refusal, Refusal) and refusal.why is Why.OVERLOADED and refusal.retry_after_s == 2.5


def test_turns_go_round() -> None:
    cluster = view(*(decode(f"d{i}") for i in range(3)), *(prefill(f"p{i}", **M()) for i in range(2)))
    taken = [placed(route(Query(10_000, turn=turn), cluster, 0.0, TURNS)) for turn in range(6)]
    assert [t.decode for t in taken] == [f"d{i % 3}:1" for i in range(6)]
    assert [t.prefill for t in taken] == [f"p{i % 2}:1" for i in range(6)]


ALL_SETTINGS = st.builds(
    PolicySettings,
    plans=st.lists(st.sampled_from(PLANS), unique=True).map(tuple),
    layerwise=st.booleans(),
    scheduler=st.sampled_from(Scheduler),
    direct_tail_tokens=st.sampled_from([None, 0, 300]),
    error_band=st.sampled_from([0.0, 0.05, 0.3]),
)


@given(cases(), ALL_SETTINGS)
def test_a_route_names_only_workers_that_can_serve_it(case: tuple[Query, ClusterView], settings: PolicySettings) -> None:
    query, cluster = case
    decision = route(query, cluster, 5.0, settings)
    able = {w.address for w in able_decodes(query, cluster)}
    if isinstance(decision, Refusal):
        assert not able and decision.reason
        return
    assert decision.decode in able and decision.reason
    assert (decision.decode not in query.avoid) or able <= query.avoid
    assert not decision.prefill or any(w.address == decision.prefill and cluster.usable(w) for w in cluster.prefills)
    assert not (decision.prefill and query.moved)
    assert decision.plan in {*settings.plans, Plan.RECOMPUTE}
    assert ("prefill" if decision.prefill else "decode") in SHAPES[decision.plan].computers


@given(cases(), ALL_SETTINGS)
def test_alternates_are_other_prefill_workers_that_can_serve_it(
    case: tuple[Query, ClusterView], settings: PolicySettings
) -> None:
    query, cluster = case
    decision = route(query, cluster, 5.0, settings)
    if isinstance(decision, Refusal):
        return
    usable = {w.address for w in cluster.prefills if cluster.usable(w)}
    others = usable - {decision.prefill} if decision.prefill else set()
    assert set(decision.alternates) <= others and len(decision.alternates) == min(ALTERNATES_MAX, len(others))
    worker = next(w for w in cluster.decodes if w.address == decision.decode)
    assert decision.tail_tokens == direct_tail_tokens(worker, settings)


def test_alternates_come_in_the_papers_order() -> None:
    busy, reading, late = (
        prefill("p1", queued_tokens=9, **M()),
        prefill("p2", **M(storage_queue=900e6)),
        prefill("p3", queued_tokens=9000, **M()),
    )
    cluster = view(decode("d0", **M()), late, reading, busy, prefill("p0", **M()))
    decision = placed(route(FRESH, cluster, 0.0))
    assert (decision.prefill, decision.alternates) == ("p0:1", ("p1:1", "p2:1"))
    assert placed(route(FRESH, view(decode("d0", **M()), late, prefill("p0", **M())), 0.0)).alternates == ("p3:1",)


@given(cases(), ALL_SETTINGS)
def test_legs_are_ordered_disjoint_and_of_stored_blocks(case: tuple[Query, ClusterView], settings: PolicySettings) -> None:
    query, cluster = case
    decision = route(query, cluster, 5.0, settings)
    if isinstance(decision, Refusal):
        return
    for estimate in decision.candidates:
        check_legs(query, estimate.decode, estimate.prefill, estimate.legs, SHAPES[estimate.plan].loads)
        if not estimate.prefill and estimate.legs:
            assert [leg.first_block for leg in estimate.legs] == [0, *(leg.last_block for leg in estimate.legs[:-1])], "no gaps"
        covered = sum(leg.blocks for leg in estimate.legs)
        least = query.prompt_tokens - covered * BLOCK_TOKENS
        assert 1 <= estimate.computed_tokens <= query.prompt_tokens and least <= estimate.computed_tokens
        assert (estimate.computed_tokens == least) or estimate.order is Order.MEET
        assert (estimate.order is Order.MEET) == SHAPES[estimate.plan].meets
        here = sum(leg.blocks for leg in estimate.legs if leg.source is Source.RESIDENT)
        kept = sum(leg.blocks for leg in estimate.legs if leg.source is Source.RESIDENT_AT_PREFILL)
        moved, queued, stored, raw = estimate.moved, estimate.queued, cluster.stored_bytes_per_block, cluster.bytes_per_block
        loaded = moved.storage_to_decode + moved.storage_to_prefill
        tokens = estimate.computed_tokens + (here + kept + loaded // stored) * BLOCK_TOKENS
        assert tokens == query.prompt_tokens and loaded % stored == 0
        if not estimate.prefill:
            assert moved.decode_to_prefill == moved.prefill_to_decode == queued.decode_to_prefill == queued.prefill_to_decode == 0
            continue
        both = query.resident.get(estimate.prefill, 0) if estimate.legs else 0
        pulled = moved.storage_to_decode // stored
        read, handed = max(0, here - both), -(-query.prompt_tokens // BLOCK_TOKENS) - here - pulled
        assert moved.decode_to_prefill == (read + pulled) * raw, "what only decode has goes on to prefill, and no more"
        assert moved.prefill_to_decode == handed * raw, "what decode lacks goes there, and no more"
        assert moved.decode_to_prefill >= queued.decode_to_prefill >= read * raw
        assert moved.prefill_to_decode >= queued.prefill_to_decode >= kept * raw


@given(cases())
def test_the_choice_is_never_later_than_any_candidate_by_more_than_the_band(case: tuple[Query, ClusterView]) -> None:
    """But for guesses that others bet on already: they may be passed over for what takes up to twice as long."""
    query, cluster = case
    decision = route(query, cluster, 5.0)
    if isinstance(decision, Refusal):
        return
    for other in decision.candidates:
        if SHAPES[other.plan].meets or not other.busy_guess:
            reckoned_s = other.finish_s + (other.load_s * other.error if other.busy_guess else 0)
            assert decision.estimate.finish_s <= reckoned_s * (1 + OURS.error_band) + SMALL_S


@given(cases())
def test_no_route_is_later_than_recomputing_by_more_than_the_stated_error(case: tuple[Query, ClusterView]) -> None:
    query, cluster = case
    decision, only = route(query, cluster, 5.0), route(query, cluster, 5.0, PolicySettings(plans=(Plan.RECOMPUTE,)))
    if isinstance(decision, Refusal) or isinstance(only, Refusal):
        return
    assert decision.estimate.finish_s <= only.estimate.finish_s * (1 + OURS.error_band) + SMALL_S


@given(cases(), ALL_SETTINGS)
def test_decodes_batch_is_spared_while_there_is_a_prefill_worker(
    case: tuple[Query, ClusterView], settings: PolicySettings
) -> None:
    query, cluster = case
    decision = route(query, cluster, 5.0, settings)
    if isinstance(decision, Refusal) or query.moved or not any(map(cluster.usable, cluster.prefills)):
        return
    worker = next(w for w in cluster.decodes if w.address == decision.decode)
    if not decision.prefill:
        assert decision.estimate.computed_tokens + worker.queued_tokens <= direct_tail_tokens(worker, settings)
    elif decision.estimate.moved.decode_to_prefill:
        link = worker.peer_read
        assert decision.estimate.serve_wait_s <= settings.serve_backlog_s
        if link.bytes_per_s and link.idle_s <= STALE_S:  # a rate that may not be what it was is reckoned higher
            assert link.queue_bytes <= settings.serve_backlog_s * link.bytes_per_s * (1 + 1e-9)


@given(cases(), st.sampled_from([OURS, PAPER]))
def test_decode_is_under_the_papers_limit_whenever_one_is(case: tuple[Query, ClusterView], settings: PolicySettings) -> None:
    query, cluster = case
    query = msgspec.structs.replace(query, resident={}, avoid=frozenset())
    free = able_decodes(query, cluster)
    decision = route(query, cluster, 5.0, settings)
    if isinstance(decision, Refusal):
        return
    free = [w for w in free if roomy(query, w)] or free
    limit = Z_FACTOR * (query.prompt_tokens + sum(w.tokens for w in free)) / len(free)
    under = [w for w in free if w.tokens + query.prompt_tokens <= limit]
    chosen = next(w for w in free if w.address == decision.decode)
    if under:
        assert chosen in under and chosen.sequences == min(w.sequences for w in under)
    else:
        assert chosen.tokens == min(w.tokens for w in free)


@given(cases(), ALL_SETTINGS)
def test_the_same_view_gives_the_same_route_whatever_its_order(case: tuple[Query, ClusterView], settings: PolicySettings) -> None:
    query, cluster = case
    turned = msgspec.structs.replace(cluster, decodes=cluster.decodes[::-1], prefills=cluster.prefills[::-1])
    assert route(query, cluster, 5.0, settings) == route(query, turned, 5.0, settings)


@given(cases())
def test_what_prefill_workers_hold_never_makes_a_route_later(case: tuple[Query, ClusterView]) -> None:
    """But by what counts as about equal, and where some other worker's guess comes in between."""
    query, cluster = case
    at_decode = {w.address: query.resident[w.address] for w in cluster.decodes if w.address in query.resident}
    known, unknown = route(query, cluster, 5.0), route(msgspec.structs.replace(query, resident=at_decode), cluster, 5.0)
    if isinstance(known, Refusal) or isinstance(unknown, Refusal) or any(e.guess for e in known.candidates):
        return
    assert known.estimate.finish_s <= unknown.estimate.finish_s * (1 + OURS.error_band) + SMALL_S


def test_the_namespace_of_most_workers_is_the_clusters_and_a_tie_changes_nothing() -> None:
    assert cluster_namespace(["a", "b", "b"], "a") == "b"
    assert cluster_namespace(["a", "b"], "a") == "a"
    assert cluster_namespace(["a", "b"], "b") == "b"
    assert cluster_namespace([], "b") == "b"


def placed(decision: Route | Refusal) -> Route:
    assert isinstance(decision, Route), decision
    return decision


def able_decodes(query: Query, cluster: ClusterView) -> list[DecodeView]:
    """Those that could take it at 5 s."""
    return [
        w for w in cluster.decodes if cluster.usable(w) and w.full_until <= 5 and not 0 < w.pool_tokens <= query.prompt_tokens
    ]


def roomy(query: Query, worker: DecodeView) -> bool:
    pool = not worker.pool_tokens or worker.tokens + query.prompt_tokens <= worker.pool_tokens
    return pool and (not worker.stage_slots_total or -(-query.prompt_tokens // BLOCK_TOKENS) <= worker.stage_slots_free)


def check_legs(query: Query, decode: str, prefill: str, legs: tuple[Leg, ...], loads: tuple[Source, ...]) -> None:
    here, kept = query.resident.get(decode, 0), query.resident.get(prefill, 0)
    cursor = 0
    for leg in legs:
        assert cursor <= leg.first_block < leg.last_block
        cursor = leg.last_block
        if leg.source is Source.RESIDENT:
            assert leg.first_block == 0 and leg.last_block == here
        elif leg.source is Source.RESIDENT_AT_PREFILL:
            assert (leg.first_block, leg.last_block) == (here, kept)
        else:
            assert leg.source in loads and max(here, kept) <= leg.first_block and leg.last_block <= query.stored_blocks
