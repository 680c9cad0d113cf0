"""What an I/O engine is asked to do, and how far one transfer has come. No I/O here."""

import errno
import os
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Protocol

import msgspec

from common.disk.pages import PAGE_BYTES


class Op(Enum):
    READ = "read"
    WRITE = "write"
    SYNC = "sync"


class Transfer(msgspec.Struct, frozen=True, gc=False):
    """Bytes from `offset` of a file into or out of `buffers`, one after the other; or a sync of the file.

    `check` is called when all bytes have moved, on the loop or on a thread: what it returns (or raises) is
    the transfer's result. Without it the result is the number of bytes. `device` says under which of
    several engines the file lies (devices.py).
    """

    op: Op
    fd: int
    buffers: Sequence[memoryview] = ()
    offset: int = 0
    check: Callable[[], int] | None = None
    device: int = 0
    length: int = 0  # of `buffers`: not to be given

    def __post_init__(self) -> None:
        buffers = self.buffers
        msgspec.structs.force_setattr(self, "length", len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers)))

    def rest(self, done: int) -> Sequence[memoryview]:
        """The buffers from byte `done` on."""
        if not done:
            return self.buffers
        left: list[memoryview] = []
        for buffer in self.buffers:
            if done < len(buffer):
                left.append(buffer[done:])
            done = max(0, done - len(buffer))
        return left

    def advanced(self, done: int, moved: int) -> int:
        """Bytes done after a system call moved `moved` more. Raises `OSError` where going on makes no sense.

        A kernel may move less than asked for, in whole pages; anything else is the end of the file or a fault.
        """
        after = done + moved
        if after < self.length and (moved <= 0 or moved % PAGE_BYTES):
            raise OSError(errno.EIO, f"short {self.op.value} of {moved} of {self.length - done} bytes at {self.offset + done}")
        return after

    def finished(self) -> int:
        """The result, all bytes having moved. May raise: that is the result then."""
        return self.check() if self.check is not None else self.length


class DiskCalls(Protocol):
    """The blocking system calls of transfers. Errors are `OSError`."""

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int: ...

    def write(self, fd: int, buffer: memoryview, offset: int) -> int: ...

    def sync(self, fd: int) -> None: ...


class SystemCalls:
    """The real ones."""

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def write(self, fd: int, buffer: memoryview, offset: int) -> int:
        return os.pwrite(fd, buffer, offset)

    def sync(self, fd: int) -> None:
        os.fdatasync(fd)


def carry_out(calls: DiskCalls, transfer: Transfer) -> int:
    """Does a transfer, blocking; its result. Raises `OSError` and what `check` raises."""
    if transfer.op is Op.SYNC:
        calls.sync(transfer.fd)
        return transfer.finished()
    done = 0
    while done < transfer.length:
        rest = transfer.rest(done)
        at = transfer.offset + done
        moved = calls.read(transfer.fd, rest, at) if transfer.op is Op.READ else calls.write(transfer.fd, rest[0], at)
        done = transfer.advanced(done, moved)
    return transfer.finished()
