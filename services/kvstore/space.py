"""Where a new block may lie: the byte budget, disks, new segments, segments of other namespaces, eviction.

For a slot, in this order: a free one; a new segment, while a disk's budget has room; a segment of another
namespace in which everything is colder than what would have to go here; the block that eviction
gives up. Nothing of that: there is no space. Of several free slots a block takes one on the disk after its
parent's, so that a chain goes round all disks and one prefix is read from all of them at once.

Invariants:
- The bytes of all files on a disk, checkpoints, those being created and those that can't be used included,
  never exceed its share of the budget (a share that shrank is met at start by dropping the coldest segments).
- A segment with a leased block, or with a leased block's ancestor, is never taken.
- Nothing is written to a disk that isn't SERVING.
"""

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence

from common.blocks import Namespace
from common.logs import Log
from common.storage import BlockMeta
from services.kvstore.checkpoint import footprint_bytes, slots_that_fit
from services.kvstore.coldest import coldest_segment
from services.kvstore.disk import OWN_FILES_BYTES, Disk, DiskState
from services.kvstore.eviction import NewcomersFirst
from services.kvstore.file_calls import FileCalls
from services.kvstore.files import Files
from services.kvstore.metrics import Metrics
from services.kvstore.record import PAGE_BYTES, SLOTS_MAX, Geometry
from services.kvstore.segment import Segment
from services.kvstore.segment_changes import SegmentChanges
from services.kvstore.segment_files import SegmentFiles
from services.kvstore.shelf import Shelf
from services.kvstore.tenants import Tenants

log = Log("space")
SEGMENTS_PER_BUDGET = 8  # a segment is at most this fraction, so that namespaces can share a small budget


