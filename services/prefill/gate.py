"""What a step does around each layer: it waits for that layer of the prefixes, and announces that of what was computed."""

import time
from collections.abc import Callable, Sequence

from services.prefill.run import Piece
from services.worker.ledger import Wait

LATE_S = 0.25  # how long a batch waits for one run's layer
LATE_ALONE_S = 5.0  # the same with nobody else in the batch

Announce = Callable[[int, Sequence[tuple[str, range]]], None]


class NobodyLeft(Exception):
    """Every piece of the step is broken: the rest of the forward pass is for nobody."""


class StepGate:
    """Of one step: a `Gate` (layerwise.py) for its pieces. One whose prefix is broken or late is waited for no more in this step.

    Attributes:
        waited_s: for layers that had not come yet: it says nothing of how fast this engine computes.
    """

    def __init__(self, pieces: Sequence[Piece], layers: int, announce: Announce) -> None:
        self._pieces = pieces
        self._layers = layers
        self._announce = announce
        self._wait_s = LATE_S if len(pieces) > 1 else LATE_ALONE_S
        self.waited_s = 0.0

    def before(self, layer: int) -> None:
        began = time.monotonic()
        deadline = began + self._wait_s
        for piece in self._pieces:
            if piece.broken:
                continue
            outcome = piece.run.ledger.wait(piece.blocks.start, layer, deadline)
            piece.broken = outcome is not Wait.READY
            if outcome is Wait.LATE:
                piece.run.layers_wanted = self._layers
        self.waited_s += time.monotonic() - began
        if all(piece.broken for piece in self._pieces):
            raise NobodyLeft

    def after(self, layer: int) -> None:
        self._announce(layer, [(piece.run.sequence.id, piece.blocks) for piece in self._pieces if not piece.broken])
