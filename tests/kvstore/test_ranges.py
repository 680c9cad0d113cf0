"""Ranges of blocks (layer slices): read and verified by the chunks around them, without the rest of the block."""

import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.transport.interface import Part, PartStatus
from common.transport.memory import checksums, crc32c
from services.kvstore.chunks import (
    CHUNK_BYTES_MIN,
    CHUNKS_MAX,
    CHUNKS_MIN,
    TABLE_OFFSET,
    Chunks,
    chunk_bytes,
    decode_table,
    encode_table,
)
from services.kvstore.options import StoreOptions
from services.kvstore.record import PAGE_BYTES, PAYLOAD_BYTES_MAX
from tests.kvstore.faulty import EIO, FailingFiles
from tests.kvstore.support import NAMESPACE, Rig, chain, flip, options, payload, rig, slot_offset

pytestmark = pytest.mark.usefixtures("engine")
OK = PartStatus.OK
SIZE = 1_200_000  # 19 chunks, the last one short
CHUNK = CHUNK_BYTES_MIN
RANGES = [
    (0, 1),
    (0, CHUNK),
    (5, CHUNK),
    (CHUNK - 1, 2),
    (4 * CHUNK, 3 * CHUNK),
    (SIZE - 1, 1),
    (SIZE - 80_000, 80_000),
    (1, SIZE - 1),
]


def large(**changed: object) -> StoreOptions:
    return options(budget_bytes=32 << 20, segment_bytes=4 << 20, **changed)


