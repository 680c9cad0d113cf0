"""The real process: gRPC, the byte plane's carriers, signals, kill -9."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common import rpc
from common.clients.kvstore import Admission, BlockMeta, KvStoreClient
from common.errors import InvalidRequest, LeaseRejected
from common.pb import kvstore_pb2 as pb
from common.pb import kvstore_pb2_grpc
from common.storage import Terms
from common.transport.client import connect
from common.transport.frames import Hello, Mode, Op, Transfer, encode
from common.transport.interface import Endpoint, LeaseToken, Part, PartStatus, Span
from common.transport.region import Region
from services.kvstore.service import SERVICE
from tests.kvstore.support import MIB, NAMESPACE, ROOT, bytes_on_disk, chain, payload

HELLO = encode(Hello(Mode.INLINE, 0))
LENGTH = 20_000
BUDGET = 8 * MIB
OK = PartStatus.OK


class Process:
    """python -m services.kvstore, with its log."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self.child = child
        self.events: list[dict[str, Any]] = []

    async def until(self, event: str) -> dict[str, Any]:
        """The next log line of that name."""
        assert self.child.stderr is not None
        async with asyncio.timeout(60):
            async for line in self.child.stderr:
                self.events.append(json.loads(line))
                if self.events[-1]["event"] == event:
                    return self.events[-1]
        raise AssertionError(f"no {event!r} in {self.events}")

    async def end(self, number: int) -> int:
        """Sends a signal and waits; the exit status."""
        self.child.send_signal(number)
        assert self.child.stderr is not None
        self.events += [json.loads(line) for line in (await self.child.stderr.read()).splitlines()]
        return await self.child.wait()


@asynccontextmanager
async def process(folder: Path, *flags: str) -> AsyncIterator[Process]:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.kvstore", "--data", str(folder / "data"), "--run-dir", str(folder),
        "--budget-bytes", str(BUDGET), "--id", "store", *flags, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield Process(child)
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


@asynccontextmanager
async def running(folder: Path, *flags: str) -> AsyncIterator[tuple[Process, KvStoreClient, dict[str, Any]]]:
    async with process(folder, *flags) as one:
        ready = await one.until("ready")
        client = KvStoreClient(ready["grpc"], deadline_s=20.0)
        try:
            yield one, client, ready
        finally:
            await client.close()


def metas(keys: list[bytes], parent: bytes = ROOT, length: int = LENGTH) -> list[BlockMeta]:
    return [BlockMeta(key, before, length) for key, before in zip(keys, [parent, *keys[:-1]], strict=True)]


def whole(count: int) -> list[Part]:
    return [Part(i, 0, LENGTH) for i in range(count)]


def spans(count: int, first: int = 0) -> list[Span]:
    return [Span((first + i) * LENGTH, LENGTH) for i in range(count)]


async def put(
    client: KvStoreClient, region: Region, keys: list[bytes], parent: bytes = ROOT, carrier: str = "tcp"
) -> list[bytes]:
    """Writes blocks; the keys of those that the store says it has."""
    reserved = await client.reserve(NAMESPACE, metas(keys, parent), 10.0)
    wanted = [i for i, admission in enumerate(reserved.admissions) if admission is Admission.ACCEPTED]
    stored = [keys[i] for i, admission in enumerate(reserved.admissions) if admission is Admission.PRESENT]
    if not wanted:
        return stored
    for place, i in enumerate(wanted):
        region.view(Span(place * LENGTH, LENGTH))[:] = payload(keys[i], LENGTH)
    transport = await connect(Endpoint(**{carrier: getattr(reserved.endpoint, carrier)}), region)
    try:
        statuses = await transport.write(
            reserved.token, [Part(i, 0, LENGTH) for i in wanted], spans(len(wanted)), deadline_s=20.0
        )
    finally:
        await transport.close()
    await client.release(reserved.token)
    return stored + [keys[i] for i, status in zip(wanted, statuses, strict=True) if status is OK]


