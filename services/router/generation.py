"""A request from tokens to text: look up, place, stream, move when a worker dies. HTTP and gRPC share it.

Life of a `Generation`:

1. `async with Generation(generator, work)` admits it (or refuses at once) and places every choice: block
   keys -> kvstore lookup (a failure is a miss) -> `placement.route` -> `Start` on the decode stream.
2. Iterating gives lists of `Delta`, everything that came since the last time.
3. A retryable failure moves the choice: to another decode worker, or the same one back again, with
   the tokens so far as `output_ids`. Seeded sampling makes the continuation exact.
4. Leaving the block cancels what still runs, releases every lease and reports the request once.
"""

import asyncio
import time
from collections import deque
from types import TracebackType
from typing import Any

from common import tracing
from common.clients.decode import Step
from common.errors import (
    DeadlineExceeded,
    Internal,
    Overloaded,
    PenstockError,
    Unavailable,
    meaning,
)
from common.generation import FinishReason
from common.logs import Log
from services.router.choice import Choice, Delta, Placement, choices_of, measured
from services.router.dispatch import Dispatch
from services.router.generator import Generator
from services.router.outcome import outcome_of, status_of, timing_of
from services.router.work import Work

MOVES_MAX = 2  # a request that killed two workers is not offered a fourth
FULL_S = 0.5  # how long a worker that refused is left alone, when it didn't say
UNREAD_STEPS_MAX = 65536  # steps a client may be behind
log = Log("generation")


