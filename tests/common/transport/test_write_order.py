"""A long write goes through its stations one request after the other, so that the disk begins with the first."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.transport import connection, pending, requests
from common.transport.client import connect
from common.transport.interface import LeaseToken, Part, PartStatus, Span
from common.transport.memory import Checksums, checksums_of_copy, crc32c_in_turns
from common.transport.region import Region
from common.transport.server import serve_bytes
from tests.contract.wire import GatedArea

TOKEN = LeaseToken(bytes(16))
REQUESTS = 5


class Taking(GatedArea):
    """Takes every write, and remembers the order."""

    def __init__(self) -> None:
        super().__init__()
        self.committed: list[tuple[int, bytes]] = []
        self.requests: list[int] = []  # parts of each

    def write_buffers(self, token: LeaseToken, parts: Sequence[Part]) -> list[memoryview | PartStatus]:
        return [memoryview(bytearray(part.length)) for part in parts]

    async def commit(
        self, token: LeaseToken, parts: Sequence[Part], buffers: Sequence[memoryview], checksums: Sequence[Checksums]
    ) -> list[PartStatus]:
        self.requests.append(len(parts))
        self.committed += [(part.item, bytes(buffer)) for part, buffer in zip(parts, buffers, strict=True)]
        return [PartStatus.OK] * len(parts)


class Station:
    """Counts who is there at once."""

    def __init__(self) -> None:
        self.here = self.most = self.passed = 0

    async def __aenter__(self) -> None:
        self.here += 1
        self.most = max(self.most, self.here)
        await asyncio.sleep(0)  # others could come in
        await asyncio.sleep(0)

    async def __aexit__(self, *_: object) -> None:
        self.here -= 1
        self.passed += 1


async def test_one_request_at_a_time_is_checked_here_and_copied_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checking, copying = Station(), Station()

    async def checked(view: memoryview) -> int:
        async with checking:
            return await crc32c_in_turns(view)

    async def copied(into: memoryview, source: memoryview) -> Checksums:
        async with copying:
            return await checksums_of_copy(into, source)

    monkeypatch.setattr(connection, "crc32c_in_turns", checked)
    monkeypatch.setattr(requests, "checksums_of_copy", copied)
    monkeypatch.setattr(pending, "BATCH_BYTES", 8)  # every part is a request of its own
    area, region = Taking(), Region(4096)
    server = await serve_bytes(area, shm_path=tmp_path / "s")
    transport = await connect(server.endpoint, region, prefer="shm")
    spans = [Span(8 * i, 8) for i in range(REQUESTS)]
    for i, span in enumerate(spans):
        region.view(span)[:] = bytes([i]) * 8
    statuses = await transport.write(TOKEN, [Part(i, 0, 8) for i in range(REQUESTS)], spans, deadline_s=30)
    assert statuses == [PartStatus.OK] * REQUESTS
    assert area.committed == [(i, bytes([i]) * 8) for i in range(REQUESTS)]
    assert (checking.most, copying.most) == (1, 1) and checking.passed == copying.passed == REQUESTS
    await transport.close()
    await server.close()
    region.close()


async def test_a_write_begins_with_little_unless_others_go_before_it(tmp_path: Path) -> None:
    area, region = Taking(), Region(8 << 20)
    server = await serve_bytes(area, shm_path=tmp_path / "s")
    transport = await connect(server.endpoint, region, prefer="shm")
    parts, spans = [Part(i, 0, 1 << 20) for i in range(8)], [Span(i << 20, 1 << 20) for i in range(8)]
    for _ in range(2):
        assert await transport.write(TOKEN, parts, spans, deadline_s=30) == [PartStatus.OK] * 8
    assert area.requests == [2, 4, 2] * 2
    area.requests.clear()
    await asyncio.gather(*(transport.write(TOKEN, parts, spans, deadline_s=30) for _ in range(3)))
    assert area.requests == [2, 4, 2, 8, 8]
    await transport.close()
    await server.close()
    region.close()
