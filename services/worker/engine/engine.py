"""The paged, continuously batching engine: schedule, run, postprocess.

Synchronous, owned by one thread (loop.py). `step()` never raises for what a sequence or the model
does: a sequence that can't go on ends with an error in the step's result, the others continue.

    schedule      Scheduler.plan() decides which tokens of which sequences run
    load          KV that came from elsewhere is copied into the pool at admission
    run           one forward pass over all planned tokens, laid end to end
    postprocess   sample where a sequence's last token was computed; finish, hold or free

Full blocks are named by their keys and stay resident when nobody holds them, until their memory is needed: a later
sequence with the same beginning claims them.
"""

import logging
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items

import torch

from common.blocks import BlockKey
from common.errors import Internal, InvalidRequest, NotFound, PenstockError
from common.generation import FinishReason, Token
from services.worker.engine import admission
from services.worker.engine.allocator import blocks_for
from services.worker.engine.attention import attention_over
from services.worker.engine.forward import Forward
from services.worker.engine.intake import Intake
from services.worker.engine.pool import BlockPool, pool_blocks
from services.worker.engine.sampling import Sampled
from services.worker.engine.scheduler import Chunk, Plan, Scheduler
from services.worker.engine.sequence import Event, Sequence
from services.worker.engine.speed import Speed
from services.worker.engine.types import Claim, EngineLoad, NewSequence, Phase, SequenceStep, StepResult
from services.worker.model import LoadedModel

log = logging.getLogger(__name__)