async def get(client: KvStoreClient, region: Region, keys: list[bytes], carrier: str = "tcp") -> int:
    """How many leading blocks can be read, with the right bytes."""
    found = await client.lookup(NAMESPACE, keys, 10.0)
    if found is None:
        return 0
    transport = await connect(Endpoint(**{carrier: getattr(found.endpoint, carrier)}), region)
    try:
        statuses = await transport.read(found.token, whole(found.blocks), spans(found.blocks), deadline_s=20.0)
    finally:
        await transport.close()
    await client.release(found.token)
    for i, (key, status) in enumerate(zip(keys, statuses, strict=False)):
        if status is not OK:
            return i
        assert region.view(Span(i * LENGTH, LENGTH)) == payload(key, LENGTH), "wrong bytes were served"
    return found.blocks


@pytest.fixture
def region() -> Any:
    region = Region(64 * LENGTH)
    yield region
    region.close()


async def test_blocks_travel_over_every_carrier_and_survive_a_restart(tmp_path: Path, region: Region) -> None:
    chains = {carrier: chain(8, carrier) for carrier in ("shm", "tcp", "grpc")}
    async with running(tmp_path) as (one, client, ready):
        assert ready["endpoint"] == {"shm": str(tmp_path / "store.sock"), "tcp": ready["endpoint"]["tcp"], "grpc": ready["grpc"]}
        async with rpc.channel(ready["grpc"]) as channel:
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert health.status == health_pb2.HealthCheckResponse.SERVING
        for carrier, keys in chains.items():
            assert await put(client, region, keys, carrier=carrier) == keys
            assert await client.count(NAMESPACE, keys) == 8
        info = await client.describe()
        assert (info.id, info.blocks, info.writes, info.leases, info.draining) == ("store", 24, 24, 0, False)
        assert info.used_bytes <= info.budget_bytes == BUDGET
        assert await one.end(signal.SIGTERM) == 0
        assert [event["event"] for event in one.events[-3:]] == ["draining", "drained", "stopped"]
    async with running(tmp_path) as (one, client, _):
        for reading, writing in (("shm", "tcp"), ("tcp", "grpc"), ("grpc", "shm")):
            assert await get(client, region, chains[writing], reading) == 8
        assert (await client.describe()).epoch != info.epoch


@pytest.mark.timeout(300)
async def test_kill_9_while_writing_loses_nothing_that_was_committed(tmp_path: Path, region: Region) -> None:
    committed: list[list[bytes]] = []
    for life in range(4):
        async with running(tmp_path) as (one, client, _):
            for keys in committed[-20:]:
                assert await get(client, region, keys) == len(keys)
            assert bytes_on_disk(tmp_path) <= BUDGET
            enough = 5 + 3 * life
            writing = asyncio.create_task(_write_for_ever(client, region, committed, life))
            async with asyncio.timeout(60):
                while len(committed) < 12 * life + enough and not writing.done():
                    await asyncio.wait([writing], timeout=0.01)
            one.child.send_signal(signal.SIGKILL)
            await one.child.wait()
            await asyncio.wait([writing], timeout=30)
            assert writing.done() and writing.exception() is not None


async def _write_for_ever(client: KvStoreClient, region: Region, committed: list[list[bytes]], life: int) -> None:
    for i in range(10_000):
        keys = chain(4, f"life{life}/{i}")
        if await put(client, region, keys) != keys:
            raise RuntimeError("the store has died")
        committed.append(keys)


async def test_a_second_process_refuses_and_names_the_first(tmp_path: Path) -> None:
    async with running(tmp_path) as (one, _, _), process(tmp_path) as second:
        failed = await second.until("failed")
        assert f"process {one.child.pid}" in failed["reason"]
        assert await second.child.wait() == 1


async def test_a_folder_that_cannot_be_used_stops_the_start_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    async with process(tmp_path) as one:
        failed = await one.until("failed")
        assert "[kvstore] data" in failed["reason"] and "expected a folder" in failed["reason"]
        assert await one.child.wait() == 2


