"""Questions that move no bytes, and whoever waits for their answers."""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from common.errors import TransferFailed

T = TypeVar("T")


class Asked(Generic[T]):
    """One connection's open questions of one kind, by the request's number."""

    def __init__(self) -> None:
        self._answers: dict[int, asyncio.Future[T]] = {}

    async def ask(self, number: int, post: Callable[[], None], deadline_s: float) -> T:
        """Posts the question and waits for its answer. Raises `TransferFailed`, `TimeoutError`."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        post()
        try:
            async with asyncio.timeout(deadline_s):
                return await answer
        finally:
            self._answers.pop(number, None)

    def answered(self, number: int, answer: T) -> bool:
        """Hands an answer on. False: nobody waits for it any more."""
        waiting = self._answers.pop(number, None)
        if waiting is None or waiting.done():
            return False
        waiting.set_result(answer)
        return True

    def fail(self, reason: str) -> None:
        """No answers come any more."""
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(TransferFailed(reason))
