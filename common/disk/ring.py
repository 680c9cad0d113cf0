"""One io_uring: the kernel's two rings, driven by raw system calls. No asyncio, no policy.

1. `open_ring` sets it up and moves real bytes through it, or says why it can't: an old kernel, a container
   that forbids the calls, a processor whose memory order Python can't work with.
2. `push` places an operation; `submit` hands all that were placed to the kernel.
3. The eventfd `fd` becomes readable when operations complete; `reap` takes their results.
4. `close`, when nothing is in flight.

An operation is known by its `tag`. Its memory is pinned here, and its iovecs live here, until it is reaped.

The submission ring is read only inside our own system call, so it needs no barrier. The completion ring is
filled behind our back: an entry must not be read before the tail that announces it. x86-64 keeps loads
in order by itself. Python can't ask a weaker processor to: there, threads serve instead.

Layouts and numbers are those of linux/io_uring.h. Nothing is needed but Linux 5.6 or later: no compiler, no library.
"""

import ctypes
import errno
import mmap
import os
import platform
import struct
from collections.abc import Sequence
from enum import IntEnum

from common.disk.pages import PAGE_BYTES, aligned

ENTRIES_MAX = 4096
_SETUP, _ENTER, _REGISTER = 425, 426, 427  # system calls: the same numbers on every architecture
_SETUP_CLAMP = 1 << 4
_OFFSET_RINGS, _OFFSET_SQES = 0, 0x10000000
_FEATURES = 1 << 0 | 1 << 1 | 1 << 2  # both rings in one mapping; no completion is dropped; arguments are copied at submission
_ENTER_GETEVENTS = 1
_REGISTER_EVENTFD = 4
_FSYNC_DATASYNC = 1
_HARDLINK = 1 << 3  # IOSQE_IO_HARDLINK, of Linux 5.5
_PARAMS = struct.Struct("<7I3I10I10I")  # struct io_uring_params, then its io_sqring_offsets and io_cqring_offsets
_PARAMS_FLAGS_OFFSET = 8
_SQE = struct.Struct("<BBHiQQIIQ24x")  # opcode, flags, ioprio, fd, offset, address, length, operation's flags, user_data
_CQE = struct.Struct("<QiI")  # user_data, result, flags
_IOVEC = struct.Struct("@PN")
_WORD = 0xFFFFFFFF
_libc = ctypes.CDLL(None, use_errno=True)


class RingUnavailable(Exception):
    """There is no io_uring here, and why."""


class Opcode(IntEnum):
    """IORING_OP_*: what the kernel is asked to do."""

    READV = 1
    WRITEV = 2
    FSYNC = 3
    READ = 22
    WRITE = 23