async def test_one_process_stripes_over_several_folders(tmp_path: Path, region: Region) -> None:
    keys = chain(12)
    more = ("--data", str(tmp_path / "more"))
    async with running(tmp_path, *more) as (_, client, _):
        assert await put(client, region, keys) == keys
    assert bytes_on_disk(tmp_path / "data") == bytes_on_disk(tmp_path / "more") > 0
    async with running(tmp_path, *more) as (_, client, _), process(tmp_path) as second:
        assert await get(client, region, keys) == 12
        assert "is in use by process" in (await second.until("failed"))["reason"]
    async with process(tmp_path, "--data", str(tmp_path / "data")) as twice:
        assert "each folder once" in (await twice.until("failed"))["reason"]
    async with process(tmp_path) as one:
        assert (await one.until("disks_missing"))["numbers"] == [1]


async def test_the_budget_is_lowered_to_what_the_disk_has(tmp_path: Path) -> None:
    async with process(tmp_path, "--budget-bytes", str(1 << 60)) as one:
        lowered = await one.until("budget_lowered")
        assert lowered["budget_bytes"] < lowered["asked_bytes"] == 1 << 60


async def test_metrics_are_served(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with running(tmp_path, "--metrics-port", str(port)) as (_, client, _):
        await client.count(NAMESPACE, chain(3))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        text = (await reader.read()).decode()
        writer.close()
        assert "penstock_kvstore_lookup_blocks_total 3.0" in text
        assert "penstock_kvstore_budget_bytes 8.388608e+06" in text


BAD: dict[str, tuple[str, Callable[[], Any], str]] = {
    "namespace that is no hex": ("Lookup", lambda: pb.LookupRequest(namespace="x" * 64, keys=[ROOT]), "namespace 'xxx"),
    "namespace too short": ("Lookup", lambda: pb.LookupRequest(namespace="ab", keys=[ROOT]), "64 lower-case hex digits"),
    "namespace in capitals": ("Reserve", lambda: pb.ReserveRequest(namespace="AB" * 32, blocks=[pb.BlockMeta()]), "hex"),
    "namespace that climbs": ("Reserve", lambda: pb.ReserveRequest(namespace="../" * 21 + "a", blocks=[pb.BlockMeta()]), "hex"),
    "short key": (
        "Lookup",
        lambda: pb.LookupRequest(namespace=NAMESPACE, keys=[ROOT, b"ab"]),
        "keys[1] has 2 bytes: expected 32",
    ),
    "no keys": ("Lookup", lambda: pb.LookupRequest(namespace=NAMESPACE), "0 keys: expected 1 to"),
    "too many keys": ("Lookup", lambda: pb.LookupRequest(namespace=NAMESPACE, keys=[b""] * 262_145), "262145 keys"),
    "no blocks": ("Reserve", lambda: pb.ReserveRequest(namespace=NAMESPACE), "0 blocks"),
    "long tenant": (
        "Reserve",
        lambda: pb.ReserveRequest(namespace=NAMESPACE, blocks=[pb.BlockMeta()], tenant=b"t" * 65),
        "tenant has 65 bytes: at most 64",
    ),
    "short token": ("Renew", lambda: pb.RenewRequest(token=b"short"), "token has 5 bytes: expected 16"),
    "no token": ("Release", lambda: pb.ReleaseRequest(), "token has 0 bytes: expected 16"),
}


async def test_bad_requests_get_clear_errors_and_disturb_nothing(tmp_path: Path, region: Region) -> None:
    keys = chain(3)
    async with running(tmp_path) as (_, client, ready), rpc.channel(ready["grpc"]) as channel:
        stub = kvstore_pb2_grpc.KvStoreStub(channel)
        await put(client, region, keys)
        for name, (method, request, message) in BAD.items():
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await getattr(stub, method)(request(), timeout=20)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, name
            assert message in caught.value.details(), name
        odd = [BlockMeta(b"", ROOT, LENGTH), BlockMeta(ROOT, b"x" * 33, LENGTH), BlockMeta(keys[0], ROOT, 2**32 - 1)]
        assert set((await client.reserve(NAMESPACE, odd, 5.0)).admissions) <= {Admission.INVALID, Admission.PRESENT}
        with pytest.raises(LeaseRejected):
            await client.renew(LeaseToken(bytes(16)), 5.0)
        with pytest.raises(InvalidRequest, match="namespace"):
            await client.count("no hex", keys)  # type: ignore[arg-type]
        await client.release(LeaseToken(bytes(16)))
        assert await get(client, region, keys) == 3


@pytest.mark.parametrize("method", ["KvStore/Lookup", "KvStore/Reserve", "KvStore/Renew", "Admin/Evict", "Admin/Pin"])
async def test_bytes_that_are_no_request_are_refused_with_the_reason_and_disturb_nothing(
    tmp_path: Path, region: Region, method: str
) -> None:
    keys = chain(2)
    async with running(tmp_path) as (_, client, ready), rpc.channel(ready["grpc"]) as channel:
        await put(client, region, keys)
        for data in (b"\xff" * 7, b"\x0a\x20cut", os.urandom(1000) + b"\xff"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"/penstock.kvstore.v1.{method}")(data, timeout=20)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert f"{method} got {len(data)} bytes that are no message of its type" in caught.value.details()
            assert isinstance(rpc.raised(caught.value, "peer"), InvalidRequest)
        assert await get(client, region, keys) == 2


async def test_a_stranger_on_the_byte_plane_gets_nothing(tmp_path: Path, region: Region) -> None:
    keys = chain(2)
    async with running(tmp_path) as (_, client, _):
        await put(client, region, keys)
        found = await client.lookup(NAMESPACE, keys, 10.0)
        assert found is not None
        transport = await connect(Endpoint(tcp=found.endpoint.tcp), region)
        stranger = LeaseToken(os.urandom(16))
        assert await transport.read(stranger, whole(2), spans(2), deadline_s=10.0) == [PartStatus.REJECTED] * 2
        assert await transport.write(stranger, whole(2), spans(2), deadline_s=10.0) == [PartStatus.REJECTED] * 2
        assert await transport.write(found.token, whole(2), spans(2), deadline_s=10.0) == [PartStatus.REJECTED] * 2
        await client.release(found.token)
        assert await transport.read(found.token, whole(2), spans(2), deadline_s=10.0) == [PartStatus.REJECTED] * 2
        await transport.close()
        assert await get(client, region, keys) == 2


async def test_leases_that_ran_out_or_are_of_another_life_give_nothing(tmp_path: Path, region: Region) -> None:
    keys = chain(2)
    async with running(tmp_path) as (_, client, _):
        await put(client, region, keys)
        short, old = await client.lookup(NAMESPACE, keys, 0.001), await client.lookup(NAMESPACE, keys, 60.0)
        assert short is not None and old is not None
        transport = await connect(Endpoint(tcp=short.endpoint.tcp), region)
        async with asyncio.timeout(30):
            while await transport.read(short.token, whole(2), spans(2), deadline_s=10.0) != [PartStatus.REJECTED] * 2:
                continue  # until its millisecond is over
        with pytest.raises(LeaseRejected):
            await client.renew(short.token, 5.0)
        assert await transport.read(old.token, whole(2), spans(2), deadline_s=10.0) == [OK, OK]
        await transport.close()
    async with running(tmp_path) as (_, client, ready):
        transport = await connect(Endpoint(tcp=ready["endpoint"]["tcp"]), region)
        assert await transport.read(old.token, whole(2), spans(2), deadline_s=10.0) == [PartStatus.REJECTED] * 2
        assert await transport.write(old.token, whole(2), spans(2), deadline_s=10.0) == [PartStatus.REJECTED] * 2
        with pytest.raises(LeaseRejected):
            await client.renew(old.token, 5.0)
        await transport.close()
        assert await get(client, region, keys) == 2


async def test_a_message_over_the_limit_is_refused_and_disturbs_nothing(tmp_path: Path, region: Region) -> None:
    keys = chain(2)
    async with running(tmp_path) as (_, client, ready):
        await put(client, region, keys)
        async with grpc.aio.insecure_channel(ready["grpc"]) as channel:
            call = channel.unary_unary(f"/{SERVICE}/Lookup")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(bytes(rpc.MESSAGE_BYTES_MAX + 1), timeout=30)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"\xff" * 100, timeout=30)
            assert "LookupRequest" in caught.value.details()
        assert await get(client, region, keys) == 2


