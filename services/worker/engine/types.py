"""What goes into the engine and what one step of it brings out.

The engine is synchronous and owned by one thread (services/worker/engine/loop.py); everything here
is handed over by value, except KV bytes, which move between stage and pool inside a step.

Life of a sequence (`Phase`): WAITING -> PREFILLING -> DECODING -> FINISHED; a full pool sends a
sequence from PREFILLING or DECODING back to WAITING (preemption), and it recomputes what it had.
A sequence with `hold=True` stays FINISHED but keeps its pool blocks until it is released, so that
its KV can be exported.
"""

from collections.abc import Callable, Sequence
from enum import StrEnum

import msgspec

from common.blocks import ChainRoot
from common.errors import PenstockError
from common.generation import FinishReason, Sampling, Token
from common.runs import QueuedRun
from services.worker.engine.meeting import Meeting


class Phase(StrEnum):
    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    FINISHED = "finished"


class LoadedKv(msgspec.Struct, frozen=True):
    """KV in host memory, to be copied into the pool when the sequence is admitted.

    Attributes:
        tokens: the leading tokens that are there once the buffers are copied; not necessarily a whole number of blocks.
        buffers: one for each of the blocks `[first_block, ceil(tokens / block_tokens))`: a raw record
            (`KvLayout.bytes_per_block` bytes) or, for a full block, its stored form (`StoredLayout.bytes_per_block`); they
            may be mixed.
        first_block: blocks before it are in the pool already, by the sequence's claim.
        on_copied: called once, on the engine's thread, when the buffers are no longer needed,
            whether the sequence was admitted or dropped.
    """

    tokens: int
    buffers: Sequence[memoryview]
    on_copied: Callable[[], None]
    first_block: int = 0


class Claim(msgspec.Struct, frozen=True):
    """Leading blocks of a prompt that are resident in the pool and stay so until the claim is given up or added with a sequence."""

    blocks: tuple[int, ...] = ()


class NewSequence(msgspec.Struct, frozen=True):
    """One sequence to run.

    Attributes:
        id: unique among live sequences.
        prompt: token ids.
        output: tokens generated elsewhere already (by prefill, or before a move); they count as
            output for penalties, `min_tokens` and `max_tokens`, and their positions for sampling.
            The KV of the last of them is never in `kv`: it is the next step's input.
        sampling: resolved.
        kv: KV of the leading tokens of prompt + output, or None.
        hold: keep the pool blocks after the finish until `release`.
        root: parent of the first block's key; its blocks can be found again under their keys. None: they can't.
        claim: resident blocks it starts from; the engine gives it up in every outcome.
        meeting: KV that is still being loaded, from the end, while the engine computes from the front; None: none is.
    """

    id: str
    prompt: Sequence[int]
    sampling: Sampling
    output: Sequence[int] = ()
    kv: LoadedKv | None = None
    hold: bool = False
    root: ChainRoot | None = None
    claim: Claim = Claim()
    meeting: Meeting | None = None

    def give_back(self) -> None:
        """Of one that is refused: its buffers are not needed. Its claim is the engine's to give up."""
        if self.kv is not None:
            self.kv.on_copied()
        if self.meeting is not None:
            self.meeting.over()


class SequenceStep(msgspec.Struct, frozen=True):
    """What one step did for one sequence.

    Attributes:
        tokens: newly sampled tokens (0 or 1 per step today).
        computed: leading tokens of prompt + output whose KV is in the pool.
        finish: set on the last step of the sequence.
        stop_token: the stop or eos token that ended it; it is also the last of `tokens`.
        error: why the sequence was given up, with finish = ERROR.
        preempted: the sequence lost its pool blocks in this step and will recompute.
        started_at: with its first step, `time.perf_counter()` when it was admitted: queueing ended then.
        resident: with its first step, leading tokens that were in the pool before anything was copied or computed.
        loaded_bytes, loaded_s: with its first step, what was copied into the pool at admission.
    """

    id: str
    tokens: tuple[Token, ...] = ()
    computed: int = 0
    finish: FinishReason | None = None
    stop_token: int | None = None
    error: PenstockError | None = None
    preempted: bool = False
    started_at: float | None = None
    resident: int = 0
    loaded_bytes: int = 0
    loaded_s: float = 0.0


class EngineLoad(msgspec.Struct, frozen=True):
    """Counts after a step."""

    running: int
    waiting: int
    tokens: int
    queued_tokens: int  # whose KV is not computed yet
    pool_blocks_free: int
    pool_blocks_total: int
    pool_blocks_named: int
    preemptions: int
    prefill_tokens_per_s: float
    prefill_step_s: float
    queued_runs: tuple[QueuedRun, ...] = ()  # of prefill, on the monotonic clock


class StepResult(msgspec.Struct, frozen=True):
    sequences: tuple[SequenceStep, ...]
    load: EngineLoad
