"""Header pages of many slots at once, as rows of an array: encoded before a write, decoded by a scan (entries.py).

The fields are those of record.py's `SlotHeader` and of docs/formats.md. A group of blocks that is written together shares
most of them, so a page costs its checksum and the copy into its slot's image.
"""

from collections.abc import Sequence

import google_crc32c
import numpy as np
import numpy.typing as npt

from services.kvstore.chunks import TABLE_OFFSET
from services.kvstore.key_table import words
from services.kvstore.record import PAGE_BYTES, SLOT_MAGIC, VERSION

Pages = npt.NDArray[np.uint8]  # [slot, PAGE_BYTES]
CRC_OFFSET = PAGE_BYTES - 4
PAGE = np.dtype(
    {
        "names": [
            "magic", "version", "flags", "namespace", "key", "parent", "sequence", "payload_bytes", "checksum", "slot", "segment",
            "tenant", "written_s", "keep_s", "crc32c",
        ],
        "formats": [
            "V8", "<u4", "<u4", "V32", ("<u8", (4,)), ("<u8", (4,)), "<u8", "<u4", "<u4", "<u4", "<u4", "V16", "<u8", "<u4", "<u4",
        ],
        "offsets": [0, 8, 12, 16, 48, 80, 112, 120, 124, 128, 132, 4032, 4048, 4056, CRC_OFFSET],
        "itemsize": PAGE_BYTES,
    }
)  # fmt: skip


class SlotPages:
    """The pages of a group. They say all but the sequence numbers until `seal`."""

    def __init__(
        self,
        keys: Sequence[bytes],
        parents: Sequence[bytes],
        checksums: Sequence[int],
        places: Sequence[tuple[int, int]],  # segment number, slot in it
        *,
        namespace: bytes,
        payload_bytes: int,
        tenant: bytes,
        written_s: int,
        keep_s: int,
    ) -> None:
        self._pages: Pages = np.zeros((len(keys), PAGE_BYTES), np.uint8)
        rows = self._rows = self._pages.reshape(-1).view(PAGE)
        rows["magic"] = np.void(SLOT_MAGIC)
        rows["version"] = VERSION
        rows["namespace"] = np.void(namespace)
        rows["key"] = words(b"".join(keys))
        rows["parent"] = words(b"".join(parents))
        rows["payload_bytes"] = payload_bytes
        rows["checksum"] = checksums
        rows["segment"], rows["slot"] = zip(*places, strict=True)
        if any(tenant):
            rows["tenant"] = np.void(tenant)
        rows["written_s"] = written_s
        rows["keep_s"] = keep_s

    def put_table(self, place: int, table: bytes) -> None:
        """The chunk table (chunks.py) of one block."""
        self._pages[place, TABLE_OFFSET : TABLE_OFFSET + len(table)] = np.frombuffer(table, np.uint8)

    def seal(self, places: Sequence[int], sequences: Sequence[int], images: Sequence[memoryview]) -> None:
        """Numbers some of the pages, and puts each at the front of its slot's image."""
        at = np.asarray(places, np.int64)
        self._rows["sequence"][at] = np.asarray(sequences, np.uint64)
        covered, pages = self._pages[:, :CRC_OFFSET], self._pages.reshape(-1).data
        self._rows["crc32c"][at] = [google_crc32c.value(covered[place]) for place in places]
        for place, image in zip(places, images, strict=True):
            image[:PAGE_BYTES] = pages[place * PAGE_BYTES : (place + 1) * PAGE_BYTES]
