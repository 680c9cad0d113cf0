"""A reader of extents over a real store and a real connection, for tests: its disk can fail, its clock stands still."""

import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from common.disk.buffers import BufferPool
from common.disk.engine import Engine, open_engine
from common.transport.client import connect
from common.transport.connection import Connection
from common.transport.extents import ExtentTransport
from common.transport.interface import LeaseToken, Part, PartStatus, Span
from common.transport.region import Region
from common.transport.server import serve_bytes
from tests.kvstore.faulty import FailingFiles
from tests.kvstore.support import LENGTH, NAMESPACE, Clock, Rig, chain, options, rig

OK = PartStatus.OK
STRIDE = 8192
BLOCKS = 6
DEADLINE_S = 30.0


class Reader:
    """The other process' half, here: a region, and a transport that reads extents into it."""

    def __init__(
        self,
        one: Rig,
        region: Region,
        connection: Connection,
        clock: Clock,
        files: FailingFiles,
        engine: Engine,
        buffers: BufferPool | None,
    ) -> None:
        self.one, self.region, self.connection, self.clock = one, region, connection, clock
        self.files, self.engine = files, engine
        self.transport = ExtentTransport(connection, region, engine, buffers)
        self.buffers = buffers
        self.keys = chain(BLOCKS)
        self.parts = [Part(i, 0, LENGTH) for i in range(BLOCKS)]
        self.spans = [Span(i * STRIDE, LENGTH) for i in range(BLOCKS)]

    def lease(self) -> LeaseToken:
        found = self.one.store.lookup(NAMESPACE, self.keys, None, lease=True)
        assert found.blocks == BLOCKS and found.token is not None
        return found.token

    async def read(self, token: LeaseToken, deadline_s: float = DEADLINE_S) -> list[PartStatus]:
        return await self.transport.read(token, self.parts, self.spans, deadline_s=deadline_s)

    def bytes(self, i: int) -> bytes:
        return bytes(self.region.view(self.spans[i]))


def segment_fds() -> int:
    """Descriptors of segment files that this process has."""
    names = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sum(".seg" in name for name in names)


@pytest.fixture(params=["direct", "direct, through buffers", "buffered"])
async def reader(tmp_path: Path, engine: str, request: pytest.FixtureRequest) -> AsyncIterator[Reader]:
    clock, files = Clock(), FailingFiles()
    region = Region(BLOCKS * STRIDE)
    reads = open_engine(files, engine, label="extents", depth=4, pending_max=100)  # type: ignore[arg-type]
    async with rig(tmp_path / "data", options(direct=request.param != "buffered"), clock=clock) as one:
        assert await one.put(chain(BLOCKS)) == [OK] * BLOCKS
        server = await serve_bytes(one.area, tcp=("127.0.0.1", 0), shm_path=tmp_path / "s")
        connection = await connect(server.endpoint, region, prefer="shm")
        buffers = BufferPool(1 << 20) if "through" in request.param else None
        made = Reader(one, region, connection, clock, files, reads, buffers)
        yield made
        await made.transport.close()
        await server.close()
        reads.close()
    region.close()
