"""What a start finds on disk, by namespace and segment, and what of it doesn't count.

A crash can leave a header whose payload never arrived (`drop_torn`), and two slots with one key
(`drop_duplicates`): evicted blocks keep their headers until their slots are filled again.
"""

from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np

from common.blocks import Namespace
from common.logs import Log
from services.kvstore.column import NO_SLOTS, Slots
from services.kvstore.entries import ENTRY, Entries
from services.kvstore.record import Geometry
from services.kvstore.segment import CorruptPayload, Segment

log = Log("scan")


class Counts(msgspec.Struct):
    """What the scan saw, for the log and the metrics."""

    segments: int = 0
    segments_read_only: int = 0
    segments_unusable: int = 0
    unusable_bytes: int = 0
    checkpoints: int = 0  # segments that weren't read, because their checkpoints were
    blocks: int = 0
    empty: int = 0
    damaged: int = 0  # header pages that match no checksum
    foreign: int = 0  # headers of another namespace, place or size
    newer: int = 0  # headers of a later format, left alone
    unreadable: int = 0  # I/O errors and slots behind the end of a file
    torn: int = 0  # header fine, payload not
    duplicates: int = 0
    extra_files: int = 0


class FoundSegment:
    """A segment, the blocks in it, and which of its slots hold nothing that is wanted."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.entries: Entries = np.empty(0, ENTRY)
        self.free: Slots = NO_SLOTS
        self.scanned = True  # or its checkpoint was believed


class FoundNamespace(msgspec.Struct):
    """One namespace's segments."""

    namespace: Namespace
    geometry: Geometry | None  # None: no segment of it can be used
    segments: list[FoundSegment]
    unusable_numbers: dict[int, set[int]]  # by disk: files that must be left alone


class Found(msgspec.Struct):
    """Everything that is on disk."""

    namespaces: list[FoundNamespace]
    counts: Counts
    last_sequence: int = 0  # 0: no block
    last_tick: int = 0
    time_s: int = 0  # the latest that a block or a checkpoint tells of; 0: none does

    @property
    def segments(self) -> list[FoundSegment]:
        return [found for one in self.namespaces for found in one.segments]


def last_sequences(segments: list[FoundSegment]) -> dict[int, int]:
    """By disk, the highest sequence number on it."""
    last: dict[int, int] = {}
    for found in segments:
        disk = found.segment.disk
        last[disk] = max(last.get(disk, 0), int(found.entries["sequence"].max(initial=0)))
    return last


def drop_torn(found: FoundSegment, certain: int, pool: ThreadPoolExecutor, counts: Counts) -> None:
    """Reads the payloads of blocks after sequence `certain`, which may be torn; forgets and erases those that are."""
    if not found.scanned:
        return  # a checkpoint names durable blocks only
    entries, segment = found.entries, found.segment
    recent = np.flatnonzero(entries["sequence"].astype(np.int64) > certain)
    wholes = pool.map(lambda row: _whole(segment, int(row["slot"]), int(row["checksum"])), entries[recent])
    torn = recent[~np.fromiter(wholes, np.bool_, len(recent))]
    for row in entries[torn]:
        counts.torn += 1
        slot = int(row["slot"])
        log.warning("slot_dropped", path=str(segment.path), slot=slot, reason="torn", key=row["key"].tobytes().hex())
        if _erased(segment, slot):
            found.free = np.append(found.free, np.int32(slot))
    found.entries = np.delete(entries, torn)


def drop_duplicates(segments: list[FoundSegment], counts: Counts) -> None:
    """Of the blocks of one namespace with one key only the one that was written last counts."""
    if not segments:
        return
    starts = np.cumsum([0, *(len(found.entries) for found in segments)])
    gone: dict[int, list[int]] = {}  # by position in `segments`: rows
    for alike in _alike(np.concatenate([found.entries["key"][:, 0] for found in segments])):
        places = [(at := int(np.searchsorted(starts, row, "right")) - 1, int(row - starts[at])) for row in alike]
        places.sort(key=lambda place: int(segments[place[0]].entries["sequence"][place[1]]))
        latest = {segments[at].entries["key"][row].tobytes(): (at, row) for at, row in places}
        for at, row in set(places) - set(latest.values()):
            gone.setdefault(at, []).append(row)
    for at, rows in gone.items():
        found = segments[at]
        counts.duplicates += len(rows)
        found.free = np.append(found.free, found.entries["slot"][rows].astype(np.int32))
        found.entries = np.delete(found.entries, rows)


def _alike(words: "np.ndarray[tuple[int], np.dtype[np.uint64]]") -> list[Slots]:
    """Groups of rows whose keys begin alike; nearly always the keys are equal."""
    order: Slots = np.argsort(words).astype(np.int32)
    ordered = words[order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    first = same[np.diff(same, prepend=-2) > 1]
    last = same[np.diff(same, append=len(words) + 1) > 1] + 1
    return [order[start : stop + 1] for start, stop in zip(first, last, strict=True)]


def _whole(segment: Segment, slot: int, checksum: int) -> bool:
    try:
        segment.read_own(slot, checksum)
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
