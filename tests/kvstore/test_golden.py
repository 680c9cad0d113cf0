"""The disk format, pinned byte by byte: a segment file of two slots, one of them written.

If this test fails, stores on people's disks can't be read any more: raise the version instead.
"""

from pathlib import Path

from common.blocks import Namespace
from common.transport.interface import Part, PartStatus
from common.transport.memory import checksums, crc32c
from services.kvstore.disk import read_identity, write_identity
from services.kvstore.files import Files
from services.kvstore.record import Geometry, StoreIdentity, Unreadable, decode_store
from tests.kvstore.support import offers, options, rig, room_for

NAMESPACE = Namespace(bytes(range(32)).hex())
KEY, PARENT = b"K" * 32, b"P" * 32
PAYLOAD = bytes(range(100))
PART = Part(0, 0, 100)
OPTIONS = options(budget_bytes=room_for(8, geometry=Geometry(100, 2)), segment_bytes=20480)

SEGMENT_PAGE = bytes.fromhex(
    "504e53544b534547"  # magic "PNSTKSEG"
    "01000000"  # version 1
    "00000000"  # flags
    "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"  # namespace
    "64000000"  # payload_bytes 100
    "00200000"  # slot_bytes 8192
    "02000000"  # slot_count 2
    "00000000"  # segment 0
)
SLOT_PAGE = bytes.fromhex(
    "504e53544b424c4b"  # magic "PNSTKBLK"
    "01000000"  # version 1
    "00000000"  # flags
    "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"  # namespace
    + "4b" * 32  # key
    + "50" * 32  # parent
    + "0100000000000000"  # sequence 1
    "64000000"  # payload_bytes 100
    "e5ebcac1"  # payload_crc32c
    "00000000"  # slot 0
    "00000000"  # segment 0
)


def sealed(fields: bytes, crc: str) -> bytes:
    return fields.ljust(4092, b"\0") + bytes.fromhex(crc)


STORE_PAGE = bytes.fromhex(
    "504e53544b53544f"  # magic "PNSTKSTO"
    "01000000"  # version 1
    "00000000"  # flags
    "000102030405060708090a0b0c0d0e0f"  # store
    "01000000"  # disk 1
    "03000000"  # disks 3
)
GOLDEN_STORE = sealed(STORE_PAGE, "e3659a1b")

GOLDEN = sealed(SEGMENT_PAGE, "1ce9c02e") + sealed(SLOT_PAGE, "3595fa0d") + PAYLOAD.ljust(4096, b"\0") + bytes(8192)


async def test_the_store_writes_the_golden_file(tmp_path: Path) -> None:
    async with rig(tmp_path, OPTIONS) as one:
        reserved = await one.store.reserve(NAMESPACE, offers([KEY], PARENT, 100), None)
        assert reserved.token is not None
        (place,) = one.area.write_buffers(reserved.token, [PART])
        assert isinstance(place, memoryview)
        place[:] = PAYLOAD
        await one.area.commit(reserved.token, [PART], [place], [checksums(PAYLOAD)])
        one.store.release(reserved.token)
    assert (tmp_path / "namespaces" / NAMESPACE / "00000000.seg").read_bytes() == GOLDEN


async def test_the_golden_file_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "namespaces" / NAMESPACE
    folder.mkdir(parents=True)
    (folder / "00000000.seg").write_bytes(GOLDEN)
    async with rig(tmp_path, OPTIONS) as one:
        found = one.store.lookup(NAMESPACE, [KEY], None, lease=True)
        assert found.blocks == 1 and found.token is not None
        ((status, view, checksum),) = await one.area.read(found.token, [PART], None)
        assert (status, view, checksum) == (PartStatus.OK, PAYLOAD, crc32c(PAYLOAD))
        assert view is not None
        one.area.done_reading(found.token, [view])
        one.store.release(found.token)


def test_the_golden_store_file_is_written_and_read(tmp_path: Path) -> None:
    identity = StoreIdentity(bytes(range(16)), 1, 3)
    write_identity(Files(), tmp_path, identity)
    assert (tmp_path / "STORE").read_bytes() == GOLDEN_STORE
    assert read_identity(Files(), tmp_path) == identity
    for bit in range(8 * 40):
        page = bytearray(GOLDEN_STORE)
        page[bit // 8] ^= 1 << bit % 8
        assert isinstance(decode_store(page), Unreadable)
