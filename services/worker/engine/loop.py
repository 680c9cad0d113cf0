"""Runs an engine in a thread of its own, next to one asyncio event loop.

- Commands (add, cancel, call, ...) come from the event loop's thread, in order, and take effect between two
  steps. Refusals that need no engine state are raised at once, on the caller's side.
- Each step's result goes back as one callback on the event loop. At most `_RESULTS_MAX` results are on
  their way: an event loop that doesn't keep up slows the engine instead of filling memory.
- The thread sleeps while there is nothing to do, and a command wakes it.

If a step itself raises, that is our bug: all sequences are ended with an error and the loop goes on. If ending
them fails too the loop stops, and `failure` says why. Every sequence gets a finish, also when the loop stops.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

from common.blocks import BlockKey
from common.errors import Internal, Overloaded, PenstockError, Unavailable
from common.generation import FinishReason
from services.worker.engine.engine import Engine
from services.worker.engine.types import Claim, EngineLoad, NewSequence, SequenceStep, StepResult

log = logging.getLogger(__name__)


class Steppable(Protocol):
    """What a loop runs: decode's `Engine`, or prefill's. All but `check` and `room` belong to the loop's thread."""

    @property
    def load(self) -> EngineLoad: ...

    @property
    def room(self) -> int:
        """How many more sequences would be taken."""
        ...

    @property
    def idle(self) -> bool:
        """Nothing to compute and nothing to report."""
        ...

    blocked: bool  # the last step could compute nothing: only a command changes that

    def check(self, new: NewSequence) -> None: ...

    def add(self, new: Any) -> None: ...

    def give_up(self, claim: Claim) -> None: ...

    def cancel(self, sequence_id: str) -> None: ...

    def fail_all(self, error: PenstockError) -> None: ...

    def close(self, error: PenstockError) -> tuple[SequenceStep, ...]: ...

    def step(self) -> StepResult: ...


T = TypeVar("T")
P = ParamSpec("P")
E = TypeVar("E", bound=Steppable)
Command = Callable[[E], None]

_COMMANDS_MAX = 4096
_RESULTS_MAX = 64


