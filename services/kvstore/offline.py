"""A store's directories, looked at from outside while no process has them: nothing is ever written.

`survey` walks every segment and says what a start would find: with `payloads` it reads whole slots and
verifies them (`penstock store check`), without it only header pages (`penstock store stat`). `find_block`
looks for one block. A directory that a process has is refused (`Unavailable`); a shared lock keeps one
from starting meanwhile.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from common.disk.pages import aligned
from common.transport.memory import crc32c
from services.kvstore.checkpoint import SUFFIX as CHECKPOINT_SUFFIX
from services.kvstore.disk import NAMESPACES_FOLDER, STORE_NAME, read_identity
from services.kvstore.files import Files
from services.kvstore.raw_segments import Pace, locked, open_raw, raw_slots, read_raw
from services.kvstore.record import (
    PAGE_BYTES,
    Geometry,
    SegmentHeader,
    SlotHeader,
    StoreIdentity,
    Unreadable,
    decode_slot,
)
from services.kvstore.segment import SUFFIX

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
            stack.enter_context(locked(folder))
        segments = [path for folder in folders for path in _segments(files, folder, found)]
        found.file_bytes = sum(path.stat().st_size for path in segments)
        pace = Pace(bytes_per_s)
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
            stack.enter_context(locked(folder))
        for path in [path for folder in folders for path in _segments(files, folder, Survey())]:
            opened = open_raw(files, path)
            if not isinstance(opened, tuple):
                continue
            fd, segment = opened
            try:
                for slot, data in raw_slots(files, fd, segment.geometry, payloads=False):
                    header = decode_slot(data) if not isinstance(data, OSError) else None
                    newer = isinstance(header, SlotHeader) and (best is None or header.sequence > best.header.sequence)
                    if isinstance(header, SlotHeader) and header.key == key and newer:
                        best = _block(files, fd, path, segment.geometry, slot, header)
            finally:
                files.close(fd)
    return best


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


def _survey_segment(files: Files, path: Path, found: Survey, payloads: bool, pace: Pace) -> Iterator[SlotHeader]:
    """The headers of a segment's good slots; what is wrong goes to `found`."""
    opened = open_raw(files, path)
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
        for slot, data in raw_slots(files, fd, geometry, payloads=payloads):
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


def _block(files: Files, fd: int, path: Path, geometry: Geometry, slot: int, header: SlotHeader) -> BlockOnDisk:
    offset = geometry.slot_offset(slot)
    image = aligned(geometry.slot_bytes)
    payload: bytes | None = None
    if not isinstance(read_raw(files, fd, image, offset), OSError):
        held = bytes(image[PAGE_BYTES : PAGE_BYTES + header.payload_bytes])
        payload = held if crc32c(held) == header.payload_crc32c else None
    return BlockOnDisk(header, path, offset, payload)
