"""The policy's parts: dividing blocks, rates to reckon with, what was learnt, what is still to be done."""

import math
import random
from collections.abc import Sequence

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from common.membership import RECORD_BYTES_MAX, MemberLoad, MemberRecord
from common.pb import worker_pb2 as pb
from common.routes import Plan, Source
from common.runs import QueuedRun, by_class, due_s
from services.router.account import Account
from services.router.backlog import REPORT_LAG_S, Backlog
from services.router.peers import worker_info
from services.router.placement import Route, route
from services.router.policy.corrections import CORRECTION_MAX, FORGET_S, Corrections
from services.router.policy.division import claim
from services.router.policy.estimates import Demand
from services.router.policy.rates import PRIOR_STORAGE_BYTES_PER_S, STALE_S, UNDER_WAY_S, rates_of
from services.router.policy.shares import Filler, level_s, share
from services.router.policy.view import ClusterView, Link, Query
from tests.router.blockwise import first_token_s
from tests.router.clusters import BLOCK_BYTES, BLOCK_TOKENS, decode, measured, prefill, view

fillers = st.lists(st.builds(Filler, st.floats(0, 100), st.floats(0.01, 1e4)), min_size=1, max_size=4)


@given(fillers, st.integers(0, 5000))
def test_shares_are_whole_and_none_could_be_moved_to_finish_earlier(given_fillers: list[Filler], blocks: int) -> None:
    shares = share(given_fillers, blocks)
    assert sum(shares) == blocks and min(shares) >= 0
    last_s = max(f.filled_s(n) for f, n in zip(given_fillers, shares, strict=True))
    for i, slowest in enumerate(given_fillers):
        if shares[i] and slowest.filled_s(shares[i]) == last_s:
            others = [f.filled_s(n + 1) for j, (f, n) in enumerate(zip(given_fillers, shares, strict=True)) if j != i]
            assert all(other_s >= last_s - 1e-6 * last_s for other_s in others)


@given(fillers, st.integers(1, 5000))
def test_rates_add_up(given_fillers: list[Filler], blocks: int) -> None:
    level = level_s(given_fillers, blocks)
    filled = sum(max(0.0, level - f.wait_s) * f.blocks_per_s for f in given_fillers)
    assert math.isclose(filled, blocks, rel_tol=1e-6)


def test_an_unmeasured_rate_is_what_the_others_measured_or_else_the_prior() -> None:
    unknown = decode("d0")
    assert rates_of(view(unknown)).storage(unknown, False).per_s == PRIOR_STORAGE_BYTES_PER_S
    others = (unknown, prefill("p0", **measured(storage=3e6)), prefill("p1", **measured(storage=5e6)))
    assert rates_of(view(*others)).storage(unknown, False).per_s == 4e6


def test_a_low_rate_counts_for_what_was_moved_at_it() -> None:
    quick = (prefill("p0", **measured(storage=1e9)), prefill("p1", **measured(storage=1e9)))
    for moved, least, most in ((1e6, 80e6, 90e6), (8e6, 19e6, 21e6), (1e9, 10e6, 10.1e6), (math.inf, 10e6, 10e6)):
        worker = decode("d0", storage=Link(10e6, 0, 0, moved))
        assert least <= rates_of(view(worker, *quick)).storage(worker, False).per_s <= most
    good = decode("d0", storage=Link(5e9, 0, 0, 1e3))
    assert rates_of(view(good, *quick)).storage(good, False).per_s == 5e9


def test_a_stale_rate_is_doubled_by_the_bold_only_and_never_beyond_what_others_have() -> None:
    quick = (prefill("p0", **measured(storage=1e9)), prefill("p1", **measured(storage=1e9)))
    for idle_s, per_s, bold_per_s in ((0.0, 1e6, 1e6), (STALE_S + 1e-6, 1e6, 2e6), (3 * STALE_S, 1e6, 8e6), (1e9, 1e6, 1e9)):
        worker = decode("d0", storage=Link(1e6, 0, idle_s))
        rates = rates_of(view(worker, *quick))
        assert math.isclose(rates.storage(worker, False).per_s, per_s, rel_tol=1e-6)
        assert math.isclose(rates.storage(worker, True).per_s, bold_per_s, rel_tol=1e-6)
    slow = decode("d0", storage=Link(1e6, 0, 1e9))
    assert rates_of(view(slow)).storage(slow, True).per_s == 1e6


def test_every_link_gets_measured_and_who_bets_on_one_that_is_being_measured_computes_beside_it() -> None:
    true = {"storage": 20e6, "peer_read": 500e6, "peer_write": 500e6}
    known: dict[tuple[str, str], float] = {}
    betting: list[tuple[str, str]] = []
    for turn in range(12):
        taken = placed(LONG, cluster_of(known, betting, true))
        bets = [link for link in links_of(taken) if link not in known]
        assert taken.plan.endswith("+meet") or taken.plan is Plan.RECOMPUTE or not set(bets) & set(betting)
        betting += bets
        if turn % 3 == 2:  # those that run finish, and their links have been measured
            known |= {link: true[link[1]] for link in betting}
            betting = []
    assert {("d0:1", "storage"), ("p0:1", "storage"), ("p0:1", "peer_write")} <= known.keys()


