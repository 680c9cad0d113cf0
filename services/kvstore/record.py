"""The disk format, bytes only: segment headers and slot headers (docs/formats.md draws them).

A segment file is one header page and then `slot_count` slots of `slot_bytes`; a slot is one header
page and the payload, zero-padded to a whole page. All integers are little-endian, every page is
4096 bytes, and the last four bytes of a header page are the CRC-32C of the rest of it.

Invariants:
- A header names its own place (segment number, slot number): a misdirected write is not a block.
- Whatever doesn't decode is `None`: the caller counts it and treats it as a miss.
- A reader refuses a version or a flag that it doesn't know, so a later format is never misread.
"""

import struct
from enum import Enum, auto
from functools import cached_property

import msgspec

from common.blocks import KEY_BYTES
from common.transport.memory import crc32c

PAGE_BYTES = 4096  # the largest logical block size of common SSDs, and the memory page
VERSION = 1
SEGMENT_MAGIC = b"PNSTKSEG"
SLOT_MAGIC = b"PNSTKBLK"
STORE_MAGIC = b"PNSTKSTO"
STORE_ID_BYTES = 16
DISKS_MAX = 4096  # numbers that a store gives out in its life
PAYLOAD_BYTES_MAX = 64 << 20  # one request of the byte plane carries a whole block
SLOTS_MAX = 1 << 20  # per segment

_SEGMENT = struct.Struct("<8sII32sIIII")
_SLOT = struct.Struct("<8sII32s32s32sQIIII")
_TERMS = struct.Struct("<16sQI")
_TERMS_OFFSET = 4032  # in a slot page, behind the longest chunk table
_STORE = struct.Struct("<8sII16sII")
_CRC = struct.Struct("<I")
_CRC_OFFSET = PAGE_BYTES - _CRC.size


class Geometry(msgspec.Struct, frozen=True, dict=True):
    """The sizes that all segments of a namespace share."""

    payload_bytes: int
    slots_per_segment: int

    @cached_property
    def padded_bytes(self) -> int:
        """The payload in whole pages."""
        return pages(self.payload_bytes)

    @cached_property
    def slot_bytes(self) -> int:
        return PAGE_BYTES + self.padded_bytes

    @cached_property
    def segment_bytes(self) -> int:
        return PAGE_BYTES + self.slots_per_segment * self.slot_bytes

    def slot_offset(self, slot: int) -> int:
        """Where slot number `slot` of a segment starts in its file."""
        return PAGE_BYTES + slot * self.slot_bytes


class SegmentHeader(msgspec.Struct, frozen=True):
    """Page 0 of a segment file."""

    namespace: bytes
    geometry: Geometry
    segment: int


class SlotHeader(msgspec.Struct, frozen=True):
    """The first page of a slot: which block this is, and where it was meant to lie.

    `sequence` orders all writes of a store, across namespaces.
    """

    namespace: bytes
    key: bytes
    parent: bytes
    sequence: int
    payload_bytes: int
    payload_crc32c: int
    slot: int
    segment: int
    tenant: bytes = bytes(16)  # who it belongs to (tenants.py); zeros: nobody
    written_s: int = 0  # the store's time when it was written; 0 when it is kept for ever
    keep_s: int = 0  # how long it is kept from then on; 0: for ever


class StoreIdentity(msgspec.Struct, frozen=True):
    """The STORE file of a data directory: which store it belongs to, and as which of its directories."""

    store: bytes  # random, the same in all directories of a store
    disk: int  # this directory's number
    disks: int  # how many numbers the store has given out: [0, disks)


class Unreadable(Enum):
    """Why a header page is not a header that may be used."""

    EMPTY = auto()  # a slot that was never written, or was erased
    DAMAGED = auto()  # magic or checksum
    NEWER = auto()  # a version or flag of a later format


