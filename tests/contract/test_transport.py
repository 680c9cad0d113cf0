"""Every carrier keeps the same contract: real sockets, real processes, real gRPC."""

import asyncio
import gc
import os
import random
import socket
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import grpc.aio
import msgspec
import pytest
import uvloop

from common.errors import InvalidRequest, Unavailable
from common.transport import connection as connection_module
from common.transport.client import Prefer, connect
from common.transport.connection import Connection
from common.transport.frames import Hello, Mode, Op, Transfer, encode
from common.transport.interface import Area, Endpoint, LeaseToken, Part, PartStatus, Span
from common.transport.pool import TransportPool
from common.transport.reception import Limits
from common.transport.region import Region
from common.transport.server import serve_bytes
from services.worker.lease import Right
from services.worker.stage import Stage
from tests.contract.wire import GatedArea, Proxy, Served, other_process, serve, until

OK, CORRUPT, REJECTED, FULL, FAILED, EXPIRED = (
    PartStatus.OK,
    PartStatus.CORRUPT,
    PartStatus.REJECTED,
    PartStatus.FULL,
    PartStatus.FAILED,
    PartStatus.EXPIRED,
)
SLOT = 1 << 18
LONG_S = 60.0
CARRIERS = ("tcp", "shm", "grpc")
INLINE = ("tcp", "grpc")
NOBODY = LeaseToken(bytes(16))
Serve = Callable[..., Awaitable[Served]]
Connect = Callable[..., Awaitable[Connection]]


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy], ids=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> object:
    return request.param()


