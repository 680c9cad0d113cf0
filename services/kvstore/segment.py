"""One segment file: fixed-size slots, read and written by whole pages.

1. `create` writes a complete file under a temporary name and renames it: a segment either exists
   with all its bytes allocated, or doesn't.
2. `open_segment` takes one that exists; what can't be written is served read-only.
3. Slots are read, written, erased; `sync` makes what was written durable.

All calls block and raise `OSError`; they run in an `IoPool`. With direct I/O every transfer is of
aligned whole pages; what the caller's memory can't take that way goes through a scratch buffer of
the thread.
"""

import errno
import os
import threading
from pathlib import Path

from common.transport.memory import crc32c
from services.kvstore.buffers import address, aligned, copy
from services.kvstore.files import Files
from services.kvstore.record import (
    PAGE_BYTES,
    Geometry,
    SegmentHeader,
    Unreadable,
    decode_segment,
    encode_segment,
    pages,
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
        self._direct = direct

    def __repr__(self) -> str:
        return f"Segment({self.path.name}, {'rw' if self.writable else 'ro'}, {'direct' if self._direct else 'buffered'})"

    def read_header(self, slot: int, page: memoryview) -> None:
        """Fills `page` (aligned) with the slot's header page."""
        self._read([page], self.geometry.slot_offset(slot))

    def read_payload(self, slot: int, into: memoryview) -> None:
        """Fills `into`, of payload length or padded length, from the slot."""
        offset = self.geometry.slot_offset(slot) + PAGE_BYTES
        if not self._direct:
            self._read([into], offset)
            return
        if address(into) % PAGE_BYTES:
            bounce = scratch(pages(len(into)))
            self._read([bounce], offset)
            copy(into, bounce[: len(into)])
            return
        whole = len(into) // PAGE_BYTES * PAGE_BYTES
        buffers = [into[:whole]] if whole else []
        tail = scratch(PAGE_BYTES) if whole < len(into) else None
        self._read([*buffers, tail] if tail is not None else buffers, offset)
        if tail is not None:
            into[whole:] = tail[: len(into) - whole]

    def read_verified(self, slot: int, into: memoryview, checksum: int) -> None:
        """`read_payload`, then the checksum. Raises `CorruptPayload`.

        `into` may be a peer's memory, which the peer may scribble over meanwhile: a mismatch is
        settled on a second read into memory of our own, so that no peer can condemn a good block.
        """
        length = self.geometry.payload_bytes
        self.read_payload(slot, into)
        if crc32c(into[:length]) == checksum:
            return
        own = self.read_own(slot, checksum)
        copy(into[:length], own)

    def read_own(self, slot: int, checksum: int) -> memoryview:
        """The verified payload in this thread's scratch buffer, valid until its next call."""
        own = scratch(self.geometry.padded_bytes)
        self.read_payload(slot, own)
        payload = own[: self.geometry.payload_bytes]
        if crc32c(payload) != checksum:
            raise CorruptPayload(f"slot {slot} of {self.path}")
        return payload

    def write_slot(self, slot: int, image: memoryview) -> None:
        """Writes header page and padded payload: an aligned buffer of `slot_bytes`."""
        assert len(image) == self.geometry.slot_bytes
        self._write(image, self.geometry.slot_offset(slot))

    def erase(self, slot: int) -> None:
        """Makes the slot empty, so that no scan finds a block in it. Durable after `sync`."""
        page = scratch(PAGE_BYTES)
        page[:] = bytes(PAGE_BYTES)
        self._write(page, self.geometry.slot_offset(slot))

    def sync(self) -> None:
        self._files.sync(self._fd)

    def remove(self) -> None:
        """Deletes the file and closes it; durable when this returns."""
        self._files.remove(self.path)
        self._files.sync_folder(self.path.parent)
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            self._files.close(self._fd)
            self._fd = -1

    def _read(self, buffers: list[memoryview], offset: int) -> None:
        wanted = sum(len(buffer) for buffer in buffers)
        got = self._files.read(self._fd, buffers, offset)
        if got != wanted:
            raise OSError(errno.EIO, f"short read of {got} of {wanted} bytes at {offset}", str(self.path))

    def _write(self, buffer: memoryview, offset: int) -> None:
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
    """`length` bytes (whole pages) of aligned memory that belongs to the calling thread."""
    held: memoryview | None = getattr(_scratch, "held", None)
    if held is None or len(held) < length:
        held = _scratch.held = aligned(length)
    return held[:length]
