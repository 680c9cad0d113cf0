"""Turns: who goes next, and that no turn is lost."""

import asyncio

from services.worker.turns import Turns


async def test_the_lowest_number_goes_next_whoever_asked_first() -> None:
    turns, order = Turns(1), []

    async def take(number: int) -> None:
        async with turns.turn(number):
            order.append(number)

    async with asyncio.TaskGroup() as group, turns.turn(0):
        for number in (3, 1, 2, 1):
            group.create_task(take(number))
        await asyncio.sleep(0)
    assert order == [1, 1, 2, 3]


async def test_who_is_cancelled_while_waiting_or_just_called_leaves_the_turn_to_the_next() -> None:
    turns, held = Turns(1), asyncio.Event()

    async def take(number: int) -> None:
        async with turns.turn(number):
            held.set()

    async with turns.turn(0):
        waiting, called = asyncio.create_task(take(1)), asyncio.create_task(take(2))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.sleep(0)
    called.cancel()  # it was called when the turn ended, and has not run since
    await asyncio.wait([waiting, called])
    assert not held.is_set()
    async with asyncio.timeout(5), turns.turn(3):
        pass


async def test_who_waited_while_the_peer_was_found_stalled_is_told_and_who_comes_later_is_not() -> None:
    turns, told = Turns(1), []

    async def take(number: int) -> None:
        async with turns.turn(number) as answers:
            told.append((number, answers))

    async with asyncio.TaskGroup() as group, turns.turn(0) as answers:
        assert answers
        for number in (1, 2):
            group.create_task(take(number))
        await asyncio.sleep(0)
        turns.stalled()
    await take(3)
    assert told == [(1, False), (2, False), (3, True)]