@pytest.fixture(params=CARRIERS)
def carrier(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def open_fds() -> list[str]:
    """Sockets, memfds and files. Not polls, events and pipes: the loop and gRPC keep those for the process."""
    kinds = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own
            kinds.append(os.readlink(f"/proc/self/fd/{name}").partition(":[")[0])
    return [kind for kind in kinds if kind not in ("anon_inode", "pipe", "/dev/null")]


def open_tasks() -> set[asyncio.Task[object]]:
    return asyncio.all_tasks() - {asyncio.current_task()}


@pytest.fixture
async def no_leaks() -> AsyncIterator[None]:
    """After the test and its clean-up: no task and no descriptor more than before."""
    warm = grpc.aio.server()  # gRPC keeps a socket pair per process from its first use on
    warm.add_insecure_port("127.0.0.1:0")
    await warm.start()
    await warm.stop(0)
    tasks, fds = open_tasks(), Counter(open_fds())
    yield
    try:
        async with asyncio.timeout(10):
            while open_tasks() - tasks or Counter(open_fds()) - fds:  # gRPC closes its sockets in threads of its own
                gc.collect()  # tracebacks keep views
                await asyncio.sleep(0)
    except TimeoutError:
        pytest.fail(f"left behind: tasks {open_tasks() - tasks}, descriptors {Counter(open_fds()) - fds}")


@pytest.fixture
async def serving(no_leaks: None, tmp_path: Path) -> AsyncIterator[Serve]:
    started: list[Served] = []

    async def start(area: Area, limits: Limits | None = None, name: str = "a") -> Served:
        started.append(await serve(area, str(tmp_path / name), limits))
        return started[-1]

    yield start
    for served in started:
        await served.close()


@pytest.fixture
async def region(no_leaks: None) -> AsyncIterator[Region]:
    region = Region(32 * SLOT)
    yield region
    region.close()


@pytest.fixture
async def connecting(serving: Serve, region: Region) -> AsyncIterator[Connect]:
    opened: list[Connection] = []

    async def start(endpoint: Endpoint, carrier: Prefer, into: Region = region) -> Connection:
        opened.append(await connect(endpoint, into, prefer=carrier))
        return opened[-1]

    yield start
    for transport in opened:
        await transport.close()


@pytest.fixture
async def stage(no_leaks: None) -> AsyncIterator[Stage]:
    stage = Stage(32, SLOT)
    yield stage
    stage.check_integrity()
    stage.close()


def spans(parts: list[Part]) -> list[Span]:
    """Spans laid end to end."""
    out, offset = [], 0
    for part in parts:
        out.append(Span(offset, part.length))
        offset += part.length
    return out


def whole(count: int) -> list[Part]:
    return [Part(item, 0, SLOT) for item in range(count)]


async def test_random_parts_written_by_one_client_are_read_by_another(
    carrier: str, serving: Serve, connecting: Connect, stage: Stage, region: Region
) -> None:
    rng = random.Random(20)
    served = await serving(stage)
    one, two = await connecting(served.endpoint, carrier), await connecting(served.endpoint, carrier)
    slots = stage.reserve(8)
    lease = stage.grant(slots, Right.WRITE, LONG_S)
    parts: list[Part] = []
    for item in range(8):
        cuts = sorted({0, SLOT, *(rng.randrange(1, SLOT) for _ in range(5))})
        parts += [Part(item, start, end - start) for start, end in pairwise(cuts)]
    rng.shuffle(parts)
    source = spans(parts)
    region.view(Span(0, 8 * SLOT))[:] = rng.randbytes(8 * SLOT)
    expected = [bytes(region.view(span)) for span in source]

    assert await one.write(lease.token, parts, source, deadline_s=LONG_S) == [OK] * len(parts)
    assert lease.filled_count == 8
    for item in range(8):
        await lease.filled(item)
    region.view(Span(0, 8 * SLOT))[:] = bytes(8 * SLOT)
    reading = stage.grant(slots, Right.READ, LONG_S)
    assert await two.read(reading.token, parts, source, deadline_s=LONG_S) == [OK] * len(parts)
    assert [bytes(region.view(span)) for span in source] == expected
    for part, data in zip(parts, expected, strict=True):
        assert bytes(stage.view(slots[part.item], part.offset, part.length)) == data
    assert two.counters.read.bytes == 8 * SLOT and two.counters.read.busy_s > 0
    assert served.reception.counters.write.bytes == 8 * SLOT


async def test_a_transfer_of_many_batches_arrives_whole(carrier: str, serving: Serve, connecting: Connect) -> None:
    stage = Stage(20, 2 << 20)  # more than one batch of 8 MiB, each part longer than what is copied in place
    region = Region(20 * (2 << 20))
    try:
        served = await serving(stage)
        transport = await connecting(served.endpoint, carrier, region)
        slots = stage.reserve(20)
        data = random.Random(21).randbytes(region.size)
        region.view(Span(0, region.size))[:] = data
        parts = [Part(item, 0, 2 << 20) for item in range(20)]
        assert (
            await transport.write(stage.grant(slots, Right.WRITE, LONG_S).token, parts, spans(parts), deadline_s=LONG_S)
            == [OK] * 20
        )
        region.view(Span(0, region.size))[:] = bytes(region.size)
        assert (
            await transport.read(stage.grant(slots, Right.READ, LONG_S).token, parts, spans(parts), deadline_s=LONG_S)
            == [OK] * 20
        )
        assert bytes(region.view(Span(0, region.size))) == data
    finally:
        stage.close()
        region.close()


async def test_a_token_that_is_foreign_expired_or_of_the_other_right_is_rejected(
    carrier: str, serving: Serve, connecting: Connect, region: Region
) -> None:
    now = 0.0
    stage = Stage(4, SLOT, clock=lambda: now)
    served = await serving(stage)
    transport = await connecting(served.endpoint, carrier)
    slots = stage.reserve(2)
    reading, writing, short = (
        stage.grant(slots, right, ttl) for right, ttl in ((Right.READ, 9), (Right.WRITE, 9), (Right.READ, 1))
    )
    now = 2.0
    parts, place = whole(2), spans(whole(2))
    region.view(Span(0, 2 * SLOT))[:] = b"\x11" * (2 * SLOT)
    for token in (NOBODY, os.urandom(16), writing.token, short.token):
        assert await transport.read(LeaseToken(token), parts, place, deadline_s=LONG_S) == [REJECTED] * 2
    for token in (NOBODY, reading.token, short.token):
        assert await transport.write(LeaseToken(token), parts, place, deadline_s=LONG_S) == [REJECTED] * 2
    assert bytes(region.view(Span(0, 2 * SLOT))) == b"\x11" * (2 * SLOT)
    assert bytes(stage.view(slots[0])) == bytes(SLOT)
    stage.release(writing.token)
    assert await transport.write(writing.token, parts, place, deadline_s=LONG_S) == [REJECTED] * 2
    stage.close()


async def test_parts_outside_the_lease_are_rejected_and_their_neighbours_arrive(
    carrier: str, serving: Serve, connecting: Connect, stage: Stage, region: Region
) -> None:
    served = await serving(stage)
    transport = await connecting(served.endpoint, carrier)
    slots = stage.reserve(2)
    lease = stage.grant(slots, Right.WRITE, LONG_S, lengths=[SLOT, 1000])
    parts = [Part(0, 0, SLOT), Part(2, 0, 8), Part(1, 0, 1001), Part(1, 990, 11), Part(0, SLOT - 1, 2), Part(1, 0, 1000)]
    expected = [OK, REJECTED, REJECTED, REJECTED, REJECTED, OK]
    assert await transport.write(lease.token, parts, spans(parts), deadline_s=LONG_S) == expected
    assert lease.filled_count == 2
    reading = stage.grant(slots, Right.READ, LONG_S, lengths=[SLOT, 1000])
    assert await transport.read(reading.token, parts, spans(parts), deadline_s=LONG_S) == expected


async def test_spans_outside_the_region_are_the_callers_error(
    carrier: str, serving: Serve, connecting: Connect, stage: Stage
) -> None:
    served = await serving(stage)
    transport = await connecting(served.endpoint, carrier)
    with pytest.raises(InvalidRequest, match="outside the region"):
        await transport.read(NOBODY, [Part(0, 0, 8)], [Span(32 * SLOT - 4, 8)], deadline_s=LONG_S)
    assert await transport.read(NOBODY, [Part(0, 0, 8)], [Span(0, 8)], deadline_s=LONG_S) == [REJECTED]


async def test_a_wrong_checksum_from_the_area_is_corrupt(carrier: str, serving: Serve, connecting: Connect) -> None:
    area = GatedArea(checksum_error=1)
    area.gate.set()
    served = await serving(area)
    transport = await connecting(served.endpoint, carrier)
    assert await transport.read(NOBODY, [Part(0, 0, 99)], [Span(0, 99)], deadline_s=LONG_S) == [CORRUPT]
    assert area.not_done == 0


async def test_an_area_with_a_fault_fails_its_request_and_nothing_else(carrier: str, serving: Serve, connecting: Connect) -> None:
    area = GatedArea()
    area.gate.set()
    served = await serving(area)
    transport = await connecting(served.endpoint, carrier)
    assert await transport.write(NOBODY, [Part(0, 0, 99)], [Span(0, 99)], deadline_s=LONG_S) == [FAILED]
    assert await transport.read(NOBODY, [Part(0, 0, 99)], [Span(0, 99)], deadline_s=LONG_S) == [OK]


@pytest.mark.parametrize("carrier", INLINE)
async def test_a_bit_flipped_on_the_wire_is_found_by_the_receiver(
    carrier: str, serving: Serve, connecting: Connect, stage: Stage, region: Region
) -> None:
    served = await serving(stage)
    slots = stage.reserve(2)
    lease = stage.grant(slots, Right.WRITE, LONG_S)
    region.view(Span(0, 2 * SLOT))[:] = b"\xaa" * (2 * SLOT)
    async with Proxy(flip=True).before(getattr(served.endpoint, carrier)) as proxy:
        transport = await connecting(Endpoint(**{carrier: proxy.address}), carrier)
        assert await transport.write(lease.token, whole(2), spans(whole(2)), deadline_s=LONG_S) == [CORRUPT, OK]
        assert [lease.is_filled(0), lease.is_filled(1)] == [False, True]
        assert await transport.write(lease.token, whole(2), spans(whole(2)), deadline_s=LONG_S) == [OK, OK]
        await transport.close()
    reading = stage.grant(slots, Right.READ, LONG_S)
    async with Proxy(flip=True).before(getattr(served.endpoint, carrier)) as proxy:
        transport = await connecting(Endpoint(**{carrier: proxy.address}), carrier)
        assert await transport.read(reading.token, whole(2), spans(whole(2)), deadline_s=LONG_S) == [CORRUPT, OK]
        assert await transport.read(reading.token, whole(2), spans(whole(2)), deadline_s=LONG_S) == [OK, OK]
        await transport.close()


@pytest.mark.parametrize("carrier", INLINE)
async def test_a_read_cancelled_in_mid_payload_leaves_its_span_alone_and_the_connection_usable(
    carrier: str, serving: Serve, connecting: Connect, stage: Stage, region: Region
) -> None:
    served = await serving(stage)
    slots = stage.reserve(4)
    for slot in slots:
        stage.view(slot)[:] = b"\xaa" * SLOT
    reading = stage.grant(slots, Right.READ, LONG_S)
    async with Proxy(hold=True).before(getattr(served.endpoint, carrier)) as proxy:
        transport = await connecting(Endpoint(**{carrier: proxy.address}), carrier)
        task = asyncio.create_task(transport.read(reading.token, whole(4), spans(whole(4)), deadline_s=LONG_S))
        await proxy.holding.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        region.view(Span(0, 4 * SLOT))[:] = b"\x77" * (4 * SLOT)
        proxy.go_on.set()
        later = Span(8 * SLOT, SLOT)
        assert await transport.read(reading.token, [Part(1, 0, SLOT)], [later], deadline_s=LONG_S) == [OK]
        assert bytes(region.view(later)) == b"\xaa" * SLOT
        assert bytes(region.view(Span(0, 4 * SLOT))) == b"\x77" * (4 * SLOT)
        await transport.close()


@pytest.mark.parametrize("carrier", INLINE)
async def test_a_read_that_expires_in_mid_payload_never_touches_its_span_again(
    carrier: str, serving: Serve, connecting: Connect, stage: Stage, region: Region
) -> None:
    served = await serving(stage)
    slots = stage.reserve(1)
    stage.view(slots[0])[:] = b"\xaa" * SLOT
    reading = stage.grant(slots, Right.READ, LONG_S)
    async with Proxy(hold=True).before(getattr(served.endpoint, carrier)) as proxy:
        transport = await connecting(Endpoint(**{carrier: proxy.address}), carrier)
        assert await transport.read(reading.token, whole(1), spans(whole(1)), deadline_s=0.05) == [EXPIRED]
        region.view(Span(0, SLOT))[:] = b"\x77" * SLOT
        proxy.go_on.set()
        if transport.usable:
            await transport.read(reading.token, whole(1), [Span(SLOT, SLOT)], deadline_s=LONG_S)
        assert bytes(region.view(Span(0, SLOT))) == b"\x77" * SLOT
        await transport.close()


async def test_a_cancelled_shm_read_returns_only_when_the_server_has_let_go(
    serving: Serve, connecting: Connect, region: Region
) -> None:
    area = GatedArea()
    served = await serving(area)
    transport = await connecting(served.endpoint, "shm")
    task = asyncio.create_task(transport.read(NOBODY, whole(1), spans(whole(1)), deadline_s=LONG_S))
    await area.entered.acquire()
    task.cancel()
    for _ in range(50):
        await asyncio.sleep(0)
    assert not task.done()
    area.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not region.held(Span(0, SLOT))
    region.view(Span(0, SLOT))[:] = b"\x77" * SLOT
    assert await transport.read(NOBODY, [Part(0, 0, 8)], [Span(SLOT, 8)], deadline_s=LONG_S) == [OK]
    assert bytes(region.view(Span(0, SLOT))) == b"\x77" * SLOT


async def test_spans_that_a_hung_server_may_still_write_are_held_until_it_answers(
    serving: Serve, connecting: Connect, region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "SETTLE_S", 0.01)
    area = GatedArea()
    served = await serving(area)
    transport = await connecting(served.endpoint, "shm")
    assert await transport.read(NOBODY, whole(1), spans(whole(1)), deadline_s=0.01) == [EXPIRED]
    assert region.held(Span(0, 1)) and not region.held(Span(SLOT, SLOT))
    assert await transport.read(NOBODY, whole(1), spans(whole(1)), deadline_s=LONG_S) == [FULL]
    area.gate.set()
    assert await transport.read(NOBODY, whole(1), [Span(SLOT, SLOT)], deadline_s=LONG_S) == [OK]
    assert not region.held(Span(0, SLOT))
    assert await transport.read(NOBODY, whole(1), spans(whole(1)), deadline_s=LONG_S) == [OK]


@pytest.mark.parametrize("carrier", INLINE)
async def test_a_write_cancelled_in_mid_payload_fills_nothing_and_the_connection_stays_usable(
    carrier: str, serving: Serve, connecting: Connect, stage: Stage, region: Region
) -> None:
    served = await serving(stage)
    slots = stage.reserve(24)
    lease = stage.grant(slots, Right.WRITE, LONG_S)
    region.view(Span(0, 24 * SLOT))[:] = b"\xaa" * (24 * SLOT)  # more than the sockets' buffers take
    async with Proxy(hold=True).before(getattr(served.endpoint, carrier)) as proxy:
        transport = await connecting(Endpoint(**{carrier: proxy.address}), carrier)
        task = asyncio.create_task(transport.write(lease.token, whole(24), spans(whole(24)), deadline_s=LONG_S))
        await proxy.holding.wait()
        for _ in range(100):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        region.view(Span(0, 24 * SLOT))[:] = b"\x77" * (24 * SLOT)
        proxy.go_on.set()
        assert await transport.write(lease.token, [Part(23, 0, SLOT)], [Span(0, SLOT)], deadline_s=LONG_S) == [OK]
        for item in range(23):
            assert not lease.is_filled(item) or bytes(stage.view(slots[item])) == b"\xaa" * SLOT
        assert not all(lease.is_filled(item) for item in range(24))
        await transport.close()


@pytest.mark.parametrize("carrier", INLINE)
async def test_nothing_lands_in_a_slot_after_its_lease_was_revoked(
    carrier: str, serving: Serve, connecting: Connect, stage: Stage, region: Region
) -> None:
    served = await serving(stage)
    slots = stage.reserve(2)
    lease = stage.grant(slots, Right.WRITE, LONG_S)
    region.view(Span(0, 2 * SLOT))[:] = b"\xaa" * (2 * SLOT)
    async with Proxy(hold=True).before(getattr(served.endpoint, carrier)) as proxy:
        transport = await connecting(Endpoint(**{carrier: proxy.address}), carrier)
        task = asyncio.create_task(transport.write(lease.token, whole(2), spans(whole(2)), deadline_s=LONG_S))
        await proxy.holding.wait()
        await stage.revoke(lease.token)
        for slot in slots:
            stage.view(slot)[:] = b"\x77" * SLOT
        proxy.go_on.set()
        assert await task == [REJECTED] * 2
        assert all(bytes(stage.view(slot)) == b"\x77" * SLOT for slot in slots)
        again = stage.grant(slots, Right.WRITE, LONG_S)
        assert await transport.write(again.token, whole(2), spans(whole(2)), deadline_s=LONG_S) == [OK] * 2
        await transport.close()


async def test_many_concurrent_requests_each_get_their_own_bytes(
    carrier: str, serving: Serve, connecting: Connect, stage: Stage, region: Region
) -> None:
    served = await serving(stage)
    transport = await connecting(served.endpoint, carrier)
    slots = stage.reserve(32)
    for index, slot in enumerate(slots):
        stage.view(slot)[:] = bytes([index]) * SLOT
    reading = stage.grant(slots, Right.READ, LONG_S)

    async def one(number: int) -> None:
        item, span = number % 32, Span(number * 1024, 1024)
        assert await transport.read(reading.token, [Part(item, number, 1024)], [span], deadline_s=LONG_S) == [OK]
        assert bytes(region.view(span)) == bytes([item]) * 1024

    async with asyncio.TaskGroup() as group:
        for number in range(500):
            group.create_task(one(number))


async def test_no_more_requests_reach_the_area_than_the_bound(carrier: str, serving: Serve, connecting: Connect) -> None:
    area = GatedArea()
    served = await serving(area, Limits(requests_max=3, requests_total_max=4))
    one, two = await connecting(served.endpoint, carrier), await connecting(served.endpoint, carrier)
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(transport.read(NOBODY, [Part(0, 0, 8)], [Span(8 * i, 8)], deadline_s=LONG_S))
            for i, transport in enumerate([one, two] * 10)
        ]
        for _ in range(4):
            await area.entered.acquire()
        for _ in range(200):
            await asyncio.sleep(0)
        assert area.reading == 4
        area.gate.set()
    assert all(task.result() == [OK] for task in tasks)
    assert area.reading_max == 4 and area.not_done == 0


