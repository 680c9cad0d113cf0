"""Small pieces of asyncio that several services need."""

import asyncio
from collections.abc import Coroutine
from typing import Any


async def first_of(*work: Coroutine[Any, Any, Any]) -> None:
    """Runs all, waits for the first to end, cancels the others, raises what the first raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        pending = {task for task in tasks if not task.done()}
        while pending:  # more than once: asyncio.wait_for of 3.11, which libraries use, can swallow a cancellation
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=1.0)


def check_cancelled() -> None:
    """Raises the cancellation that a library's `asyncio.wait_for` may have swallowed."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