def pages(length: int) -> int:
    """`length` rounded up to whole pages."""
    return -(-length // PAGE_BYTES) * PAGE_BYTES


def encode_segment(header: SegmentHeader) -> bytes:
    geometry = header.geometry
    return _sealed(
        _SEGMENT.pack(
            SEGMENT_MAGIC,
            VERSION,
            0,
            header.namespace,
            geometry.payload_bytes,
            geometry.slot_bytes,
            geometry.slots_per_segment,
            header.segment,
        )
    )


def decode_segment(page: bytes | memoryview) -> SegmentHeader | Unreadable:
    """The header in `page`, or why there is none."""
    fault = _fault(page, SEGMENT_MAGIC)
    if fault is not None:
        return fault
    _, _, _, namespace, payload_bytes, slot_bytes, slot_count, segment = _SEGMENT.unpack_from(page)
    geometry = Geometry(payload_bytes, slot_count)
    if not 0 < payload_bytes <= PAYLOAD_BYTES_MAX or not 0 < slot_count <= SLOTS_MAX or geometry.slot_bytes != slot_bytes:
        return Unreadable.DAMAGED
    return SegmentHeader(namespace, geometry, segment)


def encode_slot(header: SlotHeader) -> bytes:
    """The page of one block without a chunk table; slot_pages.py makes those of a group."""
    assert len(header.key) == len(header.parent) == len(header.namespace) == KEY_BYTES
    fields = _SLOT.pack(
        SLOT_MAGIC,
        VERSION,
        0,
        header.namespace,
        header.key,
        header.parent,
        header.sequence,
        header.payload_bytes,
        header.payload_crc32c,
        header.slot,
        header.segment,
    )
    return _sealed(fields.ljust(_TERMS_OFFSET, b"\0") + _TERMS.pack(header.tenant, header.written_s, header.keep_s))


def decode_slot(page: bytes | memoryview) -> SlotHeader | Unreadable:
    """The header in `page`, or why there is none. Whether it belongs here is the caller's to check."""
    fault = _fault(page, SLOT_MAGIC)
    if fault is not None:
        return fault
    _, _, _, namespace, key, parent, sequence, payload_bytes, payload_crc32c, slot, segment = _SLOT.unpack_from(page)
    terms = _TERMS.unpack_from(page, _TERMS_OFFSET)
    return SlotHeader(namespace, key, parent, sequence, payload_bytes, payload_crc32c, slot, segment, *terms)


def encode_store(identity: StoreIdentity) -> bytes:
    assert len(identity.store) == STORE_ID_BYTES and 0 <= identity.disk < identity.disks <= DISKS_MAX
    return _sealed(_STORE.pack(STORE_MAGIC, VERSION, 0, identity.store, identity.disk, identity.disks))


def decode_store(page: bytes | memoryview) -> StoreIdentity | Unreadable:
    """The identity in the first page of a STORE file, or why there is none."""
    if len(page) < PAGE_BYTES:
        return Unreadable.DAMAGED
    fault = _fault(page, STORE_MAGIC)
    if fault is not None:
        return Unreadable.DAMAGED if fault is Unreadable.EMPTY else fault
    _, _, _, store, disk, disks = _STORE.unpack_from(page)
    return StoreIdentity(store, disk, disks) if disk < disks <= DISKS_MAX else Unreadable.DAMAGED


def _sealed(fields: bytes) -> bytes:
    body = fields.ljust(_CRC_OFFSET, b"\0")
    return body + _CRC.pack(crc32c(body))


def _fault(page: bytes | memoryview, magic: bytes) -> Unreadable | None:
    if bytes(page[:8]) == bytes(8):
        return Unreadable.EMPTY
    if bytes(page[:8]) != magic or _CRC.unpack_from(page, _CRC_OFFSET)[0] != crc32c(page[:_CRC_OFFSET]):
        return Unreadable.DAMAGED
    version, flags = struct.unpack_from("<II", page, 8)
    return Unreadable.NEWER if version != VERSION or flags else None
