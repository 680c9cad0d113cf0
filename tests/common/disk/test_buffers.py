"""The bounded pool of buffers for direct I/O."""

import asyncio

import pytest

from common.disk.buffers import BufferPool
from common.disk.pages import address, aligned


async def test_buffers_are_aligned_bounded_and_served_in_turn() -> None:
    pool = BufferPool(4 * 4096)
    first = pool.take(3 * 4096)
    assert first is not None and address(first) % 4096 == 0
    assert pool.take(2 * 4096) is None
    assert await pool.take_all([5 * 4096]) is None
    waiting = asyncio.create_task(pool.take_all([4096, 4096]))
    await asyncio.sleep(0)
    assert pool.take(4096) is None  # nobody overtakes
    pool.give_back(first)
    assert [len(buffer) for buffer in await waiting or []] == [4096, 4096]
    assert pool.taken_bytes == 2 * 4096


async def test_a_cancelled_wait_for_buffers_takes_nothing() -> None:
    pool = BufferPool(2 * 4096)
    held = pool.take(4096)
    assert held is not None
    first = asyncio.create_task(pool.take_all([2 * 4096]))
    second = asyncio.create_task(pool.take_all([4096]))
    await asyncio.sleep(0)
    first.cancel()
    assert len(await second or []) == 1
    assert pool.taken_bytes == 2 * 4096
    pool.give_back(held)
    woken = asyncio.create_task(pool.take_all([2 * 4096]))
    await asyncio.sleep(0)
    pool.give_back((second.result() or [aligned(4096)])[0])
    woken.cancel()
    with pytest.raises(asyncio.CancelledError):
        await woken
    assert pool.taken_bytes == 0
