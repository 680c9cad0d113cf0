"""Membership over a real NATS server, which is killed and comes back."""

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import nats
import pytest

from common.membership import (
    RECORD_BYTES_MAX,
    Announcer,
    MemberLoad,
    MemberRecord,
    Seen,
    Watcher,
    decode_record,
    encode_record,
    member_key,
    open_bucket,
)

RECORD = MemberRecord(
    role="decode",
    id="decode-127.0.0.1:5",
    epoch="0f" * 16,
    address="127.0.0.1:5",
    namespace="ab" * 32,
    model="tiny",
    block_tokens=16,
    load=MemberLoad(running=2, tokens=100, prefill_tokens_per_s=1234.5),
)
WAIT_S = 20


class Nats:
    """A real nats-server that can be killed and started again on its port."""

    def __init__(self, directory: Path, jetstream: bool = True) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"nats://127.0.0.1:{self.port}"
        self._directory = directory
        self._jetstream = jetstream
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        binary = Path(sys.executable).parent / "nats-server"
        flags = ["-a", "127.0.0.1", "-p", str(self.port)] + (["-js", "-sd", str(self._directory)] if self._jetstream else [])
        self._process = await asyncio.create_subprocess_exec(
            str(binary), *flags, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert self._process.stderr is not None
        while b"Server is ready" not in (line := await asyncio.wait_for(self._process.stderr.readline(), WAIT_S)):
            assert line, "nats-server ended"
        self._drain = asyncio.create_task(self._process.stderr.read())

    async def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
            await self._drain
            self._process = None


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Nats]:
    made = Nats(tmp_path)
    await made.start()
    yield made
    await made.kill()


class Heard:
    """Collects what a watcher hears; `until` waits for something to become true."""

    def __init__(self) -> None:
        self.all: list[Seen] = []
        self._more = asyncio.Event()

    def __call__(self, seen: Seen) -> None:
        self.all.append(seen)
        self._more.set()

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not true():
                self._more.clear()
                await self._more.wait()


@asynccontextmanager
async def running(*sessions: Announcer | Watcher) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(session.run()) for session in sessions]
    try:
        yield
    finally:
        for task in tasks:
            assert not task.done(), "a session never ends by itself"
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_an_announced_member_is_heard_and_withdrawn_on_a_clean_stop(server: Nats) -> None:
    heard = Heard()
    announcer, watcher = Announcer(server.url, lambda: RECORD), Watcher(server.url, heard)
    async with running(announcer, watcher):
        await heard.until(lambda: bool(heard.all))
        assert heard.all[0].record == RECORD and not heard.all[0].gone
        await announcer.withdraw()
        await heard.until(lambda: heard.all[-1].gone)
    assert [seen.gone for seen in watcher.members] == [True]
    watcher.forget(RECORD)
    assert watcher.members == ()


async def test_a_change_is_published_at_once_when_asked(server: Nats) -> None:
    heard = Heard()
    records = [RECORD]
    announcer = Announcer(server.url, lambda: records[-1], refresh_s=3600)
    async with running(announcer, Watcher(server.url, heard)):
        await heard.until(lambda: bool(heard.all))
        records.append(MemberRecord(role="decode", id=RECORD.id, epoch=RECORD.epoch, address=RECORD.address, draining=True))
        announcer.changed()
        await heard.until(lambda: heard.all[-1].record.draining)


async def test_a_member_that_stops_refreshing_expires_while_nats_is_healthy(server: Nats) -> None:
    heard = Heard()
    watcher = Watcher(server.url, heard, ttl_s=0.4)
    async with running(watcher):
        async with running(Announcer(server.url, lambda: RECORD, refresh_s=0.05)):
            await heard.until(lambda: bool(heard.all))
        await heard.until(lambda: heard.all[-1].gone)


async def test_losing_nats_drops_nobody_and_its_return_goes_on_where_it_was(server: Nats) -> None:
    heard = Heard()
    watcher = Watcher(server.url, heard, ttl_s=0.4)
    async with running(Announcer(server.url, lambda: RECORD, refresh_s=0.05), watcher):
        await heard.until(lambda: bool(heard.all))
        await server.kill()
        async with asyncio.timeout(WAIT_S):
            while watcher.connected:
                await asyncio.sleep(0.01)
        last = len(heard.all)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 3 * 0.4)  # three lifetimes without NATS
        assert [seen.gone for seen in watcher.members] == [False]
        await server.start()
        await heard.until(lambda: len(heard.all) > last and heard.all[-1].record == RECORD)
        assert not any(seen.gone for seen in heard.all)


async def test_nats_may_come_up_after_everybody_else(tmp_path: Path) -> None:
    late = Nats(tmp_path)
    heard = Heard()
    async with running(Announcer(late.url, lambda: RECORD), Watcher(late.url, heard)):
        await late.start()
        await heard.until(lambda: bool(heard.all))
    await late.kill()


async def test_a_server_without_jetstream_is_named_and_disturbs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "penstock")
    plain = Nats(tmp_path, jetstream=False)
    await plain.start()
    watcher = Watcher(plain.url)
    async with running(watcher), asyncio.timeout(WAIT_S):
        while not caplog.records:
            await asyncio.sleep(0.01)
    assert "no JetStream: start it with -js" in str(caplog.records[0].fields)  # type: ignore[attr-defined]
    await plain.kill()


async def test_a_bucket_made_with_other_settings_is_used_as_it_is(server: Nats) -> None:
    client = await nats.connect(server.url)
    await client.jetstream().create_key_value(bucket="penstock-members", history=5)
    bucket = await open_bucket(client)
    await bucket.put(member_key("decode", "a:b"), encode_record(RECORD))
    assert decode_record("k", (await bucket.get("decode.a_b")).value or b"") == RECORD
    await client.close()


async def test_rubbish_in_the_bucket_is_left_out(server: Nats) -> None:
    client = await nats.connect(server.url)
    bucket = await open_bucket(client)
    await bucket.put("decode.rubbish", b"{not json")
    await bucket.put("decode.strange", b'{"role": 5}')
    heard = Heard()
    async with running(Announcer(server.url, lambda: RECORD), Watcher(server.url, heard)):
        await heard.until(lambda: bool(heard.all))
    assert {seen.record.id for seen in heard.all} == {RECORD.id}
    await client.close()


async def test_without_a_url_a_session_ends_at_once() -> None:
    await Watcher("").run()


def test_records_survive_the_wire_and_are_bounded() -> None:
    assert decode_record("k", encode_record(RECORD)) == RECORD
    assert len(encode_record(RECORD)) < 512
    assert decode_record("k", b" " * (RECORD_BYTES_MAX + 1)) is None
    assert member_key("decode", "decode-127.0.0.1:5") == "decode.decode-127_0_0_1_5"
