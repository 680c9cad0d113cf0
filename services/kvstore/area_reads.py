"""Reading leased blocks for the byte plane.

An item of a read lease is read from its slot into the caller's memory (or a buffer of ours) and its
payload checked against the checksum that the index holds for exactly this filling of the slot. That
check also catches a misdirected or stale slot, so the header page isn't read again. The checksum goes
along, and the receiver checks once more. A range of a block is cut from the verified whole.

Memory is bounded; reads wait for room. A disk that hangs costs the caller its deadline (EXPIRED),
never more; only reads into the caller's own memory are waited for once they have started, because the
disk may still write there.
"""

import asyncio
import errno
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from common.errors import Overloaded
from common.logs import Log
from common.transport.interface import LeaseToken, Part, PartStatus
from common.transport.memory import crc32c
from services.kvstore.buffers import BufferPool, address, copy
from services.kvstore.io_pool import NotStarted
from services.kvstore.leases import ReadLease
from services.kvstore.record import pages
from services.kvstore.segment import CorruptPayload, Segment
from services.kvstore.shelf import Shelf
from services.kvstore.store import Store

log = Log("reads")
_NOT_THE_DISK = (errno.EFAULT, errno.EINVAL, errno.ENOMEM, errno.EAGAIN, errno.EINTR)  # the block isn't to blame
ReadResult = tuple[PartStatus, memoryview | None, int]


class _Target(msgspec.Struct):
    """One part to read: where its block lies, and where its bytes go."""

    index: int  # in the request
    part: Part
    shelf: Shelf
    slot: int
    sequence: int
    checksum: int
    view: memoryview | None = None
    buffer: memoryview | None = None  # the pooled buffer under `view`