def test_a_link_that_was_slow_once_is_found_out_when_it_is_quick_again() -> None:
    """A request a minute; whenever the link is used, its average moves halfway to the true rate."""
    rate, idle_s, tries = 1e3, 0.0, 0
    for _ in range(40):
        slow = {"storage": Link(rate, 0, idle_s)}
        if placed(LONG, view(decode("d0", **measured() | slow), prefill("p0", **measured()))).estimate.moved.storage_to_decode:
            rate, idle_s, tries = (rate + 100e6) / 2, 0.0, tries + 1
        idle_s += STALE_S + 1
    assert rate > 90e6 and tries > 3


@given(st.floats(0.05, 10), st.floats(0, 1e6))
def test_a_wrong_bet_on_a_stale_link_costs_no_more_than_recomputing_and_a_claim_under_way(block_s: float, idle_s: float) -> None:
    """The link is as slow as ever: the policy was wrong to try, and compute goes on past it."""
    slow = {"storage": Link(BLOCK_BYTES / block_s, 0, idle_s)}
    cluster = view(decode("d0", **measured() | slow), prefill("p0", **measured() | slow))
    taken = placed(LONG, cluster).estimate
    links_s = dict.fromkeys((Source.STORAGE_TO_DECODE, Source.STORAGE_TO_PREFILL), block_s)
    took = first_token_s(taken, LONG.prompt_tokens, BLOCK_TOKENS, links_s, 1e-3)
    under_way = max((claim(leg.blocks) for leg in taken.legs), default=0)
    assert took <= (LONG.prompt_tokens * 1e-3 + under_way * block_s) * 1.05


queues = st.lists(st.builds(QueuedRun, st.integers(16, 5000), st.floats(-3, 20)), max_size=8).map(tuple)


def wait_s(runs: Sequence[QueuedRun], tokens: int, unknown: int = 0) -> float:
    """At a prefill worker of 1,000 tokens a second."""
    worker = prefill("p0", queued_tokens=unknown + sum(run.tokens for run in runs), queued_runs=tuple(runs), **measured())
    return rates_of(view(worker)).compute(worker, tokens).wait_s


@given(queues, st.integers(1, 20_000), st.integers(0, 1000), st.randoms())
def test_a_run_waits_for_what_is_due_before_it_and_no_more_than_a_step_beside(
    runs: tuple[QueuedRun, ...], tokens: int, unknown: int, chance: random.Random
) -> None:
    due = sum(run.tokens for run in runs if run.due_s <= due_s(0.0, tokens, 1000.0)) / 1000
    all_s = sum(run.tokens for run in runs) / 1000
    waits = wait_s(runs, tokens)
    assert due - 1e-9 <= waits <= min(all_s, due + UNDER_WAY_S) + 1e-9
    assert waits <= wait_s(runs, tokens + 16) + 1e-9, "the longer wait no shorter"
    assert math.isclose(wait_s(runs, tokens, unknown), waits + unknown / 1000), "what nothing is known of goes first"
    assert wait_s(chance.sample(runs, len(runs)), tokens) == waits


@given(queues, st.integers(16, 5000))
def test_the_wait_is_what_prefills_rule_makes_of_the_queue(runs: tuple[QueuedRun, ...], tokens: int) -> None:
    """Blocks of 16 tokens one by one, always of the run that is soonest due, as services/prefill/engine.py plans them."""
    left = {number: float(run.tokens) for number, run in enumerate(runs)}
    due = {number: run.due_s for number, run in enumerate(runs)}
    new, now = len(runs), 0.0
    left[new], due[new] = tokens, due_s(0.0, tokens, 1000.0)
    while left[new] == tokens:
        soonest = min((number for number in left if left[number] > 0), key=lambda number: (due[number], number))
        step = min(16.0, left[soonest])
        if soonest == new:
            break
        left[soonest] -= step
        due[soonest] = due_s(due[soonest], -step, 1000.0)
        now += step / 1000
    waits = wait_s(runs, tokens)
    assert now - 1e-6 <= waits <= now + UNDER_WAY_S + 1e-6