class Engine:
    """One model, one pool, many sequences.

    Args:
        pool_bytes: KV memory; 0 chooses from the machine.
        sequences_max: sequences in one batch. waiting_max: sequences that may queue beyond it.
        step_tokens_max: tokens of one step; longer prompts are computed in chunks.

    Attributes:
        context_tokens: longest prompt plus output: the model's, or what the pool holds if that is less.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        pool_bytes: int = 0,
        sequences_max: int = 64,
        waiting_max: int = 256,
        step_tokens_max: int = 1024,
    ) -> None:
        self.model = model
        self.layout = model.layout
        block_tokens = model.layout.block_tokens
        blocks = pool_blocks(model.layout, pool_bytes, model.context_tokens, sequences_max, model.device)
        self.context_tokens = min(model.context_tokens, blocks * block_tokens)
        self.pool = BlockPool(
            model.stored, blocks, model.device, touched_blocks=min(blocks, blocks_for(self.context_tokens, block_tokens))
        )
        self._scheduler = Scheduler(
            self.pool.allocator,
            block_tokens,
            sequences_max=sequences_max,
            waiting_max=waiting_max,
            step_tokens_max=step_tokens_max,
        )
        self._forward = Forward(
            model, attention_over(self.pool.tensor, model.kernels), sequences_max, blocks_for(self.context_tokens, block_tokens)
        )
        self._intake = Intake(self.pool)
        self._live: dict[str, Sequence] = {}
        self._held: dict[str, Sequence] = {}
        self._claims: dict[int, Claim] = {}  # given out and not added yet, by id(); any thread
        self._ended: list[SequenceStep] = []  # finished outside a step, reported by the next one
        self._arrivals = 0
        self._speed = Speed()
        self.blocked = False

    # -- what goes in

    def check(self, new: NewSequence) -> None:
        """Raises what makes `new` unservable, whatever runs at the moment. Pure; any thread may call it."""
        admission.check(new, self.model.stored, self.context_tokens, self.model.vocab_size)

    def add(self, new: NewSequence) -> None:
        """Queues a sequence. On any error `new.kv` and `new.claim` are given back too: exactly once in every outcome."""
        self._claims.pop(id(new.claim), None)
        try:
            self.check(new)
            if new.id in self._live or new.id in self._held:
                raise InvalidRequest(f"sequence id {new.id!r} is in use")
            sequence = Sequence(new, self._arrivals)
            self._scheduler.add(sequence)
        except BaseException:
            self.pool.allocator.release(new.claim.blocks)
            new.give_back()
            raise
        self._arrivals += 1
        self._live[new.id] = sequence

    def cancel(self, sequence_id: str) -> None:
        """Ends a sequence in any phase and frees what it holds; the next step reports it. Unknown ids are ignored."""
        sequence = self._live.get(sequence_id)
        if sequence is not None:
            self._end(sequence, keep_blocks=False)
            self._ended.append(SequenceStep(sequence_id, computed=sequence.computed, finish=FinishReason.CANCELLED))
        else:
            self.release(sequence_id)

    def fail_all(self, error: PenstockError) -> None:
        """Ends every live sequence with an error; the next step reports it."""
        for sequence in list(self._live.values()):
            self._fail(sequence, error)

    def close(self, error: PenstockError) -> tuple[SequenceStep, ...]:
        """Gives up: the last steps of all live sequences. Only buffers are given back; the pool goes with the engine."""
        live, ended = list(self._live.values()), self._ended
        self._live, self._ended = {}, []
        for sequence in live:
            sequence.drop_kv()
        failed = (SequenceStep(s.id, computed=s.computed, finish=FinishReason.ERROR, error=error) for s in live)
        return (*ended, *failed)

    # -- KV that is here

    def claim(self, keys: Items[BlockKey]) -> Claim:
        """Takes hold of the longest prefix of `keys` that is resident; any thread may call it."""
        claim = Claim(tuple(self.pool.allocator.claim(keys)))
        if claim.blocks:
            self._claims[id(claim)] = claim
        return claim

    def give_up(self, claim: Claim) -> None:
        """Lets go of a claim that was not added with a sequence; idempotent; the engine's thread."""
        if self._claims.pop(id(claim), None) is not None:
            self.pool.allocator.release(claim.blocks)

    # -- KV that leaves

    def release(self, sequence_id: str) -> None:
        """Frees the blocks of a finished sequence that was added with `hold`. Unknown ids are ignored."""
        sequence = self._held.pop(sequence_id, None)
        if sequence is not None:
            self._scheduler.free(sequence)

    def export(self, sequence_id: str, first_block: int, last_block: int, out: Items[memoryview]) -> None:
        """Copies blocks `[first_block, last_block)` of a live or held sequence into records; the last may be partial."""
        sequence = self._with_blocks(sequence_id, first_block, last_block, full=False)
        tokens = sequence.computed - first_block * self.layout.block_tokens
        count = last_block - first_block
        self.pool.export(sequence.blocks[first_block:last_block], out, min(tokens, count * self.layout.block_tokens))

    def export_claimed(self, claim: Claim, blocks: Items[int], out: Items[memoryview]) -> None:
        """Copies blocks of a claim that was not added yet into raw records, by their place in it."""
        assert id(claim) in self._claims, "the claim was given up or added"
        self.pool.export([claim.blocks[block] for block in blocks], out, len(blocks) * self.layout.block_tokens)

    def encode(self, sequence_id: str, block: int, out: memoryview) -> None:
        """One full block of a live or held sequence in its stored form."""
        sequence = self._with_blocks(sequence_id, block, block + 1, full=True)
        self.pool.encode(sequence.blocks[block], out)

    def _with_blocks(self, sequence_id: str, first: int, last: int, *, full: bool) -> Sequence:
        sequence = self._live.get(sequence_id) or self._held.get(sequence_id)
        if sequence is None:
            raise NotFound(f"sequence {sequence_id!r} is not live and not held")
        tokens = self.layout.block_tokens
        there = sequence.computed // tokens if full else blocks_for(sequence.computed, tokens)
        if not 0 <= first <= last <= there:
            raise NotFound(f"sequence {sequence_id!r} has {there} computed blocks; [{first}, {last}) was asked for")
        return sequence

    # -- the step

    @property
    def idle(self) -> bool:
        """Nothing to compute and nothing to report."""
        return not self._live and not self._ended

    @torch.inference_mode()
    def step(self) -> StepResult:
        self._meet()
        plan = self._scheduler.plan()
        for sequence in plan.preempted:
            self._forward.forget(sequence)
        self._load_kv(plan)
        steps = {sequence.id: SequenceStep(sequence.id, preempted=True) for sequence in plan.preempted}
        chunks = [chunk for chunk in plan.chunks if chunk.sequence.id in self._live]
        self.blocked = not chunks and not plan.preempted and not plan.admitted
        if chunks:
            started = time.perf_counter()
            for step in self._run(chunks):
                steps[step.id] = step
            self._measure(chunks, time.perf_counter() - started)
        ended, self._ended = self._ended, []
        return StepResult((*steps.values(), *ended), self.load)

    def _load_kv(self, plan: Plan) -> None:
        for sequence in plan.admitted:
            if not sequence.preemptions:
                sequence.admitted_at = time.perf_counter()
            self._take_in(self._intake.admit, sequence)

    def _meet(self) -> None:
        for sequence in list(self._scheduler.running):
            self._take_in(self._intake.meet, sequence)

    def _take_in(self, copy: Callable[[Sequence], None], sequence: Sequence) -> None:
        try:
            copy(sequence)
        except Exception as error:
            log.exception("loading the KV of %s", sequence.id)
            self._fail(sequence, Internal(f"loading KV failed: {error!r}"))

    def _run(self, chunks: list[Chunk]) -> list[SequenceStep]:
        try:
            outcome = self._forward.run(chunks)
        except Exception as error:
            log.exception("a step over %d sequences", len(chunks))
            for chunk in chunks:
                self._fail(chunk.sequence, Internal(f"the engine's step failed: {error!r}"))
            return []
        return [done for chunk in chunks if (done := self._advance(chunk, outcome.get(chunk.sequence.id)))]

    def _advance(self, chunk: Chunk, sampled: Sampled | None) -> SequenceStep | None:
        sequence = chunk.sequence
        started_at, sequence.admitted_at = sequence.admitted_at, None
        resident, sequence.resident = sequence.resident, 0
        loaded, sequence.loaded = sequence.loaded, (0, 0.0)
        if sequence.meeting is not None:
            sequence.meeting.computed(chunk.end)
        if sampled is None:
            sequence.computed = chunk.end
            self._intake.name(sequence)
            return SequenceStep(
                sequence.id,
                computed=chunk.end,
                started_at=started_at,
                resident=resident,
                loaded_bytes=loaded[0],
                loaded_s=loaded[1],
            )
        if sampled.token is None:
            self._fail(sequence, Internal("the model gave logits that are not finite"), scrub=True)
            return None
        sequence.computed = chunk.end
        self._intake.name(sequence)
        sequence.drop_kv()
        sequence.tokens.append(sampled.token.id)
        sequence.advance(Event.SAMPLE)
        finish, stop_token = self._finish_of(sequence, sampled.token)
        if finish is not None:
            self._end(sequence, keep_blocks=sequence.hold)
        return SequenceStep(
            sequence.id, (sampled.token,), chunk.end, finish, stop_token, started_at=started_at, resident=resident,
            loaded_bytes=loaded[0], loaded_s=loaded[1],
        )  # fmt: skip

    def _finish_of(self, sequence: Sequence, token: Token) -> tuple[FinishReason | None, int | None]:
        if token.id in sequence.stop_ids:
            return FinishReason.STOP, token.id
        limit = sequence.generated >= sequence.sampling.max_tokens or len(sequence.tokens) >= self.context_tokens
        return (FinishReason.LENGTH if limit else None), None

    def _end(self, sequence: Sequence, *, keep_blocks: bool) -> None:
        del self._live[sequence.id]
        self._scheduler.finish(sequence, keep_blocks=keep_blocks)
        self._forward.forget(sequence)
        sequence.drop_kv()
        if keep_blocks:
            self._held[sequence.id] = sequence

    def _fail(self, sequence: Sequence, error: PenstockError, *, scrub: bool = False) -> None:
        if scrub:
            self.pool.scrub(self.pool.allocator.forget(sequence.blocks))
        self._end(sequence, keep_blocks=False)
        self._ended.append(SequenceStep(sequence.id, computed=sequence.computed, finish=FinishReason.ERROR, error=error))

    # -- how it is doing

    def set_speed(self, steps: Iterable[tuple[int, float]]) -> None:
        """As if these steps, of so many tokens from a prompt's start in so many seconds, were all that was measured."""
        self._speed = Speed()
        for tokens, seconds in steps:
            self._speed.measured(tokens, seconds)

    def _measure(self, chunks: list[Chunk], elapsed_s: float) -> None:
        tokens = sum(chunk.end - chunk.start for chunk in chunks)
        # Steps that mostly decode say nothing about prefill.
        if tokens >= 4 * len(chunks) and elapsed_s > 0:
            self._speed.measured(tokens, elapsed_s)

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            tokens=sum(len(sequence.tokens) for sequence in self._live.values()),
            queued_tokens=sum(len(sequence.tokens) - sequence.computed for sequence in self._live.values()),
            pool_blocks_free=self.pool.allocator.free,
            pool_blocks_total=self.pool.allocator.total,
            pool_blocks_named=self.pool.allocator.named,
            preemptions=self._scheduler.preemptions,
            prefill_tokens_per_s=self._speed.tokens_per_s,
            prefill_step_s=self._speed.step_s,
        )

    @property
    def room(self) -> int:
        """How many more sequences would be taken. A snapshot; any thread may read it."""
        return self._scheduler.room

    def check_integrity(self) -> None:
        """Every block is free or has exactly the holders that are known here; every phase fits its place."""
        self._scheduler.check_integrity()
        self._forward.check_integrity(self._scheduler.running)
        live = {sequence.id for sequence in (*self._scheduler.running, *self._scheduler.waiting)}
        assert live == set(self._live), "live sequences"
        assert all(sequence.phase is Phase.FINISHED for sequence in self._held.values()), "held sequences"
        holders = [*self._live.values(), *self._held.values()]
        held = [block for sequence in holders for block in sequence.blocks]
        held += [block for sequence in self._scheduler.waiting for block in sequence.claimed]
        self.pool.allocator.check_integrity(held + [block for claim in self._claims.values() for block in claim.blocks])
