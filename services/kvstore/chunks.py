"""Checksums of a payload's chunks, in its slot page: a range is read and verified without the rest of the block.

Bytes only; docs/formats.md draws them. A slot without a table (written by an earlier release, or of fewer
than CHUNKS_MIN chunks) is read whole. A table that doesn't fit the payload counts as none.
"""

import struct

import msgspec

from common.transport.memory import SUM_BYTES, Checksums, crc32c

TABLE_OFFSET = 136  # in a slot page, behind its fields
CHUNK_BYTES_MIN = SUM_BYTES  # about a layer slice of a block; smaller ones cost as many calls as bytes
CHUNKS_MIN = 4  # of fewer, a range is hardly less than the block
CHUNKS_MAX = 960  # what a slot page has room for
_HEAD = struct.Struct("<II")


class Chunks(msgspec.Struct, frozen=True):
    """Chunk i is bytes `[i * chunk_bytes, (i + 1) * chunk_bytes)` of the payload; the last one may be shorter."""

    payload_bytes: int
    chunk_bytes: int
    checksums: tuple[int, ...]

    def cover(self, offset: int, length: int) -> tuple[int, int]:
        """The least bytes `[start, end)` in whole chunks that contain a range."""
        start = offset // self.chunk_bytes * self.chunk_bytes
        end = -(-(offset + length) // self.chunk_bytes) * self.chunk_bytes
        return start, min(end, self.payload_bytes)

    def match(self, start: int, data: memoryview) -> bool:
        """Whether these whole chunks, from byte `start` of the payload, are what was written."""
        first = start // self.chunk_bytes
        pieces = range(0, len(data), self.chunk_bytes)
        return all(crc32c(data[at : at + self.chunk_bytes]) == self.checksums[first + i] for i, at in enumerate(pieces))


def chunk_bytes(payload_bytes: int) -> int:
    """The size of a payload's chunks: the smallest power of two that leaves few enough."""
    size = CHUNK_BYTES_MIN
    while payload_bytes > CHUNKS_MAX * size:
        size *= 2
    return size


def encode_table(payload: memoryview, known: Checksums) -> bytes:
    """The table of a payload, whose checksums are known; empty when it has too few chunks."""
    size = chunk_bytes(len(payload))
    if len(payload) <= (CHUNKS_MIN - 1) * size:
        return b""
    checksums = known.pieces
    if size != SUM_BYTES:
        checksums = [crc32c(payload[at : at + size]) for at in range(0, len(payload), size)]
    return _HEAD.pack(size, len(checksums)) + struct.pack(f"<{len(checksums)}I", *checksums)


def decode_table(page: memoryview, payload_bytes: int) -> Chunks | None:
    """The table in a slot page that was found good."""
    size, count = _HEAD.unpack_from(page, TABLE_OFFSET)
    if not 0 < count <= CHUNKS_MAX or size < CHUNK_BYTES_MIN or size & (size - 1) or -(-payload_bytes // size) != count:
        return None
    return Chunks(payload_bytes, size, struct.unpack_from(f"<{count}I", page, TABLE_OFFSET + _HEAD.size))
