"""The block store: what is stored, who may read or write it, and for how long.

1. `Store.open` scans the folders, rebuilds the index, meets the budget. Blocking.
2. `lookup` finds and leases prefixes; `reserve` finds space and leases slots. The `Area`
   (area.py) moves the bytes under these leases and reports what became of them.
3. `sweep` ends leases whose time is over.
4. `drain` refuses new leases and waits for those that are out; `close` ends the I/O.

Decisions are synchronous, on the event loop; whatever touches the disk runs in a pool.
"""

import asyncio
import os
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from common.blocks import KEY_BYTES, Namespace
from common.disk.devices import DeviceEngines
from common.disk.engine import Engine, open_engine
from common.errors import Overloaded, Unavailable
from common.logs import Log
from common.storage import NO_TERMS, Admission, BlockMeta, Terms
from common.transport.interface import LeaseToken
from common.transport.lookups import Prefix
from services.kvstore.checkpoints import Checkpoints
from services.kvstore.column import NO_SLOTS
from services.kvstore.disk import open_disks
from services.kvstore.disk_watch import DiskWatch
from services.kvstore.doorkeeper import Doorkeeper
from services.kvstore.erasures import Erasures
from services.kvstore.file_calls import FileCalls
from services.kvstore.files import Files
from services.kvstore.intake import Intake
from services.kvstore.leases import Lease, LeaseTable, ReadLease, WriteLease
from services.kvstore.metrics import Metrics
from services.kvstore.opening import take_in
from services.kvstore.options import StoreOptions
from services.kvstore.pins import Pins
from services.kvstore.record import PAYLOAD_BYTES_MAX
from services.kvstore.reuse import ReuseSample
from services.kvstore.scan import WINDOW, scan
from services.kvstore.space import Space
from services.kvstore.store_time import StoreTime
from services.kvstore.tenants import Tenants, digest
from services.kvstore.writer import Seal, SlotWrite, Writer, Written

log = Log("store")
EPOCH_BYTES = 16
WRITE_LATE_S = 15.0  # then the disk is probed; the write is waited for all the same
EXPIRY_POLL_S = 0.25  # while draining
_PENDING_WRITES_MAX = 1 << 20  # the window and the reserve bound hold long before


class Reserved(msgspec.Struct, frozen=True):
    """One admission per offered block. `token` is None when nothing was accepted."""

    admissions: list[Admission]
    token: LeaseToken | None
    ttl_s: float


