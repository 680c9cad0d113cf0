"""Reads header pages of a segment and believes what can be believed. Blocking, any thread.

Small slots are read whole, many at once: the disk gives a header page by itself hardly sooner than the
whole slot, and far fewer of them a second. Of larger slots only the header pages are read. Pages are decoded
where they were read, in memory on huge pages that belongs to the thread: nothing is copied.
"""

import msgspec
import numpy as np

from common.logs import Log
from services.kvstore.column import Flags, Slots
from services.kvstore.entries import Entries, HeaderPages, Verdict, believe
from services.kvstore.record import PAGE_BYTES, Geometry
from services.kvstore.segment import Segment, scratch

log = Log("scan")
WHOLE_SLOT_BYTES_MAX = 32 << 10
READ_BYTES = 4 << 20  # at most, of one thread's job, where slots are read whole
RUN_PAGES = 512  # at most, of one thread's job, where header pages are read: enough jobs for all threads
_LOGGED = (Verdict.DAMAGED, Verdict.FOREIGN, Verdict.NEWER, Verdict.UNREADABLE)


class RunScan(msgspec.Struct):
    """Some slots of one segment."""

    segment: Segment
    slots: range
    entries: Entries
    free: Slots  # with nothing in them that is wanted
    seen: dict[Verdict, int]
    written_s: int


def runs(geometry: Geometry) -> list[range]:
    """The slots of a segment in jobs."""
    slots = geometry.slots_per_segment
    at_once = READ_BYTES // geometry.slot_bytes if read_whole(geometry) else RUN_PAGES
    return [range(start, min(start + at_once, slots)) for start in range(0, slots, at_once)]


def scan_run(segment: Segment, slots: range) -> RunScan:
    geometry = segment.geometry
    stride = geometry.slot_bytes if read_whole(geometry) else PAGE_BYTES
    piece = scratch(len(slots) * stride)
    pages = HeaderPages(piece, stride, _read(segment, slots, piece, stride))
    found = believe(pages, segment.namespace, geometry, segment.number, slots.start)
    counts = np.bincount(found.verdicts, minlength=len(Verdict))
    seen = {verdict: int(counts[verdict]) for verdict in Verdict}
    if any(seen[verdict] for verdict in _LOGGED):
        bad = {verdict.name.lower(): seen[verdict] for verdict in _LOGGED}
        log.warning("slots_dropped", path=str(segment.path), slots=f"[{slots.start}, {slots.stop})", **bad)
    unused = np.isin(found.verdicts, (Verdict.EMPTY, Verdict.DAMAGED, Verdict.FOREIGN))
    free: Slots = (np.flatnonzero(unused) + slots.start).astype(np.int32)
    return RunScan(segment, slots, found.entries, free, seen, found.written_s)


def read_whole(geometry: Geometry) -> bool:
    """Whether slots are read whole. Then a few threads take all that the disk gives."""
    return geometry.slot_bytes <= WHOLE_SLOT_BYTES_MAX


def _read(segment: Segment, slots: range, piece: memoryview, stride: int) -> Flags:
    """Fills the first page of every `stride` bytes; which of them could be read."""
    readable = np.ones(len(slots), np.bool_)
    if stride > PAGE_BYTES and _read_whole(segment, slots, piece):
        return readable
    for i, slot in enumerate(slots):
        try:
            segment.read_header(slot, piece[i * stride : i * stride + PAGE_BYTES])
        except OSError:
            readable[i] = False
    return readable


def _read_whole(segment: Segment, slots: range, piece: memoryview) -> bool:
    """Reads slots that follow each other; False when that fails, perhaps for one of them only."""
    try:
        segment.read_slots(slots, piece)
    except OSError:
        return False
    return True
