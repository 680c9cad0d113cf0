"""The bound on requests and bytes in flight."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.transport.budget import Budget


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_requests_are_let_in_first_come_first_served() -> None:
    budget = Budget(2, 100)
    order: list[int] = []

    async def take(number: int, size: int) -> None:
        await budget.acquire(size)
        order.append(number)

    async with asyncio.TaskGroup() as group:
        for number, size in enumerate([60, 60, 10, 10]):
            group.create_task(take(number, size))
        await turns()
        assert order == [0]  # the small ones don't overtake
        budget.release(60)
        await turns()
        assert order == [0, 1, 2]
        budget.release(60)
        await turns()
        assert order == [0, 1, 2, 3]
    budget.release(10)
    budget.release(10)
    assert (budget.requests, budget.bytes) == (0, 0)


async def test_a_request_larger_than_the_bound_goes_alone() -> None:
    budget = Budget(4, 100)
    await budget.acquire(1000)
    waiting = asyncio.create_task(budget.acquire(1))
    await turns()
    assert not waiting.done()
    budget.release(1000)
    await waiting
    budget.release(1)


async def test_one_who_stops_waiting_lets_the_next_one_in() -> None:
    budget = Budget(4, 100)
    await budget.acquire(50)
    large, small = asyncio.create_task(budget.acquire(90)), asyncio.create_task(budget.acquire(50))
    await turns()
    assert not small.done()
    large.cancel()
    await small
    assert budget.bytes == 100
    with pytest.raises(asyncio.CancelledError):
        await large


async def test_one_cancelled_just_when_let_in_gives_it_back() -> None:
    budget = Budget(1, 100)
    await budget.acquire(1)
    waiting = asyncio.create_task(budget.acquire(1))
    await turns()
    budget.release(1)  # its turn has come, but it has not run yet
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (budget.requests, budget.bytes) == (0, 0)


@given(st.lists(st.tuples(st.integers(0, 120), st.booleans()), max_size=30))
def test_the_bounds_hold_whatever_is_cancelled(wishes: list[tuple[int, bool]]) -> None:
    async def run() -> None:
        budget, held = Budget(3, 100), []

        async def take(size: int) -> None:
            await budget.acquire(size)
            held.append(size)
            assert len(held) == 1 or (len(held) <= 3 and sum(held) <= 100)

        tasks = [(asyncio.create_task(take(size)), cancel) for size, cancel in wishes]
        await turns()
        for task, cancel in tasks:
            if cancel:
                task.cancel()
        while True:
            await turns()
            if not held:
                break
            budget.release(held.pop())
        await asyncio.gather(*(task for task, _ in tasks), return_exceptions=True)
        assert (budget.requests, budget.bytes) == (0, 0)

    asyncio.run(run())
