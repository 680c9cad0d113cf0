"""What an engine's steps tell of its speed."""

import math

from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.speed import GAIN_MAX, Speed


def test_nothing_is_known_before_the_first_step() -> None:
    assert Speed().tokens_per_s == 0 and Speed().step_s == 0


def test_one_step_gives_tokens_over_seconds() -> None:
    speed = Speed()
    speed.measured(100, 0.5)
    assert math.isclose(speed.tokens_per_s, 200) and speed.step_s == 0


@given(st.floats(0, 0.1), st.floats(100, 1e5), st.lists(st.integers(16, 4096), min_size=3, max_size=50))
def test_a_line_is_found_whatever_the_sizes(step_s: float, tokens_per_s: float, sizes: list[int]) -> None:
    speed = Speed()
    for size in [16, *sizes, 4096]:
        speed.measured(size, step_s + size / tokens_per_s)
    if speed.tokens_per_s < GAIN_MAX * 0.99 * speed._tokens / speed._seconds:
        assert math.isclose(speed.tokens_per_s, tokens_per_s, rel_tol=1e-3)
        assert math.isclose(speed.step_s, step_s, rel_tol=1e-2, abs_tol=1e-5)


def test_small_steps_alone_keep_the_fixed_part_that_larger_ones_showed() -> None:
    speed = Speed()
    for size in (64, 1024, 64, 1024):
        speed.measured(size, 0.02 + size / 5000)
    for _ in range(500):
        speed.measured(64, 0.02 + 64 / 5000)
    assert math.isclose(speed.step_s, 0.02, rel_tol=0.01) and math.isclose(speed.tokens_per_s, 5000, rel_tol=0.01)


def test_a_machine_that_slows_down_is_followed() -> None:
    speed = Speed()
    for tokens_per_s in (5000, 1000):
        for size in (64, 512, 1024) * 40:
            speed.measured(size, 0.01 + size / tokens_per_s)
    assert math.isclose(speed.tokens_per_s, 1000, rel_tol=0.05)


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 10)), min_size=1, max_size=100))
def test_whatever_was_measured_the_fit_is_bounded(steps: list[tuple[int, float]]) -> None:
    speed = Speed()
    for tokens, seconds in steps:
        speed.measured(tokens, seconds)
        mean = speed._tokens / speed._seconds
        assert mean * 0.999 <= speed.tokens_per_s <= GAIN_MAX * mean * 1.001 and speed.step_s >= 0


def test_a_step_that_was_held_up_does_not_become_the_fixed_part() -> None:
    speed = Speed()
    for size, seconds in ((16, 0.9), (800, 0.16), (64, 0.018), (500, 0.1)):
        speed.measured(size, seconds)
    assert speed.step_s <= 0.018 * 1.02


def test_short_steps_that_lie_on_no_line_promise_no_quick_long_ones() -> None:
    speed = Speed()
    for size, seconds in ((43, 0.16), (31, 0.13), (25, 0.17), (60, 0.15)):
        speed.measured(size, seconds)
    assert speed.tokens_per_s < 3 * speed._tokens / speed._seconds
    for size in (43, 31, 80, 25, 60) * 8:  # the same on a line: now it is seen
        speed.measured(size, 0.12 + size / 2000)
    assert math.isclose(speed.tokens_per_s, 2000, rel_tol=0.2)


def test_two_steps_are_no_line() -> None:
    speed = Speed()
    speed.measured(40, 0.15)
    speed.measured(80, 0.15)
    assert speed.step_s == 0 and math.isclose(speed.tokens_per_s, speed._tokens / speed._seconds)
