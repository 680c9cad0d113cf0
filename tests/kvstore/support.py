"""A store with an area over it, and blocks whose bytes follow from their keys."""

import hashlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from common.blocks import Namespace
from common.storage import NO_TERMS, Admission, BlockMeta, Terms
from common.transport.interface import LeaseToken, Part, PartStatus
from common.transport.memory import checksums, crc32c
from services.kvstore.area import StoreArea
from services.kvstore.checkpoint import footprint_bytes
from services.kvstore.disk import OWN_FILES_BYTES
from services.kvstore.files import Files
from services.kvstore.options import StoreOptions
from services.kvstore.record import Geometry, pages
from services.kvstore.store import Reserved, Store

NAMESPACE = Namespace("a1" * 32)
OTHER = Namespace("b2" * 32)
ROOT = hashlib.sha256(b"root").digest()
LENGTH = 5000  # not a whole page
MIB = 1 << 20


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def chain(length: int, name: str = "chain", parent: bytes = ROOT) -> list[bytes]:
    """Keys of a chain of blocks."""
    keys: list[bytes] = []
    for i in range(length):
        parent = hashlib.sha256(parent + f"{name}/{i}".encode()).digest()
        keys.append(parent)
    return keys


def payload(key: bytes, length: int = LENGTH) -> bytes:
    """The bytes of a block."""
    return hashlib.shake_128(key).digest(length)


def offers(keys: Sequence[bytes], parent: bytes = ROOT, length: int = LENGTH) -> list[BlockMeta]:
    return [BlockMeta(key, before, length) for key, before in zip(keys, [parent, *keys[:-1]], strict=True)]


SEGMENT = Geometry(LENGTH, 4)
SEGMENT_BYTES = SEGMENT.segment_bytes
ENGINE = "auto"  # the fixture `engine` sets it
CAPACITY = 32  # blocks of LENGTH bytes in the default budget


def room_for(segments: int, *, disks: int = 1, geometry: Geometry = SEGMENT) -> int:
    """The budget into which exactly so many segments fit, on one disk or shared by several."""
    return segments * footprint_bytes(geometry) + disks * OWN_FILES_BYTES


def options(**changed: object) -> StoreOptions:
    """A small store: eight segments of four slots."""
    chosen: dict[str, object] = {
        "budget_bytes": room_for(8),
        "segment_bytes": SEGMENT_BYTES,
        "read_depth": 2,
        "write_depth": 2,
        "direct": False,
        "io": ENGINE,
    }
    return msgspec.convert(chosen | changed, StoreOptions)