def test_an_account_knows_what_is_due_from_its_report_and_from_what_was_sent_since() -> None:
    def reported(*runs: tuple[float, float]) -> MemberLoad:
        queued = int(sum(tokens for tokens, _ in runs))
        return MemberLoad(queued_tokens=queued, prefill_tokens_per_s=1000.0, queued_runs=tuple(QueuedRun(*run) for run in runs))

    def told(now: float) -> list[tuple[float, float]]:
        return [(round(run.tokens, 6), round(run.due_s, 6)) for run in account.runs(now)]

    account = Account()
    account.report(reported((5000, 9.0)), 10.0)
    assert told(10.0) == [(5000, 9.0)]
    stay = account.send(Demand(500, computed_tokens=500), 11.0)
    assert told(11.0) == [(500, 1.0), (4000, 6.0)], "a second's work is done of the long one, which is due two seconds sooner"
    assert told(11.2) == [(300, 0.4), (4000, 5.8)]
    assert told(12.5) == [(3000, 2.5)]
    stay.loaded()
    assert told(100.0) == []
    account.report(reported((100, -2.0)), 101.0)
    assert told(101.0) == [(100, -2.0)]
    account.send(Demand(16, computed_tokens=16), 102.0)
    account.report(reported(), 102.0 + REPORT_LAG_S / 2)
    assert told(102.0 + REPORT_LAG_S / 2) == [(16, round(0.032 - REPORT_LAG_S / 2, 6))], "too lately sent to be told of"


def test_a_load_says_the_same_over_both_planes() -> None:
    runs = by_class([QueuedRun(100_000 + i, 2.0**i / 3) for i in range(-40, 40)], 0.0)
    load = MemberLoad(running=1, queued_tokens=7, prefill_tokens_per_s=0.1, queued_runs=runs)
    assert worker_info(pb.WorkerInfo(load=pb.Load(**msgspec.to_builtins(load)))).load == load
    record = MemberRecord("prefill", "p" * 200, "e" * 32, "host:1", "n" * 64, "m" * 200, load=load)
    told = msgspec.json.encode(record)
    assert len(told) < RECORD_BYTES_MAX and msgspec.json.decode(told, type=MemberRecord) == record


def test_corrections_follow_what_happened_within_their_bounds() -> None:
    corrections = Corrections()
    assert corrections.factors(0.0) == {}
    for _ in range(100):
        corrections.observe(Plan.SPLIT, 1.0, 1.5, 0.0)
    assert math.isclose(corrections.factors(0.0)[Plan.SPLIT], 1.55 / 1.05, rel_tol=1e-3)
    for _ in range(100):
        corrections.observe(Plan.SPLIT, 1.0, 1e6, 0.0)
    assert corrections.factors(0.0)[Plan.SPLIT] <= CORRECTION_MAX
    for _ in range(200):
        corrections.observe(Plan.SPLIT, 1e6, 1.0, 0.0)
    assert corrections.factors(0.0)[Plan.SPLIT] >= 1 / CORRECTION_MAX


def test_a_correction_is_forgotten_when_its_plan_is_not_used() -> None:
    corrections = Corrections()
    for _ in range(200):
        corrections.observe(Plan.DIRECT, 1.0, 9.0, 0.0)
    assert math.isclose(corrections.factors(0.0)[Plan.DIRECT], 2.0, rel_tol=1e-3)
    assert math.isclose(corrections.factors(FORGET_S)[Plan.DIRECT], math.sqrt(2.0), rel_tol=1e-3)
    assert math.isclose(corrections.factors(100 * FORGET_S)[Plan.DIRECT], 1.0)


def test_half_of_what_one_plan_took_is_a_lesson_for_all() -> None:
    corrections = Corrections()
    for _ in range(200):
        corrections.observe(Plan.SPLIT, 1.0, 1.6, 0.0)
    factors = corrections.factors(0.0)
    assert math.isclose(factors[Plan.DIRECT], math.sqrt(factors[Plan.SPLIT]), rel_tol=1e-3) and factors[Plan.DIRECT] > 1.2
    for _ in range(200):
        corrections.observe(Plan.DIRECT, 1.0, 1.0, 0.0)
        corrections.observe(Plan.SPLIT, 1.0, 1.6, 0.0)
    factors = corrections.factors(0.0)
    assert math.isclose(factors[Plan.DIRECT], 1.0, rel_tol=0.05) and math.isclose(factors[Plan.SPLIT], 1.65 / 1.05, rel_tol=0.05)


def test_milliseconds_teach_next_to_nothing() -> None:
    corrections = Corrections()
    corrections.observe(Plan.DIRECT, 0.001, 0.006, 0.0)
    assert corrections.factors(0.0)[Plan.DIRECT] < 1.02


def test_a_backlog_drains_at_its_rate_and_a_report_replaces_it() -> None:
    backlog = Backlog()
    backlog.pour(1000, 1.0)
    assert backlog.left(50.0) == 1000, "nothing drains at an unknown rate"
    backlog.report(600, 100.0, 50.0)
    assert backlog.left(50.0) == 600 and backlog.left(53.0) == 300 and backlog.left(60.0) == 0


