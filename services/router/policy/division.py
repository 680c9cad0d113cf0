"""Who brings which of a prompt's stored blocks, and what that makes move. Pure."""

import math

import msgspec

from common.routes import Leg, Source
from services.router.policy.paths import Moved
from services.router.policy.plans import Shape

CLAIM_BLOCKS = 3  # on their way when load and compute meet: one each of a reader's requests (services/worker/loading.py)
MARGIN = 0.5  # of what is expected to be loaded under MEET: what may be loaded beyond that


class Held(msgspec.Struct, frozen=True):
    """Leading blocks that each worker of a pair still holds."""

    decode: int = 0
    prefill: int = 0

    @property
    def blocks(self) -> int:
        return max(self.decode, self.prefill)

    @property
    def to_prefill(self) -> int:
        """Those that only decode holds."""
        return self.blocks - self.prefill

    @property
    def to_decode(self) -> int:
        return self.blocks - self.decode


class Division(msgspec.Struct, frozen=True):
    """Who brings the blocks [0, blocks): `loaded` per load of the plan, the rest computed or still held."""

    loaded: tuple[int, ...]
    computed: int
    held: Held = Held()

    @property
    def blocks(self) -> int:
        return sum(self.loaded) + self.computed + self.held.blocks


def traffic_of(shape: Shape, division: Division, prompt_blocks: int | None) -> Moved:
    """Blocks per path. `prompt_blocks`: of the whole prompt, when prefill computes; None: nothing is handed over."""
    by = dict(zip(shape.loads, division.loaded, strict=True))
    to_decode, to_prefill = by.get(Source.STORAGE_TO_DECODE, 0), by.get(Source.STORAGE_TO_PREFILL, 0)
    if prompt_blocks is None:
        return Moved(to_decode)
    held = division.held
    return Moved(to_decode, to_prefill, to_decode + held.to_prefill, prompt_blocks - to_decode - held.decode)


def claim(blocks: int) -> int:
    """Blocks of a leg that are on their way when MEET is over: compute may have to wait for so many."""
    return min(CLAIM_BLOCKS, blocks)


def legs_of(shape: Shape, division: Division) -> tuple[Leg, ...]:
    """What decode holds, what prefill holds beyond that, then the loads in the plan's order.

    Under MEET, the first load's leg also covers the last of the blocks that compute is expected to take, so that the load goes
    on when compute is late. It doesn't cover them all: what nobody will load isn't queued.
    """
    held = division.held
    legs = [Leg(0, held.decode, Source.RESIDENT)] if held.decode else []
    legs += [Leg(held.decode, held.prefill, Source.RESIDENT_AT_PREFILL)] if held.to_decode else []
    first = held.blocks + division.computed
    margin = min(division.computed, math.ceil(MARGIN * sum(division.loaded)))
    if "decode" in shape.computers:  # it loads what is covered from the prompt's start on
        margin = division.computed
    for source, blocks in zip(shape.loads, division.loaded, strict=True):
        if blocks:
            legs.append(Leg(first - margin, first + blocks, source))
        first, margin = first + blocks, 0
    return tuple(legs)
