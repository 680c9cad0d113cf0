"""A decode worker's requests, from admission to the last token.

Life of a request (`_run`):
1. Admitted, or refused at once when too many are in flight.
2. Filled: its stage slots get the KV its route promises (services/decode/filling.py), unless the pool still has it.
3. A first token from prefill goes out immediately.
4. The engine copies the KV into its pool, computes what is missing, and decodes.
5. Every step's news goes out through `emit`; full blocks are offered to the write-back.
6. It ends: finished, failed, cancelled or out of time. In every case the engine, the stage and the
   leases hold nothing of it afterwards, except blocks that are still being written back.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence

import msgspec

from common import tracing
from common.blocks import BlockKey, block_keys, reusable_blocks
from common.errors import Cancelled, DeadlineExceeded, Internal, Overloaded, PenstockError
from common.generation import FinishReason, Token
from common.logs import Log
from common.routes import Plan, Source
from services.decode.filled import Filled
from services.decode.filling import Filler
from services.worker.engine.engine import Engine
from services.worker.engine.loop import EngineLoop
from services.worker.engine.types import Claim, NewSequence, SequenceStep, StepResult
from services.worker.requests import DecodeRequest, Flow, PrefillProgress, Report, RequestStep
from services.worker.writeback import Chain, Writer

log = Log("decoder")
Emit = Callable[[RequestStep], None]


class Live:
    """One request in flight. `emit` takes its news, in order; the last one has `finish`."""

    def __init__(self, key: str, request: DecodeRequest, emit: Emit) -> None:
        self.key = key
        self.request = request
        self.emit = emit
        self.report = Report()
        self.began = time.perf_counter()
        self.submitted = self.began
        self.over = asyncio.Event()  # the engine has finished the sequence and holds its blocks
        self.task: asyncio.Task[None] | None = None
        self.running = False  # the task has taken its first step; one that is cancelled before takes none
        self.chain: Chain | None = None
        self.first_seen = False
        self.reported = False  # with the first tokens that the engine made
        self.in_engine = False
        self.loading: asyncio.Task[None] | None = None  # what still loads while the engine computes
        self.ended = False

    def first(self, progress: PrefillProgress) -> None:
        """Sends prefill's first token on, while KV is still on its way; one that ends the request waits for the report."""
        assert progress.first is not None and not self.first_seen
        self.first_seen = True
        tracing.record("first_token", time.perf_counter() - self.began, self.request.traceparent)
        if progress.finish is not FinishReason.STOP and self.request.sampling.max_tokens > 1:
            self.emit(RequestStep(self.request.id, (progress.first,)))

    def asking_another(self) -> None:
        """The router counts the request at the prefill worker that has it, until there is a token."""
        if not self.first_seen:
            self.emit(RequestStep(self.request.id, report=self.report))

    def __repr__(self) -> str:
        return f"Live({self.key}, first_seen={self.first_seen}, ended={self.ended})"