async def test_a_peer_that_does_not_answer_costs_the_deadline_and_no_more(
    carrier: str, serving: Serve, connecting: Connect
) -> None:
    area = GatedArea()
    served = await serving(area)
    transport = await connecting(served.endpoint, carrier)
    task = asyncio.create_task(transport.read(NOBODY, [Part(0, 0, 8)], [Span(0, 8)], deadline_s=0.05))
    await area.entered.acquire()
    if carrier == "shm":
        asyncio.get_running_loop().call_later(0.1, area.gate.set)
    assert await task == [EXPIRED]
    area.gate.set()
    again = transport if transport.usable else await connecting(served.endpoint, carrier)
    assert await again.read(NOBODY, [Part(0, 0, 8)], [Span(0, 8)], deadline_s=LONG_S) == [OK]


async def test_closing_the_server_finishes_what_is_in_flight(carrier: str, serving: Serve, connecting: Connect) -> None:
    area = GatedArea()
    served = await serving(area)
    transport = await connecting(served.endpoint, carrier)
    task = asyncio.create_task(transport.read(NOBODY, [Part(0, 0, 8)], [Span(0, 8)], deadline_s=LONG_S))
    await area.entered.acquire()
    closing = asyncio.create_task(served.server.close())
    await until(lambda: not transport.usable)
    assert await transport.read(NOBODY, [Part(0, 0, 8)], [Span(8, 8)], deadline_s=LONG_S) == [FAILED]
    area.gate.set()
    assert await task == [OK]
    await closing
    assert not served.reception.sessions
    with pytest.raises(Unavailable):
        await connecting(served.endpoint, carrier)


