"""Lookups at a kvstore on this host, over its byte plane's unix socket: a fifth of what gRPC takes, and less after a pause.

1. `learn` is told where the store listens, by an answer that came over gRPC. Where that is here, it connects in the background.
2. `look_up` asks there while the connection lives. None: there is none, or no good answer came; gRPC has it, and words for what is wrong.
3. A connection that broke, or that leads to another incarnation than the one that was learned of, is closed. The next answer over gRPC
   begins anew, RETRY_S after the last attempt at the soonest.

A lookup whose answer is lost, or comes too late, leaves a lease that ends by itself, as over gRPC.
"""

import asyncio
import os
from collections.abc import Sequence

from common.blocks import KEY_BYTES, Namespace
from common.errors import TransferFailed, Unavailable
from common.logs import Log
from common.transport.client import connect
from common.transport.connection import Connection
from common.transport.frames import FoundPrefix, Offers
from common.transport.interface import PARTS_MAX, Endpoint, PartStatus
from common.transport.region import Region

log = Log("kvstore_near")
CONNECT_S = 1.0
RETRY_S = 5.0
_HEX = frozenset("0123456789abcdef")
REGION_BYTES = 4096  # the socket wants to be shown some memory; no bytes move here


class NearStore:
    """The way to one kvstore. `close` when done."""

    def __init__(self) -> None:
        self.endpoint = Endpoint()  # of the incarnation `epoch`
        self.epoch = b""
        self._connection: Connection | None = None
        self._region: Region | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._not_before_s = 0.0

    @property
    def connected(self) -> bool:
        return self._connection is not None and self._connection.usable and self._connecting is None

    def learn(self, endpoint: Endpoint, epoch: bytes) -> None:
        """The store said where it listens. Never waits."""
        known = (endpoint, epoch) == (self.endpoint, self.epoch)
        if (known and self.connected) or self._connecting is not None or not os.path.exists(endpoint.shm):
            return
        loop = asyncio.get_running_loop()
        if known and loop.time() < self._not_before_s:
            return
        self.endpoint, self.epoch = endpoint, epoch
        self._not_before_s = loop.time() + RETRY_S
        self._connecting = loop.create_task(self._connect())

    async def look_up(
        self, namespace: Namespace, keys: Sequence[bytes], lease_ms: int, *, deadline_s: float
    ) -> FoundPrefix | None:
        """The longest stored prefix, leased if `lease_ms` isn't 0; None: ask over gRPC."""
        connection = self._connection
        if connection is None or not self.connected or not _fits(namespace, keys):
            return None
        try:
            found = await connection.lookup(bytes.fromhex(namespace), keys, lease_ms, deadline_s=deadline_s)
        except (TransferFailed, TimeoutError):
            return None
        if found.status is not PartStatus.OK or found.epoch != self.epoch or found.blocks > len(keys):
            return None
        return found

    async def close(self) -> None:
        """Idempotent."""
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        await self._disconnect()
        if self._region is not None:
            self._region.close()
            self._region = None

    async def _connect(self) -> None:
        """One attempt."""
        try:
            await self._disconnect()
            self._region = self._region or Region(REGION_BYTES, name="penstock-lookups", prefault=False)
            endpoint = Endpoint(shm=self.endpoint.shm)
            connection = await connect(endpoint, self._region, prefer="shm", timeout_s=CONNECT_S)
            if connection.offers & Offers.LOOKUPS:
                self._connection = connection
            else:
                await connection.close()
        except Unavailable as error:
            log.debug("not_connected", reason=error.message)
        finally:
            self._connecting = None

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()


def _fits(namespace: Namespace, keys: Sequence[bytes]) -> bool:
    """Whether a frame can hold the question. What is malformed is for the store to refuse, over gRPC."""
    whole = len(namespace) == 2 * KEY_BYTES and _HEX.issuperset(namespace)
    return whole and len(keys) <= PARTS_MAX and set(map(len, keys)) == {KEY_BYTES}
