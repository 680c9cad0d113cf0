"""The layerwise prefill engine: the KV of its runs lies in the stage, in full-block records, and nowhere else.

Synchronous, owned by one thread (services/worker/engine/loop.py). A step is

    plan          runs whose next blocks can be computed, those soonest due first, to a quota of compute time (quota.py)
    run           one forward pass; at each layer the gate (gate.py) first waits for that layer of the prefixes, then says that
                  the layer of what was computed is there
    postprocess   a run whose last token was computed samples its first output token and ends

When a run is due, common/runs.py says.

Chunks end on block borders, except the last, so that a layer of a block is sent once. A run whose prefix fails or is late
within a step loses its part of that step, and nobody else does: its rows are computed and forgotten, and it is planned
again when its prefix is whole.
"""

import logging
import time
from collections.abc import Iterable

import torch

from common.errors import Internal, InvalidRequest, Overloaded, PenstockError
from common.generation import FinishReason
from common.runs import QueuedRun, due_s
from services.prefill.gate import Announce, NobodyLeft, StepGate
from services.prefill.layerwise import Layerwise
from services.prefill.quota import Quota, attention_tokens, cost, fitting
from services.prefill.run import NewRun, Piece, Run
from services.worker.engine import admission
from services.worker.engine.allocator import blocks_for
from services.worker.engine.forward import Forward
from services.worker.engine.sampling import Sampled
from services.worker.engine.scheduler import Chunk
from services.worker.engine.types import Claim, EngineLoad, NewSequence, SequenceStep, StepResult
from services.worker.ledger import Loader
from services.worker.model import LoadedModel

log = logging.getLogger(__name__)


