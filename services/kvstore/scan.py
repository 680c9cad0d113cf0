"""What is on disk when the store starts: segments, and the blocks whose headers can be believed.

1. Every namespace folder's segment files are opened; leftovers of an unfinished creation go.
2. Header pages are read by several threads. Damaged, foreign, misplaced and unknown ones are counted.
3. A crash can leave a header whose payload never arrived. Writes are numbered, and at most
   `WINDOW` numbers are open at once, so only blocks among the last `WINDOW` numbers can be torn:
   their payloads are read and checked, and the bad ones erased. The last number is taken for each disk
   by itself, so that this also holds for one that was away while the others went on.
4. Of two slots with one key the later one counts.

Nothing here is fatal. Blocking; runs before the service serves.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from common.blocks import Namespace
from common.logs import Log
from services.kvstore.disk import Disk, DiskState
from services.kvstore.files import Files
from services.kvstore.record import PAGE_BYTES, Geometry, SlotHeader, Unreadable, decode_slot
from services.kvstore.segment import SUFFIX, TEMPORARY_SUFFIX, CorruptPayload, Segment, open_segment, scratch

log = Log("scan")
WINDOW = 1024  # part of the format: a writer never has more sequence numbers open
_PROGRESS_S = 1.0
_RUN_SLOTS = 512  # one thread's job: enough jobs for all threads, few enough to be cheap


class Counts(msgspec.Struct):
    """What the scan saw, for the log and the metrics."""

    segments: int = 0
    segments_read_only: int = 0
    segments_unusable: int = 0
    unusable_bytes: int = 0
    blocks: int = 0
    empty: int = 0
    damaged: int = 0  # header pages that match no checksum
    foreign: int = 0  # headers of another namespace, place or size
    newer: int = 0  # headers of a later format, left alone
    unreadable: int = 0  # I/O errors and slots behind the end of a file
    torn: int = 0  # header fine, payload not
    duplicates: int = 0
    extra_files: int = 0


class FoundBlock(msgspec.Struct, frozen=True):
    """A block by its header; `slot` is numbered within the segment."""

    segment: Segment
    slot: int
    key: bytes
    parent: bytes
    checksum: int
    sequence: int


class FoundNamespace(msgspec.Struct):
    """One namespace's segments and blocks, blocks in the order they were written."""

    namespace: Namespace
    geometry: Geometry | None  # None: no segment of it can be used
    segments: list[Segment]
    blocks: list[FoundBlock]
    free: list[tuple[Segment, int]]  # (segment, slot) with nothing in it that is wanted
    unusable_numbers: dict[int, set[int]]  # by disk: files that must be left alone


class _RunScan(msgspec.Struct):
    """Some slots of one segment."""

    segment: Segment
    slots: range
    blocks: list[FoundBlock]
    free: list[int]
    seen: Counts


def scan(files: Files, disks: Sequence[Disk], *, threads: int) -> tuple[list[FoundNamespace], Counts, int]:
    """Namespaces found, counts, and the highest sequence number on disk (0 when there is none)."""
    counts = Counts()
    by_name: dict[Namespace, FoundNamespace] = {}
    for disk in disks:
        if disk.state is not DiskState.LOST:
            _open_disk(files, disk, by_name, counts)
    found = [one for _, one in sorted(by_name.items()) if one.segments or one.unusable_numbers]
    with ThreadPoolExecutor(threads, thread_name_prefix="scan") as pool:
        _read_headers(found, pool, counts)
        last = _last_sequences(found)
        for one in found:
            _drop_torn(one, last, pool, counts)
            _drop_duplicates(one, counts)
    counts.blocks = sum(len(one.blocks) for one in found)
    return found, counts, max(last.values(), default=0)


