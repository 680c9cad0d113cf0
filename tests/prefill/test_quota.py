"""FIFO packing to a quota of compute: the arithmetic."""

from hypothesis import given
from hypothesis import strategies as st

from services.prefill.quota import QUOTA_S, Quota, cost, fitting, meeting_point
from services.worker.ledger import Loader


def test_a_token_costs_one_and_its_share_of_attention() -> None:
    assert cost(0, 1, 100.0) == 1.01
    assert cost(100, 101, 100.0) == 2.01


@given(st.integers(0, 5000), st.integers(1, 3000), st.sampled_from([16, 64]), st.floats(0, 1e5), st.floats(1, 1e6))
def test_the_longest_chunk_that_fits_is_found(start: int, length: int, step: int, budget: float, attention: float) -> None:
    end = start + length
    found = fitting(start, end, step, budget, attention)
    assert found == end or (found - start) % step == 0
    assert found == start or cost(start, found, attention) <= budget
    if found < end:
        following = min(found + step, end)
        assert cost(start, following, attention) > budget


@given(st.integers(0, 1000), st.integers(1, 500), st.integers(1, 500), st.floats(1, 1e6))
def test_chunks_cost_what_their_whole_costs(start: int, first: int, second: int, attention: float) -> None:
    parts = cost(start, start + first, attention) + cost(start + first, start + first + second, attention)
    assert abs(parts - cost(start, start + first + second, attention)) < 1e-6 * parts


def test_the_quota_is_what_was_measured_to_take_so_long() -> None:
    quota = Quota(float("inf"), tokens_max=64)
    assert quota.equivalents == 64
    quota.measured([(0, 100), (50, 150)], 0.1)
    assert abs(quota.speed.tokens_per_s - 2000) < 1e-6 and abs(quota.equivalents - 2000 * QUOTA_S) < 1e-6


def test_what_a_step_takes_whatever_it_computes_is_not_the_tokens() -> None:
    quota = Quota(float("inf"), tokens_max=64)
    for tokens in (50, 100, 150, 200):
        quota.measured([(0, tokens)], 0.1 + tokens / 1000)
    assert abs(quota.speed.step_s - 0.1) < 1e-6
    assert abs(quota.equivalents - (QUOTA_S - 0.1) * 1000) < 1e-3


def test_a_long_prompt_pays_the_fixed_part_of_every_step() -> None:
    quota = Quota(float("inf"), tokens_max=100)
    assert quota.tokens_per_s == 0
    for tokens in (50, 100, 150, 200):
        quota.measured([(0, tokens)], 0.1 + tokens / 1000)
    assert abs(quota.tokens_per_s - 100 / 0.2) < 1e-3  # a step of at most 100 tokens
    quota = Quota(float("inf"), tokens_max=10**6)
    for tokens in (50, 100, 150, 200):
        quota.measured([(0, tokens)], 0.1 + tokens / 1000)
    assert abs(quota.tokens_per_s - (QUOTA_S - 0.1) * 1000 / QUOTA_S) < 1e-3


@given(st.integers(1, 500), st.integers(0, 50), st.floats(1, 1e4), st.floats(0, 0.1), st.floats(1e-4, 1))
def test_where_they_meet_both_are_done(left: int, coming: int, per_s: float, step_s: float, block_s: float) -> None:
    computed = meeting_point(Loader(left, coming, per_s), step_s, block_s)
    assert abs(step_s + computed * block_s - (left + coming - computed) / per_s) < 1e-6 * (1 + left + coming)


def test_compute_goes_towards_a_loader_in_few_steps_and_leaves_it_the_last_blocks() -> None:
    quota = Quota(float("inf"), tokens_max=4096)
    for tokens in (50, 100, 150, 200):
        quota.measured([(0, tokens)], 0.02 + tokens / 1000)  # a block of 16 tokens: 16 ms
    left, first, taken, loaded = 100, 0, [], 0.0
    while left and (count := quota.reach(first * 16, 16, Loader(left, 0, 100.0))):
        taken.append(count)
        first, loaded = first + count, loaded + (0.02 + 0.016 * count) * 100
        left = max(0, 100 - first - int(loaded))
    assert len(taken) <= 4 and taken == sorted(taken, reverse=True), taken
    assert abs(sum(taken) - 100 / (1 + 1.6)) < 5  # what two ends that never stop would give


def test_a_loader_that_has_brought_nothing_is_met_by_quarters() -> None:
    quota = Quota(float("inf"), tokens_max=4096)
    quota.measured([(0, 100)], 0.1)
    assert quota.reach(0, 16, Loader(40, 16, 0.0)) == 10


def test_a_loader_that_brings_nothing_more_is_left_nothing() -> None:
    quota = Quota(float("inf"), tokens_max=4096)
    for tokens in (50, 100, 150, 200):
        quota.measured([(0, tokens)], 0.02 + tokens / 1000)
    assert quota.reach(0, 16, Loader(2, 1, 1000.0)) == 0, "it is there before a step would be over"
    assert quota.reach(0, 16, Loader(2, 1, 0.1)) >= 2, "what it has brought is long ago"
