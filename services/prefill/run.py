"""A run in the prefill engine, and its part of one step.

Life of a run: added -> planned, a piece of it at a time, until its last block is computed -> ended. It may be forgotten at any time.
"""

import time
from collections.abc import Collection
from collections.abc import Sequence as Items
from dataclasses import dataclass

from services.worker.engine.scheduler import Chunk
from services.worker.engine.sequence import Sequence
from services.worker.engine.types import NewSequence
from services.worker.ledger import Ledger


class NewRun(NewSequence, frozen=True, kw_only=True):
    """A prompt to compute.

    Attributes:
        slots: stage slots of its blocks, all of them.
        ledger: which of them are there.
        held: leading blocks, or some, that were in the stage before it: others may read those slots too.
    """

    slots: Items[int]
    ledger: Ledger
    held: Collection[int] = frozenset()


class Run:
    """One run while it is live.

    Attributes:
        layers_wanted: layers that its prefix must have before it is planned: one, or all once it came late.
    """

    def __init__(self, new: NewRun, arrival: int) -> None:
        self.sequence = Sequence(new, arrival)
        self.sequence.blocks = list(new.slots)
        self.ledger = new.ledger
        self.layers_wanted = 1
        self.came_s = time.monotonic()
        self._held = new.held

    @property
    def own_slots(self) -> list[int]:
        """Those that nobody else reads or writes."""
        return [slot for block, slot in enumerate(self.sequence.blocks) if block not in self._held]


@dataclass(slots=True)
class Piece:
    """A run's part of one step: blocks `blocks` are computed."""

    run: Run
    chunk: Chunk
    blocks: range
    broken: bool = False