class Ring:
    """See the module. Belongs to one thread at a time."""

    def __init__(self, entries: int) -> None:
        """Raises `OSError`."""
        params = _Raw(_PARAMS.size)
        struct.pack_into("<I", params.bytes, _PARAMS_FLAGS_OFFSET, _SETUP_CLAMP)
        self.fd = -1
        self._ring_fd = _call(_SETUP, min(entries, ENTRIES_MAX), params.address)
        try:
            fields = _PARAMS.unpack(params.bytes)
            if fields[5] & _FEATURES != _FEATURES:
                raise OSError(errno.ENOSYS, f"io_uring has features {fields[5]:#x}: expected {_FEATURES:#x}, of Linux 5.6")
            self._map(fields[0], fields[1], fields[10:20], fields[20:30])
            self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            number = ctypes.c_int(self.fd)
            _call(_REGISTER, self._ring_fd, _REGISTER_EVENTFD, ctypes.addressof(number), 1)
        except BaseException:
            self.close()
            raise
        self._placed = 0
        self._pinned: dict[int, object] = {}  # by tag: what the kernel may still touch

    def _map(self, sq_entries: int, cq_entries: int, sq: Sequence[int], cq: Sequence[int]) -> None:
        """`sq` and `cq`: head, tail, mask, entries, then (sq) flags, dropped, array; (cq) overflow, cqes."""
        self.entries = sq_entries
        size = max(sq[6] + 4 * sq_entries, cq[5] + _CQE.size * cq_entries)
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self._rings = mmap.mmap(self._ring_fd, size, flags=flags, offset=_OFFSET_RINGS)
        self._sqes = mmap.mmap(self._ring_fd, _SQE.size * sq_entries, flags=flags, offset=_OFFSET_SQES)
        self._words = memoryview(self._rings)[: size // 4 * 4].cast("I")
        self._sq_tail, self._cq_head, self._cq_tail = sq[1] // 4, cq[0] // 4, cq[1] // 4
        self._sq_mask, self._cq_mask = self._words[sq[2] // 4], self._words[cq[2] // 4]
        self._cqes = cq[5]
        for index in range(sq_entries):
            self._words[sq[6] // 4 + index] = index  # entry n of the array is always sqe n

    @property
    def in_flight(self) -> int:
        """Operations placed or submitted, and not reaped: at most `entries`."""
        return len(self._pinned)

    def read(self, tag: int, fd: int, buffers: Sequence[memoryview], offset: int, *, linked: bool = False) -> None:
        """Places a read into `buffers`, one after the other.

        `linked`: what is placed next, and submitted with it, begins when it has ended, well or not.
        """
        self._move(Opcode.READ, Opcode.READV, _HARDLINK if linked else 0, tag, fd, buffers, offset)

    def write(self, tag: int, fd: int, buffers: Sequence[memoryview], offset: int, *, linked: bool = False) -> None:
        """Places a write of `buffers`, one after the other. `linked`: as for `read`."""
        self._move(Opcode.WRITE, Opcode.WRITEV, _HARDLINK if linked else 0, tag, fd, buffers, offset)

    def sync(self, tag: int, fd: int) -> None:
        """Places an fdatasync: of the writes that were reaped before."""
        self._place(tag, None, Opcode.FSYNC, 0, fd, 0, 0, 0, _FSYNC_DATASYNC)

    def _move(
        self, single: Opcode, several: Opcode, flags: int, tag: int, fd: int, buffers: Sequence[memoryview], offset: int
    ) -> None:
        if len(buffers) == 1:
            pin = ctypes.c_char.from_buffer(buffers[0])
            self._place(tag, pin, single, flags, fd, offset, ctypes.addressof(pin), len(buffers[0]), 0)
            return
        pins = [ctypes.c_char.from_buffer(buffer) for buffer in buffers]
        table = _Raw(_IOVEC.size * len(buffers))
        for i, (pin, buffer) in enumerate(zip(pins, buffers, strict=True)):
            _IOVEC.pack_into(table.bytes, i * _IOVEC.size, ctypes.addressof(pin), len(buffer))
        self._place(tag, (pins, table), several, flags, fd, offset, table.address, len(buffers), 0)

    def _place(
        self, tag: int, pinned: object, opcode: Opcode, flags: int, fd: int, offset: int, place: int, length: int, own_flags: int
    ) -> None:
        """The operation's fields; `own_flags` are of its kind."""
        assert tag not in self._pinned and len(self._pinned) < self.entries
        tail = self._words[self._sq_tail]
        _SQE.pack_into(
            self._sqes, _SQE.size * (tail & self._sq_mask), opcode, flags, 0, fd, offset, place, length, own_flags, tag
        )
        self._words[self._sq_tail] = (tail + 1) & _WORD
        self._pinned[tag] = pinned
        self._placed += 1

    def submit(self, *, wait: bool = False) -> None:
        """Hands over what was placed; `wait`: returns when something has completed. Raises `OSError`."""
        while self._placed or wait:
            self._placed -= _call(_ENTER, self._ring_fd, self._placed, int(wait), _ENTER_GETEVENTS if wait else 0)
            wait = False

    @property
    def completed(self) -> bool:
        """Whether there is something to reap: a look at memory, no system call."""
        return self._words[self._cq_head] != self._words[self._cq_tail]

    def reap(self) -> list[tuple[int, int]]:
        """What has completed since: tags, and results as of the system calls, errors as negative numbers."""
        with_events = []
        words = self._words
        head, tail = words[self._cq_head], words[self._cq_tail]
        while head != tail:
            tag, result, _ = _CQE.unpack_from(self._rings, self._cqes + _CQE.size * (head & self._cq_mask))
            del self._pinned[tag]
            with_events.append((tag, result))
            head = (head + 1) & _WORD
        words[self._cq_head] = head
        return with_events

    def close(self) -> None:
        """Idempotent."""
        for fd in (self._ring_fd, self.fd):
            if fd >= 0:
                os.close(fd)
        self._ring_fd = self.fd = -1


def open_ring(entries: int) -> Ring:
    """A ring that has proved itself on a file in memory. Raises `RingUnavailable`."""
    machine = platform.machine()
    if machine != "x86_64":
        raise RingUnavailable(f"processor {machine}: io_uring from Python needs the memory order of x86_64")
    try:
        ring = Ring(entries)
    except OSError as error:
        raise RingUnavailable(f"io_uring_setup: {error.strerror}{_HINTS.get(error.errno or 0, '')}") from error
    try:
        _prove(ring)
    except OSError as error:
        ring.close()
        raise RingUnavailable(f"io_uring moves no bytes: {error.strerror}") from error
    return ring


_HINTS = {
    errno.EPERM: " (forbidden by the container's seccomp profile, or sysctl kernel.io_uring_disabled)",
    errno.ENOSYS: " (a kernel before 5.6, or a sandbox)",
}


def _prove(ring: Ring) -> None:
    written, back = aligned(2 * PAGE_BYTES), aligned(2 * PAGE_BYTES)
    written[:] = os.urandom(len(written))
    halves = [back[PAGE_BYTES:], back[:PAGE_BYTES]]
    fd = os.memfd_create("penstock-probe", os.MFD_CLOEXEC)
    try:
        for place, expected in (
            (lambda: ring.write(1, fd, [written], 0), len(written)),
            (lambda: ring.sync(2, fd), 0),
            (lambda: ring.read(3, fd, halves, 0), len(back)),
        ):
            place()
            ring.submit(wait=True)
            ((_, result),) = ring.reap()
            if result != expected:
                raise OSError(-result if result < 0 else errno.EIO, os.strerror(-result) if result < 0 else "short transfer")
        if bytes(halves[0]) + bytes(halves[1]) != bytes(written) or not os.eventfd_read(ring.fd):
            raise OSError(errno.EIO, "what was read is not what was written")
    finally:
        os.close(fd)


class _Raw:
    """Memory with an address, alive as long as this object."""

    def __init__(self, size: int) -> None:
        self.bytes = bytearray(size)
        self._export = (ctypes.c_char * size).from_buffer(self.bytes)
        self.address = ctypes.addressof(self._export)


def _call(number: int, *arguments: int) -> int:
    """A system call of at most six arguments. Raises `OSError`."""
    padded = (*arguments, *(0,) * (6 - len(arguments)))
    result: int = _syscall(number, *padded)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long] * 7