def test_what_was_sent_just_before_a_report_is_not_lost_to_it() -> None:
    backlog = Backlog()
    backlog.pour(70, 9.0)
    backlog.pour(30, 10.0)
    backlog.report(0, 1.0, 10.0 + REPORT_LAG_S / 2)
    assert backlog.left(10.0 + REPORT_LAG_S / 2) == 30


def test_a_pour_leaves_an_unmeasured_backlog_when_its_request_is_done() -> None:
    backlog = Backlog()
    first, second = backlog.pour(70, 9.0), backlog.pour(30, 10.0)
    first.done()
    first.done()
    assert backlog.left(10.0) == 30
    backlog.report(5, 0.0, 10.05)
    assert backlog.left(11.0) == 35, "the report can't tell of the second"
    second.done()
    assert backlog.left(11.0) == 5
    third = backlog.pour(8, 12.0)
    backlog.report(11, 0.0, 13.0)
    third.done()
    assert backlog.left(13.0) == 3, "what the report has beyond ours is the worker's to say"


def test_a_request_that_ended_has_nothing_queued_whatever_the_last_report_said() -> None:
    backlog = Backlog()
    pour = backlog.pour(100, 1.0)
    backlog.report(80, 10.0, 2.0)
    assert backlog.left(3.0) == 70
    pour.done()
    assert backlog.left(3.0) == 0


def test_what_load_and_compute_share_leaves_nothing_behind_when_it_ends() -> None:
    backlog = Backlog()
    pour = backlog.pour(60, 1.0, shared=True)
    backlog.report(100, 10.0, 2.0)  # the worker can't know that compute will take 40 of these
    assert backlog.left(2.0) == 60
    pour.done()
    pour.done()
    assert backlog.left(2.0) == 0
    backlog.report(7, 10.0, 3.0)
    assert backlog.left(3.0) == 7, "somebody else's"


def test_a_request_tells_of_a_rate_until_its_worker_does() -> None:
    backlog = Backlog()
    backlog.measured(0, 1.0)
    backlog.report(0, 0.0, 1.0)
    assert backlog.per_s == 0
    backlog.measured(100, 2.0)
    backlog.measured(100, 1.0)
    backlog.report(0, 0.0, 2.0)
    assert backlog.per_s == 50
    backlog.report(0, 80.0, 3.0)
    assert backlog.per_s == 80


def test_a_request_that_came_and_went_between_two_reports_is_not_counted() -> None:
    account = Account()
    account.report(MemberLoad(running=1, tokens=10), 1.0)
    stay = account.send(Demand(tokens=100), 2.0)
    stay.grown(5)
    assert (account.sequences, account.tokens) == (2, 110)
    stay.ended()
    stay.ended()
    assert (account.sequences, account.tokens) == (1, 10) and account.tokens_live == 0
    late = account.send(Demand(tokens=100), 3.0)
    account.report(MemberLoad(running=2, tokens=110), 4.0)
    late.ended()
    assert account.sequences == 2, "the report's, until the next"


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1e9), st.booleans()), max_size=30))
def test_a_backlog_is_never_negative_and_never_more_than_was_poured(events: list[tuple[float, float, bool]]) -> None:
    backlog, now, poured = Backlog(), 0.0, 0.0
    for after_s, amount, is_report in events:
        now += after_s
        if is_report:
            backlog.report(0, amount, now)
        else:
            backlog.pour(amount, now)
            poured += amount
        assert 0 <= backlog.left(now) <= poured * (1 + 1e-9)


LONG = Query(prompt_tokens=10_000, stored_blocks=600)


def placed(query: Query, cluster: ClusterView) -> Route:
    decision = route(query, cluster, 0.0)
    assert isinstance(decision, Route)
    return decision


def cluster_of(known: dict[tuple[str, str], float], betting: list[tuple[str, str]], true: dict[str, float]) -> ClusterView:
    """One pair; links measured as far as known, with bytes queued where a request bets."""

    def facts(address: str) -> dict[str, object]:
        keys = {name: (address, name) for name in true}
        links = {name: Link(known.get(key, 0.0), 1e6 * betting.count(key)) for name, key in keys.items()}
        return {"prefill_tokens_per_s": 1000.0, **links}

    return view(decode("d0", **facts("d0:1")), prefill("p0", **facts("p0:1")))


def links_of(taken: Route) -> list[tuple[str, str]]:
    """The links that its bytes go over, by whoever measures them: prefill, but for what decode pulls."""
    moved, prefill_ = taken.estimate.moved, taken.prefill
    links = [((taken.decode, "storage"), moved.storage_to_decode), ((prefill_, "storage"), moved.storage_to_prefill)]
    links += [((prefill_, "peer_read"), moved.decode_to_prefill), ((prefill_, "peer_write"), moved.prefill_to_decode)]
    return [link for link, amount in links if amount]
