"""Where leased blocks lie, for readers on this host that read the disk themselves.

Only whole blocks have a checksum to go with them; a range is read through the store. The lease keeps the slot
from being written to. A block that the reader finds damaged comes back as an ordinary read, which
decides what becomes of it: a reader's word alone condemns nothing.
"""

from collections.abc import Sequence

from common.logs import Log
from common.transport.interface import Extent, LeaseToken, Part, PartStatus
from services.kvstore.leases import ReadLease
from services.kvstore.store import Store

log = Log("extents")


def locate(store: Store, token: LeaseToken, parts: Sequence[Part]) -> list[Extent | PartStatus]:
    """As `ExtentArea.locate`."""
    lease = store.leases.get(token)
    if not isinstance(lease, ReadLease):
        store.metrics.rejected_parts += len(parts)
        return [PartStatus.REJECTED] * len(parts)
    return [_locate(store, lease, part) for part in parts]


def _locate(store: Store, lease: ReadLease, part: Part) -> Extent | PartStatus:
    shelf = lease.shelf
    if not 0 <= part.item < len(lease.slots) or part.offset or part.length != shelf.geometry.payload_bytes:
        return PartStatus.REJECTED
    slot, sequence = lease.slots[part.item], lease.sequences[part.item]
    if not shelf.index.holds(slot) or shelf.index.sequence(slot) != sequence:
        return PartStatus.MISSING
    segment, within = shelf.place(slot)
    try:
        fd = segment.reading_fd()
    except OSError as error:
        log.warning("no_extent", path=str(segment.path), reason=str(error))
        return PartStatus.FAILED
    store.metrics.located_blocks += 1
    store.metrics.located_bytes += part.length
    return Extent(fd, segment.payload_offset(within), shelf.index.checksum(slot))