async def test_a_closed_transport_fails_what_is_in_flight(carrier: str, serving: Serve, connecting: Connect) -> None:
    area = GatedArea()
    served = await serving(area)
    transport = await connecting(served.endpoint, carrier)
    task = asyncio.create_task(transport.read(NOBODY, [Part(0, 0, 8)], [Span(0, 8)], deadline_s=LONG_S))
    await area.entered.acquire()
    closing = asyncio.create_task(transport.close())
    if carrier == "shm":
        area.gate.set()  # only then is the memory ours again
        assert await task in ([OK], [FAILED])
    else:
        assert await task == [FAILED]
    await closing
    area.gate.set()
    assert await transport.read(NOBODY, [Part(0, 0, 8)], [Span(0, 8)], deadline_s=LONG_S) == [FAILED]


async def test_a_restarted_server_is_a_clean_failure_and_then_works(
    carrier: Prefer, serving: Serve, stage: Stage, region: Region
) -> None:
    pool = TransportPool(region, prefer=carrier)
    served = await serving(stage)
    slots = stage.reserve(1)
    reading = stage.grant(slots, Right.READ, LONG_S)
    transport = pool.transport(served.endpoint)
    assert await transport.read(reading.token, whole(1), spans(whole(1)), deadline_s=LONG_S) == [OK]
    await served.close()
    assert await transport.read(reading.token, whole(1), spans(whole(1)), deadline_s=LONG_S) == [FAILED]

    fresh = Stage(4, SLOT)
    reborn = await serving(fresh)
    assert reborn.reception.epoch != served.reception.epoch
    transport = pool.transport(reborn.endpoint)
    assert await transport.read(reading.token, whole(1), spans(whole(1)), deadline_s=LONG_S) == [REJECTED]
    again = fresh.grant(fresh.reserve(1), Right.READ, LONG_S)
    assert await transport.read(again.token, whole(1), spans(whole(1)), deadline_s=LONG_S) == [OK]
    assert transport.carrier == carrier
    await pool.close()
    fresh.close()


