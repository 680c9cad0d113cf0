"""A request from tokens to text: look up, place, stream, move when a worker dies. HTTP and gRPC share it.

Life of a `Generation`:

1. `async with generator.open(work)` admits it (or refuses at once) and places every choice: block
   keys -> kvstore lookup (a failure is a miss) -> `placement.route` -> `Start` on the decode stream.
2. Iterating gives lists of `Delta`, everything that came since the last time.
3. A retryable failure moves the choice: to another decode worker, or the same one back again, with
   the tokens so far as `output_ids`. Seeded sampling makes the continuation exact.
4. Leaving the block cancels what still runs, releases every lease and reports the request once.
"""

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from common import tracing
from common.blocks import Namespace, block_keys, chain_root, reusable_blocks
from common.clients.decode import Step
from common.errors import (
    Cancelled,
    ContextExceeded,
    DeadlineExceeded,
    Internal,
    Overloaded,
    PenstockError,
    Unavailable,
    meaning,
)
from common.generation import FinishReason, Sampling
from common.logs import Log
from common.pb import worker_pb2 as pb
from common.wire import sampling_to_pb
from services.router.choice import Choice, Delta, Placement
from services.router.cluster import Cluster
from services.router.detokenize import Detokenizer
from services.router.metrics import Metrics
from services.router.model import Model
from services.router.placement import ClusterView, Query, Refusal, Route, Source, Why, pick_kvstore, route
from services.router.settings import RouterSettings
from services.router.stop_strings import StopStrings
from services.router.stores import Found, LeaseKeeper

MOVES_MAX = 2  # a request that killed two workers is not offered a fourth
FULL_S = 0.5  # how long a worker that refused is left alone, when it didn't say
INLINE_CHARS_MAX = 4096  # shorter texts are tokenised in place: a thread hop costs more
INLINE_TOKENS_MAX = 65536  # likewise for hashing
UNREAD_STEPS_MAX = 65536  # steps a client may be behind
_SOURCE_TO_PB = {
    Source.DIRECT: pb.DIRECT,
    Source.STORAGE_TO_PREFILL: pb.STORAGE_TO_PREFILL,
    Source.RECOMPUTE: pb.RECOMPUTE,
}
T = TypeVar("T")
log = Log("generation")


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """A request, validated and tokenised.

    Attributes:
        prompts: token ids, one list per prompt.
        samplings: per prompt, one per choice; choice i of prompt p has index p * n + i.
        salt: separates a tenant's cached blocks.
        timeout_s: of the whole request.
    """

    id: str
    prompts: tuple[Sequence[int], ...]
    samplings: tuple[tuple[Sampling, ...], ...]
    timeout_s: float
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special: bool = True
    salt: bytes = b""
    traceparent: str = ""

    @property
    def sequences(self) -> int:
        return sum(len(samplings) for samplings in self.samplings)