class EngineLoop(Generic[E]):
    """One engine, one thread, one event loop.

    Args:
        on_step: called on the event loop with every step's result that names a sequence.

    Attributes:
        failure: why the thread gave up, or None.
        load: as of the last step.
    """

    def __init__(self, engine: E, on_step: Callable[[StepResult], None], *, name: str = "engine") -> None:
        self.engine = engine
        self.failure: BaseException | None = None
        self.load: EngineLoad = engine.load
        self._on_step = on_step
        self._commands: queue.SimpleQueue[Command[E]] = queue.SimpleQueue()
        self._results = threading.Semaphore(_RESULTS_MAX)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._closing = threading.Lock()  # no command slips in after the last drain
        self._closed = False
        self._stopping = False
        self._adds_put = 0  # written by the event loop's thread only
        self._adds_done = 0  # written by the engine's thread only
        self._refused: list[SequenceStep] = []
        self._busy_since: float | None = None

    # -- life

    def start(self) -> None:
        """Starts the thread; call it on the event loop that is to get the results."""
        self._event_loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after the current step; what still runs ends with `Unavailable`."""
        if self._thread.ident is None:
            return
        self._stopping = True
        self._results.release()  # the thread may be waiting for this very event loop
        self._put(lambda engine: None)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.failure is None

    def stalled_s(self) -> float:
        """How long the current step or command has been running; 0 while the engine sleeps."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    # -- commands, from the event loop's thread

    def add(self, new: NewSequence) -> None:
        """Queues a sequence, or raises why it can't be: `InvalidRequest`, `ContextExceeded`, `Overloaded`, `Unavailable`.

        As with `Engine.add`, `new.kv` and `new.claim` are given back exactly once in every outcome, on either thread.
        """
        try:
            self.engine.check(new)
            if self._adds_put - self._adds_done >= self.engine.room:
                raise Overloaded("the engine's queue is full", retry_after_s=1.0)
            if not self._put(lambda engine: self._add(engine, new)):
                raise Unavailable("the engine has stopped")
        except BaseException:
            self.give_up(new.claim)
            new.give_back()
            raise
        self._adds_put += 1

    def cancel(self, sequence_id: str) -> None:
        """Ends a sequence; its CANCELLED step comes with the next result."""
        self._put(lambda engine: engine.cancel(sequence_id))

    def wake(self) -> None:
        """Something an engine may wait for has come: its next plan may differ."""
        self._put(lambda engine: None)

    def posting(self, function: Callable[P, None]) -> Callable[P, None]:
        """The function, to be called on the engine's thread and run on the event loop, in order with the results."""

        def post(*args: P.args, **kwargs: P.kwargs) -> None:
            assert self._event_loop is not None
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody listens any more
                self._event_loop.call_soon_threadsafe(lambda: function(*args, **kwargs))

        return post

    def release(self: "EngineLoop[Engine]", sequence_id: str) -> None:
        """Frees a held sequence's blocks."""
        self._put(lambda engine: engine.release(sequence_id))

    async def export(
        self: "EngineLoop[Engine]", sequence_id: str, first_block: int, last_block: int, out: Sequence[memoryview]
    ) -> None:
        """`Engine.export` between two steps."""
        await self.call(lambda engine: engine.export(sequence_id, first_block, last_block, out))

    async def export_claimed(self: "EngineLoop[Engine]", claim: Claim, blocks: Sequence[int], out: Sequence[memoryview]) -> None:
        """`Engine.export_claimed` between two steps."""
        await self.call(lambda engine: engine.export_claimed(claim, blocks, out))

    def claim(self: "EngineLoop[Engine]", keys: Sequence[BlockKey]) -> Claim:
        """`Engine.claim`, at once."""
        return self.engine.claim(keys)

    def give_up(self, claim: Claim) -> None:
        """`Engine.give_up` between two steps."""
        if claim.blocks:
            self._put(lambda engine: engine.give_up(claim))

    async def call(self, function: Callable[[E], T]) -> T:
        """Runs a function on the engine's thread between two steps and returns what it returns.

        When the wait is cancelled, the function has either never run or run to its end.
        """
        outcome: Future[T] = Future()

        def command(engine: E) -> None:
            if outcome.set_running_or_notify_cancel():
                try:
                    outcome.set_result(function(engine))
                except BaseException as error:
                    outcome.set_exception(error)

        if self._commands.qsize() >= _COMMANDS_MAX:
            raise Overloaded(f"{_COMMANDS_MAX} commands wait for the engine", retry_after_s=1.0)
        if not self._put(command):
            raise Unavailable("the engine has stopped")
        waiting = asyncio.wrap_future(outcome)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            while not outcome.cancel() and not waiting.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([waiting])
            raise

    def _put(self, command: Command[E]) -> bool:
        with self._closing:
            if not self._closed:
                self._commands.put(command)
            return not self._closed

    def _add(self, engine: E, new: NewSequence) -> None:
        self._adds_done += 1
        try:
            engine.add(new)
        except PenstockError as error:
            self._refused.append(SequenceStep(new.id, finish=FinishReason.ERROR, error=error))

    # -- the thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_commands()
                if not self._stopping:
                    self._step()
        except BaseException as error:
            self.failure = error
            log.exception("the engine's thread ends")
        finally:
            self._close()

    def _take_commands(self) -> None:
        """Runs all waiting commands; waits for one if there is nothing else to do."""
        if self.engine.idle or self.engine.blocked:
            self._busy_since = None
            command = self._commands.get()
            self._busy_since = time.monotonic()
            command(self.engine)
        self._drain()

    def _drain(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command(self.engine)

    def _step(self) -> None:
        self._busy_since = time.monotonic()
        try:
            result = self.engine.step()
        except Exception as error:
            log.exception("the engine's step")
            self.engine.fail_all(Internal(f"the engine's step failed: {error!r}"))
            result = self.engine.step()
        refused, self._refused = self._refused, []
        self.load = result.load
        if result.sequences or refused:
            self._send(StepResult((*result.sequences, *refused), result.load))

    def _send(self, result: StepResult) -> None:
        self._busy_since = None
        self._results.acquire()
        assert self._event_loop is not None
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody listens any more
            self._event_loop.call_soon_threadsafe(self._deliver, result)

    def _deliver(self, result: StepResult) -> None:
        self._results.release()
        self._on_step(result)

    def _close(self) -> None:
        with self._closing:
            self._closed = True
        self._drain()
        failed = Internal(f"the engine failed: {self.failure!r}") if self.failure else Unavailable("the engine is stopping")
        steps = (*self.engine.close(failed), *self._refused)
        self._busy_since = None
        self._results.release()
        if steps:
            self._send(StepResult(steps, self.load))