SERVER_PROCESS = """
import asyncio, sys
from tests.contract.wire import serve
from services.worker.lease import Right
from services.worker.stage import Stage
async def main():
    stage = Stage(8, 1 << 18)
    served = await serve(stage, sys.argv[1])
    slots = stage.reserve(8)
    for index, slot in enumerate(slots):
        stage.view(slot)[:] = bytes([index]) * (1 << 18)
    lease = stage.grant(slots, Right.READ, 600)
    endpoint = served.endpoint
    print(endpoint.shm, endpoint.tcp, endpoint.grpc, lease.token.hex(), flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_a_peer_killed_in_mid_transfer_fails_its_parts_and_its_successor_serves(
    carrier: Prefer, no_leaks: None, region: Region, tmp_path: Path
) -> None:
    pool = TransportPool(region, prefer=carrier)
    for _ in range(2):
        async with other_process(SERVER_PROCESS, str(tmp_path / "s")) as process:
            assert process.stdout
            shm, tcp, grpc_address, token = (await process.stdout.readline()).decode().split()
            transport = pool.transport(Endpoint(shm=shm, tcp=tcp, grpc=grpc_address))
            lease = LeaseToken(bytes.fromhex(token))
            assert await transport.read(lease, whole(8), spans(whole(8)), deadline_s=LONG_S) == [OK] * 8
            assert bytes(region.view(Span(7 * SLOT, SLOT))) == b"\x07" * SLOT
            many = [Part(i % 8, 0, SLOT) for i in range(24)]
            tasks = [asyncio.create_task(transport.read(lease, many, spans(many), deadline_s=LONG_S)) for _ in range(20)]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            process.kill()
            for task in tasks:
                assert set(await task) <= {OK, FAILED}
            assert FAILED in await transport.read(lease, whole(1), spans(whole(1)), deadline_s=LONG_S)
    await pool.close()
    assert not region.held(Span(0, region.size))


CLIENT_PROCESS = """
import asyncio, socket, sys
from common.transport.client import Prefer, connect
from common.transport.frames import *
from common.transport.interface import *
from common.transport.region import Region
async def main():
    region = Region(32 << 18)
    endpoint = Endpoint(**{sys.argv[1]: sys.argv[2]})
    transport = await connect(endpoint, region, prefer=sys.argv[1])
    parts = [Part(i, 0, 1 << 18) for i in range(8)]
    spans = [Span(i << 18, 1 << 18) for i in range(8)]
    print(await transport.write(bytes.fromhex(sys.argv[3]), parts, spans, deadline_s=60), flush=True)
