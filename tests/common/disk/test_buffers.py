"""The bounded pool of buffers for direct I/O."""

import asyncio
import itertools

import pytest

from common.disk.buffers import BufferPool
from common.disk.pages import HUGE_BYTES, address, aligned, huge


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


def test_buffers_for_blocks_are_cut_from_arenas_within_the_bound() -> None:
    length = 3 << 20
    pool = BufferPool(4 * length)
    taken = [pool.take(length) for _ in range(4)]
    assert all(buffer is not None and len(buffer) == length and address(buffer) % 4096 == 0 for buffer in taken)
    assert pool.take(length) is None
    starts = sorted(address(buffer) for buffer in taken if buffer is not None)
    assert all(later - earlier >= length for earlier, later in itertools.pairwise(starts))
    for buffer in taken:
        assert buffer is not None
        pool.give_back(buffer)
    assert pool.take(4 * length) is not None and pool.taken_bytes == pool.bytes_max


def test_memory_on_huge_pages_is_aligned_zeroed_and_writable() -> None:
    memory = huge((5 << 20) + 4096)
    assert len(memory) == (5 << 20) + 4096 and address(memory) % HUGE_BYTES == 0
    assert not any(memory[:: 1 << 16])
    memory[-1] = 7
    assert memory[-1] == 7
