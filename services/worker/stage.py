"""A worker's stage: shared memory divided in full-block slots, filled and read by peers under leases.

Life of a slot: free --reserve--> owned --free--> free, or limbo while somebody may still write to it.
Life of a lease: granted --> ended, by `revoke`, `release`, `free` of one of its slots, or its time.

Invariants:
- A slot is free, owned or in limbo; `reserve` hands out free slots only, or refuses at once.
- A peer writes only under a live WRITE or SHARE lease. Ending it takes every buffer that is out back on the spot
  (its memoryview is released); one that a system call in a thread is writing can't be released, and is
  waited for: by `revoke`, or by its slot in limbo.
- An item is filled when every byte of its announced length was committed, each verified against its
  CRC-32C. What is committed is never overwritten: a repeated write is OK and dropped.

What a SHARE lease allows is in lease.py. A read that waits comes back EXPIRED after `PARK_S`, and may be asked again: so
nothing that a peer asks for keeps its memory, or a place within the bounds, for longer.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Sequence

from common.disk.pages import PAGE_BYTES
from common.errors import InvalidRequest, LeaseRejected, Overloaded
from common.transport.counters import Counters
from common.transport.interface import TOKEN_BYTES, LeaseToken, Part, PartStatus, Span
from common.transport.memory import Checksums, copy_with_checksum, crc32c_in_turns
from common.transport.region import Region
from services.worker.lease import Lease, Right

LEASES_MAX = 8192
PARK_S = 0.5  # less than a connection takes to think that its peer hangs (common/transport/connection.py SETTLE_S)


class _Write:
    """A buffer that is out at the byte-plane server."""

    def __init__(self, lease: Lease, part: Part, buffer: memoryview) -> None:
        self.lease, self.part, self.buffer = lease, part, buffer
        self.slot = lease.slots[part.item]
        self.over = asyncio.Event()

    def overlaps(self, start: int, end: int) -> bool:
        return start < self.part.offset + self.part.length and self.part.offset < end

    def take_back(self) -> bool:
        """True: nothing can be written through it any more."""
        try:
            self.buffer.release()
        except BufferError:
            return False
        return True


class Stage:
    """An `Area` of slots. All methods are called from one event loop."""

    def __init__(
        self, slots: int, bytes_per_slot: int, *, clock: Callable[[], float] = time.monotonic, prefault: bool = True
    ) -> None:
        self.bytes_per_slot = bytes_per_slot
        self.counters = Counters()
        self._stride = -(-bytes_per_slot // PAGE_BYTES) * PAGE_BYTES  # slots start on pages: fit for O_DIRECT
        self.region = Region(slots * self._stride, name="penstock-stage", prefault=prefault)
        self._clock = clock
        self._free = list(range(slots - 1, -1, -1))
        self._owned: set[int] = set()
        self._limbo: set[int] = set()
        self._leases: dict[LeaseToken, Lease] = {}
        self._writes: dict[int, _Write] = {}  # by id() of the buffer, which the entry keeps alive
        self._writing: dict[int, set[_Write]] = {}  # the same by slot

    # Slots

    @property
    def slots_total(self) -> int:
        return len(self._free) + len(self._owned) + len(self._limbo)

    @property
    def slots_free(self) -> int:
        return len(self._free)

    def reserve(self, count: int) -> list[int]:
        """Takes `count` slots, or raises `Overloaded` at once."""
        self._leave_limbo()
        if count > len(self._free):
            raise Overloaded(
                f"stage: {count} slots asked for, {len(self._free)} of {self.slots_total} are free", retry_after_s=1.0
            )
        taken = [self._free.pop() for _ in range(count)]
        self._owned.update(taken)
        return taken

    def free(self, slots: Sequence[int]) -> None:
        """Gives slots back; leases that name them end. A slot that may still be written is kept aside until it can't."""
        assert self._owned.issuperset(slots) and len(set(slots)) == len(slots), f"not owned, or twice: {slots}"
        gone = set(slots)
        for lease in [lease for lease in self._leases.values() if not gone.isdisjoint(lease.slots)]:
            self.release(lease.token)
        self._owned -= gone
        self._limbo |= gone
        self._leave_limbo()

    def span(self, slot: int, offset: int = 0, length: int | None = None) -> Span:
        """Bytes of a slot as a span of the stage's region; the whole slot by default."""
        length = self.bytes_per_slot - offset if length is None else length
        if slot not in self._owned or offset < 0 or length < 0 or offset + length > self.bytes_per_slot:
            raise InvalidRequest(
                f"slot {slot} [{offset}, {offset + length}): expected an owned slot and [0, {self.bytes_per_slot})"
            )
        return Span(slot * self._stride + offset, length)

    @property
    def bytes_between_slots(self) -> int:
        return self._stride

    def memory(self) -> memoryview:
        """All of it, for who computes in place: slot i begins at `i * bytes_between_slots`."""
        return self.region.view(Span(0, self.region.size))

    def view(self, slot: int, offset: int = 0, length: int | None = None) -> memoryview:
        """The same bytes, writable."""
        return self.region.view(self.span(slot, offset, length))

    def _leave_limbo(self) -> None:
        for slot in sorted(self._limbo - self._writing.keys()):
            if not self.region.held(Span(slot * self._stride, self._stride)):
                self._limbo.discard(slot)
                self._free.append(slot)

    # Leases

    def grant(self, slots: Sequence[int], right: Right, ttl_s: float, *, lengths: Sequence[int] | None = None) -> Lease:
        """A lease on owned slots. `lengths`: bytes per item, the whole slot by default."""
        self.sweep()
        if len(self._leases) >= LEASES_MAX:
            raise Overloaded(f"stage: {LEASES_MAX} leases are out", retry_after_s=1.0)
        lengths = [self.bytes_per_slot] * len(slots) if lengths is None else lengths
        assert len(lengths) == len(slots) and all(0 < length <= self.bytes_per_slot for length in lengths)
        assert self._owned.issuperset(slots), f"not owned: {slots}"
        lease = Lease(LeaseToken(os.urandom(TOKEN_BYTES)), right, slots, lengths, self._clock() + ttl_s)
        self._leases[lease.token] = lease
        return lease

    def renew(self, token: LeaseToken, ttl_s: float) -> None:
        """From now on. Raises `LeaseRejected` when it has ended."""
        lease = self._live(token)
        if lease is None:
            raise LeaseRejected("stage: no such lease, or it has ended")
        lease.expires_at_s = self._clock() + ttl_s

    def release(self, token: LeaseToken) -> None:
        """Ends a lease without waiting; idempotent. Nothing is committed under it any more."""
        lease = self._leases.pop(token, None)
        if lease is None:
            return
        lease.live = False
        for item in range(len(lease.slots)):
            lease.wake(item)
        for write in [write for write in self._writes.values() if write.lease is lease]:
            if write.take_back():
                self._forget(write)

    async def revoke(self, token: LeaseToken) -> None:
        """Ends a lease; idempotent. When this returns, no write lands in its slots any more."""
        writes = [write for write in self._writes.values() if write.lease.token == token]
        self.release(token)
        for write in writes:
            await write.over.wait()

    # What the owner does with the items of a SHARE lease. After the lease's end nothing of this matters.

    def await_own(self, lease: Lease, items: Iterable[int]) -> None:
        """The owner is going to fill them, also those of which the holder has filled a part."""
        assert lease.right is Right.SHARE
        lease.awaited.update(item for item in items if not lease.is_filled(item))

    def fill(self, lease: Lease, item: int) -> None:
        """The owner has filled an item."""
        lease.awaited.discard(item)
        lease.coverage[item].add(0, lease.lengths[item])
        lease.wake(item)

    def give_up(self, lease: Lease, item: int) -> None:
        """The owner can't fill it: the holder may, unless what it had under way has filled it by now."""
        if not lease.is_filled(item):
            lease.awaited.discard(item)
            lease.given_up.add(item)
            lease.wake(item)

    def sweep(self) -> None:
        """Ends leases whose time is over."""
        now = self._clock()
        for lease in [lease for lease in self._leases.values() if lease.expires_at_s <= now]:
            self.release(lease.token)

    def _live(self, token: LeaseToken) -> Lease | None:
        lease = self._leases.get(token)
        if lease is not None and lease.expires_at_s <= self._clock():
            self.release(token)
            return None
        return lease

    def _forget(self, write: _Write) -> None:
        if self._writes.pop(id(write.buffer), None):
            self._writing[write.slot].discard(write)
            if not self._writing[write.slot]:
                del self._writing[write.slot]
            self.counters.write.end()
            write.over.set()
            self._leave_limbo()

    # The area

    def _locate(self, token: LeaseToken, part: Part, right: Right) -> Lease | None:
        """The lease, if it is live and gives this right to this range."""
        lease = self._live(token)
        if lease is None or lease.right not in (right, Right.SHARE) or part.item >= len(lease.slots):
            return None
        return lease if part.offset + part.length <= lease.lengths[part.item] else None

    async def read(
        self, token: LeaseToken, parts: Sequence[Part], into: Sequence[memoryview] | None
    ) -> list[tuple[PartStatus, memoryview | None, int]]:
        results: list[tuple[PartStatus, memoryview | None, int]] = []
        until = asyncio.get_running_loop().time() + PARK_S
        with self.counters.read.transfer():
            for index, part in enumerate(parts):
                lease = self._locate(token, part, Right.READ)
                if lease is None:
                    results.append((PartStatus.REJECTED, None, 0))
                    continue
                status = await lease.readable(part, until)
                if status is not PartStatus.OK:
                    results.append((status, None, 0))
                    continue
                view = self.view(lease.slots[part.item], part.offset, part.length)
                if into is None:
                    results.append((PartStatus.OK, view, await crc32c_in_turns(view)))
                else:
                    results.append((PartStatus.OK, into[index], await copy_with_checksum(into[index], view)))
                await asyncio.sleep(0)  # a long request must not keep the loop to itself
        self.counters.read.count([status for status, _, _ in results], [part.length for part in parts])
        return results

    def done_reading(self, token: LeaseToken, views: Sequence[memoryview]) -> None:
        """Nothing to give back: a slot that was freed meanwhile shows as a checksum that doesn't match."""

    def write_buffers(self, token: LeaseToken, parts: Sequence[Part]) -> list[memoryview | PartStatus]:
        return [self._write_buffer(token, part) for part in parts]

    def _write_buffer(self, token: LeaseToken, part: Part) -> memoryview | PartStatus:
        lease = self._locate(token, part, Right.WRITE)
        if lease is None:
            return PartStatus.REJECTED
        slot, start, end = lease.slots[part.item], part.offset, part.offset + part.length
        if part.item in lease.awaited or lease.coverage[part.item].contains(start, end):
            return PartStatus.OK
        if lease.coverage[part.item].overlaps(start, end) or any(
            write.overlaps(start, end) for write in self._writing.get(slot, ())
        ):
            return PartStatus.REJECTED
        if self.region.held(self.span(slot, start, part.length)):
            return PartStatus.FULL
        write = _Write(lease, part, self.view(slot, start, part.length))
        self._writes[id(write.buffer)] = write
        self._writing.setdefault(slot, set()).add(write)
        self.counters.write.begin()
        return write.buffer

    async def commit(
        self, token: LeaseToken, parts: Sequence[Part], buffers: Sequence[memoryview], checksums: Sequence[Checksums]
    ) -> list[PartStatus]:
        statuses = [self._commit(buffer) for buffer in buffers]
        self.counters.write.count(statuses, [part.length for part in parts])
        return statuses

    def _commit(self, buffer: memoryview) -> PartStatus:
        write = self._writes.get(id(buffer))
        if write is None:
            return PartStatus.REJECTED  # taken back
        self._forget(write)
        if self._live(write.lease.token) is None:
            return PartStatus.REJECTED
        lease, part = write.lease, write.part
        lease.coverage[part.item].add(part.offset, part.offset + part.length)
        if lease.is_filled(part.item):
            lease.awaited.discard(part.item)
            lease.wake(part.item)
        return PartStatus.OK

    def abort(self, token: LeaseToken, parts: Sequence[Part], buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            if write := self._writes.get(id(buffer)):
                self._forget(write)

    # Care

    def check_integrity(self) -> None:
        """Raises `AssertionError` when an invariant is broken."""
        free = set(self._free)
        assert (
            len(free) == len(self._free) and not free & self._owned and not free & self._limbo and not self._owned & self._limbo
        )
        assert self.slots_total * self._stride == self.region.size
        for lease in self._leases.values():
            assert lease.live and self._owned.issuperset(lease.slots), lease
            lease.check_integrity()
        assert sum(map(len, self._writing.values())) == len(self._writes)
        for write in self._writes.values():
            assert write.slot not in free, write.slot
            assert not write.lease.coverage[write.part.item].overlaps(write.part.offset, write.part.offset + write.part.length)

    def close(self) -> None:
        """Ends all leases and gives the memory back."""
        for token in list(self._leases):
            self.release(token)
        self.region.close()

    def __repr__(self) -> str:
        return f"Stage(free={len(self._free)}, owned={len(self._owned)}, limbo={len(self._limbo)}, leases={len(self._leases)})"
