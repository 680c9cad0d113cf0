"""How hot segments are, to find the one that a store misses least. Pure: it looks, and changes nothing."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from services.kvstore.disk import Disk, DiskState
from services.kvstore.shelf import Shelf
from services.kvstore.slot_states import SlotState


class Heat(NamedTuple):
    """How hot a segment is: by the hottest block that would go with it, descendants elsewhere included, then by their number."""

    tick: int
    blocks: int


def coldest_segment(shelves: Iterable[Shelf], disks: Sequence[Disk], only: Disk | None = None) -> tuple[Shelf, int, Heat] | None:
    """The coldest segment on a disk that serves (or on `only`): its shelf, position and heat."""
    best: tuple[Shelf, int, Heat] | None = None
    for shelf in shelves:
        for position, segment in shelf.segments.items():
            disk = disks[segment.disk]
            if disk.state is not DiskState.SERVING or only not in (None, disk):
                continue
            found = heat(shelf, position)
            if found is not None and (best is None or found < best[2]):
                best = (shelf, position, found)
    return best


def stored_slots(shelf: Shelf, position: int) -> list[int]:
    return [slot for slot in shelf.segment_slots(position) if shelf.state(slot) is SlotState.STORED]


def heat(shelf: Shelf, position: int) -> Heat | None:
    """None when something may not go."""
    if any(shelf.state(slot) in (SlotState.IN_FLIGHT, SlotState.ERASING) for slot in shelf.segment_slots(position)):
        return None
    going = shelf.index.subtree(stored_slots(shelf, position))
    if any(shelf.index.offers.pinned(slot) for slot in going):
        return None
    return Heat(max(map(shelf.policy.tick, going), default=0), len(going))
