"""Slots with nothing in them, by disk, so that a chain's consecutive blocks can go to different disks."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence


class FreeSlots:
    """A stack of slot numbers for each disk. `disk_of` says on which disk a slot lies."""

    def __init__(self, disk_of: Callable[[int], int]) -> None:
        self._disk_of = disk_of
        self._by_disk: dict[int, array[int]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_disk.values()))

    def __iter__(self) -> Iterator[int]:
        for slots in self._by_disk.values():
            yield from slots

    def on(self, disk: int) -> int:
        """How many there are on a disk."""
        return len(self._by_disk.get(disk, ()))

    def add(self, slot: int) -> None:
        self._by_disk.setdefault(self._disk_of(slot), array("i")).append(slot)

    def add_all(self, disk: int, slots: Iterable[int]) -> None:
        """Slots that lie on a disk."""
        self._by_disk.setdefault(disk, array("i")).extend(slots)

    def take(self, disks: Sequence[int]) -> list[int]:
        """A slot on each of these disks, or on the next that has one; fewer when there are no more.

        What one disk gives is in order, so that slots that lie one after the other go to blocks that do.
        """
        wanted: dict[int, list[int]] = {}
        for place, disk in enumerate(disks):
            wanted.setdefault(disk, []).append(place)
        taken: dict[int, int] = {}
        for disk, places in wanted.items():
            free = self._by_disk.get(disk, array("i"))
            start = max(0, len(free) - len(places))
            taken.update(zip(places, sorted(free[start:]), strict=False))
            del free[start:]
        for place, disk in enumerate(disks):
            if place not in taken and (slot := self._take_beside(disk)) is not None:
                taken[place] = slot
        return [taken[place] for place in sorted(taken)]

    def _take_beside(self, disk: int) -> int | None:
        """A slot on `disk`, or on the next disk that has one; None when there is none at all."""
        slots = self._by_disk.get(disk)
        if slots:
            return slots.pop()
        having = [number for number, slots in self._by_disk.items() if slots]
        if not having:
            return None
        return self._by_disk[min(having, key=lambda number: (number <= disk, number))].pop()

    def drop(self, slots: range) -> None:
        """These are not to be used."""
        for number, free in self._by_disk.items():
            self._by_disk[number] = array("i", [slot for slot in free if slot not in slots])
