"""Page-aligned memory for direct I/O, bounded and reused.

`BufferPool` hands out buffers up to a number of bytes. Freed ones are kept by size, because fresh
pages cost several times what a copy into present ones does; a size that is no longer asked for
gives way to the one that is.

Buffers for blocks are cut from arenas on huge pages. An arena's memory is the system's again when all its buffers are:
after the block size has changed, what is out for the moment may keep its neighbours' memory a little longer.
"""

import asyncio
from collections import defaultdict, deque

from common.disk.pages import aligned, huge

ARENA_BYTES = 16 << 20  # a few percent of a pool; of the largest buffers with a page in front, an eighth is wasted
SMALL_BYTES = 64 << 10  # shorter buffers gain nothing from huge pages


class BufferPool:
    """Buffers whose sum never exceeds `bytes_max`. Used from one event loop."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.taken_bytes = 0
        self._kept_bytes = 0
        self._kept: defaultdict[int, list[memoryview]] = defaultdict(list)
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def take(self, length: int) -> memoryview | None:
        """A buffer of `length` bytes (whole pages), or None when there is no room now."""
        if self._waiting or not self._fits(length):
            return None
        self.taken_bytes += length
        return self._buffer(length)

    async def take_all(self, lengths: list[int]) -> list[memoryview] | None:
        """One buffer for each length as soon as there is room for all; None when there never is."""
        total = sum(lengths)
        if total > self.bytes_max:
            return None
        if self._waiting or not self._fits(total):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            entry = (total, turn)
            self._waiting.append(entry)
            try:
                await turn  # whoever wakes us has added `total` to taken_bytes
            except asyncio.CancelledError:
                if entry in self._waiting:
                    self._waiting.remove(entry)
                elif turn.done() and not turn.cancelled():
                    self.taken_bytes -= total
                self._wake()
                raise
        else:
            self.taken_bytes += total
        return [self._buffer(length) for length in lengths]

    def give_back(self, buffer: memoryview) -> None:
        length = len(buffer)
        self.taken_bytes -= length
        self._kept[length].append(buffer)
        self._kept_bytes += length
        self._wake()

    def _fits(self, length: int) -> bool:
        return self.taken_bytes + length <= self.bytes_max

    def _wake(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            total, turn = self._waiting.popleft()
            if not turn.done():
                self.taken_bytes += total
                turn.set_result(None)

    def _buffer(self, length: int) -> memoryview:
        kept = self._kept.get(length)
        if kept:
            self._kept_bytes -= length
            return kept.pop()
        while self._kept_bytes and self.taken_bytes + self._kept_bytes > self.bytes_max:
            size, buffers = next((size, buffers) for size, buffers in self._kept.items() if buffers)
            buffers.pop()
            self._kept_bytes -= size
        return self._cut(length)

    def _cut(self, length: int) -> memoryview:
        """A new buffer; with an arena, its other buffers are kept as far as there is room."""
        room = (self.bytes_max - self.taken_bytes - self._kept_bytes) // length
        count = max(1, min(1 + room, ARENA_BYTES // length))
        if length < SMALL_BYTES:
            return aligned(length)
        arena = huge(count * length)
        for start in range(length, count * length, length):
            self._kept[length].append(arena[start : start + length])
            self._kept_bytes += length
        return arena[:length]