class PrefillEngine:
    """Runs on one model.

    Args:
        layerwise: the way to attend over the stage.
        context_tokens: longest prompt plus one.
        sequences_max: runs in one step. waiting_max: runs that may be live beyond those.
        step_tokens_max: tokens of one step.

    Attributes:
        announce: called on the engine's thread when a layer of some blocks was computed: layer, (run id, blocks).
    """

    def __init__(
        self,
        model: LoadedModel,
        layerwise: Layerwise,
        *,
        context_tokens: int,
        sequences_max: int = 64,
        waiting_max: int = 256,
        step_tokens_max: int = 1024,
    ) -> None:
        self.model = model
        self.context_tokens = context_tokens
        self.block_tokens = model.layout.block_tokens
        self._layerwise = layerwise
        self.announce: Announce = lambda layer, computed: None
        self._forward = Forward(model, layerwise, sequences_max, blocks_for(context_tokens, self.block_tokens))
        self._sequences_max = sequences_max
        self._live_max = sequences_max + waiting_max
        self.step_tokens_max = step_tokens_max
        self._attention_tokens = attention_tokens(model)
        self.set_speed(())
        self._live: dict[str, Run] = {}  # in order of arrival
        self._ended: list[SequenceStep] = []
        self._arrivals = 0
        self._running = 0  # in the last step
        self.blocked = False

    def set_speed(self, steps: Iterable[tuple[int, float]]) -> None:
        """As if these steps, of so many tokens from a prompt's start in so many seconds, were all that was measured."""
        self._quota = Quota(self._attention_tokens, self.step_tokens_max)
        for tokens, seconds in steps:
            self._quota.measured([(0, tokens)], seconds)

    # -- what goes in

    def check(self, new: NewSequence) -> None:
        """Raises what makes `new` unservable. Pure; any thread may call it."""
        admission.check(new, self.model.stored, self.context_tokens, self.model.vocab_size)

    def add(self, new: NewRun) -> None:
        if new.id in self._live:
            raise InvalidRequest(f"run id {new.id!r} is in use")
        if self.room <= 0:
            raise Overloaded(f"{len(self._live)} runs are live; at most {self._live_max} may be", retry_after_s=1.0)
        assert len(new.slots) == new.ledger.blocks == blocks_for(len(new.prompt), self.block_tokens)
        self._arrivals += 1
        self._live[new.id] = Run(new, self._arrivals)

    def give_up(self, claim: Claim) -> None:
        assert not claim.blocks, "there is no pool here"

    def cancel(self, run_id: str) -> None:
        """Forgets a run; from here on its slots are neither read nor written. Unknown ids are ignored."""
        run = self._live.pop(run_id, None)
        if run is not None:
            self._forward.forget(run.sequence)

    def fail_all(self, error: PenstockError) -> None:
        for run in list(self._live.values()):
            self._fail(run, error)

    def close(self, error: PenstockError) -> tuple[SequenceStep, ...]:
        live, ended = list(self._live), self._ended
        self._live, self._ended = {}, []
        return (*ended, *(SequenceStep(run_id, finish=FinishReason.ERROR, error=error) for run_id in live))

    @property
    def room(self) -> int:
        """How many more runs would be taken. A snapshot; any thread may read it."""
        return self._live_max - len(self._live)

    @property
    def idle(self) -> bool:
        return not self._live and not self._ended

    # -- the step

    @torch.inference_mode()
    def step(self) -> StepResult:
        pieces = self._plan()
        self.blocked, self._running = not pieces, len(pieces)
        steps: list[SequenceStep] = []
        if pieces:
            outcome = self._run(pieces)
            steps = [step for piece in pieces if (step := self._advance(piece, outcome.get(piece.chunk.sequence.id)))]
        ended, self._ended = self._ended, []
        return StepResult((*steps, *ended), self.load)

    def _plan(self) -> list[Piece]:
        budget, tokens_left = self._quota.equivalents, self.step_tokens_max
        pieces: list[Piece] = []
        for run in sorted(self._live.values(), key=lambda run: self._queued(run).due_s):
            if len(pieces) == self._sequences_max or tokens_left < self.block_tokens:
                break
            open_run = run.ledger.next_run(run.layers_wanted, self._reach)
            if not open_run:
                continue
            piece = self._piece(run, open_run, budget, tokens_left, alone=not pieces)
            if piece is None:
                break
            pieces.append(piece)
            tokens_left -= piece.chunk.end - piece.chunk.start
            budget -= cost(piece.chunk.start, piece.chunk.end, self._quota.attention_tokens)
            if budget <= 0:
                break
        return pieces

    def _reach(self, first: int, loader: Loader) -> int:
        return self._quota.reach(first * self.block_tokens, self.block_tokens, loader)

    def _queued(self, run: Run) -> QueuedRun:
        """What is left of a run, and until when that should be computed."""
        tokens = run.ledger.to_compute * self.block_tokens
        return QueuedRun(tokens, due_s(run.came_s, tokens, self._quota.tokens_per_s))

    def _piece(self, run: Run, blocks: range, budget: float, tokens_left: int, *, alone: bool) -> Piece | None:
        """Claims the longest part of the open blocks that fits; at least one block when `alone`. None: nothing fits."""
        step, length = self.block_tokens, len(run.sequence.tokens)
        start, end = blocks.start * step, min(blocks.stop * step, length)
        end = min(end, start + tokens_left // step * step) if end - start > tokens_left else end
        fits = fitting(start, end, step, budget, self._quota.attention_tokens)
        if fits == start:
            if not alone:
                return None
            fits = min(start + step, end)
        count = run.ledger.take(range(blocks.start, blocks_for(fits, step)))
        if not count:
            return None
        if run.sequence.row is None:
            run.sequence.admitted_at = time.perf_counter()
        taken = range(blocks.start, blocks.start + count)
        return Piece(run, Chunk(run.sequence, start, min(taken.stop * step, length)), taken)

    def _run(self, pieces: list[Piece]) -> dict[str, Sampled]:
        gate, began = StepGate(pieces, self.model.layout.layers, self.announce), time.perf_counter()
        try:
            with self._layerwise.through(gate):
                outcome = self._forward.run([piece.chunk for piece in pieces])
            computing_s = time.perf_counter() - began - gate.waited_s
            self._quota.measured([(piece.chunk.start, piece.chunk.end) for piece in pieces], computing_s)
            return outcome
        except NobodyLeft:
            return {}
        except Exception as error:
            log.exception("a step over %d runs", len(pieces))
            for piece in pieces:
                piece.broken = True
                self._fail(piece.run, Internal(f"the engine's step failed: {error!r}"))
            return {}

    def _advance(self, piece: Piece, sampled: Sampled | None) -> SequenceStep | None:
        run, sequence = piece.run, piece.chunk.sequence
        if piece.broken or sequence.id not in self._live:
            run.ledger.give_back(piece.blocks)
            return None
        run.ledger.computed(piece.blocks)
        frontier = min(run.ledger.frontier * self.block_tokens, len(sequence.tokens))
        started_at, sequence.admitted_at = sequence.admitted_at, None
        if sampled is None:
            return SequenceStep(sequence.id, computed=frontier, started_at=started_at)
        if sampled.token is None:
            self._layerwise.scrub(run.own_slots)
            self._fail(run, Internal("the model gave logits that are not finite"))
            return None
        del self._live[sequence.id]
        self._forward.forget(sequence)
        stop = sampled.token.id if sampled.token.id in sequence.stop_ids else None
        finish = FinishReason.LENGTH if stop is None else FinishReason.STOP
        return SequenceStep(sequence.id, (sampled.token,), frontier, finish, stop, started_at=started_at)

    def _fail(self, run: Run, error: PenstockError) -> None:
        self.cancel(run.sequence.id)
        self._ended.append(SequenceStep(run.sequence.id, finish=FinishReason.ERROR, error=error))

    # -- how it is doing

    @property
    def load(self) -> EngineLoad:
        running = min(self._running, len(self._live))  # of those that ran in the last step some have ended
        queued = tuple(map(self._queued, self._live.values()))
        return EngineLoad(
            running=running,
            waiting=len(self._live) - running,
            tokens=sum(len(run.sequence.tokens) for run in self._live.values()),
            queued_tokens=int(sum(run.tokens for run in queued)),
            pool_blocks_free=0,
            pool_blocks_total=0,
            pool_blocks_named=0,
            preemptions=0,
            prefill_tokens_per_s=self._quota.tokens_per_s,
            prefill_step_s=self._quota.speed.step_s,
            queued_runs=queued,
        )

    def check_integrity(self) -> None:
        self._forward.check_integrity([run.sequence for run in self._live.values()])
