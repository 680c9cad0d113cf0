"""One live sequence and its life cycle.

The cycle is the table `NEXT`; a missing key is a bug in the caller. Who sets what:

- `Engine` creates the sequence and appends sampled tokens;
- `Scheduler` moves it between phases, gives and takes `blocks`, sets `computed` at admission and preemption;
- `Engine` advances `computed` after the forward pass that made the KV.

Invariants while PREFILLING or DECODING: `computed < len(tokens)` before a step (the last token is
always an input), `blocks` holds at least `computed` tokens, and the sequence owns one `row` of the step tables.
"""

import logging
from collections.abc import Sequence as Items
from enum import StrEnum
from typing import Any

from common.blocks import BlockKey, ChainRoot, extend_keys
from common.generation import Sampling
from services.worker.engine.meeting import Meeting
from services.worker.engine.types import LoadedKv, NewSequence, Phase

log = logging.getLogger(__name__)


class Event(StrEnum):
    ADMIT = "admit"
    SAMPLE = "sample"
    PREEMPT = "preempt"
    FINISH = "finish"


NEXT: dict[Phase, dict[Event, Phase]] = {
    Phase.WAITING: {Event.ADMIT: Phase.PREFILLING, Event.FINISH: Phase.FINISHED},
    Phase.PREFILLING: {Event.SAMPLE: Phase.DECODING, Event.PREEMPT: Phase.WAITING, Event.FINISH: Phase.FINISHED},
    Phase.DECODING: {Event.SAMPLE: Phase.DECODING, Event.PREEMPT: Phase.WAITING, Event.FINISH: Phase.FINISHED},
    Phase.FINISHED: {},
}


class Sequence:
    """Mutable state of one sequence; owned by the engine's thread.

    Attributes:
        tokens: prompt and output.
        computed: leading tokens whose KV is in `blocks`.
        blocks: pool blocks in order; block i holds tokens `[i * block_tokens, (i + 1) * block_tokens)`.
        arrival: order of `add`; the latest is preempted first.
        row: its row of the step tables while running, and how many `blocks` that row has.
        claimed: resident blocks that are its own before admission.
        kv: KV to copy in at admission; None once it was copied or dropped.
        named: leading blocks that have been named in the pool.
        resident: leading tokens that were in the pool at its first admission, until that is reported.
        penalties: what sampling remembers about it (services/worker/engine/sampling.py).
    """

    __slots__ = (
        "_keys", "_root", "admitted_at", "arrival", "blocks", "claimed", "computed", "hold", "id", "kv", "loaded", "meeting", "named", "penalties",
        "phase", "preemptions", "prompt_tokens", "resident", "row", "row_blocks", "sampling", "stop_ids", "tokens",
    )  # fmt: skip

    def __init__(self, new: NewSequence, arrival: int) -> None:
        self.id = new.id
        self.sampling: Sampling = new.sampling
        self.tokens: list[int] = [*new.prompt, *new.output]
        self.prompt_tokens = len(new.prompt)
        self.kv: LoadedKv | None = new.kv
        self.meeting: Meeting | None = new.meeting
        self.claimed: list[int] = list(new.claim.blocks)
        self.named = 0
        self.resident = 0
        self._root: ChainRoot | None = new.root
        self._keys: list[BlockKey] = []
        self.hold = new.hold
        self.arrival = arrival
        self.stop_ids = frozenset(new.sampling.stop_token_ids) | (
            frozenset() if new.sampling.ignore_eos else frozenset(new.sampling.eos_token_ids)
        )
        self.phase = Phase.WAITING
        self.computed = 0
        self.blocks: list[int] = []
        self.row: int | None = None
        self.row_blocks = 0
        self.admitted_at: float | None = None  # of the first admission, until it is reported
        self.loaded: tuple[int, float] = (0, 0.0)  # bytes and seconds of copies into its blocks, until they are reported
        self.preemptions = 0
        self.penalties: Any = None

    def __repr__(self) -> str:
        return f"<{self.id} {self.phase} {self.computed}/{len(self.tokens)} tokens, {len(self.blocks)} blocks>"

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    def keys(self, blocks: int, block_tokens: int) -> list[BlockKey]:
        """Keys of its first `blocks` blocks, computed once each; none without a root."""
        if self._root is None:
            return []
        have = len(self._keys)
        if blocks > have:
            parent = self._keys[-1] if have else self._root
            self._keys += extend_keys(parent, self.tokens[have * block_tokens : blocks * block_tokens], block_tokens)
        return self._keys[:blocks]

    def advance(self, event: Event) -> None:
        self.phase = NEXT[self.phase][event]

    def count_loaded(self, buffers: Items[memoryview], seconds: float) -> None:
        """So much was copied into its blocks."""
        self.loaded = (self.loaded[0] + sum(buffer.nbytes for buffer in buffers), self.loaded[1] + seconds)

    def drop_kv(self) -> None:
        """Gives the loaded KV's buffers back, once, also those that are still being loaded to."""
        if self.meeting is not None:
            meeting, self.meeting = self.meeting, None
            meeting.over()
        if self.kv is not None:
            kv, self.kv = self.kv, None
            try:
                kv.on_copied()
            except Exception:
                log.exception("on_copied of %s", self.id)
