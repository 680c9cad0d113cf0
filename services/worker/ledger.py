"""Who makes each block of a prompt, and which of its layers are in the stage.

Loaders and one engine share a ledger; it is locked, and whoever claims a block first has it. So two
ends that work towards each other, loading from the back and computing from the front, meet exactly.

    OPEN --claim_leg, claim_back--> LOADING --arrived--> THERE
    OPEN --take--> COMPUTING --computed--> THERE
    OPEN --found--> THERE          before anybody has claimed anything
    LOADING --failed--> OPEN       what can't be loaded is computed
    COMPUTING --give_back--> OPEN  the step broke off

Invariants:
- A block of a leg leaves OPEN at most once for a loader: `claim_back` goes down from the leg's end, and
  what failed is above it.
- The layers of a block come lowest first: `[0, layers)` of them are there. THERE means all of them.
- `next_run` is the first run of OPEN blocks, if every block before it has begun to come.
"""

import threading
import time
from collections.abc import Callable, Collection, Sequence
from enum import Enum, IntEnum
from typing import NamedTuple

import numpy as np

from common.routes import Leg


class Loader(NamedTuple):
    """What comes from the other end of a leg: `left` blocks are open before it, it has claimed `coming` more, and has brought
    `blocks_per_s` so far; 0: none yet."""

    left: int
    coming: int
    blocks_per_s: float


# How many blocks to compute from the given one on, towards a loader.
Reach = Callable[[int, Loader], int]
CONTESTED_SHARE = 4
CONTESTED_BLOCKS_MIN = 2


