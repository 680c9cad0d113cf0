"""One segment file: fixed-size slots, read and written by whole pages.

1. `create` writes a complete file under a temporary name and renames it: a segment either exists
   with all its bytes allocated, or doesn't.
2. `open_segment` takes one that exists; what can't be written is served read-only.
3. Slots are read, written and synced by an I/O engine: `payload_read`, `slots_write` and `sync_transfer` say how.
4. `read_header`, `read_own`, `erase`, `sync` block, for the scan and for repairs.

Blocking calls raise `OSError`. With direct I/O every transfer is of aligned whole pages.
"""

import asyncio
import errno
import math
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from common.disk.pages import HUGE_BYTES, address, aligned, huge
from common.disk.transfer import Op, Transfer
from common.transport.memory import crc32c
from services.kvstore.chunks import Chunks
from services.kvstore.files import Files
from services.kvstore.record import (
    PAGE_BYTES,
    Geometry,
    SegmentHeader,
    Unreadable,
    decode_segment,
    encode_segment,
)

SUFFIX = ".seg"
TEMPORARY_SUFFIX = ".tmp"
_scratch = threading.local()


class CorruptPayload(Exception):
    """The bytes on disk are not the ones that were written."""


def file_name(number: int) -> str:
    return f"{number:08d}{SUFFIX}"


class Segment:
    """An open segment file. `disk` is the position of its directory among the store's."""

    def __init__(
        self, files: Files, path: Path, fd: int, header: SegmentHeader, *, direct: bool, writable: bool, disk: int = 0
    ) -> None:
        self.path = path
        self.disk = disk
        self.namespace = header.namespace
        self.number = header.segment
        self.geometry: Geometry = header.geometry
        self.writable = writable
        self._files = files
        self._fd = fd
        self._reading_fd = -1
        self.direct = direct
        self.written_s = -math.inf  # when a write to it began last, by the monotonic clock
        self.changing = asyncio.Lock()  # held while its checkpoint is written or removed, or the file is
        self.checkpointed = False  # a checkpoint lies beside the file: nothing may be written until it is discarded

    def __repr__(self) -> str:
        return f"Segment({self.path.name}, {'rw' if self.writable else 'ro'}, {'direct' if self.direct else 'buffered'})"

    def read_header(self, slot: int, page: memoryview) -> None:
        """Fills `page` (aligned) with the slot's header page."""
        self._read([page], self.geometry.slot_offset(slot))

    def read_slots(self, slots: range, into: memoryview) -> None:
        """Fills `into` (aligned) with the whole of consecutive slots."""
        self._read([into], self.geometry.slot_offset(slots.start))

    def read_own(self, slot: int, checksum: int) -> memoryview:
        """The verified payload in this thread's scratch buffer, valid until its next call. Raises `CorruptPayload`."""
        own = scratch(self.geometry.padded_bytes)
        self._read([own], self.payload_offset(slot))
        payload = own[: self.geometry.payload_bytes]
        if crc32c(payload) != checksum:
            raise self.corrupt(slot)
        return payload

    def payload_offset(self, slot: int) -> int:
        """Where the payload starts in the file."""
        return self.geometry.slot_offset(slot) + PAGE_BYTES

    def takes(self, into: memoryview) -> bool:
        """Whether a payload can be read straight into this memory."""
        return not self.direct or address(into) % PAGE_BYTES == 0

    def payload_read(self, slot: int, into: memoryview, checksum: int) -> Transfer:
        """Fills `into`, which this `takes`, of payload length or padded length, with the verified payload; results in its checksum."""
        whole = len(into) // PAGE_BYTES * PAGE_BYTES
        tail = aligned(PAGE_BYTES) if self.direct and whole < len(into) else None
        length = self.geometry.payload_bytes

        def check() -> int:
            if tail is not None:
                into[whole:] = tail[: len(into) - whole]
            if crc32c(into[:length]) != checksum:
                raise self.corrupt(slot)
            return checksum

        buffers = [into] if tail is None else [into[:whole], tail] if whole else [tail]
        return Transfer(Op.READ, self._fd, buffers, self.payload_offset(slot), check, self.disk)

    def reading_fd(self) -> int:
        """A descriptor of the file that can't be written through, for readers in other processes. Raises `OSError`."""
        if self._reading_fd < 0:
            self._reading_fd = self._files.open(self.path, os.O_RDONLY | (os.O_DIRECT if self.direct else 0))
        return self._reading_fd

    def header_read(self, slot: int, page: memoryview, check: Callable[[], int]) -> Transfer:
        """Fills `page` (aligned) with the slot page."""
        return Transfer(Op.READ, self._fd, [page], self.geometry.slot_offset(slot), check, self.disk)

    def chunks_read(self, slot: int, into: memoryview, start: int, chunks: Chunks) -> Transfer:
        """Fills `into` (aligned, whole pages) with verified chunks, from byte `start` of the payload."""

        def check() -> int:
            if not chunks.match(start, into[: self.geometry.payload_bytes - start]):
                raise self.corrupt(slot)
            return len(into)

        return Transfer(Op.READ, self._fd, [into], self.payload_offset(slot) + start, check, self.disk)

    def slots_write(self, slot: int, images: Sequence[memoryview]) -> Transfer:
        """Writes `slot` and those that follow, header page and padded payload each: aligned buffers of `slot_bytes`."""
        assert sum(map(len, images)) == len(images) * self.geometry.slot_bytes
        assert slot + len(images) <= self.geometry.slots_per_segment
        assert not self.checkpointed, f"{self.path} is written to under its checkpoint"
        return Transfer(Op.WRITE, self._fd, images, self.geometry.slot_offset(slot), device=self.disk)

    def sync_transfer(self) -> Transfer:
        """Makes durable what was written before."""
        return Transfer(Op.SYNC, self._fd, device=self.disk)

    def corrupt(self, slot: int) -> CorruptPayload:
        return CorruptPayload(f"slot {slot} of {self.path}")

    def erase(self, slot: int) -> None:
        """Makes the slot empty, so that no scan finds a block in it. Durable after `sync`."""
        page = scratch(PAGE_BYTES)
        page[:] = bytes(PAGE_BYTES)
        self._write(page, self.geometry.slot_offset(slot))

    def sync(self) -> None:
        self._files.sync(self._fd)

    def remove(self) -> None:
        """Deletes the file and closes it; durable when this returns. Its checkpoint must be gone."""
        assert not self.checkpointed
        self._files.remove(self.path)
        self._files.sync_folder(self.path.parent)
        self.close()

    def close(self) -> None:
        for fd in (self._fd, self._reading_fd):
            if fd >= 0:
                self._files.close(fd)
        self._fd = self._reading_fd = -1

    def _read(self, buffers: list[memoryview], offset: int) -> None:
        wanted = sum(len(buffer) for buffer in buffers)
        got = self._files.read(self._fd, buffers, offset)
        if got != wanted:
            raise OSError(errno.EIO, f"short read of {got} of {wanted} bytes at {offset}", str(self.path))

    def _write(self, buffer: memoryview, offset: int) -> None:
        assert not self.checkpointed, f"{self.path} is written to under its checkpoint"
        done = 0
        while done < len(buffer):
            wrote = self._files.write(self._fd, buffer[done:], offset + done)
            if wrote <= 0 or (wrote % PAGE_BYTES and done + wrote < len(buffer)):
                raise OSError(
                    errno.EIO, f"short write of {wrote} of {len(buffer) - done} bytes at {offset + done}", str(self.path)
                )
            done += wrote


