"""Slots with nothing in them, by disk, so that a chain's consecutive blocks can go to different disks."""

from array import array
from collections.abc import Callable, Iterator


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

    def take(self, disk: int) -> int | None:
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