class Space:
    """The store's disk space. Belongs to the event loop; files are made and removed by `FileCalls`."""

    def __init__(
        self,
        files: Files,
        disks: Sequence[Disk],
        calls: FileCalls,
        metrics: Metrics,
        *,
        segment_bytes: int,
        clock: Callable[[], float],
        failed: Callable[[Disk, BaseException], None],
        tenants: Tenants,
    ) -> None:
        """`failed` is told of errors on a disk."""
        self.tenants = tenants
        self.shelves: dict[Namespace, Shelf] = {}
        self.disks = disks
        self.segment_files = SegmentFiles(files, disks, calls, clock, failed)
        self._metrics = metrics
        self._segment_bytes = segment_bytes
        self._chains = itertools.count()  # where the next chain begins
        self.changes = SegmentChanges(disks, self.shelves, self.segment_files, metrics, clock)

    @property
    def budget_bytes(self) -> int:
        return sum(disk.budget_bytes for disk in self.disks)

    @property
    def used_bytes(self) -> int:
        return sum(disk.used_bytes for disk in self.disks)

    @property
    def serving(self) -> list[Disk]:
        return [disk for disk in self.disks if disk.state is DiskState.SERVING]

    def shelf(self, namespace: Namespace, payload_bytes: int, ticks: Iterator[int]) -> Shelf | None:
        """The namespace's shelf, made when it is new; None when not even one block fits the budget."""
        shelf = self.shelves.get(namespace)
        if shelf is not None:
            return shelf
        geometry = self.geometry(payload_bytes)
        if footprint_bytes(geometry) > max(disk.budget_bytes for disk in self.disks) - OWN_FILES_BYTES:
            return None
        return self.add_found(namespace, geometry, ticks)

    def add_found(self, namespace: Namespace, geometry: Geometry, ticks: Iterator[int]) -> Shelf:
        """The shelf of a namespace, which at start is found on disk."""
        slots_expected = self.budget_bytes // geometry.slot_bytes
        shelf = self.shelves[namespace] = Shelf(namespace, geometry, NewcomersFirst(), ticks, self.tenants, slots_expected)
        return shelf

    def geometry(self, payload_bytes: int) -> Geometry:
        """Sizes of a new namespace's segments."""
        share = self.budget_bytes // max(1, len(self.serving)) - OWN_FILES_BYTES
        wanted = (self._segment_bytes - PAGE_BYTES) // Geometry(payload_bytes, 1).slot_bytes
        fitting = slots_that_fit(payload_bytes, share // SEGMENTS_PER_BUDGET)
        return Geometry(payload_bytes, max(1, min(SLOTS_MAX, wanted, fitting)))

    def forget_empty(self) -> None:
        """Drops shelves that have nothing and that nobody is about to fill."""
        for namespace in [name for name, shelf in self.shelves.items() if not shelf.segments and not shelf.preparing]:
            del self.shelves[namespace]

    def take(self, shelf: Shelf, offers: Sequence[BlockMeta], tenant: int = 0) -> list[int]:
        """Slots for blocks, evicting if need be, of the tenant's own if it is at its quota; fewer when there is no space."""
        count, slot_bytes = len(offers), shelf.geometry.slot_bytes
        while self.tenants.over_quota(tenant, count * slot_bytes):
            if shelf.evict_of(tenant) is not None:
                self._metrics.quota_evictions += 1
            else:
                count -= 1
                if not count:
                    return []
        self._metrics.evictions += shelf.evict(max(0, count - shelf.free_slots))
        return shelf.take(self._disks_for(shelf, offers[:count]))

    def _disks_for(self, shelf: Shelf, offers: Sequence[BlockMeta]) -> list[int]:
        """Where blocks should lie: each on the disk after its parent's; first blocks go in turn."""
        if len(self.disks) == 1:
            return [0] * len(offers)
        disk_of: dict[bytes, int] = {}
        for offer in offers:
            before = disk_of.get(offer.parent)
            if before is None:
                beside = shelf.slot_of(offer.parent)
                before = next(self._chains) - 1 if beside is None else shelf.place(beside)[0].disk
            disk_of[offer.key] = (before + 1) % len(self.disks)
        return [disk_of[offer.key] for offer in offers]

    def fit_budget(self) -> None:
        """At start: drops the coldest segments until every disk's budget is met. Blocking."""
        for disk in self.disks:
            while disk.used_bytes > disk.budget_bytes:
                chosen = coldest_segment(self.shelves.values(), self.disks, disk)
                if chosen is None:
                    log.error("over_budget", folder=str(disk.folder), used_bytes=disk.used_bytes, budget_bytes=disk.budget_bytes)
                    break
                shelf, position, _ = chosen
                segment = self.changes.empty(shelf, position)
                log.event("segment_dropped", path=str(segment.path), reason="over the budget")
                self.segment_files.remove_now(segment)

    def fit_quotas(self) -> None:
        """At start: evicts what tenants have over their quotas."""
        for tenant in self.tenants.over():
            for shelf in self.shelves.values():
                while self.tenants.over_quota(tenant) and shelf.evict_of(tenant) is not None:
                    self._metrics.quota_evictions += 1

    async def lose(self, disk: Disk) -> None:
        """A disk is gone: its blocks are misses from now on. Others get their turns in between."""
        for shelf, position in self._segments_on(disk):
            shelf.segments[position].writable = False
            self._metrics.lost_blocks += shelf.lose(shelf.segment_slots(position))
            await asyncio.sleep(0)

    async def seal(self, disk: Disk) -> None:
        """A disk takes no writes any more: its blocks are still served."""
        for shelf, position in self._segments_on(disk):
            if shelf.segments[position].writable:
                shelf.segments[position].writable = False
                shelf.seal(shelf.segment_slots(position))
                await asyncio.sleep(0)

    def _segments_on(self, disk: Disk) -> list[tuple[Shelf, int]]:
        return [
            (shelf, position)
            for shelf in self.shelves.values()
            for position, segment in shelf.segments.items()
            if segment.disk == disk.position
        ]

    def adopt(self, shelf: Shelf, segment: Segment) -> range:
        """Takes a segment in; the numbers of its slots."""
        self.disks[segment.disk].segment_bytes += footprint_bytes(segment.geometry)
        return shelf.add_segment(segment)

    def check_integrity(self) -> list[str]:
        """What is wrong, in words."""
        problems: list[str] = []
        for disk in self.disks:
            held = sum(footprint_bytes(shelf.geometry) for shelf, _ in self._segments_on(disk))
            if held != disk.segment_bytes:
                problems.append(f"{disk.folder}: {held} bytes in segments, {disk.segment_bytes} are accounted for")
            if disk.used_bytes > disk.budget_bytes and disk.used_bytes > disk.unusable_bytes:
                problems.append(f"{disk.folder}: {disk.used_bytes} bytes used of a budget of {disk.budget_bytes}")
        return problems
