"""Rates of links, with a clock of the test's own."""

from services.worker.links import HALF_LIFE_BYTES, Link


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
    move(link, clock, 1000, 1.0)
    assert link.bytes_per_s == 1000
    clock.now += 100  # idle time says nothing
    move(link, clock, HALF_LIFE_BYTES, HALF_LIFE_BYTES / 3000)
    assert abs(link.bytes_per_s - 2000) < 1e-6


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
    with link.queued(100) as less, link.queued(50):
        less(30)
        assert link.queued_bytes == 120
        less(100)  # never below what was asked for
        assert link.queued_bytes == 50
    assert link.queued_bytes == 0
