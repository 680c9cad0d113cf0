"""What a start found on disk becomes what the store holds."""

from collections.abc import Iterator

from services.kvstore.found import FoundNamespace
from services.kvstore.space import Space


def take_in(one: FoundNamespace, space: Space, ticks: Iterator[int]) -> None:
    """A shelf for a namespace of which there are segments; its files that must be left alone keep their numbers."""
    for disk, numbers in one.unusable_numbers.items():
        space.segment_files.unusable_numbers[disk, one.namespace] = numbers
    if one.geometry is None:
        return
    shelf = space.add_found(one.namespace, one.geometry, ticks)
    for found in one.segments:
        first = space.adopt(shelf, found.segment).start
        if found.segment.writable:
            shelf.free((first + found.free[::-1]).tolist())
    shelf.store_found([(found.segment, found.entries) for found in one.segments])
