"""The router's side of the kvstore: lookups, and the leases they grant until their requests are over.

A lookup that fails, for whatever reason, is a miss. A lease is renewed while its request waits for
its KV, and released when the request ends: decode and prefill release it as soon as they have
loaded, so ours is the safety net, and a second release does nothing.
"""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import msgspec

from common.clients.kvstore import KvStoreClient, StoredPrefix
from common.errors import PenstockError
from common.logs import Log
from common.pb import worker_pb2 as pb
from common.transport.interface import LeaseToken
from common.wire import endpoint_to_pb

RELEASES_MAX = 1024  # under way at once; what is beyond that ends with its TTL

log = Log("stores")


class Found(msgspec.Struct, frozen=True):
    """The leading blocks of a prompt that are stored, leased at `store`."""

    store: KvStoreClient
    prefix: StoredPrefix

    @property
    def token(self) -> LeaseToken:
        return self.prefix.token

    def to_pb(self) -> pb.StoredPrefix:
        prefix = self.prefix
        lease = pb.Lease(
            token=prefix.token, endpoint=endpoint_to_pb(prefix.endpoint), ttl_ms=int(prefix.ttl_s * 1000), epoch=prefix.epoch
        )
        return pb.StoredPrefix(blocks=prefix.blocks, lease=lease, kvstore=self.store.address)


class LeaseKeeper:
    """Every lease the router holds. Invariant: a lease taken in by `hold` leaves by `release`."""

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self._renew_after_s = lease_s / 3
        self._renewing: dict[bytes, tuple[Found, float]] = {}  # token -> (lease, when it was last renewed)
        self._held: dict[bytes, Found] = {}
        self._releasing: set[asyncio.Task[None]] = set()

    @property
    def held(self) -> int:
        return len(self._held)

    def hold(self, found: Found) -> None:
        self._held[found.token] = found
        self._renewing[found.token] = (found, time.monotonic())

    def loaded(self, found: Found) -> None:
        """The KV has been read: no more renewals."""
        self._renewing.pop(found.token, None)

    def release(self, found: Found) -> None:
        """Gives the lease back in the background. Idempotent."""
        self._renewing.pop(found.token, None)
        if self._held.pop(found.token, None) is not None and len(self._releasing) < RELEASES_MAX:
            self.see_to(self._release(found))

    def see_to(self, giving_back: Coroutine[Any, Any, None]) -> None:
        """Runs what gives a lease back in the background; it must have a deadline."""
        task = asyncio.get_running_loop().create_task(giving_back)
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)

    async def run(self) -> None:
        """Renews what is due, until cancelled."""
        while True:
            await asyncio.sleep(self._renew_after_s / 4)
            now = time.monotonic()
            due = [found for found, at in self._renewing.values() if now - at >= self._renew_after_s]
            await asyncio.gather(*(self._renew(found) for found in due))

    async def settle(self) -> None:
        """Waits for the releases under way, and for those that they bring about."""
        while self._releasing:
            await asyncio.gather(*self._releasing, return_exceptions=True)

    async def _renew(self, found: Found) -> None:
        try:
            await found.store.renew(found.token, self.lease_s)
            if found.token in self._renewing:
                self._renewing[found.token] = (found, time.monotonic())
        except PenstockError as error:  # decode notices when it reads, and recomputes
            self._renewing.pop(found.token, None)
            log.debug("renew_failed", kvstore=found.store.address, reason=error.message)

    async def _release(self, found: Found) -> None:
        try:
            await found.store.release(found.token)
        except PenstockError as error:  # it ends with its TTL
            log.debug("release_failed", kvstore=found.store.address, reason=error.message)
