"""A prefill worker's runs: fill a decode worker's stage and sample the first token.

Life of a run (`Runner.run`):
1. Admitted with stage slots for its whole prompt, or refused at once. What the stage still holds of the prompt is adopted (run_slots.py).
2. Loaders bring its legs into the slots: full blocks from SSD, layers out of decode's stage. What decode can't give is
   pulled from SSD here; what SSD can't give is computed.
3. The engine computes what no leg covers, layer by layer, as soon as what comes before it is there (engine.py).
4. `Handoff` sends every layer that decode does not have: of loaded blocks when they come, of computed ones when they exist.
5. The first token is told as soon as it is sampled; the report, when decode has everything.
6. However it ends: the engine has let go of the slots before they are free, and no transfer is under way. Blocks that are whole are
   kept in the stage.

Order WHOLE puts 2, 3 and 4 one after the other. Order MEET lets the loaders claim their legs from the end, a batch at a
time, while the engine claims from the front; decode is told how far it may pull (`PrefillProgress.pull_from`).
"""

import asyncio
from collections.abc import Sequence

from common import tracing
from common.blocks import BlockKey, block_keys, reusable_blocks
from common.errors import DeadlineExceeded, Overloaded, PenstockError, Unavailable
from common.routes import Order, Source, of_source
from services.prefill.job import Job, Means, Tell
from services.prefill.run_slots import RunSlots
from services.worker.engine.allocator import blocks_for
from services.worker.engine.types import StepResult
from services.worker.requests import PrefillRequest


class Runner:
    """Runs prefill requests on one engine. All methods belong to the event loop's thread."""

    def __init__(self, means: Means, runs_max: int, *, resident: bool) -> None:
        """`resident`: what runs leave in the stage is used again."""
        self.means = means
        self._runs_max = runs_max
        self._resident = resident and not means.reader.free
        self._live: dict[str, Job] = {}
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
            raise Overloaded(f"prefill worker {self.means.worker_id} {why}", retry_after_s=1.0)
        slots = self._slots(request)
        self._serial += 1
        run = Job(self.means, f"{request.id}#{self._serial}", request, slots, tell)
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

    def held_blocks(self, keys: Sequence[BlockKey]) -> int:
        """How many leading blocks of a chain a run would find in the stage at this moment."""
        return self.means.stage.held_blocks(keys) if self._resident else 0

    def _slots(self, request: PrefillRequest) -> RunSlots:
        """Raises Overloaded. What decode pulls by itself, whatever we hold, is read there: it may fail, and only a read tells."""
        prompt, block_tokens = request.prompt, self.means.layout.block_tokens
        root = request.chain_root if self._resident else None
        keys = block_keys(root, prompt, block_tokens) if root is not None else []
        pulled = of_source(request.legs, Source.STORAGE_TO_DECODE) if request.order is not Order.MEET else ()
        findable = reusable_blocks(len(prompt), block_tokens)
        return RunSlots(self.means.stage, keys, blocks_for(len(prompt), block_tokens), findable, pulled)

    async def _leave(self, run: Job) -> None:
        """Gives the slots back once the engine neither reads nor writes them."""
        try:
            await self.means.engine.call(lambda engine: engine.cancel(run.key))
        except Unavailable:
            pass  # the engine has stopped
        finally:
            run.slots.leave(run.ledger.frontier)
            del self._live[run.key]
            if not self._live:
                self.idle.set()

    def check_integrity(self) -> None:
        """When idle, nothing is left."""
        assert not self._live, list(self._live)
        means = self.means
        assert not any(shared.link.queued_bytes for shared in (means.reader, means.peers, means.handoffs))


def _first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of ours that a task group ended with, else the first there is."""
    ours = group.subgroup(PenstockError) or group
    error: BaseException = ours
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
