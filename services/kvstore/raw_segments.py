"""Segment files read while no process has them: under a shared lock, past the page cache, never written."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.disk.pages import aligned
from common.errors import SettingsError, Unavailable
from services.kvstore.disk import NAMESPACES_FOLDER
from services.kvstore.files import LOCK_NAME, Files
from services.kvstore.record import PAGE_BYTES, Geometry, SegmentHeader, Unreadable, decode_segment

READ_BYTES = 4 << 20  # small slots are read so many bytes at once


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a process from taking the directory. Raises `SettingsError`, and `Unavailable` when one has it."""
    if not (folder / NAMESPACES_FOLDER).is_dir():
        raise SettingsError(f"{folder} is no store: expected a data folder of a kvstore, with {NAMESPACES_FOLDER}/ in it")
    try:
        fd = os.open(folder / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield  # copied from somewhere: no process can have it
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(fd, 64, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise Unavailable(
            f"{folder} is in use by process {owner}: stop it first, or ask it (penstock store stat, scrub)"
        ) from error
    try:
        yield
    finally:
        os.close(fd)


def open_raw(files: Files, path: Path) -> tuple[int, SegmentHeader] | str:
    """A segment for reading past the page cache where that works, or why it is none."""
    try:
        try:
            fd = files.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            fd = files.open(path, os.O_RDONLY)
    except OSError as error:
        return str(error)
    page = aligned(PAGE_BYTES)
    try:
        header = decode_segment(page) if files.read(fd, [page], 0) == PAGE_BYTES else Unreadable.DAMAGED
    except OSError as error:
        header = Unreadable.DAMAGED
        files.close(fd)
        return str(error)
    wrong = ""
    if isinstance(header, Unreadable):
        wrong = f"segment page is {header.name.lower()}"
    elif header.namespace.hex() != path.parent.name or f"{header.segment:08d}" != path.stem:
        wrong = f"segment page is foreign: segment {header.segment} of {header.namespace.hex()}"
    if wrong or isinstance(header, Unreadable):
        files.close(fd)
        return wrong
    return fd, header


def raw_slots(files: Files, fd: int, geometry: Geometry, *, payloads: bool) -> Iterator[tuple[int, memoryview | OSError]]:
    """Every slot, or (without payloads) its header page, valid until the next one; or why it can't be read."""
    length = geometry.slot_bytes if payloads else PAGE_BYTES
    at_once = max(1, READ_BYTES // geometry.slot_bytes) if payloads else 1
    buffer = aligned(at_once * length)
    for first in range(0, geometry.slots_per_segment, at_once):
        count = min(at_once, geometry.slots_per_segment - first)
        together = read_raw(files, fd, buffer[: count * length], geometry.slot_offset(first))
        for i in range(count):
            piece = buffer[i * length : (i + 1) * length]
            if isinstance(together, OSError) and count > 1:
                alone = read_raw(files, fd, piece, geometry.slot_offset(first + i))
                yield first + i, alone if isinstance(alone, OSError) else piece
            else:
                yield first + i, together if isinstance(together, OSError) else piece


def read_raw(files: Files, fd: int, into: memoryview, offset: int) -> int | OSError:
    """All of `into`, or why not."""
    try:
        got = files.read(fd, [into], offset)
    except OSError as error:
        return error
    return got if got == len(into) else OSError(f"short read of {got} of {len(into)} bytes at {offset}")


class Pace:
    """Sleeps so that reads stay under a bandwidth."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at_s = time.monotonic()

    def read(self, length: int) -> None:
        if self._bytes_per_s:
            self._free_at_s = max(self._free_at_s, time.monotonic()) + length / self._bytes_per_s
            time.sleep(max(0.0, self._free_at_s - time.monotonic()))