class Decoder:
    """Runs requests on one engine. All methods belong to the event loop's thread."""

    def __init__(
        self, engine: EngineLoop[Engine], filler: Filler, writer: Writer, block_tokens: int, requests_max: int, *, resident: bool
    ) -> None:
        """`resident`: blocks of finished sequences stay in the pool and are used again."""
        self._engine = engine
        self._filler = filler
        self._writer = writer
        self._block_tokens = block_tokens
        self._requests_max = requests_max
        self._resident = resident
        self._live: dict[str, Live] = {}
        self._serial = 0
        self.draining = False

    @property
    def in_flight(self) -> int:
        return len(self._live)

    def start(self, request: DecodeRequest, emit: Emit) -> str | None:
        """Takes a request; the key to cancel it by, or None when it was refused (`emit` has said so)."""
        self._serial += 1
        key = f"{request.id}#{self._serial}"  # ids are the routers' and unique per stream only
        live = Live(key, request, emit)
        refusal = self._refusal()
        if refusal is not None:
            self._end(live, FinishReason.ERROR, error=refusal)
            return None
        self._live[key] = live
        live.task = asyncio.create_task(self._supervise(live), name=f"request {key}")
        live.task.add_done_callback(lambda _: self._leave(live))
        return key

    def _refusal(self) -> PenstockError | None:
        if self.draining:
            return Overloaded("this decode worker is draining", retry_after_s=1.0)
        if len(self._live) >= self._requests_max:
            return Overloaded(f"{len(self._live)} requests in flight: at most {self._requests_max}", retry_after_s=1.0)
        return None

    def cancel(self, key: str) -> None:
        """Ends a request early; unknown keys are fine (it may have ended by itself)."""
        live = self._live.get(key)
        if live is not None and live.task is not None:
            live.task.cancel()

    async def drain(self, deadline_s: float) -> None:
        """Refuses new requests and waits for those in flight; ends what is left after the deadline."""
        self.draining = True
        tasks = [live.task for live in self._live.values() if live.task]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=deadline_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late)

    def on_step(self, result: StepResult) -> None:
        """Hands an engine step's news to the requests it concerns."""
        for step in result.sequences:
            live = self._live.get(step.id)
            if live is not None and not live.ended:
                self._news(live, step)
        if result.load.waiting:
            self._writer.shed()

    async def _supervise(self, live: Live) -> None:
        try:
            async with asyncio.timeout(live.request.deadline_s):
                with tracing.span("decode", live.request.traceparent, request_id=live.request.id):
                    await self._run(live)
        except asyncio.CancelledError:
            self._end(live, FinishReason.CANCELLED, error=Cancelled("the request was cancelled"))
        except TimeoutError:
            self._end(live, FinishReason.ERROR, error=DeadlineExceeded(f"not finished within {live.request.deadline_s:g} s"))
        except PenstockError as error:
            self._end(live, FinishReason.ERROR, error=error)
        except Exception:
            log.exception("request_failed", request_id=live.request.id)
            self._end(live, FinishReason.ERROR, error=Internal("the decode worker failed on this request"))

    def _leave(self, live: Live) -> None:
        """The request's task is over, if it ever began. The engine lets go of the sequence: at once, or when its last
        blocks are written back."""
        self._end(live, FinishReason.CANCELLED, error=Cancelled("the request was cancelled"))
        del self._live[live.key]
        if not live.running:
            self._filler.decline(live.request)
        if live.loading is not None:
            live.loading.cancel()
        if live.chain is None:
            return
        if live.over.is_set():
            self._writer.finish(live.chain)
        else:
            self._writer.abandon(live.chain)
            if live.in_engine:
                self._engine.cancel(live.key)

    async def _run(self, live: Live) -> None:
        live.running = True
        claim = self._engine.claim(self._keys(live.request)) if self._resident else Claim()
        try:
            await self._run_from(live, claim)
        finally:
            self._engine.give_up(claim)  # unless the engine has taken it over

    def resident_blocks(self, keys: Sequence[BlockKey]) -> int:
        """How many leading blocks of a chain a request would find in the pool at this moment."""
        return self._engine.engine.pool.allocator.count(keys) if self._resident else 0

    def _keys(self, request: DecodeRequest) -> list[BlockKey]:
        """Keys of the blocks that needn't be computed."""
        known = [*request.prompt, *request.output]
        blocks = reusable_blocks(len(known), self._block_tokens)
        return block_keys(request.chain_root, known[: blocks * self._block_tokens], self._block_tokens)

    async def _fill(self, live: Live, claim: Claim) -> Filled:
        """What is resident needs no filling, if the route would load no more and decode is to compute what is left."""
        request, blocks = live.request, len(claim.blocks)
        if (
            not blocks
            or blocks < max((leg.last_block for leg in request.route.legs), default=0)
            or self._by_prefill(request, blocks)
        ):
            return await self._filler.fill(request, live.report, live, claim)
        self._filler.decline(request)
        live.report.plan = Plan.RESIDENT
        return Filled(stored_blocks=min(blocks, request.route.stored.blocks if request.route.stored else 0))

    def _by_prefill(self, request: DecodeRequest, held: int) -> bool:
        """Whether prefill computes what is left behind so many blocks: the route says so, and if it didn't know of them, there is much."""
        known = any(leg.source is Source.RESIDENT for leg in request.route.legs)
        tail = len(request.prompt) + len(request.output) - held * self._block_tokens
        return bool(request.route.prefill) and (known or tail > request.route.tail_tokens)

    async def _run_from(self, live: Live, claim: Claim) -> None:
        request = live.request
        filled = await self._fill(live, claim)
        if filled.first is not None and self._first_ends(live, filled):
            self._keep_staged(live, filled)
            return
        live.chain = self._chain(live, filled, lambda: self._engine.release(live.key))
        if filled.first is not None:
            live.chain.tokens.append(filled.first.id)
        live.submitted = time.perf_counter()
        output = (*request.output, filled.first.id) if filled.first else request.output
        if filled.loading is not None:
            live.loading = filled.loading
        sequence = NewSequence(live.key, request.prompt, request.sampling, output, filled.kv, meeting=filled.meeting, hold=True)
        if self._resident and filled.meeting is None:
            sequence = msgspec.structs.replace(sequence, root=request.chain_root, claim=claim)
        self._engine.add(sequence)
        live.in_engine = True
        await live.over.wait()

    def _chain(self, live: Live, filled: Filled, let_go: Callable[[], None], staged: Sequence[int] = ()) -> Chain:
        request, route = live.request, live.request.route
        known = [*request.prompt, *request.output]
        kvstores = (route.kvstore, *route.replicas) if route.kvstore else ()
        stored_blocks = min(filled.stored_blocks, route.replicated_blocks) if route.replicas else filled.stored_blocks
        return Chain(live.key, kvstores, request.chain_root, known, stored_blocks, let_go, staged)

    def _keep_staged(self, live: Live, filled: Filled) -> None:
        """A request that ended with prefill's token never enters the engine: its blocks are written back from the stage."""
        chain = self._chain(live, filled, filled.drop, filled.slots)
        self._writer.offer(chain, filled.kv.tokens if filled.kv else 0)
        self._writer.finish(chain)

    def _first_ends(self, live: Live, filled: Filled) -> bool:
        """Whether prefill's token, the first, is also the last."""
        assert filled.first is not None
        if filled.finish is FinishReason.STOP:
            self._end(live, FinishReason.STOP, (filled.first,), filled.stop_token)
        elif live.request.sampling.max_tokens <= 1:
            self._end(live, FinishReason.LENGTH, (filled.first,))
        return live.ended

    def _news(self, live: Live, step: SequenceStep) -> None:
        assert live.chain is not None
        if step.resident and not live.first_seen:  # prefill's report says what it computed
            live.report.cached_tokens = max(live.report.cached_tokens, min(step.resident, len(live.request.prompt)))
        if step.started_at is not None:
            waited = step.started_at - live.submitted
            live.report.queue_s += waited
            tracing.record("queue", waited, live.request.traceparent)
        if step.loaded_bytes:
            moved = live.report.host_to_device
            live.report.host_to_device = Flow(moved.bytes + step.loaded_bytes, moved.seconds + step.loaded_s)
        if step.preempted:
            live.report.preemptions += 1
            self._writer.preempted(live.chain)
        live.chain.tokens.extend(token.id for token in step.tokens)
        self._writer.offer(live.chain, step.computed)
        if step.tokens and not live.first_seen:
            live.first_seen = True
            live.report.prefill_s = time.perf_counter() - live.submitted - live.report.queue_s
            live.report.computed_tokens = len(live.request.prompt) - live.report.cached_tokens
            tracing.record("prefill", live.report.prefill_s, live.request.traceparent)
            tracing.record("first_token", time.perf_counter() - live.began, live.request.traceparent)
        if step.finish is not None:
            self._end(live, step.finish, step.tokens, step.stop_token, step.error)
            live.over.set()
        elif step.tokens:
            live.emit(RequestStep(live.request.id, step.tokens, report=None if live.reported else live.report))
            live.reported = True

    def _end(
        self, live: Live, finish: FinishReason, tokens: Iterable[Token] = (), stop_token: int | None = None, error: PenstockError | None = None
    ) -> None:  # fmt: skip
        if not live.ended:
            live.ended = True
            live.emit(RequestStep(live.request.id, tuple(tokens), finish, stop_token, error, live.report))

    def check_integrity(self) -> None:
        """When idle, nothing is left."""
        assert not self._live, list(self._live.values())