def _open_disk(files: Files, disk: Disk, by_name: dict[Namespace, FoundNamespace], counts: Counts) -> None:
    """Opens what lies on one disk; one that can't be listed is lost."""
    before = counts.unusable_bytes
    try:
        for path in sorted(disk.namespaces.iterdir()):
            if path.is_dir() and _is_namespace(path.name):
                name = Namespace(path.name)
                one = by_name.setdefault(name, FoundNamespace(name, None, [], [], [], {}))
                _open_namespace(files, disk, path, one, counts)
            else:
                counts.extra_files += 1
                log.warning("extra_file", path=str(path), expected="folders named by 64 hex digits")
    except OSError as error:
        disk.step("read_failed", str(error))
    disk.unusable_bytes += counts.unusable_bytes - before


def _open_namespace(files: Files, disk: Disk, folder: Path, one: FoundNamespace, counts: Counts) -> None:
    for path in sorted(folder.iterdir()):
        if path.suffix == TEMPORARY_SUFFIX and _number(path) is not None:
            _remove_leftover(files, disk, path, counts)
        elif path.suffix != SUFFIX or _number(path) is None:
            counts.extra_files += 1
            log.warning("extra_file", path=str(path), expected=f"files named 00000000{SUFFIX}")
        else:
            segment = _open_one(files, disk, path, one)
            if isinstance(segment, Segment):
                one.segments.append(segment)
                one.geometry = segment.geometry
                counts.segments += 1
                counts.segments_read_only += not segment.writable
            else:
                one.unusable_numbers.setdefault(disk.position, set()).add(int(path.stem))
                counts.segments_unusable += 1
                counts.unusable_bytes += path.stat().st_size
                log.warning("segment_unusable", path=str(path), reason=segment, effect="left alone; its blocks are misses")


def _remove_leftover(files: Files, disk: Disk, path: Path, counts: Counts) -> None:
    """A segment that was never finished goes; where nothing can be written it stays and counts."""
    try:
        files.remove(path)
    except OSError as error:
        counts.unusable_bytes += path.stat().st_size
        log.warning("leftover_not_removed", path=str(path), reason=str(error))


def _open_one(files: Files, disk: Disk, path: Path, one: FoundNamespace) -> Segment | str:
    """The segment in a file, or why it can't be used."""
    try:
        segment = open_segment(files, path, direct=disk.direct, disk=disk.position)
    except OSError as error:
        return f"can't be opened: {error}"
    if isinstance(segment, Unreadable):
        return f"header is {segment.name.lower()}"
    wrong = ""
    if segment.namespace.hex() != one.namespace:
        wrong = f"belongs to namespace {segment.namespace.hex()}"
    elif segment.number != int(path.stem):
        wrong = f"header says number {segment.number}"
    elif one.geometry is not None and one.geometry != segment.geometry:
        wrong = f"{segment.geometry} differs from {one.geometry} of {one.segments[0].path}"
    if wrong:
        segment.close()
        return wrong
    segment.writable = segment.writable and disk.state is DiskState.SERVING
    if not segment.writable:
        log.warning("segment_read_only", path=str(path), effect="its blocks are served, nothing is written there")
    return segment


def _read_headers(found: list[FoundNamespace], pool: ThreadPoolExecutor, counts: Counts) -> None:
    started_s = reported_s = time.monotonic()
    total = sum(segment.geometry.slots_per_segment for one in found for segment in one.segments)
    done = 0
    jobs = [
        (one, pool.submit(_scan_slots, segment, slots))
        for one in found
        for segment in one.segments
        for slots in _runs(segment.geometry.slots_per_segment)
    ]
    for one, job in jobs:
        result = job.result()
        one.blocks.extend(result.blocks)
        one.free.extend((result.segment, slot) for slot in result.free)
        for name in ("empty", "damaged", "foreign", "newer", "unreadable"):
            setattr(counts, name, getattr(counts, name) + getattr(result.seen, name))
        done += len(result.slots)
        now_s = time.monotonic()
        if now_s - reported_s >= _PROGRESS_S:
            reported_s = now_s
            log.event("scanning", slots=done, of=total, slots_per_s=round(done / (now_s - started_s)))
    for one in found:
        one.blocks.sort(key=lambda block: block.sequence)


