"""Buffers of a stage that are out at the byte-plane server, for peers to write to.

Life of a write: out --end--> over. It ends when it is committed or aborted, or when its buffer is taken back: a buffer that a
system call in a thread is writing can't be, and is waited for.
"""

import asyncio
from collections.abc import Callable, Collection

from common.transport.interface import LeaseToken, Part
from services.worker.lease import Lease


class Write:
    """A buffer that is out, for one part of a lease."""

    def __init__(self, lease: Lease, part: Part, buffer: memoryview) -> None:
        self.lease, self.part, self.buffer = lease, part, buffer
        self.slot = lease.slots[part.item]
        self.over = asyncio.Event()

    def overlaps(self, start: int, end: int) -> bool:
        return start < self.part.offset + self.part.length and self.part.offset < end

    def take_back(self) -> bool:
        """True: nothing can be written through it any more."""
        try:
            self.buffer.release()
        except BufferError:
            return False
        return True


class Writes:
    """All that are out. `ended` is called when one is over."""

    def __init__(self, ended: Callable[[], None]) -> None:
        self._ended = ended
        self._by_buffer: dict[int, Write] = {}  # by id() of the buffer, which the entry keeps alive
        self._by_slot: dict[int, set[Write]] = {}

    def begin(self, write: Write) -> None:
        self._by_buffer[id(write.buffer)] = write
        self._by_slot.setdefault(write.slot, set()).add(write)

    def through(self, buffer: memoryview) -> Write | None:
        """The write that has this buffer; None: it is over."""
        return self._by_buffer.get(id(buffer))

    def under(self, token: LeaseToken) -> list[Write]:
        """Of a lease, which may have ended."""
        return [write for write in self._by_buffer.values() if write.lease.token == token]

    def at(self, slot: int) -> Collection[Write]:
        return self._by_slot.get(slot, ())

    def end(self, write: Write) -> None:
        """Idempotent."""
        if self._by_buffer.pop(id(write.buffer), None):
            self._by_slot[write.slot].discard(write)
            if not self._by_slot[write.slot]:
                del self._by_slot[write.slot]
            write.over.set()
            self._ended()

    def take_back(self, token: LeaseToken) -> None:
        """Ends what is out under a lease, as far as its buffers can be taken back at once."""
        for write in self.under(token):
            if write.take_back():
                self.end(write)

    def check_integrity(self) -> None:
        assert sum(map(len, self._by_slot.values())) == len(self._by_buffer)
        for write in self._by_buffer.values():
            assert not write.lease.coverage[write.part.item].overlaps(write.part.offset, write.part.offset + write.part.length)