async def test_noise_on_the_byte_plane_ends_its_connection_and_no_other(tmp_path: Path, region: Region) -> None:
    keys = chain(2)
    async with running(tmp_path) as (_, client, _ready):
        await put(client, region, keys)
        found = await client.lookup(NAMESPACE, keys, 60.0)
        assert found is not None
        good = await connect(Endpoint(tcp=found.endpoint.tcp), region)
        host, _, port = found.endpoint.tcp.rpartition(":")
        for noise in (
            b"GET / HTTP/1.1\r\n\r\n" + bytes(64),
            os.urandom(4096),
            HELLO + os.urandom(4096),
            HELLO + b"PSBP" + b"\xff" * 60,
        ):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(noise)
            with suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), 30)  # to its end: the store closes it
            writer.close()
        assert await good.read(found.token, whole(2), spans(2), deadline_s=10.0) == [OK, OK]
        await good.close()


async def test_a_reader_that_stalls_is_dropped_and_its_buffers_come_back(tmp_path: Path, region: Region) -> None:
    """It asks for more than sockets hold and never reads: at its deadline (and 2 s) the store lets go."""
    keys = chain(60)
    async with running(tmp_path, "--metrics-port", str(port := free_port())) as (_, client, _):
        await put(client, region, keys)
        found = await client.lookup(NAMESPACE, keys, 60.0)
        assert found is not None
        host, _, tcp_port = found.endpoint.tcp.rpartition(":")
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect((host, int(tcp_port)))
            parts = tuple(whole(60)) * 40  # 48 MB
            zeros = (0,) * len(parts)
            sock.sendall(HELLO + encode(Transfer(Op.READ, 1, found.token, 2000, parts, zeros, zeros)))
            async with asyncio.timeout(60):
                while not await gauge(port, "read_buffer_bytes"):
                    await asyncio.sleep(0.01)  # another process is asked
                assert await get(client, region, keys[:3]) == 3  # meanwhile others are served
                while await gauge(port, "read_buffer_bytes"):
                    await asyncio.sleep(0.05)
        assert await get(client, region, keys) == 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def gauge(port: int, name: str) -> float:
    """A metric of the store, as Prometheus reads it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith(f"penstock_kvstore_{name} ")))


async def test_terms_and_pins_go_over_the_wire(tmp_path: Path, region: Region) -> None:
    keys = chain(3)
    async with (
        running(tmp_path, "--tenant-quota-bytes", str(2 * 8192)) as (_, client, ready),
        rpc.channel(ready["grpc"]) as channel,
    ):
        mine = await client.reserve(NAMESPACE, metas(keys, length=100), 5.0, terms=Terms(b"tenant", 60))
        assert mine.admissions == (Admission.ACCEPTED, Admission.ACCEPTED, Admission.DROPPED)
        admin = kvstore_pb2_grpc.AdminStub(channel)
        reply = await admin.Pin(pb.PinRequest(namespace=NAMESPACE, keys=keys, for_s=5), timeout=20)
        assert reply.blocks == 0
        for request, message in (
            (pb.PinRequest(namespace=NAMESPACE), "0 keys"),
            (pb.PinRequest(namespace=NAMESPACE, last=keys[0]), "not both"),
            (pb.PinRequest(last=b"short"), "key has 5 bytes"),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=message):
                await admin.Pin(request, timeout=20)
