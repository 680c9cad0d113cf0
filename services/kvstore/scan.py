"""What is on disk when the store starts: segments, and the blocks whose headers can be believed.

1. Every namespace folder's segment files are opened; leftovers of an unfinished creation go.
2. A segment with a checkpoint is what that says. Of the others the header pages are read, by several threads;
   damaged, foreign, misplaced and unknown ones are counted.
3. A crash can leave a header whose payload never arrived. Writes are numbered, and at most
   `WINDOW` numbers are open at once, so only blocks among the last `WINDOW` numbers can be torn:
   their payloads are read and checked, and the bad ones erased. The last number is taken for each disk
   by itself, so that this also holds for one that was away while the others went on.
4. Of two slots with one key the later one counts.

Nothing here is fatal. Blocking; runs before the service serves.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from common.blocks import Namespace
from common.logs import Log
from services.kvstore import checkpoint
from services.kvstore.disk import Disk, DiskState
from services.kvstore.entries import Verdict
from services.kvstore.files import Files
from services.kvstore.found import Counts, Found, FoundNamespace, FoundSegment, drop_duplicates, drop_torn, last_sequences
from services.kvstore.header_scan import RunScan, read_whole, runs, scan_run
from services.kvstore.record import Unreadable, pages
from services.kvstore.segment import SUFFIX, TEMPORARY_SUFFIX, Segment, open_segment

log = Log("scan")
WINDOW = 1024  # part of the format: a writer never has more sequence numbers open
_PROGRESS_S = 1.0
_FEW_THREADS = 4  # reading slots whole: more only take the interpreter from each other (docs/benchmarks.md)


def scan(files: Files, disks: Sequence[Disk], *, threads: int) -> Found:
    """Opens and reads what lies on all disks."""
    out = Found([], Counts())
    by_name: dict[Namespace, FoundNamespace] = {}
    for disk in disks:
        if disk.state is not DiskState.LOST:
            _open_disk(files, disk, by_name, out.counts)
    out.namespaces = [one for _, one in sorted(by_name.items()) if one.segments or one.unusable_numbers]
    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(min(threads, _FEW_THREADS)) as few:
        _load_checkpoints(files, out, pool)
        _read_headers(out, pool, few)
        last = last_sequences(out.segments)
        for found in out.segments:
            drop_torn(found, last[found.segment.disk] - WINDOW, pool, out.counts)
    for one in out.namespaces:
        drop_duplicates(one.segments, out.counts)
    out.last_sequence = max(last.values(), default=0)
    out.last_tick = max((int(found.entries["tick"].max(initial=0)) for found in out.segments), default=0)
    out.counts.blocks = sum(len(found.entries) for found in out.segments)
    return out


def _open_disk(files: Files, disk: Disk, by_name: dict[Namespace, FoundNamespace], counts: Counts) -> None:
    """Opens what lies on one disk; one that can't be listed is lost."""
    before = counts.unusable_bytes
    try:
        for path in sorted(disk.namespaces.iterdir()):
            if path.is_dir() and _is_namespace(path.name):
                name = Namespace(path.name)
                one = by_name.setdefault(name, FoundNamespace(name, None, [], {}))
                _open_namespace(files, disk, path, one, counts)
            else:
                counts.extra_files += 1
                log.warning("extra_file", path=str(path), expected="folders named by 64 hex digits")
    except OSError as error:
        disk.step("read_failed", str(error))
    disk.unusable_bytes += counts.unusable_bytes - before


def _open_namespace(files: Files, disk: Disk, folder: Path, one: FoundNamespace, counts: Counts) -> None:
    for path in sorted(folder.iterdir()):
        if path.suffix in (TEMPORARY_SUFFIX, checkpoint.TEMPORARY_SUFFIX) and _number(path) is not None:
            _remove_leftover(files, disk, path, counts)
        elif path.suffix == checkpoint.SUFFIX and _number(path) is not None:
            if not path.with_suffix(SUFFIX).exists():
                _remove_leftover(files, disk, path, counts)
        elif path.suffix != SUFFIX or _number(path) is None:
            counts.extra_files += 1
            log.warning("extra_file", path=str(path), expected=f"files named 00000000{SUFFIX}")
        else:
            segment = _open_one(files, disk, path, one)
            if isinstance(segment, Segment):
                one.segments.append(FoundSegment(segment))
                one.geometry = segment.geometry
                counts.segments += 1
                counts.segments_read_only += not segment.writable
            else:
                one.unusable_numbers.setdefault(disk.position, set()).add(int(path.stem))
                counts.segments_unusable += 1
                counts.unusable_bytes += _bytes_of(path) + _bytes_of(path.with_suffix(checkpoint.SUFFIX))
                log.warning("segment_unusable", path=str(path), reason=segment, effect="left alone; its blocks are misses")


