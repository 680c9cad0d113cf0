"""Which blocks are taken in, and what becomes of them.

1. `admit` answers each block on offer: it finds a slot, or says why not, and pins what the block hangs on.
2. `filled` makes a durable block visible; `given_up` takes the slot of one that won't come back.
3. `end` undoes what a write lease still holds.

Invariant: `reserved_bytes`, at most `reserved_bytes_max`, is the space of all blocks between 1 and 2.
"""

from collections.abc import Sequence

from common.blocks import KEY_BYTES
from common.storage import Admission, BlockMeta
from services.kvstore.doorkeeper import Doorkeeper
from services.kvstore.leases import WriteLease
from services.kvstore.metrics import Metrics
from services.kvstore.shelf import Shelf
from services.kvstore.space import Space
from services.kvstore.write_item import WriteItem, WriteState


class Intake:
    """Belongs to the event loop; never waits."""

    def __init__(self, space: Space, metrics: Metrics, reserved_bytes_max: int, doorkeeper: Doorkeeper | None = None) -> None:
        """`doorkeeper`: of second-touch admission; None admits everything."""
        self._doorkeeper = doorkeeper
        self.reserved_bytes = 0
        self._space = space
        self._metrics = metrics
        self._reserved_bytes_max = reserved_bytes_max

    def room(self, shelf: Shelf, offers: Sequence[BlockMeta]) -> int:
        """How many of these blocks may need a slot."""
        wanted = sum(shelf.index.find(offer.key) is None and offer.key not in shelf.in_flight for offer in offers)
        return min(wanted, max(0, self._reserved_bytes_max - self.reserved_bytes) // shelf.geometry.slot_bytes)

    def admit(self, lease: WriteLease, offers: Sequence[BlockMeta]) -> list[Admission]:
        """One admission per block; what is accepted has a slot, an item of the lease, and its parent pinned."""
        admissions: list[Admission] = []
        dropped: set[bytes] = set()
        for offer in offers:
            admission, item = self._admit(lease, offer, dropped)
            if admission is Admission.DROPPED:
                dropped.add(offer.key)
            admissions.append(admission)
            lease.items.append(item)
        self._metrics.dropped_writes += admissions.count(Admission.DROPPED)
        self._metrics.present_writes += admissions.count(Admission.PRESENT) + admissions.count(Admission.IN_FLIGHT)
        return admissions

    def _admit(self, lease: WriteLease, offer: BlockMeta, dropped: set[bytes]) -> tuple[Admission, WriteItem | None]:
        shelf = lease.shelf
        malformed = len(offer.key) != KEY_BYTES or len(offer.parent) != KEY_BYTES or offer.key == offer.parent
        if malformed or offer.length != shelf.geometry.payload_bytes:
            return Admission.INVALID, None
        stored = shelf.index.find(offer.key)
        if stored is not None:
            self._keep(lease, stored)
            shelf.index.terms.keep_until(stored, lease.written_s + lease.keep_s)
            return Admission.PRESENT, None
        if offer.key in shelf.in_flight:
            return Admission.IN_FLIGHT, None
        if not self._welcome(shelf, offer):
            self._metrics.first_touches += 1
            return Admission.DROPPED, None
        if offer.parent in dropped or self.reserved_bytes + shelf.geometry.slot_bytes > self._reserved_bytes_max:
            return Admission.DROPPED, None
        parent = shelf.index.find(offer.parent)
        if parent is not None:
            self._keep(lease, parent)
        slot = self._space.take(shelf, offer.parent, lease.tenant)
        if slot is None:
            return Admission.DROPPED, None
        item = WriteItem(slot, offer.key, offer.parent)
        shelf.tenants.charge(lease.tenant, shelf.geometry.slot_bytes)
        shelf.in_flight[offer.key] = item
        self.reserved_bytes += shelf.geometry.slot_bytes
        return Admission.ACCEPTED, item

    def _welcome(self, shelf: Shelf, offer: BlockMeta) -> bool:
        """Whether admission lets the block in: all, or those that knocked before, or go on where something was found."""
        if self._doorkeeper is None:
            return True
        known = self._doorkeeper.knocked_before(offer.key)
        parent = shelf.index.find(offer.parent)
        return known or (parent is not None and shelf.index.proven(parent)) or offer.parent in shelf.in_flight

    def _keep(self, lease: WriteLease, slot: int) -> None:
        """Pins a block that what is being written hangs on."""
        lease.shelf.index.pin(slot)
        lease.pins.append(slot)

    def filled(self, lease: WriteLease, items: Sequence[WriteItem], checksums: Sequence[int], sequences: Sequence[int]) -> None:
        """The items are durable. Stored even if their lease ended meanwhile: the bytes are right."""
        shelf = lease.shelf
        for item, checksum, sequence in zip(items, checksums, sequences, strict=True):
            item.step("done")
            shelf.store(item, checksum, sequence, lease.tenant, lease.written_s + lease.keep_s)
            if not lease.ended:
                self._keep(lease, item.slot)
        self.reserved_bytes -= len(items) * shelf.geometry.slot_bytes
        self._metrics.writes += len(items)
        self._metrics.written_bytes += len(items) * shelf.geometry.payload_bytes
        self._metrics.disk_written_bytes += len(items) * shelf.geometry.slot_bytes

    def given_up(self, lease: WriteLease, items: Sequence[WriteItem], event: str, *, failed: bool = False) -> None:
        """The items will not be filled: `event` is "close" or "fail"."""
        for item in items:
            item.step(event)
            lease.shelf.give_back(item, lease.tenant, failed=failed)
        self.reserved_bytes -= len(items) * lease.shelf.geometry.slot_bytes

    def end(self, lease: WriteLease) -> None:
        """Frees what was never begun and unpins; what is on its way is settled when it arrives."""
        unbegun = [item for item in lease.items if item is not None and item.state is WriteState.RESERVED]
        self.given_up(lease, unbegun, "close")
        for slot in lease.pins:
            lease.shelf.index.unpin(slot)
        lease.pins.clear()