class Rig:
    """A store and its area, with the moves of a client."""

    def __init__(self, store: Store, read_deadline_s: float = 10.0, buffer_bytes: int = 8 * MIB) -> None:
        self.store = store
        self.area = StoreArea(
            store, read_buffer_bytes=buffer_bytes, write_buffer_bytes=buffer_bytes, read_deadline_s=read_deadline_s
        )

    async def put(
        self,
        keys: Sequence[bytes],
        parent: bytes = ROOT,
        namespace: Namespace = NAMESPACE,
        length: int = LENGTH,
        terms: Terms = NO_TERMS,
    ) -> list[PartStatus | Admission]:
        """Writes a chain; per block the status of its write, or why it wasn't admitted."""
        reserved = await self.store.reserve(namespace, offers(keys, parent, length), None, terms)
        if reserved.token is None:
            return list(reserved.admissions)
        out = await self.fill(reserved, keys, length)
        self.store.release(reserved.token)
        return out

    async def fill(self, reserved: Reserved, keys: Sequence[bytes], length: int = LENGTH) -> list[PartStatus | Admission]:
        """Writes what was accepted of a reservation."""
        assert reserved.token is not None
        wanted = [i for i, admission in enumerate(reserved.admissions) if admission is Admission.ACCEPTED]
        parts = [Part(i, 0, length) for i in wanted]
        statuses = await self.write(reserved.token, parts, [payload(keys[i], length) for i in wanted])
        out: list[PartStatus | Admission] = list(reserved.admissions)
        for i, status in zip(wanted, statuses, strict=True):
            out[i] = status
        return out

    async def write(self, token: LeaseToken, parts: Sequence[Part], blocks: Sequence[bytes]) -> list[PartStatus]:
        """As a byte-plane server does: buffers, bytes, commit."""
        given = self.area.write_buffers(token, parts)
        statuses = [item if isinstance(item, PartStatus) else PartStatus.FAILED for item in given]
        ready = [(i, item) for i, item in enumerate(given) if not isinstance(item, PartStatus)]
        for i, buffer in ready:
            buffer[:] = blocks[i]
        done = await self.area.commit(
            token, [parts[i] for i, _ in ready], [b for _, b in ready], [checksums(b) for _, b in ready]
        )
        for (i, _), status in zip(ready, done, strict=True):
            statuses[i] = status
        return statuses

    async def get(
        self, keys: Sequence[bytes], namespace: Namespace = NAMESPACE, length: int = LENGTH
    ) -> list[bytes | PartStatus]:
        """The stored prefix of a chain: bytes, or what became of the part. Checks the bytes."""
        found = self.store.lookup(namespace, keys, None, lease=True)
        if found.token is None:
            return []
        parts = [Part(i, 0, length) for i in range(found.blocks)]
        results = await self.area.read(found.token, parts, None)
        out: list[bytes | PartStatus] = []
        for key, (status, view, checksum) in zip(keys, results, strict=False):
            if status is PartStatus.OK:
                assert view is not None
                data = bytes(view)
                assert data == payload(key, length), "wrong bytes were served"
                assert crc32c(data) == checksum
                out.append(data)
            else:
                assert view is None
                out.append(status)
        self.area.done_reading(found.token, [view for _, view, _ in results if view is not None])
        self.store.release(found.token)
        return out

    async def readable(self, keys: Sequence[bytes], namespace: Namespace = NAMESPACE, length: int = LENGTH) -> set[bytes]:
        """Which of these blocks can be read, each asked for by itself."""
        return {key for key in keys if any(isinstance(one, bytes) for one in await self.get([key], namespace, length))}

    def stored(self, namespace: Namespace = NAMESPACE) -> set[bytes]:
        shelf = self.store.space.shelves.get(namespace)
        return {key for key, _ in shelf.index.stored()} if shelf is not None else set()

    async def check(self) -> None:
        """All is accounted for."""
        await self.area.settle()
        await self.store.settle()
        assert self.store.check_integrity() == []
        assert self.area.check_integrity() == []


@asynccontextmanager
async def rig(
    folder: Path | Sequence[Path],
    chosen: StoreOptions | None = None,
    *,
    files: Files | None = None,
    clock: Callable[[], float] | None = None,
    wall: Callable[[], float] = time.time,
    read_deadline_s: float = 10.0,
    buffer_bytes: int = 8 * MIB,
) -> AsyncIterator[Rig]:
    """An open store; checked and closed at the end."""
    store = Store.open(folder, chosen or options(), files=files, clock=clock or Clock(), wall=wall)
    try:
        out = Rig(store, read_deadline_s, buffer_bytes)
        yield out
        await out.check()
    finally:
        store.close()


def segment_files(folder: Path, namespace: Namespace = NAMESPACE) -> list[Path]:
    return sorted((folder / "namespaces" / namespace).glob("*.seg"))


def slot_offset(folder: Path, key: bytes) -> tuple[Path, int]:
    """Where a block's header page lies on disk."""
    for path in folder.rglob("*.seg"):
        data = path.read_bytes()
        at = data.find(key, 4096)
        while at >= 0:
            if at % 4096 == 48:  # the key's place in a header page
                return path, at - 48
            at = data.find(key, at + 1)
    raise AssertionError("the block is not on disk")


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Turns one bit of a file over."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def bytes_on_disk(folder: Path) -> int:
    """Of all files, in whole pages."""
    return sum(pages(path.stat().st_size) for path in folder.rglob("*") if path.is_file())


def leftovers(folder: Path) -> list[Path]:
    """Segment files that were never finished."""
    return list(folder.rglob("*.tmp"))