def _runs(slots: int) -> list[range]:
    return [range(start, min(start + _RUN_SLOTS, slots)) for start in range(0, slots, _RUN_SLOTS)]


def _scan_slots(segment: Segment, slots: range) -> _RunScan:
    out = _RunScan(segment, slots, [], [], Counts())
    seen = out.seen
    page = scratch(PAGE_BYTES)
    for slot in slots:
        try:
            segment.read_header(slot, page)
        except OSError:
            seen.unreadable += 1
            continue
        header = decode_slot(page)
        if isinstance(header, SlotHeader) and _belongs(header, segment, slot):
            out.blocks.append(FoundBlock(segment, slot, header.key, header.parent, header.payload_crc32c, header.sequence))
        elif header is Unreadable.NEWER:
            seen.newer += 1
        else:
            kind = header.name.lower() if isinstance(header, Unreadable) else "foreign"
            setattr(seen, kind, getattr(seen, kind) + 1)
            out.free.append(slot)
    if seen.damaged or seen.foreign or seen.newer or seen.unreadable:
        seen_bad = {"damaged": seen.damaged, "foreign": seen.foreign, "newer": seen.newer, "unreadable": seen.unreadable}
        log.warning("slots_dropped", path=str(segment.path), slots=f"[{slots.start}, {slots.stop})", **seen_bad)
    return out


def _belongs(header: SlotHeader, segment: Segment, slot: int) -> bool:
    place = (header.namespace, header.segment, header.slot, header.payload_bytes)
    return place == (segment.namespace, segment.number, slot, segment.geometry.payload_bytes)


def _last_sequences(found: list[FoundNamespace]) -> dict[int, int]:
    """By disk, the highest sequence number on it."""
    last: dict[int, int] = {}
    for one in found:
        for block in one.blocks:
            disk = block.segment.disk
            if block.sequence > last.get(disk, 0):
                last[disk] = block.sequence
    return last


def _drop_torn(one: FoundNamespace, last: dict[int, int], pool: ThreadPoolExecutor, counts: Counts) -> None:
    """Reads the payloads of the last blocks written to each disk; forgets and erases what is torn."""
    recent = [block for block in one.blocks if block.sequence > last[block.segment.disk] - WINDOW]
    wholes = pool.map(_whole, recent)
    torn = {id(block) for block, whole in zip(recent, wholes, strict=True) if not whole}
    if not torn:
        return
    for block in (block for block in recent if id(block) in torn):
        counts.torn += 1
        log.warning("slot_dropped", path=str(block.segment.path), slot=block.slot, reason="torn", key=block.key.hex())
        if _erased(block.segment, block.slot):
            one.free.append((block.segment, block.slot))
    one.blocks = [block for block in one.blocks if id(block) not in torn]


def _whole(block: FoundBlock) -> bool:
    try:
        block.segment.read_own(block.slot, block.checksum)
    except (OSError, CorruptPayload):
        return False
    return True


def _erased(segment: Segment, slot: int) -> bool:
    try:
        segment.erase(slot)
        segment.sync()
    except OSError:
        return False
    return True


def _drop_duplicates(one: FoundNamespace, counts: Counts) -> None:
    latest = {block.key: block for block in one.blocks}
    for block in one.blocks:
        if latest[block.key] is not block:
            counts.duplicates += 1
            one.free.append((block.segment, block.slot))
    one.blocks = sorted(latest.values(), key=lambda block: block.sequence)


def _is_namespace(name: str) -> bool:
    return len(name) == 64 and all(c in "0123456789abcdef" for c in name)


def _number(path: Path) -> int | None:
    return int(path.stem) if len(path.stem) == 8 and path.stem.isdecimal() else None
