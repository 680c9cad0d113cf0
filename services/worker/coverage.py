"""Which bytes of a slot have come: a set of disjoint half-open ranges."""

from bisect import bisect_left, bisect_right


class Coverage:
    """Ranges `[start, end)`, sorted, merged where they touch."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        assert start < end
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def contains(self, start: int, end: int) -> bool:
        """Whether every byte of the range has come."""
        index = bisect_right(self._starts, start) - 1
        return index >= 0 and end <= self._ends[index]

    def overlaps(self, start: int, end: int) -> bool:
        """Whether any byte of the range has come."""
        index = bisect_right(self._ends, start)
        return index < len(self._starts) and self._starts[index] < end

    def ranges(self) -> list[tuple[int, int]]:
        return list(zip(self._starts, self._ends, strict=True))

    def __repr__(self) -> str:
        return f"Coverage({self.ranges()})"
