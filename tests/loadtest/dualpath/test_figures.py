"""What is concluded from measured jobs, worked out by hand."""

import pytest

from loadtest.dualpath import conclusions
from loadtest.dualpath.figures import (
    Slo,
    dual_bound,
    figures,
    max_over_avg,
    one_request_bound_s,
    slo_share,
    windowed_max_over_avg,
)
from loadtest.dualpath.jobs import Tick
from loadtest.dualpath.search import TRIALS_MAX, capacity
from tests.loadtest.dualpath.recorded import RATE, measured, sample


def test_figures_of_one_job() -> None:
    found = figures(measured(), Slo())
    assert (found.wall_s, found.requests, found.failed, found.hit_rate) == (20.0, 2, 0, 0.96)
    assert found.requests_per_s == 0.1 and found.output_tokens_per_s == 1.1
    assert found.ttft is not None and found.ttft.p50 == 1500.0
    assert found.tpot is not None and found.tpot.p99 == pytest.approx(10.0)
    assert {link.port: link.towards_load for link in found.links} == {
        "st-prefill-0": 0.95, "st-decode-0": 0.0, "co-prefill-0": 0.0, "co-decode-0": pytest.approx(0.1187, abs=1e-4),
    }  # fmt: skip
    assert found.overhead == {"storage": 1.01, "compute": 1.01}
    assert (found.cpu["cluster"], found.cpu["machine"]) == (0.3, 0.5)
    assert found.max_over_avg == found.max_over_avg_run == 2.0  # one of two links did everything


def test_balance_in_windows_sees_what_the_total_hides() -> None:
    turns = [(0, 0), (50, 0), (50, 50), (100, 50), (100, 100)]  # the links take turns
    ticks = [Tick(5.0 * n, {"a": (a, 0), "b": (b, 0)}) for n, (a, b) in enumerate(turns)]
    assert max_over_avg([100, 100]) == 1.0
    assert windowed_max_over_avg(ticks, ["a", "b"], 5.0, 10.0) == 2.0


def test_idle_windows_say_nothing_about_balance() -> None:
    ticks = [Tick(0, {"a": (0, 0), "b": (0, 0)}), Tick(5, {"a": (50, 0), "b": (50, 0)}), Tick(10, {"a": (51, 0), "b": (50, 0)})]
    assert windowed_max_over_avg(ticks, ["a", "b"], 5.0, 10.0) == 1.0
    assert max_over_avg([0, 0]) == 0.0


def test_objective_needs_both_times_and_leaves_the_warm_part_out() -> None:
    late, slow, good, early = sample(50, 4.1), sample(60, 1.0, 0.051), sample(100, 4.0, 0.05), sample(1, 9.0)
    assert slo_share([early, late, slow, good], Slo()) == pytest.approx(1 / 3)
    assert not Slo().attained(sample(0, 1.0, outcome="cut"))
    assert slo_share([early, late, slow, good], Slo().here(0.03)) == pytest.approx(2 / 3), "a slow machine: 60 ms"
    assert Slo().here(0.02) == Slo(), "a quick one: the paper's"
    assert slo_share([], Slo()) == 0.0


def test_bounds() -> None:
    assert dual_bound(1, 1, basic_s=30, oracle_s=5) == 2.0
    assert dual_bound(1, 2, basic_s=30, oracle_s=None) == 3.0
    assert dual_bound(1, 2, basic_s=30, oracle_s=12) == 2.5  # computing is what is left
    assert one_request_bound_s(120.0, [10.0, 20.0], 1.0) == 5.0


def test_ratios_are_formed_from_what_was_measured_and_nothing_else() -> None:
    assert conclusions.ratios([measured("full")], Slo()) == {}
    found = conclusions.ratios([measured("basic"), measured("full", wall_s=10.0, decode_bytes=190_000_000)], Slo())
    assert found["offline_1p1d_over_basic"] == 2.0
    assert found["offline_1p1d_over_bound"] == 1.0
    assert found["link_load_max_over_avg"] == 1.0


def test_online_ratio_compares_the_highest_rates_within_the_objective() -> None:
    good, bad = [sample(0, 1.0), sample(10, 1.0)], [sample(0, 9.0), sample(10, 9.0)]
    jobs = [
        measured("basic", "online", step=0.5, samples=good), measured("basic", "online", step=0.625, samples=bad),
        measured("full", "online", step=0.9, samples=good), measured("full", "online", step=1.0, samples=good),
    ]  # fmt: skip
    found = conclusions.ratios(jobs, Slo())
    assert (found["online_aps_over_basic"], found["tpot_over_basic"]) == (2.0, 1.0)


