"""Blocks on disk as rows of an array: what header pages say, and what a checkpoint keeps of them.

A row is an `Entry`: the block in one slot of one segment. Header pages are decoded many at a time; each is
believed, or has a `Verdict` that says why it isn't.
"""

from enum import IntEnum

import google_crc32c
import msgspec
import numpy as np
import numpy.typing as npt

from services.kvstore.record import SLOT_MAGIC, VERSION, Geometry
from services.kvstore.slot_pages import CRC_OFFSET, PAGE

Entries = npt.NDArray[np.void]  # rows of ENTRY
TENANT_BYTES = 16
PROVEN = 1  # flag of an entry: a lookup found the block, or one that it hangs on (eviction.py)

ENTRY = np.dtype(
    [
        ("slot", "<u4"),  # within the segment
        ("checksum", "<u4"),  # CRC-32C of the payload
        ("sequence", "<u8"),
        ("tick", "<u8"),  # the number of the write that came next when the block was last used
        ("key", "<u8", (4,)),
        ("parent", "<u8", (4,)),
        ("tenant", "V16"),
        ("expires_s", "<u4"),  # in seconds since 1970; 0: never
        ("flags", "<u4"),
    ]
)


class Verdict(IntEnum):
    """What a slot's header page is."""

    BLOCK = 0
    EMPTY = 1  # never written, or erased
    DAMAGED = 2  # magic or checksum
    NEWER = 3  # a version or flag of a later format
    FOREIGN = 4  # of another namespace, place or size
    UNREADABLE = 5


class Believed:
    """Entries of the pages that hold blocks, one verdict per page, and the latest time at which a block was written."""

    def __init__(self, entries: Entries, verdicts: npt.NDArray[np.uint8], written_s: int) -> None:
        self.entries = entries
        self.verdicts = verdicts
        self.written_s = written_s


class HeaderPages(msgspec.Struct, frozen=True):
    """Header pages where they were read: one begins every `stride` bytes. `readable` says which of them could be read."""

    memory: memoryview
    stride: int
    readable: npt.NDArray[np.bool_]

    @property
    def rows(self) -> npt.NDArray[np.void]:
        return np.ndarray(len(self.memory) // self.stride, PAGE, self.memory, strides=(self.stride,))

    def checksums(self, which: npt.NDArray[np.intp]) -> npt.NDArray[np.uint32]:
        """Of these pages, without the checksum that each ends in."""
        pages = np.frombuffer(self.memory, np.uint8).reshape(-1, self.stride)[:, :CRC_OFFSET]
        return np.fromiter((google_crc32c.value(pages[i]) for i in which.tolist()), np.uint32, len(which))


def believe(pages: HeaderPages, namespace: bytes, geometry: Geometry, segment: int, first_slot: int) -> Believed:
    """Decodes the header pages of consecutive slots of a segment."""
    rows = pages.rows
    verdicts = np.full(len(rows), Verdict.BLOCK, np.uint8)
    verdicts[rows["magic"] != np.void(SLOT_MAGIC)] = Verdict.DAMAGED
    verdicts[rows["magic"] == np.void(bytes(8))] = Verdict.EMPTY
    verdicts[~pages.readable] = Verdict.UNREADABLE
    checked = np.flatnonzero(verdicts == Verdict.BLOCK)
    verdicts[checked[pages.checksums(checked) != rows["crc32c"][checked]]] = Verdict.DAMAGED
    sound = verdicts == Verdict.BLOCK
    verdicts[sound & ((rows["version"] != VERSION) | (rows["flags"] != 0))] = Verdict.NEWER
    slots = np.arange(first_slot, first_slot + len(rows))
    belongs = (rows["namespace"] == np.void(namespace)) & (rows["segment"] == segment)
    belongs &= (rows["slot"] == slots) & (rows["payload_bytes"] == geometry.payload_bytes)
    verdicts[(verdicts == Verdict.BLOCK) & ~belongs] = Verdict.FOREIGN
    blocks = rows[verdicts == Verdict.BLOCK]
    return Believed(_entries(blocks), verdicts, int(blocks["written_s"].max(initial=0)))


def _entries(rows: npt.NDArray[np.void]) -> Entries:
    out = np.zeros(len(rows), ENTRY)
    for name in ("slot", "checksum", "sequence", "key", "parent", "tenant"):
        out[name] = rows[name]
    out["tick"] = rows["sequence"]  # used when it was written
    expires_s = np.minimum(rows["written_s"] + rows["keep_s"], 0xFFFF_FFFF)
    out["expires_s"] = np.where(rows["keep_s"] == 0, 0, expires_s)
    return out