class Reads:
    """The reading half of a `StoreArea`."""

    def __init__(self, store: Store, *, buffer_bytes: int, deadline_s: float) -> None:
        self.buffers = BufferPool(buffer_bytes)
        self._store = store
        self._metrics = store.metrics
        self._deadline_s = deadline_s
        self._sending: dict[int, memoryview] = {}  # address of a view that was handed out -> its buffer

    async def read(self, token: LeaseToken, parts: Sequence[Part], into: Sequence[memoryview] | None) -> list[ReadResult]:
        """As `Area.read`."""
        results: list[ReadResult] = [(PartStatus.REJECTED, None, 0)] * len(parts)
        lease = self._store.leases.get(token)
        if not isinstance(lease, ReadLease):
            self._metrics.rejected_parts += len(parts)
            return results
        targets: list[_Target] = []
        for i, part in enumerate(parts):
            target = self._target(lease, i, part)
            if isinstance(target, PartStatus):
                results[i] = (target, None, 0)
                self._metrics.rejected_parts += target is PartStatus.REJECTED
            else:
                targets.append(target)
        if not targets:
            return results
        for target in targets:
            target.shelf.index.pin(target.slot)
        with self._metrics.read_s.time():
            if into is not None:
                for target in targets:
                    target.view = into[target.index]
                await self._read_waiting(targets, results)
            else:
                await self._read_buffered(targets, results)
        return results

    def done_reading(self, views: Sequence[memoryview]) -> None:
        """As `Area.done_reading`."""
        for view in views:
            buffer = self._sending.pop(address(view), None)
            if buffer is not None:
                self.buffers.give_back(buffer)

    def _target(self, lease: ReadLease, i: int, part: Part) -> _Target | PartStatus:
        length = lease.shelf.geometry.payload_bytes
        if not 0 <= part.item < len(lease.slots) or part.offset < 0 or part.length <= 0 or part.offset + part.length > length:
            return PartStatus.REJECTED
        slot, sequence = lease.slots[part.item], lease.sequences[part.item]
        index = lease.shelf.index
        if index.key(slot) is None or index.sequence(slot) != sequence:
            return PartStatus.MISSING
        return _Target(i, part, lease.shelf, slot, sequence, index.checksum(slot))

    async def _read_waiting(self, targets: list[_Target], results: list[ReadResult]) -> None:
        """Into the caller's memory: returns, or raises, when no thread touches it any more."""
        try:
            batch = self._store.readers.submit([_reading(target) for target in targets], self._deadline_s)
        except Overloaded:
            self._finish(targets, [NotStarted()] * len(targets), results)
            return
        try:
            outcomes = await asyncio.shield(batch.done)
        except asyncio.CancelledError:
            self._store.readers.abandon(batch)
            await asyncio.wait([batch.done])
            self._finish(targets, batch.done.result(), results)
            raise
        self._finish(targets, outcomes, results)

    async def _read_buffered(self, targets: list[_Target], results: list[ReadResult]) -> None:
        """Into our buffers: returns at the deadline, even where a thread still hangs in a read."""
        deadline_s = asyncio.get_running_loop().time() + self._deadline_s
        buffers: list[memoryview] | None = None
        try:
            async with asyncio.timeout_at(deadline_s):
                buffers = await self.buffers.take_all([pages(target.part.length) for target in targets])
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            self._unpin(targets)
            raise
        if buffers is None:
            self._unpin(targets)
            for target in targets:
                results[target.index] = (PartStatus.FULL, None, 0)
            return
        for target, buffer in zip(targets, buffers, strict=True):
            target.buffer = buffer
            target.view = buffer[: target.part.length]
        try:
            batch = self._store.readers.submit([_reading(target) for target in targets], self._deadline_s)
        except Overloaded:
            self._finish(targets, [NotStarted()] * len(targets), results)
            return
        try:
            await asyncio.wait([batch.done], timeout=self._deadline_s)
        except asyncio.CancelledError:
            self._store.readers.abandon(batch)
            batch.done.add_done_callback(lambda done: self._finish(targets, done.result(), None))
            raise
        if batch.done.done():
            self._finish(targets, batch.done.result(), results)
            return
        batch.done.add_done_callback(lambda done: self._finish(targets, done.result(), None))
        self._metrics.failed_reads += len(targets)
        log.warning("read_deadline", parts=len(targets), deadline_s=self._deadline_s)
        for target in targets:
            self._store.io_failed(target.shelf.place(target.slot)[0], TimeoutError(f"no answer for {self._deadline_s:g} s"))
            results[target.index] = (PartStatus.EXPIRED, None, 0)

    def _finish(self, targets: list[_Target], outcomes: Sequence[int | BaseException], results: list[ReadResult] | None) -> None:
        """Settles every target; `results` is None when nobody waits for the bytes any more."""
        self._unpin(targets)
        for target, outcome in zip(targets, outcomes, strict=True):
            if isinstance(outcome, int):
                self._metrics.reads += 1
                self._metrics.read_bytes += target.part.length
                if results is not None:
                    results[target.index] = (PartStatus.OK, target.view, outcome)
                    if target.buffer is not None:
                        self._sending[address(target.buffer)] = target.buffer
                    continue
            else:
                status = self._failed_read(target, outcome)
                if results is not None:
                    results[target.index] = (status, None, 0)
            if target.buffer is not None:
                self.buffers.give_back(target.buffer)

    def _unpin(self, targets: list[_Target]) -> None:
        for target in targets:
            target.shelf.index.unpin(target.slot)

    def _failed_read(self, target: _Target, error: BaseException) -> PartStatus:
        if isinstance(error, CorruptPayload):
            self._store.condemn(target.shelf, target.slot, target.sequence, str(error))
            return PartStatus.CORRUPT
        self._metrics.failed_reads += 1
        if isinstance(error, NotStarted):
            return PartStatus.EXPIRED
        if isinstance(error, OSError) and error.errno not in _NOT_THE_DISK:
            self._store.io_failed(target.shelf.place(target.slot)[0], error)
            self._store.condemn(target.shelf, target.slot, target.sequence, str(error))
        else:
            log.error("read_failed", reason=repr(error))
        return PartStatus.FAILED

    def check_integrity(self) -> list[str]:
        """What is wrong, in words."""
        sending = sum(len(buffer) for buffer in self._sending.values())
        if sending > self.buffers.taken_bytes:
            return [f"{sending} bytes are being sent, {self.buffers.taken_bytes} were taken"]
        return []


def _reading(target: _Target) -> Callable[[], int]:
    """Fills `target.view`; the checksum of what is in it."""
    segment, within = target.shelf.place(target.slot)
    assert target.view is not None
    if target.part.length == target.shelf.geometry.payload_bytes:
        return partial(_read_whole, segment, within, target.view, target.buffer, target.checksum)
    return partial(_read_range, segment, within, target.view, target.part.offset, target.checksum)


def _read_whole(segment: Segment, slot: int, view: memoryview, buffer: memoryview | None, checksum: int) -> int:
    segment.read_verified(slot, view if buffer is None else buffer, checksum)
    return checksum


def _read_range(segment: Segment, slot: int, view: memoryview, offset: int, checksum: int) -> int:
    piece = segment.read_own(slot, checksum)[offset : offset + len(view)]
    value = crc32c(piece)
    copy(view, piece)
    return value