def test_tpot_is_compared_at_the_least_rate_that_gains_as_much_as_the_papers() -> None:
    slow, fast = ([sample(0, 1.0, tpot_s), sample(10, 1.0, tpot_s)] for tpot_s in (0.02, 0.01))
    jobs = [
        measured("basic", "online", step=0.5, samples=slow), measured("full", "online", step=0.9, samples=slow),
        measured("full", "online", step=0.98, samples=fast), measured("full", "online", step=1.2, samples=slow),
    ]  # fmt: skip
    found = conclusions.ratios(jobs, Slo())
    assert (found["tpot_over_basic_at_paper_gain"], found["tpot_over_basic"]) == (pytest.approx(0.5), pytest.approx(1.0))
    assert "tpot_over_basic_at_paper_gain" not in conclusions.ratios(jobs[:2], Slo())


def test_one_request_against_the_sum_of_the_rates() -> None:
    # 1,000 tokens are 8.192 MB: 0.8192 s over one 10 MB/s link. Made at 4.096 MB/s; beside its load a request takes 0.1 s.
    ttfts = {"recompute": 2.0, "direct": 0.9192, "split": 0.5096, "split+meet": 0.44}
    jobs = [measured(mode, "one-request", samples=[sample(0, ttft)]) for mode, ttft in ttfts.items()]
    found = conclusions.ratios(jobs, Slo())
    assert found["one_request_split_over_sum_of_rates"] == 1.0
    assert found["one_request_split_meet_over_sum_of_rates"] == pytest.approx(0.44 / (8.192 / 24.096 + 0.1), abs=1e-3)
    assert found["one_request_split_over_best_single"] == pytest.approx(0.5096 / 0.9192, abs=1e-3)


def test_crossing_compares_with_the_better_of_the_two() -> None:
    jobs = [
        measured(mode, "crossing", step=step, samples=[sample(0, ttft)])
        for mode, step, ttft in (("split", RATE, 4.0), ("direct", RATE, 2.0), ("full", RATE, 1.05), ("recompute", RATE, 1.0))
    ]
    (point,) = conclusions.crossings(jobs)
    assert (point.load_s, point.recompute_s, point.over_better) == (2.0, 1.0, 1.05)
    assert conclusions.crossings(jobs[:2]) == []


def test_crossing_is_judged_turn_by_turn_so_that_a_machine_that_slows_down_says_nothing() -> None:
    took = {"full": (1.05, 2.1, 4.2), "recompute": (1.0, 2.0, 4.0), "split": (9.0,)}
    jobs = [measured(mode, "crossing", samples=[sample(n, s) for n, s in enumerate(took[mode])]) for mode in took]
    (point,) = conclusions.crossings(jobs)
    assert point.over_better == pytest.approx(1.05) and point.recompute_s == 2.0
    assert conclusions.near({job.mode: job for job in jobs}, 2.0) == ["full", "recompute"]
    assert conclusions.near({job.mode: job for job in jobs}, 5.0) == ["full", "recompute", "split"]


def test_rounds_of_one_mode_are_one_job() -> None:
    first, later = measured("full", wall_s=20.0, decode_bytes=100), measured("full", wall_s=10.0, decode_bytes=50)
    both = first.followed_by(later)
    assert both.name == first.name and both.done.wall_s == 30.0 and both.cpu_s == {"prefill-0": 8.0, "decode-0": 4.0}
    assert [one.sent_s for one in both.done.samples] == [0.0, 10.0, 20.0, 30.0]
    assert both.ticks[-1].at_s == 30.0 and both.ticks[-1].ports["st-decode-0"] == (150, 0)
    found = figures(both, Slo())
    assert {link.port: link.towards_bytes for link in found.links}["st-prefill-0"] == 2 * 190_000_000
    assert found.overhead["storage"] == pytest.approx(1.01)


@pytest.mark.parametrize("bisections", [0, 1, 2])
@pytest.mark.parametrize("truth", [0.3, 0.99, 1.0, 1.1, 3.7])
def test_capacity_is_found_within_what_is_left_of_a_step(truth: float, bisections: int) -> None:
    tried: list[float] = []

    def passes(rate: float) -> bool:
        tried.append(rate)
        return rate <= truth

    found = capacity(passes, 1.0, ratio=1.25, bisections=bisections)
    assert found <= truth < found * 1.25**0.5**bisections * (1 + 1e-9)
    assert len(tried) <= TRIALS_MAX


def test_no_capacity_is_zero() -> None:
    assert capacity(lambda rate: False, 1.0, ratio=1.25, bisections=2) == 0.0
