"""Dividing blocks among sources that fill at the same time, so that the last of them is done earliest.

Every source starts after its own wait and then fills at its own rate. By the time t together they
have filled sum(max(0, t - wait) * rate): the rates of those that have started add up. Setting that
equal to the number of blocks gives the finish, and each source's share is what it fills by then.
"""

import math
from collections.abc import Sequence

import msgspec


class Filler(msgspec.Struct, frozen=True):
    """Fills blocks after `wait_s`, `blocks_per_s` of them a second."""

    wait_s: float
    blocks_per_s: float

    def filled_s(self, blocks: int) -> float:
        """When so many blocks are there; nothing takes no time."""
        return self.wait_s + blocks / self.blocks_per_s if blocks else 0.0


def level_s(fillers: Sequence[Filler], blocks: float) -> float:
    """The time at which all together have filled so many blocks."""
    wait_rate = rate = 0.0
    finish = math.inf
    for filler in sorted(fillers, key=lambda f: f.wait_s):
        if filler.wait_s >= finish:
            break
        rate += filler.blocks_per_s
        wait_rate += filler.wait_s * filler.blocks_per_s
        finish = (blocks + wait_rate) / rate
    return finish


def share(fillers: Sequence[Filler], blocks: int) -> tuple[int, ...]:
    """Whole blocks for each filler. Equal fillers get theirs in the order given."""
    if not blocks:
        return (0,) * len(fillers)
    level = level_s(fillers, blocks)
    shares = [max(0, int((level - f.wait_s) * f.blocks_per_s)) for f in fillers]
    while sum(shares) > blocks:  # rounding of a float that was just below a whole number
        shares[max(range(len(shares)), key=lambda i: shares[i])] -= 1
    while sum(shares) < blocks:
        shares[min(range(len(shares)), key=lambda i: fillers[i].filled_s(shares[i] + 1))] += 1
    return tuple(shares)
