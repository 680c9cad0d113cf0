"""The pool: connects when used, keeps peers apart, stays within its bound."""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from common.transport.interface import Endpoint, LeaseToken, Part, PartStatus, Span
from common.transport.pool import TransportPool
from common.transport.region import Region
from common.transport.server import BytesServer, serve_bytes
from tests.contract.wire import GatedArea, until

NOBODY = LeaseToken(bytes(16))
PART, SPAN = [Part(0, 0, 8)], [Span(0, 8)]


@pytest.fixture
async def region() -> AsyncIterator[Region]:
    region = Region(1 << 16)
    yield region
    region.close()


@pytest.fixture
async def area() -> GatedArea:
    area = GatedArea()
    area.gate.set()
    return area


@pytest.fixture
async def server(area: GatedArea) -> AsyncIterator[BytesServer]:
    server = await serve_bytes(area, tcp=("127.0.0.1", 0))
    yield server
    await server.close()


async def test_an_unreachable_peer_fails_its_parts_and_no_one_else_s(region: Region, server: BytesServer) -> None:
    pool = TransportPool(region)
    dead = pool.transport(Endpoint(tcp="127.0.0.1:1"))
    good = pool.transport(server.endpoint)
    assert await dead.read(NOBODY, PART, SPAN, deadline_s=30) == [PartStatus.FAILED]
    assert "127.0.0.1:1" in dead.last_error and dead.carrier == ""
    assert await good.read(NOBODY, PART, SPAN, deadline_s=30) == [PartStatus.OK]
    assert good.carrier == "tcp" and good.counters.read.bytes == 8
    await pool.close()


async def test_a_peer_that_accepts_but_says_nothing_costs_the_deadline(region: Region) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        pool = TransportPool(region)
        transport = pool.transport(Endpoint(tcp=f"127.0.0.1:{silent.getsockname()[1]}"))
        assert await transport.read(NOBODY, PART, SPAN, deadline_s=0.02) == [PartStatus.EXPIRED]
        await pool.close()


async def test_many_first_users_share_one_connection(region: Region, server: BytesServer) -> None:
    pool = TransportPool(region)
    reads = [pool.transport(server.endpoint).read(NOBODY, PART, [Span(8 * i, 8)], deadline_s=30) for i in range(20)]
    assert await asyncio.gather(*reads) == [[PartStatus.OK]] * 20
    assert len(server.reception.sessions) == 1
    await pool.close()


async def test_a_peer_may_be_given_several_connections(region: Region, server: BytesServer, area: GatedArea) -> None:
    area.gate.clear()
    pool = TransportPool(region, connections_per_peer=3)
    async with asyncio.TaskGroup() as group:
        for i in range(6):
            group.create_task(pool.transport(server.endpoint).read(NOBODY, PART, [Span(8 * i, 8)], deadline_s=30))
            await area.entered.acquire()
        assert len(server.reception.sessions) == 3
        area.gate.set()
    await pool.close()


async def test_the_longest_unused_peer_makes_room_and_comes_back_when_used(region: Region, area: GatedArea) -> None:
    servers = [await serve_bytes(area, tcp=("127.0.0.1", 0)) for _ in range(3)]
    pool = TransportPool(region, peers_max=2)
    kept = [pool.transport(server.endpoint) for server in servers[:1]]
    for server in servers:
        assert await pool.transport(server.endpoint).read(NOBODY, PART, SPAN, deadline_s=30) == [PartStatus.OK]
    await until(lambda: not servers[0].reception.sessions)
    assert await kept[0].read(NOBODY, PART, SPAN, deadline_s=30) == [PartStatus.OK]
    await kept[0].close()
    await pool.close()
    for server in servers:
        await server.close()


async def test_a_closed_pool_fails_what_is_asked_of_it(region: Region, server: BytesServer) -> None:
    pool = TransportPool(region)
    transport = pool.transport(server.endpoint)
    await pool.close()
    assert await transport.write(NOBODY, PART, SPAN, deadline_s=30) == [PartStatus.FAILED]
    assert "closed" in transport.last_error
