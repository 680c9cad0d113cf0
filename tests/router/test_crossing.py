"""Storage from far slower than computing to far quicker: the choice stays near the better of the two, and of everything."""

from hypothesis import given
from hypothesis import strategies as st

from common.routes import Plan, Source
from services.router.placement import Route, route
from services.router.policy.candidates import SMALL_S
from services.router.policy.division import claim
from services.router.policy.plans import PLANS
from services.router.policy.settings import PolicySettings
from services.router.policy.view import ClusterView, Query
from tests.router.blockwise import first_token_s
from tests.router.clusters import BLOCK_BYTES, BLOCK_TOKENS, decode, measured, prefill, view, written_down

QUERY = Query(prompt_tokens=8000, stored_blocks=475)  # 7,600 tokens stored: 95 %
TOKENS_PER_S = 4000.0  # computing fills 250 blocks a second
PEER_BYTES_PER_S = 1e12


def test_the_sweep_is_as_written_down() -> None:
    lines = ["storage over compute | recompute, load, better of two | taken: seconds, over the better, blockwise, plan"]
    for exponent in range(-12, 13):
        ratio = 2 ** (exponent / 2)
        row = sweep(ratio)
        lines.append(
            f"{ratio:9.4f} | {row['recompute']:7.3f} {row['load']:9.3f} {row['better']:7.3f} | "
            f"{row['taken']:7.3f} {row['taken'] / row['better']:6.3f} {row['blockwise']:7.3f}  {row['plan']}"
        )
    assert "\n".join(lines) + "\n" == written_down("crossing.txt")


@given(st.floats(-7, 7), st.booleans())
def test_at_any_rate_the_choice_is_within_the_band_of_the_better_of_loading_and_recomputing(log: float, meets: bool) -> None:
    plans = PLANS if meets else tuple(plan for plan in PLANS if not plan.endswith("+meet"))
    row = sweep(2.0**log, PolicySettings(plans=plans))
    assert row["taken"] <= row["better"] * 1.05 + SMALL_S
    assert row["blockwise"] <= row["better"] * 1.10 + SMALL_S


rates = st.floats(-4, 4).map(lambda log: 250.0 * 2.0**log)  # blocks per second


@given(rates, rates, st.integers(0, 40_000), st.integers(1, 600))
def test_the_closed_form_is_what_happens_block_by_block(at_decode: float, at_prefill: float, queued: int, stored: int) -> None:
    """To within two claims, and a few blocks for where a leg's end leaves its link without work."""
    cluster = pair(at_decode, at_prefill, queued)
    query = Query(prompt_tokens=stored * BLOCK_TOKENS + 123, stored_blocks=stored)
    decision = route(query, cluster, 0.0)
    assert isinstance(decision, Route)
    for estimate in decision.candidates:
        if estimate.prefill:
            block_s = {Source.STORAGE_TO_DECODE: 1 / at_decode, Source.STORAGE_TO_PREFILL: 1 / at_prefill}
            wait_s = queued / TOKENS_PER_S
            took = first_token_s(estimate, query.prompt_tokens, BLOCK_TOKENS, block_s, 1 / TOKENS_PER_S, wait_s)
            claims = max((claim(leg.blocks) for leg in estimate.legs), default=0)
            slack = (2 * claims + 4) * max(*block_s.values(), BLOCK_TOKENS / TOKENS_PER_S)
            assert abs(took - estimate.first_token_s) <= slack, estimate


def sweep(ratio: float, settings: PolicySettings = PolicySettings()) -> dict[str, float | str]:
    """One storage speed, in multiples of the computing speed, both in tokens: every number of a row."""
    blocks_per_s = ratio * TOKENS_PER_S / BLOCK_TOKENS
    cluster = pair(blocks_per_s, blocks_per_s)

    def only(*plans: Plan) -> Route:
        decision = route(QUERY, cluster, 0.0, PolicySettings(plans=plans))
        assert isinstance(decision, Route)
        return decision

    recompute = only(Plan.RECOMPUTE).estimate.finish_s
    load = next(e.finish_s for e in only(Plan.STORAGE_TO_PREFILL).candidates if e.plan is Plan.STORAGE_TO_PREFILL)
    decision = route(QUERY, cluster, 0.0, settings)
    assert isinstance(decision, Route)
    block_s = dict.fromkeys((Source.STORAGE_TO_DECODE, Source.STORAGE_TO_PREFILL), 1 / blocks_per_s)
    took = first_token_s(decision.estimate, QUERY.prompt_tokens, BLOCK_TOKENS, block_s, 1 / TOKENS_PER_S)
    return {
        "recompute": recompute,
        "load": load,
        "better": min(recompute, load),
        "taken": decision.estimate.finish_s,
        "blockwise": took,
        "plan": decision.plan,
    }


def pair(at_decode: float, at_prefill: float, queued: float = 0.0) -> ClusterView:
    """One decode and one prefill worker whose storage links give so many blocks a second."""
    return view(
        decode("d0", **measured(TOKENS_PER_S, at_decode * BLOCK_BYTES, PEER_BYTES_PER_S)),
        prefill("p0", queued_tokens=queued, **measured(TOKENS_PER_S, at_prefill * BLOCK_BYTES, PEER_BYTES_PER_S)),
    )
