"""Checksums and copies of bulk memory, a piece at a time.

Measured (2 cores, memory out of cache): CRC-32C 10 GB/s, copy 8-11 GB/s, a hop to a thread and back
70-110 us. A part is 0.5-2.5 MB, so a thread would cost about what it saves; and a view can't be taken
back from a thread (numpy pins no export). So everything runs on the event loop, which gets its turn
after every TURN_BYTES (100-200 us), and between two pieces no view is in use: releasing it then ends
the work with `ValueError`.
"""

import asyncio
from collections.abc import Iterator, Sequence

import google_crc32c
import msgspec
import numpy as np

PIECE_BYTES = 1 << 18  # stays in the second-level cache from the copy to the checksum
SUM_BYTES = 1 << 16  # what has a checksum of its own in `Checksums`
TURN_BYTES = 1 << 20


class Checksums(msgspec.Struct, frozen=True, gc=False):
    """CRC-32C of bytes, and of each SUM_BYTES of them: from one look at them, as the parts' give the whole's."""

    whole: int
    pieces: Sequence[int]


def crc32c(data: memoryview | bytes | bytearray) -> int:
    """CRC-32C (Castagnoli) of a contiguous buffer, at one go."""
    return _extend(0, data) if len(data) else 0


async def crc32c_in_turns(data: memoryview) -> int:
    """`crc32c`. Raises `ValueError` when `data` is released meanwhile."""
    if len(data) < TURN_BYTES:
        return crc32c(data)
    value = 0
    for start, end in _pieces(len(data)):
        value = _extend(value, data[start:end])
        if not end % TURN_BYTES:
            await asyncio.sleep(0)
    return value


def copy(into: memoryview, source: memoryview) -> None:
    """Copies equal lengths at one go and releases the GIL meanwhile: for threads of the caller's."""
    np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(source, np.uint8))


def checksums(data: memoryview | bytes) -> Checksums:
    """Of a contiguous buffer, at one go."""
    view = memoryview(data)
    return _joined([crc32c(view[at : at + SUM_BYTES]) for at in range(0, len(view), SUM_BYTES)], view)


async def checksums_in_turns(data: memoryview) -> Checksums:
    """`checksums`. Raises `ValueError` when `data` is released meanwhile."""
    pieces = []
    for start in range(0, len(data), SUM_BYTES):
        pieces.append(_extend(0, data[start : start + SUM_BYTES]))
        if not (start + SUM_BYTES) % TURN_BYTES:
            await asyncio.sleep(0)
    return _joined(pieces, data)


async def checksums_of_copy(into: memoryview, source: memoryview) -> Checksums:
    """Copies equal lengths, and returns the checksums of what arrived: the source may change under us.

    When this ends, in whatever way, nothing is written any more.
    """
    pieces = []
    for start in range(0, len(into), SUM_BYTES):
        piece = into[start : start + SUM_BYTES]
        piece[:] = source[start : start + SUM_BYTES]
        pieces.append(_extend(0, piece))
        piece.release()
        if not (start + SUM_BYTES) % TURN_BYTES:
            await asyncio.sleep(0)
    return _joined(pieces, into)


async def copy_with_checksum(into: memoryview, source: memoryview) -> int:
    """Copies equal lengths, and returns the CRC-32C of the source, so that the reader's check covers the copy.

    When this ends, in whatever way, nothing is written any more.
    """
    value = 0
    for start, end in _pieces(len(into)):
        into[start:end] = source[start:end]
        value = _extend(value, source[start:end])
        if not end % TURN_BYTES:
            await asyncio.sleep(0)
    return value


def _joined(pieces: Sequence[int], data: memoryview) -> Checksums:
    """The checksum of `data` out of its pieces': a short one at the end is looked at once more."""
    whole = 0
    a, b, c, d = _BEHIND
    for piece in pieces[: len(data) // SUM_BYTES]:
        whole = a[whole & 255] ^ b[whole >> 8 & 255] ^ c[whole >> 16 & 255] ^ d[whole >> 24] ^ piece
    if tail := len(data) % SUM_BYTES:
        whole = _extend(whole, data[-tail:])
    return Checksums(whole, pieces)


def _extend(value: int, data: memoryview | bytes | bytearray) -> int:
    return int(google_crc32c.extend(value, np.frombuffer(data, np.uint8)))


def _pieces(length: int) -> Iterator[tuple[int, int]]:
    return ((start, min(length, start + PIECE_BYTES)) for start in range(0, length, PIECE_BYTES))


def _tables() -> Sequence[Sequence[int]]:
    """What becomes of a CRC when SUM_BYTES follow, but for their own: linear in its bits, so a table for each of its bytes."""
    zeros = bytes(SUM_BYTES)
    own = crc32c(zeros)
    bits = [_extend(1 << bit, zeros) ^ own for bit in range(32)]
    tables = []
    for first in range(0, 32, 8):
        table = [0]
        for bit in bits[first : first + 8]:
            table += [value ^ bit for value in table]
        tables.append(table)
    return tables


_BEHIND = _tables()
