"""A prefill worker's runs: fill a decode worker's stage and sample the first token.

Life of a run (`Runner.run`):
1. Admitted with stage slots for its whole prompt, or refused at once.
2. Loaders bring its legs into the slots: full blocks from SSD, layers out of decode's stage. What decode can't give is
   pulled from SSD here; what SSD can't give is computed.
3. The engine computes what no leg covers, layer by layer, as soon as what comes before it is there (engine.py).
4. `Handoff` sends every layer that decode does not have: of loaded blocks when they come, of computed ones when they exist.
5. The first token is told as soon as it is sampled; the report, when decode has everything.
6. However it ends: the engine has let go of the slots before they are free, and no transfer is under way.

Order WHOLE puts 2, 3 and 4 one after the other. Order MEET lets the loaders claim their legs from the end, a batch at a
time, while the engine claims from the front; decode is told how far it may pull (`PrefillProgress.pull_from`).
"""

import asyncio
import time
from collections.abc import Callable, Sequence

from common import tracing
from common.errors import DeadlineExceeded, Overloaded, PenstockError, Unavailable
from common.routes import Order
from common.transport.counters import Flow as Moved
from services.prefill.engine import NewRun, PrefillEngine
from services.prefill.handoff import Handoff, Handoffs
from services.prefill.legs import Legs
from services.prefill.pulling import PeerReader
from services.worker.engine.loop import EngineLoop
from services.worker.engine.types import SequenceStep, StepResult
from services.worker.ledger import Ledger
from services.worker.loading import Reader
from services.worker.requests import HEARTBEAT_S, Flow, PrefillProgress, PrefillRequest, Report
from services.worker.stage import Stage

Tell = Callable[[PrefillProgress], None]
ENGINE_STALLED_S = 20.0  # a step longer than this is a stuck engine: its runs are better computed elsewhere


