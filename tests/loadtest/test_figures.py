"""Figures from recorded samples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.figures import percentile, spread, summarize
from loadtest.samples import Sample
from tests.loadtest.recorded import finished, unfinished


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_percentiles_are_numpys(values: list[float], share: float) -> None:
    assert percentile(sorted(values), share) == pytest.approx(np.percentile(values, share * 100), rel=1e-9, abs=1e-9)


def test_a_spread_is_in_milliseconds_and_leaves_out_what_was_not_measured() -> None:
    found = spread([0.3, None, 0.1, 0.2])
    assert found is not None
    assert (found.n, found.mean, found.p50, found.p90, found.p99, found.max) == (3, 200, 200, 280, 298, 300)
    assert spread([None]) is None


def test_tpot_is_the_time_after_the_first_token_per_token_also_when_an_event_carries_several() -> None:
    sample = Sample(
        kind="chat", user=1, session=1, turn=1, sent_s=0, total_s=1, outcome="ok", chunk_s=(0.5, 0.6, 0.9), output_tokens=5
    )
    assert sample.tpot_s == pytest.approx(0.1)
    assert sample.gaps_s == pytest.approx((0.1, 0.3))


def test_one_token_has_a_ttft_and_no_tpot() -> None:
    single = finished()[-1]
    assert single.ttft_s == 0.08 and single.tpot_s is None and single.gaps_s == ()


def test_only_finished_requests_are_measured_and_the_others_counted() -> None:
    summary = summarize([*finished(), *unfinished()])
    assert (summary.finished, summary.refused, summary.cut) == (6, 1, 1)
    assert summary.errors == {"internal_error": 1, "connection": 1}
    assert summary.all.ttft is not None and summary.all.ttft.n == 6
    assert summary.all == summarize(finished()).all


def test_rates_are_over_the_time_from_the_first_request_to_the_last_end() -> None:
    summary = summarize(finished())
    assert summary.window_s == pytest.approx(3.09)
    assert summary.requests_per_s == pytest.approx(6 / 3.09, abs=1e-3)
    assert summary.output_tokens_per_s == pytest.approx(15 / 3.09, abs=1e-3)
    assert summary.prompt_tokens_per_s == pytest.approx(4300 / 3.09, abs=1e-3)


def test_the_hit_rate_weighs_tokens_not_requests() -> None:
    summary = summarize(finished())
    assert summary.all.hit_rate == round((128 + 960 + 1472) / 4300, 4)
    assert {group.name: group.hit_rate for group in summary.kinds} == {"chat": 0.32, "agent": round(2432 / 3900, 4)}
    assert {group.name: (group.requests, group.cached_tokens) for group in summary.routes} == {
        "recompute": (3, 0),
        "direct": (2, 1600),
        "storage_to_prefill": (1, 960),
    }


def test_turns_have_no_gaps() -> None:
    turns = summarize(finished()).turns
    assert [(group.name, group.requests) for group in turns["agent"]] == [("1", 1), ("2", 1), ("3", 0), ("4", 1)]
    assert [group.hit_rate for group in turns["chat"]] == [0, 0.64]


def test_no_request_at_all_is_summarized_too() -> None:
    summary = summarize([])
    assert summary.window_s == 0 and summary.all.ttft is None and summary.kinds == [] and summary.requests_per_s == 0
