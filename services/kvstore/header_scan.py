"""Reads header pages of a segment and believes what can be believed. Blocking, any thread.

Small slots are read whole, many at once: the disk gives a header page by itself hardly sooner than the
whole slot, and far fewer of them a second. Of larger slots only the header pages are read.
"""

import msgspec
import numpy as np

from common.logs import Log
from services.kvstore.column import Slots
from services.kvstore.entries import Entries, Verdict, believe
from services.kvstore.record import PAGE_BYTES
from services.kvstore.segment import Segment, scratch
from services.kvstore.slot_pages import Pages

log = Log("scan")
WHOLE_SLOT_BYTES_MAX = 32 << 10
READ_BYTES = 4 << 20
RUN_SLOTS = 512  # one thread's job: enough jobs for all threads, few enough to be cheap
_LOGGED = (Verdict.DAMAGED, Verdict.FOREIGN, Verdict.NEWER, Verdict.UNREADABLE)


class RunScan(msgspec.Struct):
    """Some slots of one segment."""

    segment: Segment
    slots: range
    entries: Entries
    free: Slots  # with nothing in them that is wanted
    seen: dict[Verdict, int]
    written_s: int


def runs(slots: int) -> list[range]:
    """The slots of a segment in jobs."""
    return [range(start, min(start + RUN_SLOTS, slots)) for start in range(0, slots, RUN_SLOTS)]


def scan_run(segment: Segment, slots: range) -> RunScan:
    pages = np.zeros((len(slots), PAGE_BYTES), np.uint8)
    readable = _read(segment, slots, pages)
    found = believe(pages, segment.namespace, segment.geometry, segment.number, slots.start)
    verdicts = np.where(readable, found.verdicts, Verdict.UNREADABLE)
    counts = np.bincount(verdicts, minlength=len(Verdict))
    seen = {verdict: int(counts[verdict]) for verdict in Verdict}
    if any(seen[verdict] for verdict in _LOGGED):
        bad = {verdict.name.lower(): seen[verdict] for verdict in _LOGGED}
        log.warning("slots_dropped", path=str(segment.path), slots=f"[{slots.start}, {slots.stop})", **bad)
    unused = np.isin(verdicts, (Verdict.EMPTY, Verdict.DAMAGED, Verdict.FOREIGN))
    free: Slots = (np.flatnonzero(unused) + slots.start).astype(np.int32)
    return RunScan(segment, slots, found.entries, free, seen, found.written_s)


def _read(segment: Segment, slots: range, pages: Pages) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """Fills `pages`; which of them could be read."""
    readable = np.ones(len(slots), np.bool_)
    slot_bytes = segment.geometry.slot_bytes
    at_once = max(1, READ_BYTES // slot_bytes) if slot_bytes <= WHOLE_SLOT_BYTES_MAX else 1
    for start in range(0, len(slots), at_once):
        stop = min(start + at_once, len(slots))
        if at_once > 1 and _read_whole(segment, slots[start:stop], pages[start:stop]):
            continue
        for i in range(start, stop):
            page = scratch(PAGE_BYTES)
            try:
                segment.read_header(slots[i], page)
                pages[i] = np.frombuffer(page, np.uint8)
            except OSError:
                readable[i] = False
    return readable


def _read_whole(segment: Segment, slots: range, pages: Pages) -> bool:
    """Reads slots that follow each other in one piece; False when that fails, perhaps for one of them only."""
    piece = scratch(len(slots) * segment.geometry.slot_bytes)
    try:
        segment.read_slots(slots, piece)
    except OSError:
        return False
    pages[:] = np.frombuffer(piece, np.uint8).reshape(len(slots), -1)[:, :PAGE_BYTES]
    return True
