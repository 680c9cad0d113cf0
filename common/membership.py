"""Who is there: members and their loads in a NATS JetStream KV bucket.

Workers announce themselves under one key each, refreshed every `REFRESH_S`; the bucket lives in
memory and forgets a key after `TTL_S`. Nothing depends on it: losing NATS keeps the last known
members, and routers reach static peers without it.

Life of both sides: connect -> check the server -> open the bucket -> announce or watch until the
connection is lost -> wait (0.2 s doubling to 5 s) -> connect again, for ever. The first failure of a
spell is logged, and so is its end.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import Callable
from typing import Any

import msgspec
import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.js.api import KeyValueConfig, StorageType
from nats.js.kv import KV_DEL, KV_PURGE, KeyValue

from common.aio import check_cancelled, first_of
from common.logs import Log
from common.runs import QueuedRun

BUCKET = "penstock-members"
TTL_S = 5.0
REFRESH_S = 1.0
RECORD_BYTES_MAX = 4096
MEMBERS_MAX = 4096
SERVER_VERSION_MIN = (2, 10)  # JetStream KV as used here; 2.9 ignores some limits in silence
_BACKOFF_S = (0.2, 5.0)
_TIMEOUT_S = 2.0

log = Log("membership")


class MemberLoad(msgspec.Struct, frozen=True, omit_defaults=True):
    """As worker.proto's Load; a kvstore leaves it empty."""

    running: int = 0
    waiting: int = 0
    tokens: int = 0
    pool_blocks_free: int = 0
    pool_blocks_total: int = 0
    stage_slots_free: int = 0
    stage_slots_total: int = 0
    prefill_tokens_per_s: float = 0.0
    read_bytes_per_s: float = 0.0
    read_queue_bytes: int = 0
    peer_read_bytes_per_s: float = 0.0
    peer_read_queue_bytes: int = 0
    peer_write_bytes_per_s: float = 0.0
    peer_write_queue_bytes: int = 0
    queued_tokens: int = 0
    prefill_step_s: float = 0.0
    queued_runs: tuple[QueuedRun, ...] = ()  # from when it is told on


class MemberRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a member says of itself.

    Attributes:
        role: "decode", "prefill" or "kvstore".
        id: its name, unique within the role.
        epoch: 32 hex digits, one per incarnation.
        address: host:port of its gRPC, as others reach it.
    """

    role: str
    id: str
    epoch: str
    address: str
    namespace: str = ""
    model: str = ""
    block_tokens: int = 0
    draining: bool = False
    load: MemberLoad = MemberLoad()


class Seen(msgspec.Struct, frozen=True):
    """A member as last heard of. `gone`: its entry was removed, or expired while NATS was healthy."""

    record: MemberRecord
    heard_at: float  # monotonic seconds
    gone: bool = False


def member_key(role: str, id_: str) -> str:
    return f"{role}.{re.sub(r'[^-_=a-zA-Z0-9]', '_', id_)}"


class _Session:
    """Keeps one NATS connection and the bucket open; `_work` runs while they are."""

    def __init__(self, url: str, name: str) -> None:
        self._url = url
        self._name = name
        self._warned = False
        self.connected = False

    async def run(self) -> None:
        """Runs until cancelled. An empty URL returns at once."""
        backoff_s = _BACKOFF_S[0]
        while self._url:
            check_cancelled()
            started = time.monotonic()
            try:
                await self._once()
            except (nats.errors.Error, OSError, ValueError, TimeoutError) as error:
                self._lost(error)
            self.connected = False
            if time.monotonic() - started > 2 * _BACKOFF_S[1]:
                backoff_s = _BACKOFF_S[0]
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _BACKOFF_S[1])

    async def _once(self) -> None:
        lost = asyncio.Event()

        async def on_lost() -> None:
            lost.set()

        async def on_error(error: Exception) -> None:
            log.debug("nats_error", name=self._name, reason=repr(error))

        client = await nats.connect(
            self._url,
            name=self._name,
            allow_reconnect=False,
            connect_timeout=_TIMEOUT_S,
            ping_interval=2,
            max_outstanding_pings=2,
            disconnected_cb=on_lost,
            closed_cb=on_lost,
            error_cb=on_error,
        )
        try:
            check_cancelled()
            self._check(client)
            bucket = await open_bucket(client)
            self.connected = True
            self._warned = False
            log.event("nats_connected", name=self._name, url=self._url)
            await first_of(self._work(bucket), lost.wait())
            raise nats.errors.ConnectionClosedError
        finally:
            self.connected = False
            with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
                async with asyncio.timeout(_TIMEOUT_S):
                    await client.close()

    def _check(self, client: Client) -> None:
        """Names what an unsuitable server lacks.

        Raises:
            ValueError: too old, or without JetStream.
        """
        info: dict[str, Any] = client._server_info
        version = client.connected_server_version
        if (version.major, version.minor) < SERVER_VERSION_MIN:
            raise ValueError(f"the NATS server is {info.get('version')}: at least 2.10 is needed")
        if not info.get("jetstream"):
            raise ValueError("the NATS server has no JetStream: start it with -js")

    def _lost(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            reason = str(error) or type(error).__name__
            log.warning("nats_unavailable", name=self._name, url=self._url, reason=reason, effect="members stay as last known")

    async def _work(self, bucket: KeyValue) -> None:
        raise NotImplementedError


class Announcer(_Session):
    """Publishes one member's record. Never raises into the service; `record` is called for every refresh."""

    def __init__(self, url: str, record: Callable[[], MemberRecord], refresh_s: float = REFRESH_S) -> None:
        first = record()
        super().__init__(url, f"{first.role}-{first.id}")
        self._record = record
        self._key = member_key(first.role, first.id)
        self._refresh_s = refresh_s
        self._bucket: KeyValue | None = None
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Publishes now rather than at the next refresh (draining, say)."""
        self._changed.set()

    async def withdraw(self) -> None:
        """Removes the entry on a clean stop, if NATS is there. Call it before cancelling `run`."""
        if self._bucket is not None and self.connected:
            with contextlib.suppress(nats.errors.Error, nats.js.errors.Error, OSError, TimeoutError):
                async with asyncio.timeout(_TIMEOUT_S):
                    await self._bucket.delete(self._key)

    async def _work(self, bucket: KeyValue) -> None:
        self._bucket = bucket
        try:
            while True:
                self._changed.clear()
                await bucket.put(self._key, encode_record(self._record()))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._refresh_s):
                        await self._changed.wait()
        finally:
            self._bucket = None


class Watcher(_Session):
    """Follows the bucket. `members` never shrinks because NATS is lost, only by `forget`."""

    def __init__(
        self, url: str, on_change: Callable[[Seen], None] = lambda seen: None, name: str = "router", ttl_s: float = TTL_S
    ) -> None:
        super().__init__(url, name)
        self._on_change = on_change
        self._ttl_s = ttl_s
        self._seen: dict[str, Seen] = {}
        self._synced_at: float | None = None

    @property
    def members(self) -> tuple[Seen, ...]:
        return tuple(self._seen.values())

    def forget(self, record: MemberRecord) -> None:
        """Drops a member that is gone by every account."""
        self._seen.pop(member_key(record.role, record.id), None)

    async def _work(self, bucket: KeyValue) -> None:
        watching = await bucket.watchall()
        self._synced_at = time.monotonic()  # entries refreshed while we were away get a full TTL
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._ttl_s / 4):  # wait_for of 3.11 can swallow a cancellation
                        entry = await anext(watching)
                        if entry is not None:
                            self._apply(entry)
                self._expire(time.monotonic())
        finally:
            self._synced_at = None
            with contextlib.suppress(nats.errors.Error, OSError):
                await watching.stop()

    def _apply(self, entry: KeyValue.Entry) -> None:
        if entry.operation in (KV_DEL, KV_PURGE):
            self._mark_gone(entry.key)
            return
        record = decode_record(entry.key, entry.value or b"")
        if record is None or (entry.key not in self._seen and len(self._seen) >= MEMBERS_MAX):
            return
        seen = Seen(record, time.monotonic())
        self._seen[entry.key] = seen
        self._on_change(seen)

    def _expire(self, now: float) -> None:
        """Without a refresh for a TTL, with NATS healthy all that time, a member is gone."""
        assert self._synced_at is not None
        for key, seen in list(self._seen.items()):
            if not seen.gone and now - max(seen.heard_at, self._synced_at) > self._ttl_s:
                self._mark_gone(key)

    def _mark_gone(self, key: str) -> None:
        seen = self._seen.get(key)
        if seen is not None and not seen.gone:
            self._seen[key] = gone = msgspec.structs.replace(seen, gone=True)
            self._on_change(gone)


async def open_bucket(client: Client) -> KeyValue:
    """The bucket, made if it isn't there. One made with other settings is used as it is."""
    stream = client.jetstream(timeout=_TIMEOUT_S)
    config = KeyValueConfig(BUCKET, history=1, ttl=TTL_S, storage=StorageType.MEMORY, max_value_size=RECORD_BYTES_MAX)
    try:
        return await stream.create_key_value(config)
    except nats.js.errors.BadRequestError:
        return await stream.key_value(BUCKET)


def encode_record(record: MemberRecord) -> bytes:
    data = msgspec.json.encode(record)
    assert len(data) <= RECORD_BYTES_MAX, f"member record of {len(data)} bytes"
    return data


def decode_record(key: str, data: bytes) -> MemberRecord | None:
    """A record from outside; one that can't be read is reported and left out."""
    if len(data) > RECORD_BYTES_MAX:
        log.warning("bad_member", key=key, reason=f"{len(data)} bytes, at most {RECORD_BYTES_MAX}")
        return None
    try:
        return msgspec.json.decode(data, type=MemberRecord)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        log.warning("bad_member", key=key, reason=str(error))
        return None
