"""Whose turn it is at the disk: batches of pages, each transfer known by its offset."""

import asyncio
from collections.abc import Sequence

import pytest

from common.disk import turns as turns_module
from common.disk.batch import Batch
from common.disk.flights import Chain
from common.disk.pages import PAGE_BYTES, aligned
from common.disk.transfer import Op, Transfer
from common.disk.turns import Turns


@pytest.fixture(autouse=True)
def short_is_one_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "SHORT_BYTES", PAGE_BYTES)


def add(turns: Turns, op: Op, offsets: Sequence[int]) -> Batch[int]:
    batch: Batch[int] = Batch(len(offsets), asyncio.get_running_loop())
    turns.add(batch, [Transfer(op, 0, [aligned(PAGE_BYTES)], offset) for offset in offsets])
    return batch


def order(turns: Turns) -> list[int]:
    """Of all that wait."""
    offsets = []
    while turns.waiting:
        first = turns.first
        flight = turns.start(Chain())
        assert flight.transfer is first and flight.batch.next == flight.index + 1
        offsets.append(flight.transfer.offset)
    assert not turns.queued_bytes
    return offsets


async def test_of_long_reads_the_first_that_came_is_there_first() -> None:
    turns = Turns()
    add(turns, Op.READ, [10, 11, 12])
    add(turns, Op.READ, [20, 21])
    assert turns.waiting == 5 and turns.queued_bytes == 5 * PAGE_BYTES
    assert order(turns) == [10, 11, 12, 20, 21]


async def test_long_and_short_reads_go_in_turn() -> None:
    turns = Turns()
    add(turns, Op.READ, [10, 11, 12, 13])
    add(turns, Op.READ, [20, 21])
    for short in (30, 31, 32):
        add(turns, Op.READ, [short])
    assert order(turns) == [30, 10, 31, 11, 32, 12, 13, 20, 21]


async def test_a_short_read_that_comes_later_is_next_but_one_at_most() -> None:
    turns = Turns()
    add(turns, Op.READ, [10, 11, 12])
    assert [turns.start(Chain()).transfer.offset for _ in range(2)] == [10, 11]
    add(turns, Op.READ, [30])
    assert order(turns) == [30, 12]


async def test_writes_of_several_batches_go_in_turn() -> None:
    turns = Turns()
    add(turns, Op.WRITE, [10, 11, 12])
    add(turns, Op.WRITE, [20, 21])
    assert order(turns) == [10, 20, 11, 21, 12]


async def test_what_is_given_up_has_no_turn_any_more() -> None:
    turns = Turns()
    batch = add(turns, Op.READ, [10, 11, 12])
    add(turns, Op.READ, [20])
    assert [turns.start(Chain()).transfer.offset for _ in range(2)] == [20, 10]
    assert turns.give_up(batch) == 2 and turns.give_up(batch) == 0
    add(turns, Op.READ, [30, 31])
    assert turns.queued_bytes == 2 * PAGE_BYTES and order(turns) == [30, 31]