def create(files: Files, folder: Path, header: SegmentHeader, *, direct: bool, disk: int = 0) -> Segment:
    """A new segment file, allocated and durable. On failure nothing is left of it."""
    path = folder / file_name(header.segment)
    temporary = path.with_suffix(TEMPORARY_SUFFIX)
    fd = files.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if direct else 0))
    try:
        files.allocate(fd, header.geometry.segment_bytes)
        page = aligned(PAGE_BYTES)
        page[:] = encode_segment(header)
        if files.write(fd, page, 0) != PAGE_BYTES:
            raise OSError(errno.ENOSPC, "short write of the segment header", str(temporary))
        files.sync(fd)
        files.rename(temporary, path)
        files.sync_folder(folder)
    except BaseException:
        files.close(fd)
        for leftover in (temporary, path):
            if leftover.exists():
                files.remove(leftover)
        raise
    return Segment(files, path, fd, header, direct=direct, writable=True, disk=disk)


def open_segment(files: Files, path: Path, *, direct: bool, disk: int = 0) -> Segment | Unreadable:
    """The segment in a file that exists, or why it is none. Raises `OSError` when it can't be read.

    A file that is shorter than its header says is allocated again; where that fails, and where the
    file can't be opened for writing, it is served read-only.
    """
    extra = os.O_DIRECT if direct else 0
    writable = True
    try:
        fd = files.open(path, os.O_RDWR | extra)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        fd = files.open(path, os.O_RDONLY | extra)
        writable = False
    try:
        page = aligned(PAGE_BYTES)
        if files.read(fd, [page], 0) != PAGE_BYTES:
            files.close(fd)
            return Unreadable.DAMAGED
        header = decode_segment(page)
        if isinstance(header, Unreadable):
            files.close(fd)
            return header
        if writable and files.size(fd) < header.geometry.segment_bytes:
            writable = _restored(files, fd, header)
    except BaseException:
        files.close(fd)
        raise
    return Segment(files, path, fd, header, direct=direct, writable=writable, disk=disk)


def _restored(files: Files, fd: int, header: SegmentHeader) -> bool:
    try:
        files.allocate(fd, header.geometry.segment_bytes)
        files.sync(fd)
    except OSError:
        return False
    return True


def scratch(length: int) -> memoryview:
    """`length` bytes (whole pages) of aligned memory, on huge pages if long, that belongs to the calling thread."""
    held: memoryview | None = getattr(_scratch, "held", None)
    if held is None or len(held) < length:
        held = _scratch.held = huge(length) if length >= HUGE_BYTES else aligned(length)
    return held[:length]
