"""Decides what the next step computes. Pure: no tensors, no clock, no I/O.

A plan is made in this order:

1. decodes, oldest first, one token each; a full pool preempts the latest arrival, which goes back to the
   front of the queue and recomputes;
2. prompts in progress, oldest first, in chunks, until `step_tokens_max` tokens are planned; one that meets what is still
   being loaded (meeting.py) waits for it;
3. admissions in order of arrival, while the pool can hold the whole prompt and one more block, unless
   this step preempted (what was just freed would be taken at once).

Nobody overtakes the head of the queue, so nobody starves. An admission takes over what is resident of the
sequence: leading blocks that the pool still has under their keys. When nothing runs and the head of the queue
doesn't fit, those behind it give up what they have claimed.
"""

from collections import deque
from dataclasses import dataclass, field

from common.errors import Overloaded
from services.worker.engine.allocator import BlockAllocator, blocks_for
from services.worker.engine.sequence import Event, Sequence
from services.worker.engine.types import Phase


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute tokens `[start, end)` of a sequence; sample when that reaches its last token."""

    sequence: Sequence
    start: int
    end: int

    @property
    def samples(self) -> bool:
        return self.end == len(self.sequence.tokens)


@dataclass(slots=True)
class Plan:
    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Queue, batch, and the blocks of both."""

    def __init__(
        self, allocator: BlockAllocator, block_tokens: int, *, sequences_max: int, waiting_max: int, step_tokens_max: int
    ) -> None:
        self._allocator = allocator
        self._block_tokens = block_tokens
        self._sequences_max = sequences_max
        self._waiting_max = waiting_max
        self._step_tokens_max = step_tokens_max
        self.waiting: deque[Sequence] = deque()  # by arrival, preempted ones first
        self.running: list[Sequence] = []  # by arrival
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        if self.room <= 0:
            raise Overloaded(
                f"{len(self.running)} requests run and {len(self.waiting)} wait; at most {self._sequences_max} and "
                f"{self._waiting_max} may",
                retry_after_s=1.0,
            )
        self.waiting.append(sequence)

    @property
    def room(self) -> int:
        """How many more sequences may be added."""
        return self._waiting_max + self._sequences_max - len(self.waiting) - len(self.running)

    def finish(self, sequence: Sequence, *, keep_blocks: bool) -> None:
        """Takes a sequence out, whatever its phase."""
        (self.waiting if sequence.phase is Phase.WAITING else self.running).remove(sequence)
        sequence.advance(Event.FINISH)
        self._give_up_claim(sequence)
        if not keep_blocks:
            self.free(sequence)

    def free(self, sequence: Sequence) -> None:
        self._allocator.release(sequence.blocks)
        sequence.blocks, sequence.named = [], 0

    def plan(self) -> Plan:
        plan = Plan()
        budget = self._step_tokens_max
        for sequence in [s for s in self.running if s.phase is Phase.DECODING]:
            if sequence.phase is Phase.DECODING and self._make_room(sequence, plan):
                plan.chunks.append(Chunk(sequence, sequence.computed, len(sequence.tokens)))
                budget -= 1
        for sequence in self.running:
            if sequence.phase is Phase.PREFILLING:
                budget -= self._plan_prefill(sequence, budget, plan)
        while not plan.preempted and budget > 0 and (admitted := self._admit()):
            plan.admitted.append(admitted)
            budget -= self._plan_prefill(admitted, budget, plan)
        return plan

    def _plan_prefill(self, sequence: Sequence, budget: int, plan: Plan) -> int:
        count = min(budget, len(sequence.tokens) - sequence.computed)
        if count > 0 and sequence.meeting is not None:
            count = sequence.meeting.claim(sequence.computed, count)
        if count <= 0:
            return 0
        plan.chunks.append(Chunk(sequence, sequence.computed, sequence.computed + count))
        return count

    def _make_room(self, sequence: Sequence, plan: Plan) -> bool:
        """Gives a decoding sequence the block its next token needs; False if that cost the sequence itself."""
        missing = blocks_for(len(sequence.tokens), self._block_tokens) - len(sequence.blocks)
        while (taken := self._allocator.take(max(0, missing))) is None:
            victim = self.running[-1]
            self._preempt(victim, plan)
            if victim is sequence:
                return False
        sequence.blocks += taken
        return True

    def _preempt(self, victim: Sequence, plan: Plan) -> None:
        self.running.remove(victim)
        plan.chunks = [chunk for chunk in plan.chunks if chunk.sequence is not victim]
        self.free(victim)
        victim.drop_kv()
        victim.advance(Event.PREEMPT)
        victim.computed = 0
        victim.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(victim)
        plan.preempted.append(victim)

    def _admit(self) -> Sequence | None:
        if not self.waiting or len(self.running) >= self._sequences_max:
            return None
        sequence = self.waiting[0]
        self._claim(sequence)
        needed = blocks_for(len(sequence.tokens), self._block_tokens) - len(sequence.claimed)
        spare = 1 if self.running else 0  # alone it may take everything: it can preempt nobody and always fits
        taken = self._allocator.take(needed, spare=spare)
        behind = [other for other in self.waiting if other.claimed and other is not sequence]
        while taken is None and not self.running and behind:
            self._give_up_claim(behind.pop())
            taken = self._allocator.take(needed)
        if taken is None:
            return None
        self.waiting.popleft()
        resident = len(sequence.claimed)
        sequence.blocks, sequence.claimed = sequence.claimed + taken, []
        sequence.named = resident
        sequence.resident = 0 if sequence.preemptions else resident * self._block_tokens
        sequence.computed = max(resident * self._block_tokens, sequence.kv.tokens if sequence.kv else 0)
        sequence.advance(Event.ADMIT)
        self._insert(sequence)
        return sequence

    def _claim(self, sequence: Sequence) -> None:
        """Adds what else is resident behind the blocks it has claimed; its last token is always computed."""
        have, blocks = len(sequence.claimed), (len(sequence.tokens) - 1) // self._block_tokens
        if have < blocks:
            sequence.claimed += self._allocator.claim(sequence.keys(blocks, self._block_tokens)[have:])

    def _give_up_claim(self, sequence: Sequence) -> None:
        self._allocator.release(sequence.claimed)
        sequence.claimed = []
        if sequence.kv is not None and sequence.kv.first_block:
            sequence.drop_kv()  # it hung on what is given up

    def _insert(self, sequence: Sequence) -> None:
        index = len(self.running)
        while index and self.running[index - 1].arrival > sequence.arrival:
            index -= 1
        self.running.insert(index, sequence)

    def check_integrity(self) -> None:
        assert len(self.running) <= self._sequences_max
        assert [s.arrival for s in self.running] == sorted(s.arrival for s in self.running)
        for sequence in self.running:
            assert sequence.phase in (Phase.PREFILLING, Phase.DECODING), sequence
            assert sequence.computed < len(sequence.tokens), sequence
            assert sequence.computed <= len(sequence.blocks) * self._block_tokens, sequence
        for sequence in self.waiting:
            assert sequence.phase is Phase.WAITING and not sequence.blocks and not sequence.computed, sequence
        assert not any(sequence.claimed for sequence in self.running)
