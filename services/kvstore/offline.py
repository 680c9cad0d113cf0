"""A store's directories, looked at from outside while no process has them: nothing is ever written.

`survey` walks every segment and says what a start would find: with `payloads` it reads whole slots and
verifies them (`penstock store check`), without it only header pages (`penstock store stat`). `find_block`
looks for one block. A directory that a process has is refused (`Unavailable`); a shared lock keeps one
from starting meanwhile.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from common.disk.pages import aligned
from common.errors import SettingsError, Unavailable
from common.transport.memory import crc32c
from services.kvstore.checkpoint import SUFFIX as CHECKPOINT_SUFFIX
from services.kvstore.disk import NAMESPACES_FOLDER, STORE_NAME, read_identity
from services.kvstore.files import LOCK_NAME, Files
from services.kvstore.record import (
    PAGE_BYTES,
    Geometry,
    SegmentHeader,
    SlotHeader,
    StoreIdentity,
    Unreadable,
    decode_segment,
    decode_slot,
)
from services.kvstore.segment import SUFFIX

READ_BYTES = 4 << 20  # small slots are read so many bytes at once
PROBLEMS_MAX = 1000  # kept in words; all are counted
Progress = Callable[[int, int], None]  # bytes read, bytes to read


class NamespaceSurvey(msgspec.Struct):
    """What is on disk of one namespace."""

    payload_bytes: int
    slot_bytes: int
    slots_per_segment: int
    segments: int = 0
    blocks: int = 0
    superseded: int = 0  # older copies of blocks that are there again


class Survey(msgspec.Struct):
    """What was found. `problems` cost misses; `notes` nothing."""

    folders: dict[str, str] = {}  # what each directory's STORE file says
    namespaces: dict[str, NamespaceSurvey] = {}
    blocks: int = 0
    file_bytes: int = 0
    read_bytes: int = 0
    problem_count: int = 0
    problems: list[str] = []
    notes: list[str] = []

    def problem(self, text: str) -> None:
        self.problem_count += 1
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(text)


class BlockOnDisk(msgspec.Struct, frozen=True):
    """One block as it lies on disk; `payload` is None when its checksum doesn't match."""

    header: SlotHeader
    path: Path
    offset: int  # of its slot page
    payload: bytes | None


def survey(
    folders: Sequence[Path],
    *,
    payloads: bool,
    bytes_per_s: float = 0.0,
    progress: Progress = lambda done, total: None,
    files: Files | None = None,
) -> Survey:
    """Looks at every slot of every directory. Raises `Unavailable`, `SettingsError`."""
    files = files or Files()
    found = Survey()
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(_locked(folder))
        segments = [path for folder in folders for path in _segments(files, folder, found)]
        found.file_bytes = sum(path.stat().st_size for path in segments)
        pace = _Pace(bytes_per_s)
        keys: dict[str, set[bytes]] = {}
        for path in segments:
            for header in _survey_segment(files, path, found, payloads, pace):
                known = keys.setdefault(header.namespace.hex(), set())
                found.namespaces[header.namespace.hex()].superseded += header.key in known
                known.add(header.key)
            progress(min(found.read_bytes, found.file_bytes), found.file_bytes)
        for namespace, known in keys.items():
            found.namespaces[namespace].blocks = len(known)
        found.blocks = sum(one.blocks for one in found.namespaces.values())
    return found


def find_block(folders: Sequence[Path], key: bytes, *, files: Files | None = None) -> BlockOnDisk | None:
    """The newest slot that says it holds the block."""
    files = files or Files()
    best: BlockOnDisk | None = None
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(_locked(folder))
        for path in [path for folder in folders for path in _segments(files, folder, Survey())]:
            opened = _open(files, path)
            if not isinstance(opened, tuple):
                continue
            fd, segment = opened
            try:
                for slot, data in _slots(files, fd, segment.geometry, payloads=False):
                    header = decode_slot(data) if not isinstance(data, OSError) else None
                    newer = isinstance(header, SlotHeader) and (best is None or header.sequence > best.header.sequence)
                    if isinstance(header, SlotHeader) and header.key == key and newer:
                        best = _block(files, fd, path, segment.geometry, slot, header)
            finally:
                files.close(fd)
    return best