class Store:
    """See the module. Belongs to one event loop after `open`."""

    def __init__(
        self,
        folders: Sequence[Path],
        options: StoreOptions,
        *,
        files: Files | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        metrics: Metrics | None = None,
    ) -> None:
        self.epoch = os.urandom(EPOCH_BYTES)
        self.options = options
        self.metrics = metrics or Metrics()
        self.clock = clock
        self.draining = False
        self._files = files or Files()
        self.disks = open_disks(self._files, folders, budget_bytes=options.budget_bytes, direct=options.direct)
        self.readers = self._engines("kvstore-read", options.read_depth, options.pending_reads_max)
        self.writers = self._engines("kvstore-write", options.write_depth, _PENDING_WRITES_MAX)
        self.file_calls = FileCalls(self.disks, lambda disk, error: self.watch.failed(disk, error))
        self.leases = LeaseTable(clock, options.leases_max, options.lease_s_max, options.lease_s)
        self.time_s = StoreTime(clock, wall)
        self.tenants = Tenants(options.tenant_quota_bytes)
        self.reuse = ReuseSample()
        self.space = Space(
            self._files,
            self.disks,
            self.file_calls,
            self.metrics,
            segment_bytes=options.segment_bytes,
            clock=clock,
            failed=lambda disk, error: self.watch.failed(disk, error),
            tenants=self.tenants,
        )
        self.pins = Pins(clock, self.space)
        self.checkpoints = Checkpoints(self._files, self.space, self.file_calls, clock, self.time_s)
        self.watch = DiskWatch(self._files, self.space, lambda disk: self.writer.close_numbers(disk.position))
        self.erasures = Erasures(self.checkpoints, self.file_calls, self.watch, self.metrics)
        self.writer = Writer(self.writers, durable=options.durable)
        self._ticks = iter(lambda: self.writer.next_sequence, 0)  # a use is dated by the write that comes next
        doorkeeper = Doorkeeper() if options.admission == "second_touch" else None
        self.intake = Intake(self.space, self.metrics, options.reserved_bytes_max, doorkeeper)
        self._lease_ended = asyncio.Event()

    def _engines(self, label: str, depth: int, pending_max: int) -> Engine:
        """One engine for each disk, behind one face."""
        choice = self.options.io
        engines = [open_engine(self._files, choice, label=label, depth=depth, pending_max=pending_max) for _ in self.disks]
        return engines[0] if len(engines) == 1 else DeviceEngines(engines, pending_max)

    @classmethod
    def open(
        cls,
        folders: Path | Sequence[Path],
        options: StoreOptions,
        *,
        files: Files | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        metrics: Metrics | None = None,
    ) -> "Store":
        """Opens one folder or several, new or not. Blocking. Raises `Unavailable` when another process has one."""
        store = cls(
            [folders] if isinstance(folders, Path) else folders, options, files=files, clock=clock, wall=wall, metrics=metrics
        )
        try:
            store._load()
        except BaseException:
            store.close()
            raise
        return store

    def _load(self) -> None:
        started_s = time.monotonic()
        found = scan(self._files, self.disks, threads=self.options.read_depth)
        counts = found.counts
        for one in found.namespaces:
            take_in(one, self.space, self._ticks)
        self.writer.next_sequence = max(found.last_sequence, found.last_tick) + 1
        self.metrics.corrupt_blocks += counts.damaged + counts.foreign + counts.torn
        self.space.fit_budget()
        self.time_s.not_before(found.time_s)
        self._expire()
        self.space.fit_quotas()
        seconds = time.monotonic() - started_s
        log.event(
            "store_opened",
            folders=[str(disk.folder) for disk in self.disks],
            disks=[str(disk.state) for disk in self.disks],
            io=["direct" if disk.direct else "buffered" for disk in self.disks],
            seconds=round(seconds, 3),
            blocks_per_s=round(counts.blocks / max(seconds, 1e-9)),
            **msgspec.structs.asdict(counts),
        )

    # Reading

    def lookup(self, namespace: Namespace, keys: Sequence[bytes], ttl_s: float | None, *, lease: bool) -> Prefix:
        """The longest stored prefix of a chain, leased if asked for. Raises `Overloaded`, `Unavailable`."""
        self._refuse_while_draining()
        shelf = self.space.shelves.get(namespace)
        slots = shelf.index.terms.unexpired(shelf.index.prefix(keys), self.time_s()) if shelf is not None else NO_SLOTS
        self.reuse.asked(keys)
        self.metrics.lookups += 1
        self.metrics.lookup_blocks += len(keys)
        self.metrics.hit_blocks += len(slots)
        if shelf is None or not len(slots) or not lease:
            return Prefix(len(slots))
        self.leases.check_room()
        index = shelf.index
        index.touch(slots)
        index.offers.pin(int(slots[-1]))
        granted = ReadLease(shelf, array("i", slots.tobytes()), array("Q", index.sequences(slots).tobytes()))
        token, granted_s = self.leases.grant(granted, ttl_s)
        return Prefix(len(slots), token, granted_s)

    # Writing

    async def reserve(
        self, namespace: Namespace, offers: Sequence[BlockMeta], ttl_s: float | None, terms: Terms = NO_TERMS
    ) -> Reserved:
        """Space for blocks that aren't stored, leased for writing. Raises `Overloaded`, `Unavailable`."""
        self._refuse_while_draining()
        self.leases.check_room()
        length = next((offer.length for offer in offers if 0 < offer.length <= PAYLOAD_BYTES_MAX), None)
        shelf = self.space.shelf(namespace, length, self._ticks) if length is not None else None
        if shelf is None:
            return self._none_accepted(offers, length)
        if self.space.changes.may_grow(shelf):
            await self.space.changes.prepare(shelf, self.intake.room(shelf, offers))
            self._refuse_while_draining()
        self.reuse.offered([offer.key for offer in offers if len(offer.key) == KEY_BYTES])
        keep_s = terms.keep_s or self.options.block_ttl_s
        lease = WriteLease(shelf, self.tenants.number(digest(terms.tenant)), self.time_s() if keep_s else 0, keep_s)
        admissions = self.intake.admit(lease, offers)
        if Admission.ACCEPTED not in admissions:
            self._end(lease)
            return Reserved(admissions, None, 0.0)
        try:
            token, granted_s = self.leases.grant(lease, ttl_s)
        except Overloaded:
            self._end(lease)
            raise
        return Reserved(admissions, token, granted_s)

    async def write(self, writes: Sequence[SlotWrite], seal: Seal) -> Written:
        """Durable writes of slots that leases own, as `Writer.write`."""
        segments = {write.segment for write in writes}
        refused = await self.checkpoints.open_for_writing(segments)
        writing = asyncio.create_task(self.writer.write(writes, seal, refused))
        while not (await asyncio.wait([writing], timeout=WRITE_LATE_S))[0]:
            for segment in segments:
                self.watch.failed_on(segment, TimeoutError(f"a write takes more than {WRITE_LATE_S:g} s"))
        return writing.result()

    def _none_accepted(self, offers: Sequence[BlockMeta], length: int | None) -> Reserved:
        self.metrics.dropped_writes += len(offers) if length is not None else 0
        return Reserved([Admission.INVALID if length is None else Admission.DROPPED] * len(offers), None, 0.0)

    # Leases

    def renew(self, token: LeaseToken, ttl_s: float | None) -> float:
        """Raises `LeaseRejected`."""
        return self.leases.renew(token, ttl_s)

    def release(self, token: LeaseToken) -> None:
        """Idempotent."""
        lease = self.leases.take(token)
        if lease is not None:
            self._end(lease)

    def sweep(self) -> None:
        """Ends leases whose time is over."""
        for lease in self.leases.expired():
            self.metrics.expired_leases += 1
            self._end(lease)
        self.pins.sweep()
        self._expire()
        self.space.forget_empty()
        self.checkpoints.save_quiet()

    def _expire(self) -> None:
        now_s = self.time_s()
        self.metrics.expired_blocks += sum(shelf.expire(now_s) for shelf in self.space.shelves.values())

    def _end(self, lease: Lease) -> None:
        assert not lease.ended
        lease.ended = True
        self._lease_ended.set()
        shelf = lease.shelf
        if isinstance(lease, ReadLease):
            shelf.index.offers.unpin(lease.slots[-1])
            return
        self.intake.end(lease)

    # Life

    async def drain(self, deadline_s: float) -> bool:
        """Refuses new leases and waits for those that are out; whether all ended in time."""
        self.draining = True
        give_up_s = self.clock() + deadline_s
        while len(self.leases) and self.clock() < give_up_s:
            self._lease_ended.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._lease_ended.wait(), min(deadline_s, EXPIRY_POLL_S))
            self.sweep()
        clean = not len(self.leases)
        for lease in self.leases.drain():
            self._end(lease)
        await self.settle()
        await self.checkpoints.save_all()
        return clean

    async def settle(self) -> None:
        """Waits for what the store does by itself: segments being made or removed, slots being erased."""
        await self.space.changes.settle()
        await self.checkpoints.settle()
        await self.watch.settle()
        await self.erasures.settle()

    def close(self) -> None:
        """Ends the I/O and lets go of the folders. Blocking, idempotent."""
        self.readers.close()
        self.writers.close()
        self.file_calls.close()
        self.watch.close()
        for shelf in self.space.shelves.values():
            for segment in shelf.segments.values():
                segment.close()
        for disk in self.disks:
            disk.release()

    def _refuse_while_draining(self) -> None:
        if self.draining:
            raise Unavailable("this kvstore is draining: it takes no new leases; use another, or recompute", retry_after_s=1.0)

    @property
    def blocks(self) -> int:
        return sum(len(shelf.index) for shelf in self.space.shelves.values())

    def check_integrity(self) -> list[str]:
        """What is wrong, in words; empty when all is well. Cheap enough for tests and idle moments."""
        problems = [problem for shelf in self.space.shelves.values() for problem in shelf.check_integrity()]
        flying = sum(len(shelf.in_flight) * shelf.geometry.slot_bytes for shelf in self.space.shelves.values())
        if flying != self.intake.reserved_bytes:
            problems.append(f"{flying} bytes are in flight, {self.intake.reserved_bytes} are accounted for")
        problems += self.space.check_integrity()
        held = sum((len(shelf.index) + len(shelf.in_flight)) * shelf.geometry.slot_bytes for shelf in self.space.shelves.values())
        if held != self.tenants.total_bytes:
            problems.append(f"{held} bytes are stored or in flight, tenants are charged {self.tenants.total_bytes}")
        if self.writer.open_writes > WINDOW:
            problems.append(f"{self.writer.open_writes} writes are open: at most {WINDOW}")
        return problems