asyncio.run(main())
"""


async def test_a_client_killed_in_mid_write_leaves_slots_unfilled_and_free(
    carrier: str, serving: Serve, connecting: Connect, stage: Stage, region: Region
) -> None:
    served = await serving(stage)
    slots = stage.reserve(8)
    lease = stage.grant(slots, Right.WRITE, LONG_S)
    async with other_process(CLIENT_PROCESS, carrier, getattr(served.endpoint, carrier), lease.token.hex()) as process:
        await until(lambda: stage.counters.write.in_flight or lease.filled_count)
        process.kill()
    await until(lambda: not served.reception.sessions)
    assert not stage.counters.write.in_flight
    stage.free(slots)
    assert stage.slots_free == 32
    stage.check_integrity()


async def test_auto_takes_shared_memory_on_this_host_and_tcp_when_the_socket_is_gone(
    serving: Serve, region: Region, stage: Stage, tmp_path: Path
) -> None:
    served = await serving(stage)
    near = await connect(served.endpoint, region)
    assert near.carrier == "shm"
    await near.close()
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(stale))
    for path in (str(tmp_path / "absent"), str(stale)):
        far = await connect(msgspec.structs.replace(served.endpoint, shm=path), region)
        assert far.carrier == "tcp"
        await far.close()
    only_grpc = await connect(Endpoint(shm=str(stale), tcp="127.0.0.1:1", grpc=served.endpoint.grpc), region)
    assert only_grpc.carrier == "grpc"
    await only_grpc.close()


async def test_an_unreachable_peer_is_unavailable_and_says_why_for_each_carrier(region: Region) -> None:
    with pytest.raises(
        Unavailable, match=r"shm: not on this host; tcp 127\.0\.0\.1:1: .*Connect call failed.*; grpc: not served"
    ):
        await connect(Endpoint(shm="/nowhere/at/all", tcp="127.0.0.1:1"), region)
    with pytest.raises(Unavailable, match="shm: not served"):
        await connect(Endpoint(tcp="127.0.0.1:1"), region, prefer="shm")
    with pytest.raises(Unavailable, match="expected host:port"):
        await connect(Endpoint(tcp="nonsense"), region)


# Raw peers: what a broken or malicious client does to the server.


def raw_tcp(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)))


async def read_to_end(sock: socket.socket) -> bytes:
    sock.setblocking(False)
    data = b""
    try:
        while piece := await asyncio.get_running_loop().sock_recv(sock, 1 << 16):
            data += piece
    except ConnectionError:
        pass
    return data


def write_frame(token: LeaseToken, parts: list[Part], deadline_ms: int, payload: int, request: int = 1) -> bytes:
    zeros = (0,) * len(parts)
    return encode(Transfer(Op.WRITE, request, token, deadline_ms, tuple(parts), zeros, zeros, payload))


HELLO = encode(Hello(Mode.INLINE, 0))
BAD_FRAMES = {
    "garbage": HELLO + b"GET / HTTP/1.1\r\nHost: example\r\n\r\n" + bytes(64),
    "no hello": write_frame(NOBODY, [Part(0, 0, 8)], 1000, 8) + bytes(8),
    "region mode over tcp": encode(Hello(Mode.REGION, 1 << 20)),
    "too many bytes": HELLO + write_frame(NOBODY, [Part(0, 0, (64 << 20) + 1)], 1000, 0),
    "payload that differs from the parts": HELLO + write_frame(NOBODY, [Part(0, 0, 8)], 1000, 9),
    "an inline write without payload": HELLO + write_frame(NOBODY, [Part(0, 0, 8)], 1000, 0),
    "flipped table": HELLO + write_frame(NOBODY, [Part(0, 0, 8)], 1000, 8)[:-1] + b"\x01",
    "empty part": HELLO + write_frame(NOBODY, [Part(0, 0, 0)], 1000, 0),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
async def test_a_malformed_frame_closes_its_connection_and_disturbs_nobody(
    name: str, serving: Serve, connecting: Connect, stage: Stage
) -> None:
    served = await serving(stage)
    good = await connecting(served.endpoint, "tcp")
    with raw_tcp(served.endpoint.tcp) as sock:
        sock.sendall(BAD_FRAMES[name])
        assert b"expected" in await read_to_end(sock)
    assert await good.read(NOBODY, [Part(0, 0, 8)], [Span(0, 8)], deadline_s=LONG_S) == [REJECTED]


async def test_an_shm_client_without_a_proper_region_is_refused(
    serving: Serve, connecting: Connect, stage: Stage, tmp_path: Path
) -> None:
    served = await serving(stage)
    plain = os.memfd_create("plain")  # no seals
    os.ftruncate(plain, 4096)
    sealed = Region(4096)
    with tempfile.TemporaryFile() as file:
        file.truncate(4096)
        cases = [([], 4096), ([plain], 4096), ([file.fileno()], 4096), ([sealed.fd], 8192)]
        for fds, size in cases:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(served.endpoint.shm)
                socket.send_fds(sock, [encode(Hello(Mode.REGION, size))], fds) if fds else sock.sendall(
                    encode(Hello(Mode.REGION, size))
                )
                assert b"expected" in await read_to_end(sock)
        with socket.socket(socket.AF_UNIX) as sock:  # spans beyond the region
            sock.connect(served.endpoint.shm)
            bad = encode(Transfer(Op.READ, 1, NOBODY, 1000, (Part(0, 0, 8),), (0,), (4090,)))
            socket.send_fds(sock, [encode(Hello(Mode.REGION, 4096)) + bad], [sealed.fd])
            assert b"outside the region" in await read_to_end(sock)
    os.close(plain)
    sealed.close()
    good = await connecting(served.endpoint, "shm")
    assert await good.read(NOBODY, [Part(0, 0, 8)], [Span(0, 8)], deadline_s=LONG_S) == [REJECTED]


async def test_a_client_that_stalls_in_mid_write_is_dropped_and_its_slot_is_free_again(serving: Serve, stage: Stage) -> None:
    served = await serving(stage, Limits(stall_s=0.05))
    slots = stage.reserve(1)
    lease = stage.grant(slots, Right.WRITE, LONG_S)
    with raw_tcp(served.endpoint.tcp) as sock:
        sock.sendall(HELLO + write_frame(lease.token, whole(1), 50, SLOT) + bytes(1000))
        await read_to_end(sock)  # the server ends it
    assert not stage.counters.write.in_flight
    stage.free(slots)
    assert stage.slots_free == 32


async def test_a_client_that_does_not_read_its_reply_is_dropped(serving: Serve, stage: Stage) -> None:
    served = await serving(stage, Limits(stall_s=0.05))
    lease = stage.grant(stage.reserve(32), Right.READ, LONG_S)
    with raw_tcp(served.endpoint.tcp) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        zeros = (0,) * 32
        sock.sendall(HELLO + encode(Transfer(Op.READ, 1, lease.token, 500, tuple(whole(32)), zeros, zeros)))
        await until(lambda: served.reception.sessions)
        await until(lambda: not served.reception.sessions)
    assert not served.reception.budget.requests


async def test_a_request_number_used_twice_is_malformed(serving: Serve, no_leaks: None) -> None:
    area = GatedArea()
    served = await serving(area)
    with raw_tcp(served.endpoint.tcp) as sock:
        frame = encode(Transfer(Op.READ, 7, NOBODY, 60_000, (Part(0, 0, 8),), (0,), (0,)))
        sock.sendall(HELLO + frame + frame)
        asyncio.get_running_loop().call_later(0.05, area.gate.set)
        assert b"in flight already" in await read_to_end(sock)


async def test_more_connections_than_the_bound_are_told_so(serving: Serve, connecting: Connect, stage: Stage) -> None:
    served = await serving(stage, Limits(connections_max=1))
    first = await connecting(served.endpoint, "tcp")
    for carrier in ("tcp", "shm"):
        with pytest.raises(Unavailable, match="FULL"):
            await connecting(served.endpoint, carrier)
    with pytest.raises(Unavailable, match="no new byte-plane connections"):
        await connecting(served.endpoint, "grpc")
    assert await first.read(NOBODY, [Part(0, 0, 8)], [Span(0, 8)], deadline_s=LONG_S) == [REJECTED]


async def test_a_client_that_says_nothing_is_dropped(serving: Serve, stage: Stage) -> None:
    served = await serving(stage, Limits(body_s=0.05))
    for address in (served.endpoint.tcp, served.endpoint.shm):
        sock = raw_tcp(address) if address == served.endpoint.tcp else socket.socket(socket.AF_UNIX)
        with sock:
            if address == served.endpoint.shm:
                sock.connect(address)
            assert await read_to_end(sock) == b""


async def test_a_reply_that_lies_about_its_payload_ends_the_connection(region: Region, no_leaks: None) -> None:
    """A server that answers nonsense: the client fails the request and touches no memory."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)

        async def lie() -> None:
            from common.transport.frames import Reply, Welcome

            peer, _ = await loop.sock_accept(listener)
            with peer:
                await loop.sock_sendall(peer, encode(Welcome(bytes(16), 4, 128 << 20)))
                await loop.sock_recv(peer, 4096)
                await loop.sock_recv(peer, 4096)
                await loop.sock_sendall(peer, encode(Reply(1, (OK,), (0,), 4096)) + b"\xee" * 4096)
                await read_to_end(peer)

        liar = asyncio.create_task(lie())
        transport = await connect(Endpoint(tcp=f"127.0.0.1:{listener.getsockname()[1]}"), region, prefer="tcp")
        assert await transport.read(NOBODY, [Part(0, 0, 8)], [Span(0, 8)], deadline_s=LONG_S) == [FAILED]
        assert not transport.usable and bytes(region.view(Span(0, 8))) == bytes(8)
        await transport.close()
        await liar


async def test_the_socket_file_is_private_and_a_dead_process_s_is_replaced(stage: Stage, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    first = await serve_bytes(stage, shm_path=path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(Unavailable, match="in use by another process"):
        await serve_bytes(stage, shm_path=path)
    await first.close()
    assert not path.exists()
    with pytest.raises(InvalidRequest, match="expected at most 107 bytes"):
        await serve_bytes(stage, shm_path=tmp_path / ("x" * 100))
