"""Blocking calls off the event loop: a fixed number of threads, batches in turn, deadlines.

1. `submit(calls)` queues a batch; its future resolves to one result per call, in order.
2. Threads take one call of each batch in turn, so that a long batch doesn't hold up a short one.
3. A call that was not started when the batch's deadline passes, or when the batch is abandoned,
   results in `NotStarted`. A call that was started is always waited for: its memory is in use.

An exception of a call is its result, never raised. At most `pending_max` calls are queued or
running; a batch that would exceed this is refused with `Overloaded`.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from common.disk.batch import Batch
from common.errors import Overloaded

T = TypeVar("T")
_Queued = tuple[Batch[object], Sequence[Callable[[], object]]]


class IoPool:
    """Threads for blocking calls. Submit from an event loop; `close` waits for what was started."""

    def __init__(self, threads: int, name: str, pending_max: int) -> None:
        self.pending = 0  # calls queued or running
        self.pending_max = pending_max
        self._turn: deque[_Queued] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, calls: Sequence[Callable[[], T]], deadline_s: float | None = None) -> Batch[T]:
        """Queues calls, none of which may return None. Raises `Overloaded`."""
        batch: Batch[T] = Batch(len(calls), asyncio.get_running_loop())
        if not calls:
            batch.finish()
            return batch
        with self._changed:
            if self._closed or self.pending + len(calls) > self.pending_max:
                raise Overloaded(
                    f"{self.pending} disk operations are pending, {len(calls)} more asked for: at most {self.pending_max}"
                )
            self.pending += len(calls)
            self._turn.append((batch, calls))  # type: ignore[arg-type]
            self._changed.notify(min(len(calls), len(self._threads)))
        if deadline_s is not None:
            batch.timer = batch.loop.call_later(deadline_s, self.abandon, batch)
        return batch

    def abandon(self, batch: Batch[T]) -> None:
        """Gives up the calls of a batch that were not started. Idempotent."""
        with self._changed:
            left = batch.give_up()
            if not left:
                return
            self._turn = deque(entry for entry in self._turn if entry[0] is not batch)
            self.pending -= left
            settled = batch.settled
        if settled:
            batch.finish()

    def close(self) -> None:
        """Ends the threads when what is queued is done. Blocks; idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._turn:
                    if self._closed:
                        return
                    self._changed.wait()
                batch, calls = self._turn.popleft()
                index = batch.start()
                if batch.left:
                    self._turn.append((batch, calls))
            result: object
            try:
                result = calls[index]()
            except BaseException as error:
                result = error
            with self._changed:
                batch.settle(index, result)
                self.pending -= 1
                settled = batch.settled
            if settled:
                self._tell(batch)

    @staticmethod
    def _tell(batch: Batch[object]) -> None:
        try:
            batch.loop.call_soon_threadsafe(batch.finish)
        except RuntimeError:  # the loop is closed: nobody waits
            return
