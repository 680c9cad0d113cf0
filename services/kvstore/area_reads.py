"""Reading leased blocks for the byte plane.

An item of a read lease is read from its slot, straight into the caller's memory where that is aligned and on huge
pages, else into a buffer of ours that is, and copied; and its payload checked against the checksum that the index holds for exactly this
filling of the slot. That check also catches a misdirected or stale slot, so the header page isn't read
again. The checksum goes along, and the receiver checks once more. A range of a block is read and verified by the
chunks around it where their checksums are known, else cut from the verified whole.

Memory is bounded; reads wait for room. A disk that hangs costs the caller its deadline (EXPIRED), never more;
only reads into the caller's own memory are waited for once they have started, because the disk may
still write there. That memory may be a peer's, who may scribble over it meanwhile: a mismatch there is
settled by a second look into memory of our own, so that no peer can condemn a good block.
"""

import asyncio
import errno
from collections import deque
from collections.abc import Sequence

from common.disk.batch import Batch, NotStarted
from common.disk.buffers import BufferPool
from common.disk.pages import shared_memory_is_huge
from common.errors import Overloaded
from common.logs import Log
from common.transport.interface import LeaseToken, Part, PartStatus
from services.kvstore.area_chunks import ChunkTables
from services.kvstore.area_targets import Target
from services.kvstore.leases import ReadLease
from services.kvstore.segment import CorruptPayload
from services.kvstore.store import Store

log = Log("reads")
_NOT_THE_DISK = (errno.EFAULT, errno.EINVAL, errno.ENOMEM, errno.EAGAIN, errno.EINTR)  # the block isn't to blame
ReadResult = tuple[PartStatus, memoryview | None, int]
Outcomes = Sequence[int | BaseException]  # per target: the checksum of its bytes, or why there are none