class Generator:
    """What all generations share."""

    def __init__(self, settings: RouterSettings, model: Model, cluster: Cluster, keeper: LeaseKeeper, metrics: Metrics) -> None:
        self.settings = settings
        self.model = model
        self.cluster = cluster
        self.keeper = keeper
        self.metrics = metrics
        self.in_flight = 0
        self.draining = False
        self.idle = asyncio.Event()  # nothing is in flight
        self.idle.set()
        self.serials = itertools.count()
        self._threads = ThreadPoolExecutor(2, "tokenise")

    def open(self, work: Work) -> "Generation":
        return Generation(self, work)

    def refuse_when_full(self, sequences: int) -> None:
        """Raises `Overloaded` when so many more would be too many."""
        if self.draining:
            raise Unavailable("the router is shutting down", retry_after_s=1.0)
        limit = self.settings.requests_max
        if sequences > limit:
            raise ContextExceeded(f"the request makes {sequences} sequences: at most {limit}", param="n")
        if self.in_flight + sequences > limit:
            raise Overloaded(f"{self.in_flight} sequences are in flight and requests_max = {limit}: try again", retry_after_s=1.0)

    async def encode(self, text: str, *, special: bool = True) -> list[int]:
        return await self.off_loop(len(text) > INLINE_CHARS_MAX, lambda: self.model.encode(text, special=special))

    async def off_loop(self, big: bool, work: Callable[[], T]) -> T:
        """Runs `work` in place, or in a thread when it is big enough to hold up others."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work) if big else work()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class Generation:
    """One request under way."""

    def __init__(self, generator: Generator, work: Work) -> None:
        self._g = generator
        self.work = work
        self._serial = next(generator.serials)  # clients may reuse a request id
        self._choices = self._make_choices()
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
        return first.report.source if first.report else str(first.route.source) if first.route else ""

    async def __aenter__(self) -> "Generation":
        self._g.refuse_when_full(self.work.sequences)
        self._g.in_flight += self.work.sequences
        self._g.idle.clear()
        self._span, self._traceparent = tracing.begin(
            "request",
            self.work.traceparent,
            **{"gen_ai.request.id": self.work.id, "gen_ai.usage.input_tokens": self.prompt_tokens},
        )
        self._g.metrics.waiting(self.work.sequences)
        self._timer = asyncio.get_running_loop().call_later(self.work.timeout_s, self._expire)
        try:
            if len(self._choices) == 1:
                await self._place(self._choices[0])
            else:
                await _all(self._place(choice) for choice in self._choices)
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
            deltas.append(self._advance(choice, placement, step))
        return deltas

    def _advance(self, choice: Choice, placement: Placement, step: Step) -> Delta:
        before = len(choice.output)
        delta = choice.advance(step)
        now = time.monotonic()
        if delta.tokens:
            placement.peer.grown(len(delta.tokens))
            placement.tokens += len(delta.tokens)
            if before == 0:
                self._first_token(choice, now)
            elif self._last_step_at < now:
                self._g.metrics.inter_token(now - self._last_step_at, len(delta.tokens))
            self._last_step_at = now
            self._loaded(placement)
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
        if placement.prefill is not None:
            placement.prefill.ended(placement.prefill_tokens)
            placement.prefill = None
        if placement.found is not None:
            self._g.keeper.loaded(placement.found)

    def _leave(self, choice: Choice) -> None:
        """Ends a choice's stay on a worker: cancelled if it still runs, everything given back. Idempotent."""
        placement, choice.placement = choice.placement, None
        if placement is None:
            return
        placement.connection.cancel(placement.stream_id)
        self._loaded(placement)
        placement.peer.ended(placement.tokens)
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
        await self._place(choice)

    async def _place(self, choice: Choice) -> None:
        """Finds a worker and starts the choice there; waits for one only if it was running before."""
        give_up_at = time.monotonic() + (self._g.settings.failover_wait_s if choice.moves else 0)
        if isinstance(choice.failure, Overloaded) and not choice.output:
            give_up_at = 0.0  # nothing has been shown: refuse early rather than wait
        while True:
            refusal = await self._try_place(choice)
            if refusal is None:
                return
            now = time.monotonic()
            if self._expired or now >= min(give_up_at, self._deadline) or refusal.why is Why.TOO_LARGE:
                raise _refused(refusal)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(1.0, give_up_at - now)):
                    await self._g.cluster.changed()

    async def _try_place(self, choice: Choice) -> Refusal | None:
        view = self._g.cluster.view()
        if not view.block_tokens:
            return Refusal(Why.UNAVAILABLE, self._g.cluster.not_ready(needs_kvstore=False) or "no decode worker is connected")
        if choice.output and choice.namespace != view.namespace:
            return Refusal(Why.UNAVAILABLE, "no decode worker has the weights this answer was begun with")
        found, kvstore = await self._lookup(choice, view)
        query = Query(
            prompt_tokens=len(choice.prompt) + len(choice.output),
            stored_blocks=found.prefix.blocks if found else 0,
            kvstore=kvstore,
            avoid=choice.avoid,
            direct_tail_tokens=self._g.settings.direct_tail_tokens,
        )
        latest = self._g.cluster.view()
        decision = route(query, latest, time.monotonic())
        if isinstance(decision, Route) and latest.namespace == view.namespace:
            placed_at = decision.decode
            try:
                self._start(choice, decision, found, view)
                return None
            except (Unavailable, Overloaded) as error:
                decision = Refusal(Why.UNAVAILABLE, error.message)
                choice.avoid |= {placed_at}
        if found is not None:
            self._g.keeper.release(found)
        return decision if isinstance(decision, Refusal) else Refusal(Why.UNAVAILABLE, "the cluster changed its namespace")

    async def _lookup(self, choice: Choice, view: ClusterView) -> tuple[Found | None, str]:
        """The stored prefix, leased, and the store for this chain. Any failure is a miss."""
        began = time.monotonic()
        root = chain_root(Namespace(view.namespace), self.work.salt)
        reusable = reusable_blocks(len(choice.prompt), view.block_tokens)
        leading = choice.prompt[: max(1, reusable) * view.block_tokens]
        big = len(leading) > INLINE_TOKENS_MAX
        keys = await self._g.off_loop(big, lambda: block_keys(root, leading, view.block_tokens))
        kvstore = pick_kvstore(keys[0] if keys else root, view.kvstores)
        peer = self._g.cluster.peer("kvstore", kvstore)
        store = peer.store if peer is not None else None
        if reusable == 0 or store is None:
            return None, kvstore
        self._g.metrics.queried(len(choice.prompt))
        keeper, settings = self._g.keeper, self._g.settings
        try:
            deadline_s = settings.lookup_timeout_ms / 1000
            prefix = await store.lookup(Namespace(view.namespace), keys, keeper.lease_s, deadline_s=deadline_s)
        except PenstockError as error:
            log.warning("lookup_failed", request_id=self.work.id, kvstore=kvstore, reason=error.message)
            self._g.metrics.lookup_failed()
            return None, kvstore
        tracing.record("lookup", time.monotonic() - began, self._traceparent, blocks=prefix.blocks if prefix else 0)
        if prefix is None:
            return None, kvstore
        found = Found(store, prefix)
        keeper.hold(found)
        return found, kvstore

    def _start(self, choice: Choice, decision: Route, found: Found | None, view: ClusterView) -> None:
        """Sends the choice to its worker and counts it there."""
        peer = self._g.cluster.peer("decode", decision.decode)
        if peer is None or peer.connection is None:
            raise Unavailable(f"decode worker {decision.decode}: not connected")
        stream_id = f"{self.work.id}.{self._serial}.{choice.index}.{choice.moves}"
        remaining_s = max(0.001, self._deadline - time.monotonic())
        message = pb.Start(
            request_id=stream_id,
            token_ids=choice.prompt,
            sampling=sampling_to_pb(choice.sampling),
            route=pb.Route(
                source=_SOURCE_TO_PB[decision.source],
                stored=found.to_pb() if found is not None and decision.stored_blocks else None,
                prefill=decision.prefill,
                kvstore=decision.kvstore,
            ),
            deadline_ms=int(remaining_s * 1000) + 1,
            chain_root=chain_root(Namespace(view.namespace), self.work.salt),
            traceparent=self._traceparent,
            output_ids=choice.output,
        )
        peer.connection.start(message, lambda step: self._arrived(choice, stream_id, step))
        tokens = len(choice.prompt) + len(choice.output)
        peer.sent(tokens)
        placement = Placement(decision, peer, peer.connection, stream_id, tokens, found=found)
        prefill = self._g.cluster.peer("prefill", decision.prefill) if decision.prefill else None
        if prefill is not None:
            placement.prefill, placement.prefill_tokens = prefill, tokens - decision.stored_blocks * view.block_tokens
            prefill.sent(placement.prefill_tokens)
        choice.placement = placement
        choice.route = decision
        choice.namespace = view.namespace
        self._g.metrics.routed(decision.source)
        log.debug("placed", request_id=stream_id, decode=peer.id, source=decision.source, reason=decision.reason)

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

    def _make_choices(self) -> list[Choice]:
        model, work = self._g.model, self.work
        skipped = model.special_ids if work.skip_special else frozenset()

        def decode(ids: Sequence[int]) -> str:
            return model.decode(ids, skip_special=False)

        choices: list[Choice] = []
        for prompt, samplings in zip(work.prompts, work.samplings, strict=True):
            for sampling in samplings:
                choices.append(
                    Choice(
                        len(choices), prompt, sampling, Detokenizer(decode, skipped), StopStrings(work.stop), work.include_stop
                    )
                )
        return choices

    def _report(self, error: BaseException | None) -> None:
        """Metrics, span and the one log event of the request."""
        now = time.monotonic()
        status = _status(error, self._choices)
        seen = sum(1 for choice in self._choices if choice.output)
        self._g.metrics.finished(self._choices, seen, self.work, now - self._started, status)
        first = self._choices[0]
        fields: dict[str, Any] = {
            "id": self.work.id,
            "route": self.route,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.completion_tokens,
            "status": status,
            "decode": first.route.decode if first.route else "",
        }
        if self._first_token_at is not None:
            streaming_s = self._last_step_at - self._first_token_at
            fields["ttft_ms"] = round(1000 * (self._first_token_at - self._started), 1)
            if streaming_s > 0:
                fields["tokens_per_s"] = round((self.completion_tokens - seen) / streaming_s, 1)
        if isinstance(error, PenstockError):
            fields["reason"] = error.message
        if first.last_report is not None:
            fields |= {"carrier": first.last_report.carrier, "preemptions": first.last_report.preemptions}
            if first.last_report.fallback:
                fields["fallback"] = first.last_report.fallback
        if moves := sum(choice.moves for choice in self._choices):
            fields["moves"] = moves
        log.event("request", **fields)
        self._span.set_attributes({"gen_ai.usage.output_tokens": self.completion_tokens, "penstock.status": status})
        self._span.end()


def _status(error: BaseException | None, choices: Sequence[Choice]) -> str:
    if isinstance(error, asyncio.CancelledError | GeneratorExit | Cancelled):
        return "cancelled"
    if error is not None:
        return meaning(error).code
    finish = choices[0].finish
    return str(finish) if finish is not None else "cancelled"


def _refused(refusal: Refusal) -> PenstockError:
    if refusal.why is Why.TOO_LARGE:
        return ContextExceeded(refusal.reason, param="prompt")
    kind = Overloaded if refusal.why is Why.OVERLOADED else Unavailable
    return kind(refusal.reason, retry_after_s=refusal.retry_after_s)


async def _all(work: Any) -> None:
    """Runs all to the end, then raises the first error: nothing is left half placed."""
    for result in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
