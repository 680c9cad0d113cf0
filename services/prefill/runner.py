"""A prefill worker's runs: fill a decode worker's stage and sample the first token.

Life of a run (`run`):
1. Admitted, or refused at once when too many are in flight.
2. The stored prefix is pulled from SSD into stage slots; what fails is computed instead.
3. The engine takes the prefix and computes the rest in chunks. Meanwhile `Handoff` sends blocks to
   decode's stage: stored ones from the slots they came in, computed ones as they fill.
4. The first token is sampled; the last, partial block is sent; the run ends with both.
5. Engine, stage and lease hold nothing of it afterwards, however it ends.
"""

import asyncio
import time
from collections.abc import Callable

from common import tracing
from common.blocks import reusable_blocks
from common.errors import DeadlineExceeded, Overloaded
from common.generation import FinishReason
from common.logs import Log
from services.prefill.handoff import Handoff, HandoffFactory
from services.worker.engine.loop import EngineLoop
from services.worker.engine.types import LoadedKv, NewSequence, SequenceStep, StepResult
from services.worker.loading import Reader
from services.worker.requests import Flow, PrefillProgress, PrefillRequest, Report
from services.worker.stage import Stage

log = Log("runner")


class Runner:
    """Runs prefill requests on one engine. All methods belong to the event loop's thread."""

    def __init__(
        self, worker_id: str, engine: EngineLoop, stage: Stage, reader: Reader, handoffs: HandoffFactory, block_tokens: int, runs_max: int
    ) -> None:  # fmt: skip
        self._worker_id = worker_id
        self._engine = engine
        self._stage = stage
        self._reader = reader
        self._handoffs = handoffs
        self._block_tokens = block_tokens
        self._runs_max = runs_max
        self._steps: dict[str, asyncio.Queue[SequenceStep]] = {}
        self._serial = 0
        self.draining = False
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def in_flight(self) -> int:
        return len(self._steps)

    def on_step(self, result: StepResult) -> None:
        for step in result.sequences:
            if step.id in self._steps:
                self._steps[step.id].put_nowait(step)

    async def run(self, request: PrefillRequest) -> PrefillProgress:
        """Runs to the end; the event with the first token.

        Raises:
            Overloaded: refused.
            DeadlineExceeded, TransferFailed, PenstockError: the run can't be finished here.
        """
        if self.draining or self.in_flight >= self._runs_max:
            why = "is draining" if self.draining else f"has {self.in_flight} runs in flight, at most {self._runs_max}"
            raise Overloaded(f"prefill worker {self._worker_id} {why}", retry_after_s=1.0)
        self._serial += 1
        key = f"{request.id}#{self._serial}"
        steps = self._steps[key] = asyncio.Queue()
        self.idle.clear()
        report = Report(prefill=self._worker_id)
        handoff = self._handoffs.open(key, request)
        try:
            async with asyncio.timeout(request.deadline_s):
                with tracing.span("prefill_run", request.traceparent, request_id=request.id):
                    kv = await self._load(request, handoff, report)
                    began = time.perf_counter()
                    self._engine.add(
                        NewSequence(key, request.prompt, request.sampling, kv=kv, hold=True, stop_after_prefill=True)
                    )
                    return await self._follow(request, steps, handoff, report, began)
        except TimeoutError as error:
            raise DeadlineExceeded(f"prefill not finished within {request.deadline_s:g} s") from error
        finally:
            del self._steps[key]
            if not self._steps:
                self.idle.set()
            await asyncio.shield(handoff.close())
            self._engine.cancel(key)
            self._engine.release(key)

    async def _load(self, request: PrefillRequest, handoff: Handoff, report: Report) -> LoadedKv | None:
        """Pulls the stored prefix into this worker's stage, and starts sending it on."""
        stored = request.stored
        blocks = min(stored.blocks, reusable_blocks(len(request.prompt), self._block_tokens)) if stored else 0
        if stored is None or not blocks:
            return None
        slots = self._stage.reserve(blocks)
        good = 0
        try:
            loaded = await self._reader.load(stored, slots, request.deadline_s)
            good = loaded.blocks
        finally:
            self._stage.free(slots[good:])
        report.fallback = f"storage: {loaded.failure}" if loaded.failure else ""
        report.storage_to_prefill = Flow(loaded.bytes, loaded.seconds)
        tracing.record("ssd_read", loaded.seconds, tracing.traceparent(), blocks=good, bytes=loaded.bytes, carrier=loaded.carrier)
        if not good:
            return None
        report.cached_tokens = good * self._block_tokens
        shared = _Shared(lambda: self._stage.free(slots[:good]), holders=2)
        handoff.staged(slots[:good], shared.let_go)
        copied = shared.threadsafe(asyncio.get_running_loop())
        return LoadedKv(report.cached_tokens, [self._stage.view(slot) for slot in slots[:good]], copied)

    async def _follow(
        self, request: PrefillRequest, steps: "asyncio.Queue[SequenceStep]", handoff: Handoff, report: Report, began: float
    ) -> PrefillProgress:  # fmt: skip
        """Hands blocks over as the engine fills them, until the first token is there and everything is sent."""
        while True:
            step = await steps.get()
            if step.started_at is not None:
                report.queue_s = step.started_at - began
                tracing.record("queue", report.queue_s, tracing.traceparent())
            if step.error is not None:
                raise step.error
            handoff.computed(min(step.computed, len(request.prompt)))
            if step.finish is not None:
                break
        assert step.tokens and step.finish in (FinishReason.STOP, FinishReason.LENGTH), step
        report.prefill_s = time.perf_counter() - began - report.queue_s
        tracing.record("prefill", report.prefill_s, tracing.traceparent(), tokens=len(request.prompt))
        sending = time.perf_counter()
        await handoff.finish()
        parent = tracing.traceparent()
        tracing.record("handoff", time.perf_counter() - sending, parent)  # what was left to send after the first token
        tracing.record("transfer", handoff.sending_s, parent, bytes=handoff.sent_bytes, carrier=handoff.carrier)
        report.carrier, report.prefill_to_decode = handoff.carrier, Flow(handoff.sent_bytes, handoff.sending_s)
        report.computed_tokens = len(request.prompt) - report.cached_tokens
        return PrefillProgress(handoff.blocks, (), step.tokens[0], step.finish, step.stop_token, report)

    def check_integrity(self) -> None:
        """When idle, nothing is left."""
        assert not self._steps, list(self._steps)


class _Shared:
    """Runs `free` when the last of `holders` has let go."""

    def __init__(self, free: Callable[[], None], holders: int) -> None:
        self._free = free
        self._holders = holders

    def let_go(self) -> None:
        self._holders -= 1
        assert self._holders >= 0
        if not self._holders:
            self._free()

    def threadsafe(self, loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
        def let_go() -> None:
            loop.call_soon_threadsafe(self.let_go)

        return let_go