def quarter(first: int, loader: Loader) -> int:
    """The nearer they are, the less: nothing need be known of how fast they are."""
    return max(CONTESTED_BLOCKS_MIN, loader.left // CONTESTED_SHARE)


class State(IntEnum):
    OPEN = 0
    LOADING = 1
    COMPUTING = 2
    THERE = 3


class Wait(Enum):
    """How waiting for a layer ended."""

    READY = "ready"
    BROKEN = "broken"  # a block will not come, or the ledger was closed
    LATE = "late"


class Ledger:
    """Of one prompt of `blocks` blocks."""

    def __init__(self, blocks: int, layers: int, legs: Sequence[Leg] = ()) -> None:
        self.blocks = blocks
        self.layers = layers
        self._changed = threading.Condition()
        self._state = np.zeros(blocks, dtype=np.int8)
        self._layers = np.zeros(blocks, dtype=np.int16)  # leading layers that are there
        self._unclaimed = {leg: leg.last_block for leg in legs}  # [leg.first_block, this) may still be claimed by its loader
        self._began_s: dict[Leg, float] = {}  # when its loader claimed its first blocks
        self._closed = False

    def found(self, blocks: Collection[int]) -> None:
        """They were in the stage before the run: nobody needs to make them."""
        with self._changed:
            index = np.fromiter(blocks, dtype=np.int64)
            assert (self._state[index] == State.OPEN).all(), self
            self._state[index] = State.THERE
            self._layers[index] = self.layers

    # Loaders

    def claim_leg(self, leg: Leg) -> range:
        """All of a leg, for a loader that goes from its front."""
        return self.claim_back(leg, leg.blocks)

    def claim_back(self, leg: Leg, count: int) -> range:
        """The next blocks from the end of a leg, at most `count`; empty when it has met what is computed."""
        with self._changed:
            last = self._unclaimed[leg]
            first = max(last - count, self._open_from(leg))
            self._began_s.setdefault(leg, time.monotonic())
            self._state[first:last] = State.LOADING
            self._unclaimed[leg] = first if first < last else leg.first_block
            return range(first, last)

    def left(self, leg: Leg) -> int:
        """How many blocks of a leg its loader could still claim."""
        with self._changed:
            return self._unclaimed[leg] - self._open_from(leg)

    def arrived(self, blocks: Sequence[int], layers: int) -> None:
        """The leading `layers` layers of blocks that are being loaded are there."""
        with self._changed:
            index = np.fromiter(blocks, dtype=np.int64)
            assert (self._state[index] == State.LOADING).all() and (self._layers[index] <= layers).all(), self
            self._layers[index] = layers
            if layers == self.layers:
                self._state[index] = State.THERE
            self._changed.notify_all()

    def failed(self, blocks: Sequence[int]) -> None:
        """They can't be loaded: they are open, for compute alone."""
        self._reopen(blocks, State.LOADING)

    # The engine

    def next_run(self, layers: int = 1, reach: Reach = quarter) -> range:
        """What is to be computed next; empty while something before it has fewer than `layers` layers, or nothing is open, or
        what is open is better left to its loader."""
        with self._changed:
            still = np.flatnonzero(self._state == State.OPEN)
            if not len(still):
                return range(0)
            first = int(still[0])
            if first and int(self._layers[:first].min()) < layers:
                return range(0)
            closed = np.flatnonzero(self._state[first:] != State.OPEN)
            last = first + int(closed[0]) if len(closed) else self.blocks
            for leg, unclaimed in self._unclaimed.items():
                if leg.first_block <= first < unclaimed:  # a loader works towards us
                    last = min(last, unclaimed, first + reach(first, self._loader(leg, unclaimed - first)))
            return range(first, last)

    def take(self, run: range) -> int:
        """Claims the leading part of a run that is still open, for compute; how many blocks that is."""
        with self._changed:
            closed = np.flatnonzero(self._state[run.start : run.stop] != State.OPEN)
            count = int(closed[0]) if len(closed) else len(run)
            self._state[run.start : run.start + count] = State.COMPUTING
            return count

    def computed(self, run: range) -> None:
        with self._changed:
            assert (self._state[run.start : run.stop] == State.COMPUTING).all(), self
            self._state[run.start : run.stop] = State.THERE
            self._layers[run.start : run.stop] = self.layers
            self._changed.notify_all()

    def give_back(self, run: range) -> None:
        """The step that computed them broke off."""
        self._reopen(run, State.COMPUTING)

    def wait(self, end: int, layer: int, deadline: float) -> Wait:
        """Waits until `layer` of blocks `[0, end)` is there, at most until `deadline` (monotonic)."""
        with self._changed:
            while not self._closed:
                if not end or int(self._layers[:end].min()) > layer:
                    return Wait.READY
                if (self._state[:end] == State.OPEN).any():
                    return Wait.BROKEN
                left = deadline - time.monotonic()
                if left <= 0:
                    return Wait.LATE
                self._changed.wait(left)
            return Wait.BROKEN

    # Both

    @property
    def frontier(self) -> int:
        """Leading blocks that are there."""
        with self._changed:
            missing = np.flatnonzero(self._state != State.THERE)
            return int(missing[0]) if len(missing) else self.blocks

    @property
    def to_compute(self) -> int:
        """Blocks that wait for compute, or are being computed."""
        return int(((self._state == State.OPEN) | (self._state == State.COMPUTING)).sum())

    def close(self) -> None:
        """The run is over: nobody waits any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _open_from(self, leg: Leg) -> int:
        """The first block from which on all that its loader did not claim are open."""
        last = self._unclaimed[leg]
        taken = np.flatnonzero(self._state[leg.first_block : last] != State.OPEN)
        return leg.first_block + int(taken[-1]) + 1 if len(taken) else leg.first_block

    def _loader(self, leg: Leg, left: int) -> Loader:
        claimed = self._state[self._unclaimed[leg] : leg.last_block]
        came = int((claimed == State.THERE).sum())
        seconds = max(1e-6, time.monotonic() - self._began_s[leg]) if came else 1.0
        return Loader(left, int((claimed == State.LOADING).sum()), came / seconds)

    def _reopen(self, blocks: Sequence[int], state: State) -> None:
        with self._changed:
            index = np.fromiter(blocks, dtype=np.int64)
            assert (self._state[index] == state).all(), self
            self._state[index] = State.OPEN
            self._layers[index] = 0
            self._changed.notify_all()

    def __repr__(self) -> str:
        letters = "".join("olct"[state] for state in self._state)
        return f"Ledger({letters}{', closed' if self._closed else ''})"