class Reads(FailingFiles):
    """Notes the bytes of each read of a payload or slot page."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []
        self.fail["read"] = self._note

    def _note(self, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
        self.lengths.append(sum(map(len, buffers)))


async def get(one: Rig, keys: list[bytes], ranges: Sequence[tuple[int, int]], into: bool = False) -> list[bytes | PartStatus]:
    """Ranges of the last block, in one request."""
    found = one.store.lookup(NAMESPACE, keys, None, lease=True)
    assert found.token is not None and found.blocks == len(keys)
    parts = [Part(len(keys) - 1, offset, length) for offset, length in ranges]
    views = [memoryview(bytearray(length)) for _, length in ranges] if into else None
    results = await one.area.read(found.token, parts, views)
    out: list[bytes | PartStatus] = []
    for status, view, checksum in results:
        assert (view is not None) == (status is OK)
        if view is not None:
            assert crc32c(view) == checksum
        out.append(bytes(view) if view is not None else status)
    one.area.done_reading(found.token, [view for _, view, _ in results if view is not None])
    one.store.release(found.token)
    return out


@pytest.mark.parametrize("into", [False, True], ids=["lent", "into"])
@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
async def test_every_range_is_cut_from_the_block(tmp_path: Path, into: bool, direct: bool) -> None:
    keys = chain(2)
    async with rig(tmp_path, large(direct=direct)) as one:
        assert await one.put(keys, length=SIZE) == [OK, OK]
        data = payload(keys[1], SIZE)
        assert await get(one, keys, RANGES, into) == [data[offset : offset + length] for offset, length in RANGES]


async def test_a_range_reads_its_chunks_and_the_slot_page_once(tmp_path: Path) -> None:
    keys, files = chain(1), Reads()
    async with rig(tmp_path, large(), files=files) as one:
        await one.put(keys, length=SIZE)
        files.lengths.clear()
        await get(one, keys, [(CHUNK, CHUNK), (4 * CHUNK + 1, CHUNK)])
        assert sorted(files.lengths) == [PAGE_BYTES, CHUNK, 2 * CHUNK]
        files.lengths.clear()
        found = one.store.lookup(NAMESPACE, keys, None, lease=True)
        assert found.token is not None
        for layer in range(4):
            (result,) = await one.area.read(found.token, [Part(0, layer * CHUNK, CHUNK)], [memoryview(bytearray(CHUNK))])
            assert result[0] is OK
        assert files.lengths == [PAGE_BYTES, *[CHUNK] * 4]
        one.store.release(found.token)
        files.lengths.clear()
        await get(one, keys, [(10, SIZE // 2)])
        assert max(files.lengths) >= SIZE  # most of the block: all of it


async def test_damage_in_the_range_is_found_and_damage_elsewhere_harms_nobody(tmp_path: Path) -> None:
    keys = chain(1)
    async with rig(tmp_path, large()) as one:
        await one.put(keys, length=SIZE)
        path, offset = slot_offset(tmp_path, keys[0])
        flip(path, offset + PAGE_BYTES + 3 * CHUNK + 7)
        data = payload(keys[0], SIZE)
        assert await get(one, keys, [(0, 100), (4 * CHUNK, 100)]) == [data[:100], data[4 * CHUNK : 4 * CHUNK + 100]]
        assert one.stored() == set(keys)
        assert await get(one, keys, [(4 * CHUNK - 1, 2)]) == [PartStatus.CORRUPT]
        assert one.stored() == set() and one.store.metrics.corrupt_blocks == 1


@pytest.mark.parametrize("wrong", ["none", "count", "size", "damaged page"])
async def test_a_block_without_a_usable_table_is_read_whole(tmp_path: Path, wrong: str) -> None:
    keys = chain(1)
    async with rig(tmp_path, large()) as one:
        await one.put(keys, length=SIZE)
        path, offset = slot_offset(tmp_path, keys[0])
        with path.open("r+b") as file:
            file.seek(offset)
            page = bytearray(file.read(PAGE_BYTES))
            if wrong == "none":  # as an earlier release wrote it
                page[TABLE_OFFSET:] = bytes(PAGE_BYTES - TABLE_OFFSET)
            else:
                struct.pack_into("<I", page, TABLE_OFFSET + (4 if wrong == "count" else 0), 17)
            if wrong != "damaged page":
                struct.pack_into("<I", page, PAGE_BYTES - 4, crc32c(page[:-4]))
            file.seek(offset)
            file.write(page)
        assert await get(one, keys, [(CHUNK, 9)]) == [payload(keys[0], SIZE)[CHUNK : CHUNK + 9]]
        assert one.stored() == set(keys)


async def test_ranges_that_take_more_than_all_buffers_are_read_one_group_after_another(tmp_path: Path) -> None:
    keys = chain(1)
    async with rig(tmp_path, large()) as one:
        await one.put(keys, length=SIZE)
        many = [(1, SIZE - 1)] * (2 * one.area.reads.buffers.bytes_max // SIZE)
        assert set(await get(one, keys, many, into=True)) == {payload(keys[0], SIZE)[1:]}


async def test_a_failing_disk_fails_the_range(tmp_path: Path) -> None:
    keys, files = chain(1), FailingFiles()
    async with rig(tmp_path, large(), files=files) as one:
        await one.put(keys, length=SIZE)
        files.fail["read"] = EIO
        assert await get(one, keys, [(CHUNK, 9)]) == [PartStatus.FAILED]


@given(st.integers(1, 800_000), st.data())
def test_a_table_covers_and_checks_every_range(size: int, data: st.DataObject) -> None:
    body = memoryview(payload(b"x", size))
    page = bytearray(PAGE_BYTES)
    table = encode_table(body, checksums(body))
    page[TABLE_OFFSET : TABLE_OFFSET + len(table)] = table
    chunks = decode_table(memoryview(page), size)
    if size <= (CHUNKS_MIN - 1) * CHUNK:
        assert not table and chunks is None
        return
    assert chunks is not None
    offset = data.draw(st.integers(0, size - 1))
    start, end = chunks.cover(offset, data.draw(st.integers(1, size - offset)))
    assert start % CHUNK == 0 and start <= offset and (end % CHUNK == 0 or end == size)
    assert chunks.match(start, body[start:end])
    spoilt = bytearray(body[start:end])
    spoilt[data.draw(st.integers(0, len(spoilt) - 1))] ^= 1
    assert not chunks.match(start, memoryview(spoilt))


def test_the_table_of_the_largest_payload_fits_the_slot_page() -> None:
    size = chunk_bytes(PAYLOAD_BYTES_MAX)
    assert -(-PAYLOAD_BYTES_MAX // size) <= CHUNKS_MAX
    assert TABLE_OFFSET + 8 + 4 * CHUNKS_MAX <= PAGE_BYTES - 4


def test_the_table_is_pinned_byte_by_byte() -> None:
    body = memoryview(bytes(range(256)) * 896)  # 229,376 bytes: three chunks and a half
    assert encode_table(body, checksums(body)).hex(" ", 4) == "00000100 04000000 3daf24a2 3daf24a2 3daf24a2 2a3f8eec"
    page = bytes(TABLE_OFFSET) + encode_table(body, checksums(body))
    assert decode_table(memoryview(page.ljust(PAGE_BYTES, b"\0")), 229_376) == Chunks(
        229_376, 65_536, tuple(crc32c(body[at : at + 65_536]) for at in range(0, 229_376, 65_536))
    )