def _remove_leftover(files: Files, disk: Disk, path: Path, counts: Counts) -> None:
    """A file that was never finished, or whose segment is gone, goes; where nothing can be written it stays and counts."""
    try:
        files.remove(path)
    except OSError as error:
        counts.unusable_bytes += _bytes_of(path)
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
        wrong = f"{segment.geometry} differs from {one.geometry} of {one.segments[0].segment.path}"
    if wrong:
        segment.close()
        return wrong
    segment.writable = segment.writable and disk.state is DiskState.SERVING
    if not segment.writable:
        log.warning("segment_read_only", path=str(path), effect="its blocks are served, nothing is written there")
    return segment


def _load_checkpoints(files: Files, out: Found, pool: ThreadPoolExecutor) -> None:
    """Takes the word of the checkpoints that can be believed; others go, as their segments may be written to."""
    for found, kept in zip(
        out.segments, pool.map(lambda found: checkpoint.load(files, found.segment), out.segments), strict=True
    ):
        segment = found.segment
        segment.checkpointed = checkpoint.path_of(segment).exists()
        if kept is not None:
            unused = np.ones(segment.geometry.slots_per_segment, np.bool_)
            unused[kept.entries["slot"]] = False
            found.entries, found.free, found.scanned = kept.entries, np.flatnonzero(unused).astype(np.int32), False
            out.counts.checkpoints += 1
            out.time_s = max(out.time_s, kept.time_s)
        elif segment.checkpointed and segment.writable:
            try:
                checkpoint.discard(files, segment)
            except OSError as error:
                segment.writable = False
                log.warning("segment_read_only", path=str(segment.path), reason=f"its checkpoint can't be removed: {error}")


def _read_headers(out: Found, pool: ThreadPoolExecutor, few: ThreadPoolExecutor) -> None:
    started_s = reported_s = time.monotonic()
    todo = [found for found in out.segments if found.scanned]
    total = sum(found.segment.geometry.slots_per_segment for found in todo)
    done = 0
    jobs: list[list[Future[RunScan]]] = []
    for found in todo:
        geometry = found.segment.geometry
        threads = few if read_whole(geometry) else pool
        jobs.append([threads.submit(scan_run, found.segment, slots) for slots in runs(geometry)])
    for found, scans in zip(todo, jobs, strict=True):
        results = [scan.result() for scan in scans]
        found.entries = np.concatenate([result.entries for result in results])
        found.free = np.concatenate([result.free for result in results])
        out.time_s = max(out.time_s, *(result.written_s for result in results))
        for verdict in (Verdict.EMPTY, Verdict.DAMAGED, Verdict.FOREIGN, Verdict.NEWER, Verdict.UNREADABLE):
            name = verdict.name.lower()
            setattr(out.counts, name, getattr(out.counts, name) + sum(result.seen[verdict] for result in results))
        done += found.segment.geometry.slots_per_segment
        now_s = time.monotonic()
        if now_s - reported_s >= _PROGRESS_S:
            reported_s = now_s
            log.event("scanning", slots=done, of=total, slots_per_s=round(done / (now_s - started_s)))


def _bytes_of(path: Path) -> int:
    """What a file takes, in whole pages."""
    return pages(path.stat().st_size) if path.exists() else 0


def _is_namespace(name: str) -> bool:
    return len(name) == 64 and all(c in "0123456789abcdef" for c in name)


def _number(path: Path) -> int | None:
    return int(path.stem) if len(path.stem) == 8 and path.stem.isdecimal() else None
