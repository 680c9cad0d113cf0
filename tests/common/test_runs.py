"""When prefill computes what, and what of it is told."""

import math

from hypothesis import given
from hypothesis import strategies as st

from common.runs import CLASS_S, CLASSES_MAX, STRETCH, QueuedRun, by_class, due_s

runs = st.lists(st.builds(QueuedRun, st.integers(1, 100_000), st.floats(-1e4, 1e6)), max_size=60)


def test_a_run_is_due_in_proportion_to_its_size_and_at_once_where_no_speed_is_known() -> None:
    assert due_s(10.0, 500, 1000.0) == 10.0 + STRETCH * 0.5
    assert due_s(10.0, 500, 0.0) == 10.0


@given(runs, st.floats(-100, 100), st.randoms())
def test_classes_are_few_and_make_nothing_later_than_it_is(queue: list[QueuedRun], now: float, chance: st.DataObject) -> None:
    told = by_class(queue, now)
    assert len(told) <= CLASSES_MAX and [run.due_s for run in told] == sorted(run.due_s for run in told)
    assert sum(run.tokens for run in told) == sum(run.tokens for run in queue)
    for limit in (0.0, 0.1, 1.0, 10.0, 1e3):
        due = sum(run.tokens for run in queue if run.due_s - now <= limit)
        assert sum(run.tokens for run in told if run.due_s <= limit) >= due
    turned = list(queue)
    chance.shuffle(turned)  # type: ignore[attr-defined]
    assert by_class(turned, now) == told


@given(st.floats(CLASS_S, CLASS_S * 2 ** (CLASSES_MAX - 2)), st.floats(CLASS_S, 1e3))
def test_runs_of_one_class_are_due_within_twice_the_time(first: float, second: float) -> None:
    told = by_class([QueuedRun(1, first), QueuedRun(1, second)], 0.0)
    if len(told) == 1:
        assert max(first, second) <= 2 * min(first, second) * (1 + 1e-9) or math.isinf(second)
