"""The pool of blocking calls."""

import asyncio
import threading
from collections.abc import Callable

import pytest

from common.disk.batch import NotStarted
from common.disk.io_pool import IoPool
from common.errors import Overloaded


class Held:
    """Calls that wait until they are let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.started = threading.Semaphore(0)
        self.order: list[str] = []

    def call(self, name: str) -> Callable[[], str]:
        def run() -> str:
            self.order.append(name)
            self.started.release()
            assert self.go.wait(30)
            return name

        return run


async def test_results_come_in_order_and_errors_are_results() -> None:
    pool = IoPool(3, "test", 100)

    def fails() -> int:
        raise OSError("no")

    results = await pool.submit([lambda: 1, fails, lambda: 3]).done
    assert (results[0], results[2]) == (1, 3) and isinstance(results[1], OSError)
    assert await pool.submit([]).done == []
    assert pool.pending == 0
    pool.close()


async def test_batches_take_turns() -> None:
    pool, held = IoPool(1, "test", 100), Held()
    long = pool.submit([held.call(f"long{i}") for i in range(3)])
    await asyncio.to_thread(held.started.acquire)
    short = pool.submit([held.call("short")])
    held.go.set()
    await asyncio.gather(long.done, short.done)
    assert held.order.index("short") < held.order.index("long2")
    pool.close()


async def test_what_was_not_started_by_the_deadline_is_given_up_and_the_rest_waited_for() -> None:
    pool, held = IoPool(1, "test", 100), Held()
    batch = pool.submit([held.call("first"), held.call("second")], deadline_s=0.02)
    later = pool.submit([held.call("third")], deadline_s=0.02)
    (result,) = await later.done
    assert isinstance(result, NotStarted)
    assert not batch.done.done()
    held.go.set()
    first, second = await batch.done
    assert first == "first" and isinstance(second, NotStarted)
    assert held.order == ["first"] and pool.pending == 0
    pool.close()


async def test_pending_calls_are_bounded() -> None:
    pool, held = IoPool(1, "test", 2), Held()
    batch = pool.submit([held.call("a"), held.call("b")])
    with pytest.raises(Overloaded, match="at most 2"):
        pool.submit([held.call("c")])
    held.go.set()
    assert await batch.done == ["a", "b"]
    pool.close()


async def test_a_closed_pool_finishes_what_is_queued_and_takes_no_more() -> None:
    pool = IoPool(2, "test", 100)
    batch = pool.submit([lambda: 1] * 20)
    await asyncio.to_thread(pool.close)
    assert await batch.done == [1] * 20
    with pytest.raises(Overloaded):
        pool.submit([lambda: 1])
