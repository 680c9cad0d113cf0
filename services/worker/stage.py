"""A worker's stage: shared memory divided in full-block slots, filled and read by peers under leases.

Life of a slot: slot_table.py. Life of a lease: granted --> ended, by `revoke`, `release`, the last owner of one of its slots,
or its time.

Invariants:
- A slot is free, kept, owned or in limbo; `reserve` hands out free and kept ones only, or refuses at once.
- What is kept is named by the key of the block whose whole KV it holds, so that only who knows the block's chain, its tenant's
  salt and all, can find it (common/blocks.py). Nobody writes to it, and several requests may own it at once (`adopt`).
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
from collections.abc import Callable, Sequence

from common.blocks import BlockKey
from common.disk.pages import PAGE_BYTES
from common.errors import InvalidRequest, LeaseRejected, Overloaded
from common.transport.counters import Counters
from common.transport.interface import TOKEN_BYTES, LeaseToken, Part, PartStatus, Span
from common.transport.memory import Checksums, copy_with_checksum, crc32c_in_turns
from common.transport.region import Region
from services.worker.lease import Lease, Right
from services.worker.slot_table import SlotTable
from services.worker.writes import Write, Writes

LEASES_MAX = 8192
PARK_S = 0.5  # less than a connection takes to think that its peer hangs (common/transport/connection.py SETTLE_S)


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
        self._slots = SlotTable(slots, self._may_be_written)
        self._leases: dict[LeaseToken, Lease] = {}
        self._writes = Writes(self._write_ended)

    # Slots

    @property
    def slots_total(self) -> int:
        return self._slots.total

    @property
    def slots_free(self) -> int:
        """That `reserve` could give; what is kept among them."""
        return self._slots.free

    def reserve(self, count: int) -> list[int]:
        """Takes `count` slots, or raises `Overloaded` at once."""
        taken = self._slots.take(count)
        if taken is None:
            raise Overloaded(
                f"stage: {count} slots asked for, {self.slots_free} of {self.slots_total} are free", retry_after_s=1.0
            )
        return taken

    def adopt(self, keys: Sequence[BlockKey]) -> list[int]:
        """Takes the slots of the longest prefix of `keys` that is held here, to read them. Others may own them too."""
        return self._slots.adopt(keys)

    def held_blocks(self, keys: Sequence[BlockKey]) -> int:
        """How many blocks `adopt` would find at this moment."""
        return self._slots.count(keys)

    def keep(self, slots: Sequence[int], keys: Sequence[BlockKey]) -> None:
        """These owned slots hold the whole, verified KV of these blocks, and their owner writes to them no more: they can be
        adopted from now on, and stay when they are freed until their memory is needed."""
        self._slots.name(slots, keys)

    def distrust(self, slots: Sequence[int]) -> None:
        """Nobody adopts these owned slots any more."""
        self._slots.forget(slots)

    def free(self, slots: Sequence[int]) -> None:
        """Gives slots back; leases that name one which nobody owns any more end. One that may still be written is kept aside."""
        gone = self._slots.give_back(slots)
        for lease in [lease for lease in self._leases.values() if not gone.isdisjoint(lease.slots)]:
            self.release(lease.token)
        self._slots.settle()

    def span(self, slot: int, offset: int = 0, length: int | None = None) -> Span:
        """Bytes of a slot as a span of the stage's region; the whole slot by default."""
        length = self.bytes_per_slot - offset if length is None else length
        if not self._slots.owns(slot) or offset < 0 or length < 0 or offset + length > self.bytes_per_slot:
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

    def _may_be_written(self, slot: int) -> bool:
        return any(self._writes.at(slot)) or self.region.held(Span(slot * self._stride, self._stride))

    # Leases

    def grant(self, slots: Sequence[int], right: Right, ttl_s: float, *, lengths: Sequence[int] | None = None) -> Lease:
        """A lease on owned slots. `lengths`: bytes per item, the whole slot by default."""
        self.sweep()
        if len(self._leases) >= LEASES_MAX:
            raise Overloaded(f"stage: {LEASES_MAX} leases are out", retry_after_s=1.0)
        lengths = [self.bytes_per_slot] * len(slots) if lengths is None else lengths
        assert len(lengths) == len(slots) and all(0 < length <= self.bytes_per_slot for length in lengths)
        assert all(map(self._slots.owns, slots)), f"not owned: {slots}"
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
        lease.end()
        self._writes.take_back(token)

    async def revoke(self, token: LeaseToken) -> None:
        """Ends a lease; idempotent. When this returns, no write lands in its slots any more."""
        writes = self._writes.under(token)
        self.release(token)
        for write in writes:
            await write.over.wait()

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

    def _write_ended(self) -> None:
        self.counters.write.end()
        self._slots.settle()

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
        if lease.coverage[part.item].overlaps(start, end) or any(write.overlaps(start, end) for write in self._writes.at(slot)):
            return PartStatus.REJECTED
        if self.region.held(self.span(slot, start, part.length)):
            return PartStatus.FULL
        write = Write(lease, part, self.view(slot, start, part.length))
        self._writes.begin(write)
        self.counters.write.begin()
        return write.buffer

    async def commit(
        self, token: LeaseToken, parts: Sequence[Part], buffers: Sequence[memoryview], checksums: Sequence[Checksums]
    ) -> list[PartStatus]:
        statuses = [self._commit(buffer) for buffer in buffers]
        self.counters.write.count(statuses, [part.length for part in parts])
        return statuses

    def _commit(self, buffer: memoryview) -> PartStatus:
        write = self._writes.through(buffer)
        if write is None:
            return PartStatus.REJECTED  # taken back
        self._writes.end(write)
        if self._live(write.lease.token) is None:
            return PartStatus.REJECTED
        write.lease.came(write.part)
        return PartStatus.OK

    def abort(self, token: LeaseToken, parts: Sequence[Part], buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            if write := self._writes.through(buffer):
                self._writes.end(write)

    # Care

    def check_integrity(self) -> None:
        """Raises `AssertionError` when an invariant is broken."""
        self._slots.check_integrity()
        assert self.slots_total * self._stride == self.region.size
        for lease in self._leases.values():
            assert lease.live and all(map(self._slots.owns, lease.slots)), lease
            lease.check_integrity()
        self._writes.check_integrity()

    def close(self) -> None:
        """Ends all leases and gives the memory back."""
        for token in list(self._leases):
            self.release(token)
        self.region.close()

    def __repr__(self) -> str:
        return f"Stage({self._slots!r}, leases={len(self._leases)})"
