"""Prefixes that are looked up over the store's unix socket, and what its client does where that fails."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from common.clients.kvstore_near import NearStore
from common.errors import Overloaded, TransferFailed, Unavailable
from common.transport.client import connect
from common.transport.connection import Connection
from common.transport.frames import HEADER_BYTES, NO_TOKEN, Hello, Lookup, Mode, Offers, encode
from common.transport.interface import Endpoint, Part, PartStatus, Span
from common.transport.reception import Limits
from common.transport.region import Region
from common.transport.server import BytesServer, serve_bytes
from services.worker.stage import Stage
from tests.contract.wire import until
from tests.kvstore.support import LENGTH, NAMESPACE, OTHER, Rig, chain, options, payload, rig
from tests.kvstore.test_process import get, put, running

OK = PartStatus.OK
DEADLINE_S = 30.0
SPACE = bytes.fromhex(NAMESPACE)
KEYS = chain(5)


class Served:
    """A store with five blocks of a chain, served; and a connection to its socket."""

    def __init__(self, one: Rig, server: BytesServer, region: Region, connection: Connection) -> None:
        self.one, self.server, self.region, self.connection = one, server, region, connection


@asynccontextmanager
async def serving(folder: Path, **changed: object) -> AsyncIterator[Served]:
    region = Region(8 * LENGTH)
    async with rig(folder / "data", options(**changed)) as one:
        assert await one.put(KEYS) == [OK] * 5
        server = await serve_bytes(one.area, tcp=("127.0.0.1", 0), shm_path=folder / "s", limits=Limits(body_s=5.0))
        connection = await connect(server.endpoint, region, prefer="shm")
        yield Served(one, server, region, connection)
        await connection.close()
        await server.close()
    region.close()


async def test_the_stored_prefix_comes_leased_and_is_read_under_its_token(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        assert served.connection.offers & Offers.LOOKUPS
        asked = [*KEYS, *chain(3, "not stored")]
        found = await served.connection.lookup(SPACE, asked, 10_000, deadline_s=DEADLINE_S)
        assert (found.status, found.blocks, found.ttl_ms, found.epoch) == (OK, 5, 10_000, served.one.store.epoch)
        parts, spans = [Part(i, 0, LENGTH) for i in range(5)], [Span(i * LENGTH, LENGTH) for i in range(5)]
        assert await served.connection.read(found.token, parts, spans, deadline_s=DEADLINE_S) == [OK] * 5
        assert [bytes(served.region.view(span)) for span in spans] == [payload(key) for key in KEYS]
        assert len(served.one.store.leases) == 1 and served.one.store.metrics.lookups == 1
        served.one.store.release(found.token)


async def test_a_count_leases_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        found = await served.connection.lookup(SPACE, KEYS, 0, deadline_s=DEADLINE_S)
        assert (found.status, found.blocks, found.token) == (OK, 5, NO_TOKEN)
        for namespace, keys in ((SPACE, chain(2, "not stored")), (bytes.fromhex(OTHER), KEYS)):
            nothing = await served.connection.lookup(namespace, keys, 10_000, deadline_s=DEADLINE_S)
            assert (nothing.status, nothing.blocks, nothing.token) == (OK, 0, NO_TOKEN)
        assert not len(served.one.store.leases)


async def test_as_many_keys_as_a_frame_holds_are_looked_up(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        keys = [*KEYS, *chain(4091, "not stored")]
        found = await served.connection.lookup(SPACE, keys, 0, deadline_s=DEADLINE_S)
        assert found.blocks == 5


async def test_a_store_that_refuses_says_so_and_the_connection_goes_on(tmp_path: Path) -> None:
    async with serving(tmp_path, leases_max=1) as served:
        held = await served.connection.lookup(SPACE, KEYS, 10_000, deadline_s=DEADLINE_S)
        with pytest.raises(Overloaded):
            served.one.store.lookup(NAMESPACE, KEYS, 10.0, lease=True)
        full = await served.connection.lookup(SPACE, KEYS, 10_000, deadline_s=DEADLINE_S)
        assert (full.status, full.blocks, full.token) == (PartStatus.FULL, 0, NO_TOKEN)
        served.one.store.release(held.token)
        served.one.store.draining = True
        with pytest.raises(Unavailable):
            served.one.store.lookup(NAMESPACE, KEYS, 10.0, lease=True)
        assert (await served.connection.lookup(SPACE, KEYS, 10_000, deadline_s=DEADLINE_S)).status is PartStatus.FAILED
        served.one.store.draining = False
        assert (await served.connection.lookup(SPACE, KEYS, 0, deadline_s=DEADLINE_S)).status is OK


async def test_a_fault_of_the_store_is_that_lookup_s_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as served:
        with monkeypatch.context() as faulty:
            faulty.setattr(served.one.store, "lookup", None)
            assert (await served.connection.lookup(SPACE, KEYS, 0, deadline_s=DEADLINE_S)).status is PartStatus.FAILED
        assert (await served.connection.lookup(SPACE, KEYS, 0, deadline_s=DEADLINE_S)).blocks == 5


async def test_neither_a_port_nor_a_worker_s_stage_offers_lookups(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        far = await connect(served.server.endpoint, served.region, prefer="tcp")
        assert not far.offers
        await far.close()
        host, _, port = served.server.endpoint.tcp.rpartition(":")
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(encode(Hello(Mode.INLINE, 0)) + encode(Lookup(1, 1000, SPACE, 10_000, tuple(KEYS))))
            assert b"LOOKUP: expected READ or WRITE" in await to_end(sock)
        assert not len(served.one.store.leases)
        stage = Stage(2, 4096)
        server = await serve_bytes(stage, shm_path=tmp_path / "stage")
        worker = await connect(server.endpoint, served.region, prefer="shm")
        assert not worker.offers & Offers.LOOKUPS
        await worker.close()
        await server.close()
        stage.close()


GOOD = encode(Lookup(1, 1000, SPACE, 10_000, tuple(KEYS)))
BAD_FRAMES = {
    "no keys": (encode(Lookup(1, 1000, SPACE, 10_000, ())), b"LOOKUP of 0 keys"),
    "a short key": (encode(Lookup(1, 1000, SPACE, 10_000, (KEYS[0], b"short"))), b"body_bytes 77 of LOOKUP with count 2"),
    "a short namespace": (GOOD[:HEADER_BYTES] + b"ab" + GOOD[HEADER_BYTES + 2 :], b"crc32c"),
    "too many keys": (encode(Lookup(1, 1000, SPACE, 10_000, (KEYS[0],) * 4097))[:HEADER_BYTES], b"count 4097"),
    "an answer": (b"PSBP\x01\x0b" + encode(Lookup(1, 1000, SPACE, 0, ()))[6:], b"expected"),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
async def test_a_malformed_lookup_ends_its_connection_and_no_other(tmp_path: Path, name: str) -> None:
    frame, reason = BAD_FRAMES[name]
    async with serving(tmp_path) as served:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(served.server.endpoint.shm)
            socket.send_fds(sock, [encode(Hello(Mode.REGION, served.region.size))], [served.region.fd])
            sock.sendall(frame)
            said = await to_end(sock)
        assert reason in said and b"expected" in said
        assert not len(served.one.store.leases)
        assert (await served.connection.lookup(SPACE, KEYS, 0, deadline_s=DEADLINE_S)).blocks == 5


async def test_who_has_stopped_waiting_gets_no_other_s_answer(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        late = asyncio.create_task(served.connection.lookup(SPACE, KEYS[:2], 10_000, deadline_s=DEADLINE_S))
        await asyncio.sleep(0)
        late.cancel()
        found = await served.connection.lookup(SPACE, KEYS, 0, deadline_s=DEADLINE_S)
        assert found.blocks == 5 and late.cancelled()
        await served.connection.close()
        with pytest.raises(TransferFailed):
            await served.connection.lookup(SPACE, KEYS, 0, deadline_s=DEADLINE_S)


async def test_a_client_on_the_store_s_host_asks_over_its_socket_after_the_first_time(tmp_path: Path) -> None:
    region = Region(80 * LENGTH)
    async with running(tmp_path) as (_, client, _):
        keys = chain(6)
        assert await put(client, region, keys) == keys
        assert not client.near and await get(client, region, keys) == 6
        await until(lambda: client.near)
        assert await get(client, region, [*keys, *chain(2, "not stored")]) == 6
        assert await client.count(NAMESPACE, keys) == 6 and await client.count(OTHER, keys) == 0
        assert await client.lookup(OTHER, keys, 10.0) is None
        long = [*keys, *chain(5000, "not stored")]  # more than a frame holds
        assert await client.count(NAMESPACE, long) == 6 and client.near
        assert (await client.describe()).leases == 0
    region.close()


async def test_a_store_that_comes_back_is_asked_over_grpc_and_then_near_again(tmp_path: Path) -> None:
    region = Region(80 * LENGTH)
    keys = chain(6)
    async with running(tmp_path) as (one, client, ready):
        port = ready["grpc"].rpartition(":")[2]
        await put(client, region, keys)
        before = await client.lookup(NAMESPACE, keys, 10.0)
        await until(lambda: client.near)
        one.child.kill()
        await one.child.wait()
        with pytest.raises(Unavailable):
            await client.lookup(NAMESPACE, keys, 10.0, deadline_s=1.0)
        async with running(tmp_path, "--port", port):
            await until_up(client, keys)
            after = await client.lookup(NAMESPACE, keys, 10.0)
            assert before is not None and after is not None and after.blocks == 6
            assert after.epoch != before.epoch and after.endpoint.tcp != before.endpoint.tcp
            await until(lambda: client.near)
            again = await client.lookup(NAMESPACE, keys, 10.0)
            assert again is not None and again.epoch == after.epoch and again.endpoint == after.endpoint
    region.close()


async def until_up(client: object, keys: list[bytes]) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                await client.count(NAMESPACE, keys, deadline_s=5.0)  # type: ignore[attr-defined]
                return
            except Unavailable:
                await asyncio.sleep(0.05)  # another process starts


async def test_an_answer_of_another_incarnation_is_not_taken(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        near = NearStore()
        near.learn(Endpoint(shm=served.server.endpoint.shm), os.urandom(16))
        await until(lambda: near.connected)
        assert await near.look_up(NAMESPACE, KEYS, 0, deadline_s=DEADLINE_S) is None
        near.learn(served.server.endpoint, served.one.store.epoch)
        await until(lambda: near.connected and near.endpoint == served.server.endpoint)
        found = await near.look_up(NAMESPACE, KEYS, 0, deadline_s=DEADLINE_S)
        assert found is not None and found.blocks == 5
        await near.close()
        assert await near.look_up(NAMESPACE, KEYS, 0, deadline_s=DEADLINE_S) is None


async def test_a_socket_that_nobody_listens_on_leaves_it_to_grpc(tmp_path: Path) -> None:
    near = NearStore()
    dead = tmp_path / "dead"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(dead))
    for path in ("", str(tmp_path / "absent"), str(dead)):
        near.learn(Endpoint(shm=path), b"epoch")
        assert await near.look_up(NAMESPACE, KEYS, 0, deadline_s=DEADLINE_S) is None and not near.connected
    await near.close()


async def to_end(sock: socket.socket) -> bytes:
    sock.setblocking(False)
    data = b""
    try:
        while piece := await asyncio.get_running_loop().sock_recv(sock, 1 << 16):
            data += piece
    except ConnectionError:
        pass
    return data
