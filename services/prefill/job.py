"""One prefill run as the event loop carries it out: what is loaded, computed and handed over, and what is told of it.

Order WHOLE loads, then computes, then hands over. In the others all three go on at once.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from common import tracing
from common.kv_layout import KvLayout
from common.routes import Order, Source, of_source
from services.prefill.engine import PrefillEngine
from services.prefill.handoff import Handoff, Handoffs
from services.prefill.legs import Legs
from services.prefill.pulling import PeerReader
from services.prefill.run import NewRun
from services.prefill.run_slots import RunSlots
from services.worker.engine.loop import EngineLoop
from services.worker.engine.types import SequenceStep
from services.worker.ledger import Ledger
from services.worker.loading import Reader
from services.worker.requests import HEARTBEAT_S, Flow, PrefillProgress, PrefillRequest, Report
from services.worker.stage import Stage

Tell = Callable[[PrefillProgress], None]
ENGINE_STALLED_S = 20.0  # a step longer than this is a stuck engine: its runs are better computed elsewhere


class Means(msgspec.Struct, frozen=True):
    """What all runs of a worker share."""

    worker_id: str
    engine: EngineLoop[PrefillEngine]
    stage: Stage
    reader: Reader
    peers: PeerReader
    handoffs: Handoffs

    @property
    def layout(self) -> KvLayout:
        return self.handoffs.layout


class Job:
    """One run, from its slots to its report."""

    def __init__(self, means: Means, key: str, request: PrefillRequest, slots: RunSlots, tell: Tell) -> None:
        self.key = key
        self.request = request
        self.slots = slots
        self.ledger = Ledger(len(slots.all), means.layout.layers, request.legs)
        self.ledger.found(slots.held)
        self.handoff = Handoff(means.handoffs, request.stage, slots.all)
        self.handoff.ready(slots.held - of_source(request.legs, Source.RESIDENT), means.layout.layers)
        self._in = means
        self._tell = tell
        self._last: asyncio.Future[SequenceStep] = asyncio.get_running_loop().create_future()
        self._began = time.perf_counter()
        self._ready_at: float | None = None  # when the engine could begin
        self._started_at: float | None = None  # when it did
        self._first_at = self._began  # when the first token was sampled
        self._report = Report(prefill=means.worker_id)
        self._legs = Legs(means.reader, means.peers, self)

    def on_step(self, step: SequenceStep) -> None:
        if step.started_at is not None:
            self._started_at = step.started_at
        if step.error is not None:
            self.slots.distrust()
        if step.error is not None and not self._last.done():
            self._last.set_exception(step.error)
        elif step.tokens and not self._last.done():
            self._last.set_result(step)
        elif step.computed:
            self.tell()

    def tell(self) -> None:
        """How far it is."""
        self._news(pull_from=self._legs.pull_from)

    def _news(self, **more: Any) -> None:
        self._tell(PrefillProgress(self.ledger.frontier, **more, **self._flows()))

    def _flows(self) -> dict[str, Any]:
        legs, handoff = self._legs, self.handoff
        moved = {
            "storage_to_prefill": legs.from_storage,
            "decode_to_prefill": legs.from_decode,
            "prefill_to_decode": handoff.moved,
        }
        return {path: Flow(flow.bytes, flow.busy_s) for path, flow in moved.items()}

    def landed(self, blocks: Sequence[int], layers: int) -> None:
        """Layers of loaded blocks are in the stage."""
        self.ledger.arrived(blocks, layers)
        self._look()

    def lost(self, blocks: Sequence[int]) -> None:
        """Blocks that no loader can bring."""
        self.ledger.failed(blocks)
        self._look()

    def _look(self) -> None:
        if self._ready_at is None and self.ledger.next_run():
            self._ready_at = time.perf_counter()
        self._in.engine.wake()

    async def carry_out(self) -> None:
        try:
            await self._carry_out()
        except BaseException:
            self.tell()  # what it has moved by now
            raise
        self._finish()

    async def _carry_out(self) -> None:
        request, whole = self.request, self.request.order is Order.WHOLE
        self._zero_tail()
        async with asyncio.TaskGroup() as group:
            beating = group.create_task(self._beat())
            loading = group.create_task(self._legs.load())
            sending = None if whole else group.create_task(self.handoff.run())
            if whole:
                await loading
            self._look()
            slots = self.slots
            self._in.engine.add(
                NewRun(self.key, request.prompt, request.sampling, slots=slots.all, ledger=self.ledger, held=slots.held)
            )
            step = await self._last
            self._told_first(step)
            await loading
            self.handoff.complete()
            await (sending or self.handoff.run())
            beating.cancel()

    async def _beat(self) -> None:
        """Says that the run is alive, for as long as the engine is, which looks again at what a loader was better left and did not bring."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self._in.engine.wake()
            if self._in.engine.stalled_s() < ENGINE_STALLED_S:
                self.tell()

    def _zero_tail(self) -> None:
        """What a partial last block holds past the prompt leaves as zeros: it may be another sequence's KV."""
        if len(self.request.prompt) % self._in.layout.block_tokens:
            view = self._in.stage.view(self.slots.all[-1])
            view[:] = bytes(len(view))

    def _told_first(self, step: SequenceStep) -> None:
        report, parent = self._report, tracing.traceparent()
        self._first_at = time.perf_counter()
        started = self._started_at or self._began
        report.queue_s = max(0.0, started - (self._ready_at or started))
        report.prefill_s = self._first_at - started
        tracing.record("queue", report.queue_s, parent)
        tracing.record("prefill", report.prefill_s, parent, tokens=len(self.request.prompt))
        self._news(first=step.tokens[0], finish=step.finish, stop_token=step.stop_token)

    def _trace(self, handoff_s: float) -> None:
        """Spans of what moved; the hand-off's is what was left to send after the first token."""
        parent, legs, moved = tracing.traceparent(), self._legs, self.handoff.moved
        for name, read in (("ssd_read", legs.from_storage), ("peer_read", legs.from_decode)):
            if read.bytes:
                tracing.record(name, read.busy_s, parent, bytes=read.bytes, carrier=legs.carrier)
        tracing.record("transfer", moved.busy_s, parent, bytes=moved.bytes, carrier=self.handoff.carrier)
        tracing.record("handoff", handoff_s, parent)

    def _finish(self) -> None:
        """Everything is in decode's stage."""
        report, legs, handoff = self._report, self._legs, self.handoff
        block_tokens = self._in.layout.block_tokens
        report.kept_tokens = len(self.slots.held) * block_tokens
        report.cached_tokens = report.kept_tokens + len(legs.came) * block_tokens
        report.computed_tokens = len(self.request.prompt) - report.cached_tokens
        report.carrier = handoff.carrier or legs.carrier
        report.fallback = legs.fallback
        report = msgspec.structs.replace(report, **self._flows())
        self._trace(time.perf_counter() - self._first_at)
        self._news(report=report)
