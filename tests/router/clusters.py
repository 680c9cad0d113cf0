"""Clusters for tests of the routing policy: by hand, at random, and routes as text."""

from pathlib import Path

from hypothesis import strategies as st

from common.routes import Plan, Source
from common.runs import QueuedRun
from services.router.placement import Route
from services.router.policy.estimates import Estimate
from services.router.policy.view import ClusterView, DecodeView, Link, PrefillView, Query, WorkerView
from services.router.policy.workers import Refusal

NS = "aa"
BLOCK_TOKENS = 16
BLOCK_BYTES = 1_000_000
_MARKS = {
    Source.RESIDENT: "resident",
    Source.RESIDENT_AT_PREFILL: "kept",
    Source.STORAGE_TO_DECODE: "decode",
    Source.STORAGE_TO_PREFILL: "prefill",
}


def decode(name: str, **facts: object) -> DecodeView:
    return DecodeView(address=f"{name}:1", id=name, namespace=NS, **facts)  # type: ignore[arg-type]


def prefill(name: str, **facts: object) -> PrefillView:
    return PrefillView(address=f"{name}:1", id=name, namespace=NS, **facts)  # type: ignore[arg-type]


def measured(tokens_per_s: float = 1000.0, storage: float = 100e6, peer: float = 1e9, **queues: float) -> dict[str, object]:
    """Facts of a worker that has measured everything; `queues`: bytes per link."""
    return {
        "prefill_tokens_per_s": tokens_per_s,
        "storage": Link(storage, queues.get("storage_queue", 0)),
        "peer_read": Link(peer, queues.get("read_queue", 0)),
        "peer_write": Link(peer, queues.get("write_queue", 0)),
    }


def view(*workers: WorkerView, corrections: dict[Plan, float] | None = None, stored_bytes: int = BLOCK_BYTES) -> ClusterView:
    return ClusterView(
        namespace=NS,
        block_tokens=BLOCK_TOKENS,
        decodes=tuple(w for w in workers if isinstance(w, DecodeView)),
        prefills=tuple(w for w in workers if isinstance(w, PrefillView)),
        bytes_per_block=BLOCK_BYTES,
        stored_bytes_per_block=stored_bytes,
        corrections=corrections or {},
    )


def line(estimate: Estimate) -> str:
    """One candidate: where, what, which blocks from where, computed tokens, finish."""
    where = f"{estimate.decode.split(':')[0]}<-{estimate.prefill.split(':')[0] or 'itself'}"
    legs = " ".join(f"[{leg.first_block},{leg.last_block})={_MARKS[leg.source]}" for leg in estimate.legs) or "-"
    return f"{where} {estimate.plan} {legs} compute={estimate.computed_tokens} finish={estimate.finish_s:.3f}"


def text(decision: Route | Refusal) -> str:
    if isinstance(decision, Refusal):
        return f"refused ({decision.why}): {decision.reason}"
    return f"{line(decision.estimate)}\n  {decision.reason}"


def written_down(name: str) -> str:
    """The text of `golden/NAME`. After a change that is meant, put there what the failed comparison shows (`pytest -vv`)."""
    return (Path(__file__).parent / "golden" / name).read_text()


rates = st.one_of(st.just(0.0), st.floats(1.0, 1e11))
links = st.builds(Link, bytes_per_s=rates, queue_bytes=st.one_of(st.just(0), st.integers(0, 1 << 36)), idle_s=st.floats(0, 1e6))
_facts = {
    "address": st.uuids().map(str),
    "namespace": st.sampled_from([NS, NS, NS, "bb"]),
    "tokens": st.integers(0, 100_000),
    "queued_tokens": st.one_of(st.just(0), st.integers(0, 100_000)),
    "prefill_tokens_per_s": st.one_of(st.just(0.0), st.floats(1.0, 1e6)),
    "storage": links,
    "peer_read": links,
    "peer_write": links,
    "stage_slots_free": st.integers(0, 4096),
    "stage_slots_total": st.sampled_from([0, 4096]),
    "connected": st.sampled_from([True, True, True, False]),
    "draining": st.sampled_from([False, False, False, True]),
}
decodes = st.builds(
    DecodeView,
    id=st.just("d"),
    sequences=st.integers(0, 4),
    pool_tokens=st.sampled_from([0, 1024, 65536]),
    full_until=st.sampled_from([0.0, 0.0, 4.0, 9.0]),
    **_facts,
)
_runs = st.lists(st.builds(QueuedRun, st.integers(1, 20_000), st.floats(-10, 100)), max_size=4).map(tuple)
prefills = st.builds(PrefillView, id=st.just("p"), **_facts, queued_runs=_runs)
clusters = st.builds(
    ClusterView,
    namespace=st.just(NS),
    block_tokens=st.just(BLOCK_TOKENS),
    decodes=st.lists(decodes, max_size=5).map(tuple),
    prefills=st.lists(prefills, max_size=5).map(tuple),
    bytes_per_block=st.sampled_from([65536, BLOCK_BYTES]),
    stored_bytes_per_block=st.sampled_from([20_000, 65536, BLOCK_BYTES]),
    corrections=st.dictionaries(st.sampled_from(list(Plan)), st.floats(0.5, 2.0), max_size=9),
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Query, ClusterView]:
    """A request and a cluster; some of the workers hold some of its blocks."""
    cluster = draw(clusters)
    size = draw(st.integers(1, 50_000))
    blocks = st.integers(0, (size - 1) // BLOCK_TOKENS)
    workers = [worker.address for worker in (*cluster.decodes, *cluster.prefills)] or [""]
    holders = draw(st.lists(st.sampled_from(workers), max_size=4, unique=True))
    query = Query(
        prompt_tokens=size,
        stored_blocks=draw(blocks),
        avoid=frozenset(draw(st.lists(st.sampled_from([w.address for w in cluster.decodes] or [""]), max_size=2))),
        resident={address: draw(blocks) for address in holders},
        turn=draw(st.integers(0, 1000)),
        moved=draw(st.sampled_from([False, False, True])),
    )
    return query, cluster
