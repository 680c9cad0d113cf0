"""The disk format's pages."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.transport.memory import crc32c
from services.kvstore.record import (
    PAGE_BYTES,
    PAYLOAD_BYTES_MAX,
    Geometry,
    SegmentHeader,
    SlotHeader,
    Unreadable,
    decode_segment,
    decode_slot,
    encode_segment,
    encode_slot,
)
from services.kvstore.slot_pages import SlotPages

KEY = st.binary(min_size=32, max_size=32)
U32 = st.integers(0, 2**32 - 1)
SLOT = SlotHeader(bytes(range(32)), b"k" * 32, b"p" * 32, 7, 100, 0xDEADBEEF, 3, 1)
SEGMENT = SegmentHeader(bytes(range(32)), Geometry(100, 2), 1)


@given(KEY, KEY, KEY, st.integers(0, 2**64 - 1), U32, U32, U32, U32)
def test_a_slot_header_survives_the_page(
    namespace: bytes, key: bytes, parent: bytes, sequence: int, length: int, crc: int, slot: int, segment: int
) -> None:
    header = SlotHeader(namespace, key, parent, sequence, length, crc, slot, segment)
    page = encode_slot(header)
    assert len(page) == PAGE_BYTES
    assert decode_slot(page) == header


@given(
    st.lists(st.tuples(KEY, KEY, U32, U32, U32, st.integers(1, 2**64 - 1)), min_size=1, max_size=5),
    st.binary(min_size=16, max_size=16),
    U32,
)
def test_the_pages_of_a_group_are_those_of_its_blocks(
    blocks: list[tuple[bytes, bytes, int, int, int, int]], tenant: bytes, keep_s: int
) -> None:
    pages = SlotPages(
        [key for key, *_ in blocks],
        [parent for _, parent, *_ in blocks],
        [crc for _, _, crc, *_ in blocks],
        [(segment, slot) for *_, segment, slot, _ in blocks],
        namespace=SLOT.namespace,
        payload_bytes=100,
        tenant=tenant,
        written_s=77,
        keep_s=keep_s,
    )
    images = [memoryview(bytearray(2 * PAGE_BYTES)) for _ in blocks]
    for places in (range(0, len(blocks), 2), range(1, len(blocks), 2)):
        pages.seal(places, [blocks[place][-1] for place in places], [images[place] for place in places])
    for image, (key, parent, crc, segment, slot, sequence) in zip(images, blocks, strict=True):
        header = SlotHeader(SLOT.namespace, key, parent, sequence, 100, crc, slot, segment, tenant, 77, keep_s)
        assert image[:PAGE_BYTES] == encode_slot(header) and decode_slot(image[:PAGE_BYTES]) == header


@given(KEY, st.integers(1, PAYLOAD_BYTES_MAX), st.integers(1, 1 << 20), U32)
def test_a_segment_header_survives_the_page(namespace: bytes, length: int, slots: int, number: int) -> None:
    geometry = Geometry(length, slots)
    header = SegmentHeader(namespace, geometry, number)
    assert decode_segment(encode_segment(header)) == header
    assert geometry.slot_bytes % PAGE_BYTES == 0 and geometry.padded_bytes - length < PAGE_BYTES


@given(st.integers(0, PAGE_BYTES * 8 - 1))
def test_any_flipped_bit_makes_a_slot_header_unreadable(bit: int) -> None:
    page = bytearray(encode_slot(SLOT))
    page[bit // 8] ^= 1 << bit % 8
    assert decode_slot(bytes(page)) is Unreadable.DAMAGED


@given(st.binary(max_size=PAGE_BYTES))
def test_noise_is_never_a_header(noise: bytes) -> None:
    page = noise.ljust(PAGE_BYTES, b"\0")
    assert isinstance(decode_slot(page), Unreadable)
    assert isinstance(decode_segment(page), Unreadable)


@pytest.mark.parametrize("field", [8, 12])
def test_a_later_version_and_an_unknown_flag_are_told_from_damage(field: int) -> None:
    for encoded, decode in ((encode_slot(SLOT), decode_slot), (encode_segment(SEGMENT), decode_segment)):
        page = bytearray(encoded)
        struct.pack_into("<I", page, field, 2)
        struct.pack_into("<I", page, PAGE_BYTES - 4, crc32c(page[: PAGE_BYTES - 4]))
        assert decode(bytes(page)) is Unreadable.NEWER  # type: ignore[operator]


def test_a_page_of_zeros_is_an_empty_slot() -> None:
    assert decode_slot(bytes(PAGE_BYTES)) is Unreadable.EMPTY


def test_a_segment_header_with_impossible_sizes_is_damaged() -> None:
    page = bytearray(encode_segment(SEGMENT))
    struct.pack_into("<I", page, 52, 12345)  # slot_bytes that don't follow from payload_bytes
    struct.pack_into("<I", page, PAGE_BYTES - 4, crc32c(page[: PAGE_BYTES - 4]))
    assert decode_segment(bytes(page)) is Unreadable.DAMAGED