class Generation:
    """One request under way."""

    def __init__(self, generator: Generator, work: Work) -> None:
        self._g = generator
        self.work = work
        self._choices = choices_of(work, generator.model)
        self._inbox: deque[tuple[Choice, str, Step]] = deque()
        self._wake: asyncio.Event = asyncio.Event()
        self._started = time.monotonic()
        self._deadline = self._started + work.timeout_s
        self._first_token_at: float | None = None
        self._last_step_at = self._started
        self._error: BaseException | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._expired = False

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.work.prompts)

    @property
    def completion_tokens(self) -> int:
        return sum(len(choice.output) for choice in self._choices)

    @property
    def cached_tokens(self) -> int:
        """Over the first choice of every prompt."""
        starts, index = [], 0
        for samplings in self.work.samplings:
            starts.append(index)
            index += len(samplings)
        return sum(self._choices[start].cached_tokens for start in starts)

    @property
    def route(self) -> str:
        """What the first choice's worker says it did, else what was decided."""
        first = self._choices[0]
        return first.report.plan if first.report else str(first.route.plan) if first.route else ""

    @property
    def explanation(self) -> dict[str, Any]:
        """The first choice's last routing decision, in brief."""
        decision = self._choices[0].decision
        return decision.summary() if decision is not None else {}

    async def __aenter__(self) -> "Generation":
        self._g.refuse_when_full(self.work.sequences)
        self._g.in_flight += self.work.sequences
        self._g.idle.clear()
        self._span, self._traceparent = tracing.begin(
            "request",
            self.work.traceparent,
            **{"gen_ai.request.id": self.work.id, "gen_ai.usage.input_tokens": self.prompt_tokens},
        )
        self._dispatch = Dispatch(self._g, self.work, self._deadline, self._traceparent, self._arrived)
        self._g.metrics.waiting(self.work.sequences)
        self._timer = asyncio.get_running_loop().call_later(self.work.timeout_s, self._expire)
        try:
            if len(self._choices) == 1:
                await self._dispatch.place(self._choices[0])
            else:
                await _all(self._dispatch.place(choice) for choice in self._choices)
        except BaseException as error:
            await self.__aexit__(type(error), error, None)
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for choice in self._choices:
            self._leave(choice)
        self._g.in_flight -= self.work.sequences
        if not self._g.in_flight:
            self._g.idle.set()
        self._report(error)

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> list[Delta]:
        """Every step that arrived since the last call; waits for one."""
        while True:
            if self._expired:
                raise DeadlineExceeded(f"the request took longer than {self.work.timeout_s:g} s")
            deltas = await self._drain()
            if deltas:
                return deltas
            if all(choice.finish for choice in self._choices):
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()

    async def _drain(self) -> list[Delta]:
        deltas: list[Delta] = []
        while self._inbox:
            choice, stream_id, step = self._inbox.popleft()
            placement = choice.placement
            if placement is None or placement.stream_id != stream_id:
                continue  # of a worker it has moved away from
            if step.error is not None or step.finish is FinishReason.CANCELLED:
                if deltas:  # hand over what is there before a move that may take a while
                    self._inbox.appendleft((choice, stream_id, step))
                    break
                await self._move(choice, step.error or Unavailable(f"decode worker {placement.peer.address} gave the request up"))
                continue
            if step.report is not None and not step.tokens and step.finish is None:
                self._dispatch.asked_another(placement, step.report)
                continue
            deltas.append(self._advance(choice, placement, step))
        return deltas

    def _advance(self, choice: Choice, placement: Placement, step: Step) -> Delta:
        before = len(choice.output)
        delta = choice.advance(step)
        now = time.monotonic()
        if delta.tokens:
            self._g.learn(choice.decision, step.report)
            placement.stay.grown(len(delta.tokens))
            if before == 0:
                self._first_token(choice, now)
            elif self._last_step_at < now:
                self._g.metrics.inter_token(now - self._last_step_at, len(delta.tokens))
            self._last_step_at = now
            self._loaded(placement)
        if step.report is not None:
            measured(step.report, placement)
        if delta.finish is not None:
            self._leave(choice)
        return delta

    def _first_token(self, choice: Choice, now: float) -> None:
        self._g.metrics.running(1)
        if self._first_token_at is None:
            self._first_token_at = now
            self._g.metrics.first_token(now - self._started)
            tracing.record("first_token", now - self._started, self._traceparent)

    def _loaded(self, placement: Placement) -> None:
        """The prompt's KV is there: prefill is done, the lease is needed no more."""
        placement.stay.loaded()
        if placement.prefill_stay is not None:
            placement.prefill_stay.ended()
        if placement.found is not None:
            self._g.keeper.loaded(placement.found)

    def _leave(self, choice: Choice) -> None:
        """Ends a choice's stay on a worker: cancelled if it still runs, everything given back. Idempotent."""
        placement, choice.placement = choice.placement, None
        if placement is None:
            return
        if choice.decision is not None:
            choice.decision.end(choice.finish, choice.last_report)
        placement.connection.cancel(placement.stream_id)
        self._loaded(placement)
        placement.stay.ended()
        if placement.found is not None:
            self._g.keeper.release(placement.found)

    async def _move(self, choice: Choice, error: PenstockError) -> None:
        """Another worker takes the choice over, or the error stands."""
        placement = choice.placement
        assert placement is not None
        self._leave(choice)
        if isinstance(error, Overloaded):
            placement.peer.full_until = time.monotonic() + (error.retry_after_s or FULL_S)
        if not meaning(error).retry or choice.moves >= MOVES_MAX:
            raise error
        choice.moves += 1
        choice.avoid |= {placement.peer.address}
        choice.failure = error
        log.warning(
            "moved", request_id=self.work.id, away_from=placement.peer.id, tokens=len(choice.output), reason=error.message
        )
        self._g.metrics.moved()
        await self._dispatch.place(choice)

    def _arrived(self, choice: Choice, stream_id: str, step: Step) -> None:
        """A step came off the stream (called by the decode connection)."""
        if len(self._inbox) >= UNREAD_STEPS_MAX:
            self._inbox.clear()
            step = Step(finish=FinishReason.ERROR, error=Internal(f"the client is {UNREAD_STEPS_MAX} steps behind"))
        self._inbox.append((choice, stream_id, step))
        self._wake.set()

    def _expire(self) -> None:
        self._expired = True
        self._wake.set()

    def _report(self, error: BaseException | None) -> None:
        """Metrics, span and the one log event of the request."""
        seconds = time.monotonic() - self._started
        status = status_of(error, self._choices)
        seen = sum(1 for choice in self._choices if choice.output)
        self._g.metrics.finished(self._choices, seen, self.work, seconds, status)
        timing: dict[str, float] = {}
        if self._first_token_at is not None:
            timing = timing_of(
                self._first_token_at - self._started, self._last_step_at - self._first_token_at, self.completion_tokens - seen
            )
        log.event("request", id=self.work.id, route=self.route, prompt_tokens=self.prompt_tokens, cached_tokens=self.cached_tokens,
                  output_tokens=self.completion_tokens, status=status, **timing, **outcome_of(error, self._choices))  # fmt: skip
        self._span.set_attributes({"gen_ai.usage.output_tokens": self.completion_tokens, "penstock.status": status})
        self._span.end()


async def _all(work: Any) -> None:
    """Runs all to the end, then raises the first error: nothing is left half placed."""
    for result in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