class _Pace:
    """Sleeps so that reads stay under a bandwidth."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at_s = time.monotonic()

    def read(self, length: int) -> None:
        if self._bytes_per_s:
            self._free_at_s = max(self._free_at_s, time.monotonic()) + length / self._bytes_per_s
            time.sleep(max(0.0, self._free_at_s - time.monotonic()))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
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


def _segments(files: Files, folder: Path, found: Survey) -> list[Path]:
    """Segment files of a directory; everything else there is noted."""
    try:
        identity = read_identity(files, folder)
    except OSError as error:
        identity = None
        found.problem(f"{folder / STORE_NAME}: {error}")
    if isinstance(identity, StoreIdentity):
        found.folders[str(folder)] = f"disk {identity.disk} of [0, {identity.disks}) of store {identity.store.hex()}"
    else:
        found.folders[str(folder)] = "no STORE file" if identity is None else f"STORE file is {identity.name.lower()}"
        if identity is not None:
            found.problem(f"{folder / STORE_NAME} is {identity.name.lower()}")
    segments: list[Path] = []
    for namespace in sorted((folder / NAMESPACES_FOLDER).iterdir()):
        if not namespace.is_dir():
            found.notes.append(f"{namespace}: not a namespace's folder")
            continue
        for path in sorted(namespace.iterdir()):
            if path.suffix == SUFFIX:
                segments.append(path)
            elif path.suffix != CHECKPOINT_SUFFIX:
                found.notes.append(f"{path}: not a segment")
    return segments


def _survey_segment(files: Files, path: Path, found: Survey, payloads: bool, pace: _Pace) -> Iterator[SlotHeader]:
    """The headers of a segment's good slots; what is wrong goes to `found`."""
    opened = _open(files, path)
    if isinstance(opened, str):
        found.problem(f"{path}: {opened}")
        return
    fd, segment = opened
    geometry = segment.geometry
    try:
        known = found.namespaces.setdefault(
            segment.namespace.hex(), NamespaceSurvey(geometry.payload_bytes, geometry.slot_bytes, geometry.slots_per_segment)
        )
        known.segments += 1
        if files.size(fd) < geometry.segment_bytes:
            found.problem(f"{path}: {files.size(fd)} bytes, its header says {geometry.segment_bytes}")
        for slot, data in _slots(files, fd, geometry, payloads=payloads):
            length = geometry.slot_bytes if payloads else PAGE_BYTES
            found.read_bytes += length
            pace.read(length)
            header = _judged(data, segment, slot, payloads)
            if isinstance(header, str):
                found.problem(f"{path}, slot {slot}: {header}")
            elif header is not None:
                yield header
    finally:
        files.close(fd)


def _judged(data: memoryview | OSError, segment: SegmentHeader, slot: int, payloads: bool) -> SlotHeader | str | None:
    """The header of a good slot, None for an empty one, or what is wrong."""
    if isinstance(data, OSError):
        return str(data)
    header = decode_slot(data[:PAGE_BYTES])
    if header is Unreadable.EMPTY:
        return None
    if isinstance(header, Unreadable):
        return f"header is {header.name.lower()}"
    place = (header.namespace, header.segment, header.slot, header.payload_bytes)
    if place != (segment.namespace, segment.segment, slot, segment.geometry.payload_bytes):
        return f"header is foreign: it says slot {header.slot} of segment {header.segment} of {header.namespace.hex()}"
    if payloads and crc32c(data[PAGE_BYTES : PAGE_BYTES + header.payload_bytes]) != header.payload_crc32c:
        return f"payload of block {header.key.hex()} doesn't match its checksum"
    return header


def _open(files: Files, path: Path) -> tuple[int, SegmentHeader] | str:
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


def _slots(files: Files, fd: int, geometry: Geometry, *, payloads: bool) -> Iterator[tuple[int, memoryview | OSError]]:
    """Every slot, or (without payloads) its header page, valid until the next one; or why it can't be read."""
    length = geometry.slot_bytes if payloads else PAGE_BYTES
    at_once = max(1, READ_BYTES // geometry.slot_bytes) if payloads else 1
    buffer = aligned(at_once * length)
    for first in range(0, geometry.slots_per_segment, at_once):
        count = min(at_once, geometry.slots_per_segment - first)
        together = _read(files, fd, buffer[: count * length], geometry.slot_offset(first))
        for i in range(count):
            piece = buffer[i * length : (i + 1) * length]
            if isinstance(together, OSError) and count > 1:
                alone = _read(files, fd, piece, geometry.slot_offset(first + i))
                yield first + i, alone if isinstance(alone, OSError) else piece
            else:
                yield first + i, together if isinstance(together, OSError) else piece


def _read(files: Files, fd: int, into: memoryview, offset: int) -> int | OSError:
    try:
        got = files.read(fd, [into], offset)
    except OSError as error:
        return error
    return got if got == len(into) else OSError(f"short read of {got} of {len(into)} bytes at {offset}")


def _block(files: Files, fd: int, path: Path, geometry: Geometry, slot: int, header: SlotHeader) -> BlockOnDisk:
    offset = geometry.slot_offset(slot)
    image = aligned(geometry.slot_bytes)
    payload: bytes | None = None
    if not isinstance(_read(files, fd, image, offset), OSError):
        held = bytes(image[PAGE_BYTES : PAGE_BYTES + header.payload_bytes])
        payload = held if crc32c(held) == header.payload_crc32c else None
    return BlockOnDisk(header, path, offset, payload)
