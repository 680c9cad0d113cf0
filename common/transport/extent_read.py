"""One part on its way from a peer's disk into a span of ours: read, checked, and copied where it comes through a buffer."""

import fcntl
import os
import threading

from common.disk.pages import PAGE_BYTES, address, aligned
from common.disk.transfer import Op, Transfer
from common.transport.interface import Extent
from common.transport.memory import copy, crc32c


def reads_directly(fd: int) -> bool:
    """Whether a file was opened with O_DIRECT."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


class WrongBytes(Exception):
    """The disk has other bytes there than the peer said."""


class ExtentRead:
    """One part on its way from the disk into a span."""

    def __init__(self, extent: Extent, view: memoryview, direct: bool) -> None:
        """`direct`: the file is read past the page cache (`reads_directly`)."""
        self.view = view
        self.buffer: memoryview | None = None  # ours, to read through
        self.direct = direct
        self._extent = extent
        self._wanted = True
        self._copying = threading.Lock()  # held while the span is written to

    @property
    def fits(self) -> bool:
        """Whether the file can be read straight into the span."""
        return not self.direct or (address(self.view) % PAGE_BYTES == 0 and self._extent.offset % PAGE_BYTES == 0)

    def transfer(self) -> Transfer:
        """The read, which results in the number of bytes."""
        if self.buffer is not None:
            return Transfer(Op.READ, self._extent.fd, [self.buffer], self._extent.offset, self._checked_copy)
        whole = len(self.view) // PAGE_BYTES * PAGE_BYTES
        tail = aligned(PAGE_BYTES) if whole < len(self.view) else None

        def check() -> int:
            if tail is not None:
                self.view[whole:] = tail[: len(self.view) - whole]
            return self._checked(self.view)

        buffers = [self.view] if tail is None else [self.view[:whole], tail] if whole else [tail]
        return Transfer(Op.READ, self._extent.fd, buffers, self._extent.offset, check)

    def give_up(self) -> None:
        """Nothing is copied into the span any more."""
        with self._copying:
            self._wanted = False

    def _checked_copy(self) -> int:
        assert self.buffer is not None
        piece = self.buffer[: len(self.view)]
        length = self._checked(piece)
        with self._copying:
            if self._wanted:
                copy(self.view, piece)
        return length

    def _checked(self, data: memoryview) -> int:
        if crc32c(data) != self._extent.checksum:
            raise WrongBytes
        return len(data)
