"""Rates of links, with a clock of the test's own."""

from services.worker.links import HALF_LIFE_BYTES, HALF_LIFE_S, Link


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def move(link: Link, clock: Clock, size: int, seconds: float) -> None:
    with link.moving() as came:
        clock.now += seconds
        came(size)


def test_the_first_measurement_counts_whole_and_later_ones_by_their_bytes() -> None:
    clock = Clock()
    link = Link(clock)
    assert link.bytes_per_s == 0
    move(link, clock, 10**6, 1e-3)
    assert abs(link.bytes_per_s - 1e9) < 1
    clock.now += 100  # idle time says nothing
    move(link, clock, HALF_LIFE_BYTES, HALF_LIFE_BYTES / 3e9)
    assert abs(link.bytes_per_s - 2e9) < 1e3


def test_a_link_that_became_slow_is_found_out_in_seconds() -> None:
    clock = Clock()
    link = Link(clock)
    move(link, clock, 24 * 10**6, 1.0)
    move(link, clock, int(HALF_LIFE_S * 10**6), HALF_LIFE_S)
    assert abs(link.bytes_per_s - 12.5e6) < 1


def test_transfers_that_share_the_link_add_up() -> None:
    clock = Clock()
    link = Link(clock)
    with link.moving() as first, link.moving() as second:
        clock.now += 2.0
        first(1000)
        second(3000)
    assert link.bytes_per_s == 2000


def test_a_transfer_that_brings_nothing_measures_nothing() -> None:
    clock = Clock()
    link = Link(clock)
    with link.moving():
        clock.now += 5.0
    assert link.bytes_per_s == 0


def test_queued_bytes_shrink_as_they_come_and_none_are_left_at_the_end() -> None:
    link = Link()
    with link.queued(100) as queued, link.queued(50):
        queued.less(30)
        assert link.queued_bytes == 120
        queued.less(100)  # never below what was asked for
        assert link.queued_bytes == 50
    assert link.queued_bytes == 0