class Reads:
    """The reading half of a `StoreArea`."""

    def __init__(self, store: Store, *, buffer_bytes: int, deadline_s: float) -> None:
        self.buffers = BufferPool(buffer_bytes)
        self._store = store
        self._metrics = store.metrics
        self._deadline_s = deadline_s
        self._straight = shared_memory_is_huge()
        self._chunk_tables = ChunkTables(store, self.buffers, deadline_s)
        self._sending: dict[int, tuple[memoryview, memoryview]] = {}  # by id of a view that was handed out: it, its buffer

    async def read(self, token: LeaseToken, parts: Sequence[Part], into: Sequence[memoryview] | None) -> list[ReadResult]:
        """As `Area.read`."""
        results: list[ReadResult] = [(PartStatus.REJECTED, None, 0)] * len(parts)
        lease = self._store.leases.get(token)
        if not isinstance(lease, ReadLease):
            self._metrics.rejected_parts += len(parts)
            return results
        targets: list[Target] = []
        for i, part in enumerate(parts):
            target = self._target(lease, i, part, into[i] if into is not None else None)
            if isinstance(target, PartStatus):
                results[i] = (target, None, 0)
                self._metrics.rejected_parts += target is PartStatus.REJECTED
            else:
                targets.append(target)
        if not targets:
            return results
        self._pin(targets)
        with self._metrics.read_s.time():
            try:
                await self._chunk_tables.learn(lease, targets)
            except asyncio.CancelledError:
                self._unpin(targets)
                raise
            for target in targets:
                target.plan(lease.chunks.get(target.slot), straight=self._straight)
            await self._read_in_groups(targets, results)
        return results

    def done_reading(self, views: Sequence[memoryview]) -> None:
        """As `Area.done_reading`."""
        for view in views:
            _, buffer = self._sending.pop(id(view), (None, None))
            if buffer is not None:
                self.buffers.give_back(buffer)

    def _target(self, lease: ReadLease, i: int, part: Part, into: memoryview | None) -> Target | PartStatus:
        length = lease.shelf.geometry.payload_bytes
        if not 0 <= part.item < len(lease.slots) or part.offset < 0 or part.length <= 0 or part.offset + part.length > length:
            return PartStatus.REJECTED
        slot, sequence = lease.slots[part.item], lease.sequences[part.item]
        index = lease.shelf.index
        if not index.holds(slot) or index.sequence(slot) != sequence:
            return PartStatus.MISSING
        return Target(i, part, lease.shelf, slot, sequence, index.checksum(slot), into)

    async def _read_in_groups(self, targets: list[Target], results: list[ReadResult]) -> None:
        """What goes into the caller's memory needs our buffers only on its way: half of them at a time is enough."""
        groups: deque[list[Target]] = deque()
        room = 0
        for target in targets:
            if not groups or (target.into is not None and target.buffer_bytes > room):
                groups.append([])
                room = self.buffers.bytes_max // 2
            groups[-1].append(target)
            room -= target.buffer_bytes
        try:
            while groups:
                await self._read(groups.popleft(), results)
        finally:
            for group in groups:
                self._unpin(group)

    async def _read(self, targets: list[Target], results: list[ReadResult]) -> None:
        """Returns, or raises, when nothing lands in the caller's memory any more."""
        try:
            room = await self._take_buffers(targets)
        except asyncio.CancelledError:
            self._unpin(targets)
            raise
        if not room:
            self._unpin(targets)
            for target in targets:
                results[target.index] = (PartStatus.FULL, None, 0)
            return
        try:
            batch = self._store.readers.submit([target.transfer() for target in targets], self._deadline_s)
        except Overloaded:
            self._finish(targets, [NotStarted()] * len(targets), results)
            return
        waits = any(not target.buffer_bytes for target in targets)
        try:
            if waits:
                await asyncio.shield(batch.done)
            else:
                await asyncio.wait([batch.done], timeout=self._deadline_s)
        except asyncio.CancelledError:
            self._store.readers.abandon(batch)
            if waits:
                await asyncio.wait([batch.done])
            self._finish_later(batch, targets)
            raise
        if batch.done.done():
            outcomes = batch.done.result()
            self._finish(targets, await self._second_looks(targets, outcomes), results)
            return
        self._finish_later(batch, targets)
        self._metrics.failed_reads += len(targets)
        log.warning("read_deadline", parts=len(targets), deadline_s=self._deadline_s)
        for target in targets:
            self._store.watch.failed_on(target.shelf.place(target.slot)[0], TimeoutError(f"no answer for {self._deadline_s:g} s"))
            results[target.index] = (PartStatus.EXPIRED, None, 0)

    async def _take_buffers(self, targets: list[Target]) -> bool:
        """Gets a buffer for each target that needs one, or none for any: there was no room in time."""
        wanting = [target for target in targets if target.buffer_bytes]
        if not wanting:
            return True
        buffers: list[memoryview] | None = None
        try:
            async with asyncio.timeout(self._deadline_s):
                buffers = await self.buffers.take_all([target.buffer_bytes for target in wanting])
        except TimeoutError:
            pass
        if buffers is None:
            return False
        for target, buffer in zip(wanting, buffers, strict=True):
            target.buffer = buffer
        return True

    async def _second_looks(self, targets: list[Target], outcomes: Outcomes) -> Outcomes:
        """The outcomes, mismatches in the caller's memory settled by a read into ours."""
        doubted = {
            i: target.second_look()
            for i, (target, outcome) in enumerate(zip(targets, outcomes, strict=True))
            if isinstance(outcome, CorruptPayload) and not target.buffer_bytes
        }
        if not doubted:
            return outcomes
        looks = list(doubted.values())
        seconds: Outcomes = [NotStarted()] * len(looks)
        if await self._take_buffers(looks):
            seconds = await self._look(looks) or seconds
        settled = dict(zip(doubted, seconds, strict=True))
        return [settled.get(i, outcome) for i, outcome in enumerate(outcomes)]

    async def _look(self, looks: list[Target]) -> Outcomes | None:
        """Reads into our buffers and gives them back; None when the deadline passed."""

        def give_back(_: object) -> None:
            for look in looks:
                assert look.buffer is not None
                self.buffers.give_back(look.buffer)

        try:
            batch = self._store.readers.submit([look.transfer() for look in looks], self._deadline_s)
        except Overloaded:
            give_back(None)
            return None
        batch.done.add_done_callback(give_back)
        await asyncio.wait([batch.done], timeout=self._deadline_s)
        return batch.done.result() if batch.done.done() else None

    def _finish_later(self, batch: Batch[int], targets: list[Target]) -> None:
        """Nobody waits for the bytes any more, and none lands in the caller's memory."""
        for target in targets:
            if target.buffer_bytes:
                target.give_up()
        batch.done.add_done_callback(lambda done: self._finish(targets, done.result(), None))

    def _finish(self, targets: list[Target], outcomes: Outcomes, results: list[ReadResult] | None) -> None:
        """Settles every target; `results` is None when nobody waits for the bytes any more."""
        self._unpin(targets)
        for target, outcome in zip(targets, outcomes, strict=True):
            sending = False
            if isinstance(outcome, int):
                self._metrics.reads += 1
                self._metrics.read_bytes += target.part.length
                if results is not None:
                    view = target.view
                    results[target.index] = (PartStatus.OK, view, outcome)
                    sending = target.into is None
            else:
                status = self._failed_read(target, outcome)
                if results is not None:
                    results[target.index] = (status, None, 0)
            if target.buffer is None:
                continue
            if sending:
                self._sending[id(view)] = view, target.buffer
            else:
                self.buffers.give_back(target.buffer)

    @staticmethod
    def _pin(targets: list[Target]) -> None:
        targets[0].shelf.index.offers.hold([target.slot for target in targets])

    @staticmethod
    def _unpin(targets: list[Target]) -> None:
        targets[0].shelf.index.offers.unpin_all([target.slot for target in targets])

    def _failed_read(self, target: Target, error: BaseException) -> PartStatus:
        if isinstance(error, CorruptPayload):
            self._store.erasures.condemn(target.shelf, target.slot, target.sequence, str(error))
            return PartStatus.CORRUPT
        self._metrics.failed_reads += 1
        if isinstance(error, NotStarted):
            return PartStatus.EXPIRED
        if isinstance(error, OSError) and error.errno not in _NOT_THE_DISK:
            self._store.watch.failed_on(target.shelf.place(target.slot)[0], error)
            self._store.erasures.condemn(target.shelf, target.slot, target.sequence, str(error))
        else:
            log.error("read_failed", reason=repr(error))
        return PartStatus.FAILED

    def check_integrity(self) -> list[str]:
        """What is wrong, in words."""
        sending = sum(len(buffer) for _, buffer in self._sending.values())
        if sending > self.buffers.taken_bytes:
            return [f"{sending} bytes are being sent, {self.buffers.taken_bytes} were taken"]
        return []
