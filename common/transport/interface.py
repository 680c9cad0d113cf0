"""The byte plane: bulk KV moves between spans of the caller's stage and items a lease names.

One `Transport` is one connection to one peer. The peer serves an `Area`: the kvstore's blocks, or
a worker's stage. Three carriers implement it (`tcp`, `shm`, `grpc`) and pass one contract suite.

A transfer:
1. The owner of the items grants a lease (out of band, over gRPC) and hands out its token.
2. The holder connects to one of the owner's `Endpoint`s and reads or writes parts of leased items.
3. Every part carries a CRC-32C, checked by whoever receives the bytes. A part that is not `OK`
   left nothing behind that may be used.
4. The holder releases the lease, or it expires.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import NewType, Protocol, runtime_checkable

import msgspec

from common.transport.memory import Checksums

LeaseToken = NewType("LeaseToken", bytes)  # 16 random bytes; unguessable, so it is also the right
TOKEN_BYTES = 16
PARTS_MAX = 4096  # per request
EXTENT_FILES_MAX = 64  # files of one answer with extents; the kernel takes 253 descriptors at once (SCM_MAX_FD)


class PartStatus(IntEnum):
    """How one part of a transfer ended."""

    OK = 0
    MISSING = 1  # the item is no longer there
    CORRUPT = 2  # a checksum did not match, at the sender or at the receiver
    REJECTED = 3  # lease unknown, expired, or without this right; item or range outside it
    FULL = 4  # the receiver has no room
    FAILED = 5  # I/O error, short transfer, peer gone
    EXPIRED = 6  # the deadline passed


class Part(msgspec.Struct, frozen=True):
    """Bytes `[offset, offset + length)` of the lease's item number `item`."""

    item: int
    offset: int
    length: int


class Span(msgspec.Struct, frozen=True):
    """Bytes `[offset, offset + length)` of the caller's own stage region."""

    offset: int
    length: int


class Endpoint(msgspec.Struct, frozen=True):
    """Where a process serves the byte plane. An empty string means: not by this carrier.

    Attributes:
        shm: path of a unix socket on the owner's host.
        tcp: host:port.
        grpc: host:port.
    """

    shm: str = ""
    tcp: str = ""
    grpc: str = ""


class Extent(msgspec.Struct, frozen=True):
    """Where a part's bytes lie on disk: bytes `[offset, offset + part.length)` of a file open for reading.

    True while the lease lives. The checksum is of the part's bytes: a reader that is late finds other bytes.
    """

    fd: int
    offset: int
    checksum: int


class Transport(Protocol):
    """A connection to one peer's area. Safe for concurrent use by tasks of one event loop."""

    carrier: str  # "tcp", "shm" or "grpc"

    async def read(
        self, token: LeaseToken, parts: Sequence[Part], into: Sequence[Span], *, deadline_s: float
    ) -> list[PartStatus]:
        """Fills `into[i]` with `parts[i]`; equal lengths pairwise. Never raises for a part.

        When this returns, or raises because it was cancelled, no byte lands in `into` any more. The one
        exception is a peer on this host that hangs while it has our memory mapped (shm): its spans are
        then held by the region (`Region.held`), and a read into held bytes comes back FULL.
        """
        ...

    async def write(
        self, token: LeaseToken, parts: Sequence[Part], source: Sequence[Span], *, deadline_s: float
    ) -> list[PartStatus]:
        """Sends `source[i]` to `parts[i]`. `OK` means the owner has verified and committed it."""
        ...

    async def close(self) -> None: ...


class Area(Protocol):
    """What a byte-plane server serves. Called from the server's event loop; its coroutines are never cancelled."""

    async def read(
        self, token: LeaseToken, parts: Sequence[Part], into: Sequence[memoryview] | None
    ) -> list[tuple[PartStatus, memoryview | None, int]]:
        """Per part: status, the bytes, and their CRC-32C.

        With `into` (shared memory of the caller), the bytes are put there and the view returned
        is that one. Without, the area returns a view of its own that stays valid until `done_reading`.
        """
        ...

    def done_reading(self, token: LeaseToken, views: Sequence[memoryview]) -> None:
        """The views returned by `read` (without `into`) have been sent or dropped."""
        ...

    def write_buffers(self, token: LeaseToken, parts: Sequence[Part]) -> list[memoryview | PartStatus]:
        """Where to receive each part, or why not. Every buffer is passed to `commit` or `abort` once.

        The area may take a buffer back at any moment by releasing the memoryview: from then on nothing is
        written through it, and its part ends as REJECTED. `OK` instead of a buffer: the bytes are there already.
        """
        ...

    async def commit(
        self, token: LeaseToken, parts: Sequence[Part], buffers: Sequence[memoryview], checksums: Sequence[Checksums]
    ) -> list[PartStatus]:
        """The buffers hold the bytes, and their checksums were verified: make them count."""
        ...

    def abort(self, token: LeaseToken, parts: Sequence[Part], buffers: Sequence[memoryview]) -> None:
        """The bytes will not come: what the buffers hold is not to be used."""
        ...


@runtime_checkable
class ExtentArea(Protocol):
    """An `Area` on disk, whose readers on the same host may read the disk themselves."""

    def locate(self, token: LeaseToken, parts: Sequence[Part]) -> list[Extent | PartStatus]:
        """Where each part lies, or why that isn't said: then `read` it. The descriptors stay the area's."""
        ...
