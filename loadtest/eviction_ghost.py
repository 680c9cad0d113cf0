"""The ghost of S3-FIFO: blocks that were evicted lately, as many as there are slots."""


class Ghost:
    """Knows the block in each slot by `block`, which the simulation sets before a block comes."""

    def __init__(self) -> None:
        self.block: dict[int, int] = {}
        self._gone: dict[int, None] = {}
        self._size = 0

    def grow(self, slots: int) -> None:
        self._size = slots

    def inserted(self, slot: int) -> bool:
        """Whether the block that came was evicted lately."""
        block = self.block[slot]
        if block not in self._gone:
            return False
        del self._gone[block]
        return True

    def evicted(self, slot: int) -> None:
        self._gone[self.block[slot]] = None
        if len(self._gone) > self._size:
            del self._gone[next(iter(self._gone))]
