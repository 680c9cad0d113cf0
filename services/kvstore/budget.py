"""How many bytes each data directory may hold. Pure.

One budget covers the store. It is split in proportion to the sizes of the file systems, because
chains are striped evenly over the directories: disks of one size then fill together, and a larger
one takes more. Sizes, not free space, so that a share doesn't move from start to start. No share
exceeds 80 % of what its disk has free or already holds for us; what that takes from one goes to
the others. Directories on one file system share it equally.
"""

from collections import Counter
from collections.abc import Sequence

import msgspec

FREE_SHARE_MAX = 0.8  # of what the disk has free or the store already holds: the rest is for everybody else


class Room(msgspec.Struct, frozen=True):
    """What is known of the file system under a directory."""

    device: int  # directories with one device share one file system
    size_bytes: int
    free_bytes: int
    held_bytes: int  # segments and checkpoints in the directory


def budget_that_fits(budget_bytes: int, free_bytes: int, held_bytes: int) -> int:
    """The budget, or what 80 % of the disk's free space (with what the store holds of it) allows."""
    return min(budget_bytes, int(FREE_SHARE_MAX * (free_bytes + held_bytes)))


def split(budget_bytes: int, rooms: Sequence[Room]) -> list[int]:
    """Each directory's share; together at most `budget_bytes`."""
    on_device = Counter(room.device for room in rooms)
    weights = [room.size_bytes / on_device[room.device] for room in rooms]
    limits = [budget_that_fits(budget_bytes, room.free_bytes // on_device[room.device], room.held_bytes) for room in rooms]
    shares = [0] * len(rooms)
    open_ = list(range(len(rooms)))
    left = budget_bytes
    while open_:
        total = sum(weights[i] for i in open_)
        fair = {i: int(left * weights[i] / total) if len(open_) > 1 else left for i in open_}
        limited = [i for i in open_ if fair[i] >= limits[i]]
        for i in limited or open_:
            shares[i] = min(fair[i], limits[i])
        left -= sum(limits[i] for i in limited)
        open_ = [i for i in open_ if i not in limited] if limited else []
    return shares