class Runner:
    """Runs prefill requests on one engine. All methods belong to the event loop's thread."""

    def __init__(
        self,
        worker_id: str,
        engine: EngineLoop[PrefillEngine],
        stage: Stage,
        reader: Reader,
        peers: PeerReader,
        handoffs: Handoffs,
        runs_max: int,
    ) -> None:
        self.worker_id = worker_id
        self.engine = engine
        self.stage = stage
        self.reader = reader
        self.peers = peers
        self.handoffs = handoffs
        self.layout = handoffs.layout
        self._runs_max = runs_max
        self._live: dict[str, _Run] = {}
        self._serial = 0
        self.draining = False
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def in_flight(self) -> int:
        return len(self._live)

    def on_step(self, result: StepResult) -> None:
        for step in result.sequences:
            if step.id in self._live:
                self._live[step.id].on_step(step)

    def on_layer(self, layer: int, computed: Sequence[tuple[str, range]]) -> None:
        """The engine has computed a layer of some blocks."""
        for key, blocks in computed:
            if key in self._live:
                self._live[key].handoff.ready(blocks, layer + 1)

    async def run(self, request: PrefillRequest, tell: Tell) -> None:
        """Runs to the end; `tell` takes the news, the last with the report.

        Raises:
            Overloaded: refused.
            DeadlineExceeded, TransferFailed, PenstockError: the run can't be finished here.
        """
        if self.draining or self.in_flight >= self._runs_max:
            why = "is draining" if self.draining else f"has {self.in_flight} runs in flight, at most {self._runs_max}"
            raise Overloaded(f"prefill worker {self.worker_id} {why}", retry_after_s=1.0)
        slots = self.stage.reserve(-(-len(request.prompt) // self.layout.block_tokens))
        self._serial += 1
        run = _Run(self, f"{request.id}#{self._serial}", request, slots, tell)
        self._live[run.key] = run
        self.idle.clear()
        try:
            async with asyncio.timeout(request.deadline_s):
                with tracing.span("prefill_run", request.traceparent, request_id=request.id):
                    await run.carry_out()
        except TimeoutError as error:
            raise DeadlineExceeded(f"prefill not finished within {request.deadline_s:g} s") from error
        except BaseExceptionGroup as group:
            raise _first_of(group) from group
        finally:
            run.ledger.close()
            await asyncio.shield(self._leave(run))

    async def _leave(self, run: "_Run") -> None:
        """Gives the slots back once the engine neither reads nor writes them."""
        try:
            await self.engine.call(lambda engine: engine.cancel(run.key))
        except Unavailable:
            pass  # the engine has stopped
        finally:
            self.stage.free(run.slots)
            del self._live[run.key]
            if not self._live:
                self.idle.set()

    def check_integrity(self) -> None:
        """When idle, nothing is left."""
        assert not self._live, list(self._live)
        assert not self.reader.link.queued_bytes and not self.peers.link.queued_bytes and not self.handoffs.link.queued_bytes


class _Run:
    """One run, from its slots to its report."""

    def __init__(self, runner: Runner, key: str, request: PrefillRequest, slots: Sequence[int], tell: Tell) -> None:
        self.key = key
        self.request = request
        self.slots = slots
        self.ledger = Ledger(len(slots), runner.layout.layers, request.legs)
        self.handoff = Handoff(runner.handoffs, request.stage, slots)
        self._in = runner
        self._tell = tell
        self._last: asyncio.Future[SequenceStep] = asyncio.get_running_loop().create_future()
        self._began = time.perf_counter()
        self._ready_at: float | None = None  # when the engine could begin
        self._started_at: float | None = None  # when it did
        self._first_at = self._began  # when the first token was sampled
        self._report = Report(prefill=runner.worker_id)
        self._legs = Legs(runner.reader, runner.peers, self)

    def on_step(self, step: SequenceStep) -> None:
        if step.started_at is not None:
            self._started_at = step.started_at
        if step.error is not None and not self._last.done():
            self._last.set_exception(step.error)
        elif step.tokens and not self._last.done():
            self._last.set_result(step)
        elif step.computed:
            self.tell()

    def tell(self) -> None:
        """How far it is."""
        self._tell(PrefillProgress(self.ledger.frontier, self._legs.pull_from))

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
        request, whole = self.request, self.request.order is Order.WHOLE
        self._zero_tail()
        async with asyncio.TaskGroup() as group:
            beating = group.create_task(self._beat())
            loading = group.create_task(self._legs.load())
            sending = None if whole else group.create_task(self.handoff.run())
            if whole:
                await loading
            self._look()
            self._in.engine.add(NewRun(self.key, request.prompt, request.sampling, slots=self.slots, ledger=self.ledger))
            step = await self._last
            self._told_first(step)
            await loading
            self.handoff.complete()
            await (sending or self.handoff.run())
            beating.cancel()
        self._finish()

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
            view = self._in.stage.view(self.slots[-1])
            view[:] = bytes(len(view))

    def _told_first(self, step: SequenceStep) -> None:
        report, parent = self._report, tracing.traceparent()
        self._first_at = time.perf_counter()
        started = self._started_at or self._began
        report.queue_s = max(0.0, started - (self._ready_at or started))
        report.prefill_s = self._first_at - started
        tracing.record("queue", report.queue_s, parent)
        tracing.record("prefill", report.prefill_s, parent, tokens=len(self.request.prompt))
        self._tell(PrefillProgress(self.ledger.frontier, (), step.tokens[0], step.finish, step.stop_token))

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
        report.cached_tokens = len(legs.came) * block_tokens
        report.computed_tokens = len(self.request.prompt) - report.cached_tokens
        report.carrier = handoff.carrier or legs.carrier
        report.fallback = legs.fallback
        report.storage_to_prefill = flow(legs.from_storage)
        report.decode_to_prefill = flow(legs.from_decode)
        report.prefill_to_decode = flow(handoff.moved)
        self._trace(time.perf_counter() - self._first_at)
        self._tell(PrefillProgress(self.ledger.frontier, report=report))


def flow(moved: Moved) -> Flow:
    return Flow(moved.bytes, moved.busy_s)


def _first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of ours that a task group ended with, else the first there is."""
    ours = group.subgroup(PenstockError) or group
    error: BaseException = ours
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
