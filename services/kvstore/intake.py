"""Which blocks are taken in, and what becomes of them.

1. `admit` answers each block on offer: it finds a slot, or says why not, and pins what the block hangs on.
2. `filled` makes a durable block visible; `given_up` takes the slot of one that won't come back.
3. `end` undoes what a write lease still holds.

Invariant: `reserved_bytes`, at most `reserved_bytes_max`, is the space of all blocks between 1 and 2.
"""

from collections import Counter
from collections.abc import Container, Sequence

from common.blocks import KEY_BYTES
from common.storage import Admission, BlockMeta
from services.kvstore.column import NONE
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
        keys = [offer.key for offer in offers if len(offer.key) == KEY_BYTES and offer.key not in shelf.in_flight]
        wanted = int((shelf.index.find_all(keys) == NONE).sum())
        return min(wanted, max(0, self._reserved_bytes_max - self.reserved_bytes) // shelf.geometry.slot_bytes)

    def admit(self, lease: WriteLease, offers: Sequence[BlockMeta]) -> list[Admission]:
        """One admission per block; what is accepted has a slot, an item of the lease, and its parent pinned."""
        shelf = lease.shelf
        admissions = self._choose(lease, offers)
        chosen = [i for i, admission in enumerate(admissions) if admission is Admission.ACCEPTED]
        slots = self._space.take(shelf, [offers[i] for i in chosen], lease.tenant) if chosen else []
        lease.items.extend([None] * len(offers))
        for i, slot in zip(chosen, slots, strict=False):
            offer = offers[i]
            lease.items[i] = shelf.in_flight[offer.key] = WriteItem(slot, offer.key, offer.parent)
        taken_bytes = len(slots) * shelf.geometry.slot_bytes
        shelf.tenants.charge(lease.tenant, taken_bytes)
        self.reserved_bytes += taken_bytes
        unplaced = {offers[i].key for i in chosen[len(slots) :]}
        if unplaced:
            admissions = [
                Admission.DROPPED if offer.key in unplaced else was for offer, was in zip(offers, admissions, strict=True)
            ]
        counts = Counter(admissions)
        self._metrics.dropped_writes += counts[Admission.DROPPED]
        self._metrics.present_writes += counts[Admission.PRESENT] + counts[Admission.IN_FLIGHT]
        return admissions

    def _choose(self, lease: WriteLease, offers: Sequence[BlockMeta]) -> list[Admission]:
        """One admission per block, as if there were slots enough; pins what is stored and what others will hang on."""
        shelf, admissions = lease.shelf, []
        length, slot_bytes = shelf.geometry.payload_bytes, shelf.geometry.slot_bytes
        sound = [len(offer.key) == len(offer.parent) == KEY_BYTES and offer.key != offer.parent for offer in offers]
        stored = iter(shelf.index.find_all([offer.key for offer, good in zip(offers, sound, strict=True) if good]).tolist())
        room = (self._reserved_bytes_max - self.reserved_bytes) // slot_bytes
        chosen: set[bytes] = set()
        dropped: set[bytes] = set()
        for offer, good in zip(offers, sound, strict=True):
            slot = next(stored) if good else NONE
            admission = Admission.ACCEPTED
            if not good or offer.length != length:
                admission = Admission.INVALID
            elif slot != NONE:
                self._keep(lease, slot)
                shelf.index.terms.keep_until(slot, lease.written_s + lease.keep_s)
                admission = Admission.PRESENT
            elif offer.key in shelf.in_flight or offer.key in chosen:
                admission = Admission.IN_FLIGHT
            elif self._doorkeeper is not None and not self._welcome(self._doorkeeper, shelf, offer, chosen):
                self._metrics.first_touches += 1
                admission = Admission.DROPPED
            elif offer.parent in dropped or len(chosen) >= room:
                admission = Admission.DROPPED
            else:
                chosen.add(offer.key)
                if offer.parent not in chosen and (parent := shelf.index.find(offer.parent)) is not None:
                    self._keep(lease, parent)
            if admission is Admission.DROPPED:
                dropped.add(offer.key)
            admissions.append(admission)
        return admissions

    @staticmethod
    def _welcome(doorkeeper: Doorkeeper, shelf: Shelf, offer: BlockMeta, chosen: Container[bytes]) -> bool:
        """Whether second-touch admission lets the block in: it knocked before, or goes on where something was found."""
        if doorkeeper.knocked_before(offer.key) or offer.parent in chosen or offer.parent in shelf.in_flight:
            return True
        parent = shelf.index.find(offer.parent)
        return parent is not None and shelf.index.proven(parent)

    def _keep(self, lease: WriteLease, slot: int) -> None:
        """Pins a block that what is being written hangs on."""
        lease.shelf.index.offers.pin(slot)
        lease.pins.append(slot)

    def filled(self, lease: WriteLease, items: Sequence[WriteItem], checksums: Sequence[int], sequences: Sequence[int]) -> None:
        """The items are durable. Stored even if their lease ended meanwhile: the bytes are right."""
        shelf = lease.shelf
        for item in items:
            item.step("done")
        if not lease.ended:
            slots = [item.slot for item in items]
            shelf.index.offers.pin_all(slots)
            lease.pins.extend(slots)
        shelf.store(items, checksums, sequences, lease.tenant, lease.written_s + lease.keep_s)
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
        lease.shelf.index.offers.unpin_all(lease.pins)
        lease.pins.clear()
