"""The router's side of the kvstore: lookups, and the leases they grant until their requests are over.

A lookup that fails, for whatever reason, is a miss. A lease is renewed while its request waits for
its KV, and released when the request ends: decode and prefill release it as soon as they have
loaded, so ours is the safety net, and a second release does nothing.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import cast

import msgspec

from common import rpc
from common.errors import PenstockError
from common.logs import Log
from common.pb import kvstore_pb2 as pb
from common.pb import kvstore_pb2_grpc, worker_pb2

RPC_TIMEOUT_S = 2.0
RELEASES_MAX = 1024  # under way at once; what is beyond that ends with its TTL

log = Log("stores")


class Found(msgspec.Struct, frozen=True):
    """The leading blocks of a prompt that are stored, leased."""

    blocks: int
    store: "Store"
    token: bytes
    endpoint: pb.Endpoint
    ttl_ms: int
    epoch: bytes

    def to_pb(self) -> worker_pb2.StoredPrefix:
        endpoint = worker_pb2.Endpoint(shm=self.endpoint.shm, tcp=self.endpoint.tcp, grpc=self.endpoint.grpc)
        lease = worker_pb2.Lease(token=self.token, endpoint=endpoint, ttl_ms=self.ttl_ms, epoch=self.epoch)
        return worker_pb2.StoredPrefix(blocks=self.blocks, lease=lease, kvstore=self.store.address)


class Store:
    """A kvstore over its own channel."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = rpc.channel(address)
        self._stub = kvstore_pb2_grpc.KvStoreStub(self._channel)

    async def describe(self, timeout_s: float) -> pb.StoreInfo:
        pending = self._stub.Describe(pb.DescribeRequest(), timeout=timeout_s)
        return cast(pb.StoreInfo, await rpc.call(pending, self.address))

    async def lookup(self, namespace: str, keys: Sequence[bytes], lease_ms: int, timeout_s: float) -> Found | None:
        """The longest stored prefix of `keys`, leased; None when there is none."""
        request = pb.LookupRequest(namespace=namespace, keys=keys, lease_ms=lease_ms, lease=True)
        reply = cast(pb.LookupReply, await rpc.call(self._stub.Lookup(request, timeout=timeout_s), self.address))
        blocks = min(reply.blocks, len(keys))
        if blocks == 0 or not reply.token:
            return None
        return Found(blocks, self, reply.token, reply.endpoint, reply.ttl_ms, reply.epoch)

    async def renew(self, token: bytes, lease_ms: int) -> None:
        await rpc.call(self._stub.Renew(pb.RenewRequest(token=token, lease_ms=lease_ms), timeout=RPC_TIMEOUT_S), self.address)

    async def release(self, token: bytes) -> None:
        await rpc.call(self._stub.Release(pb.ReleaseRequest(token=token), timeout=RPC_TIMEOUT_S), self.address)

    async def close(self) -> None:
        await self._channel.close()


class LeaseKeeper:
    """Every lease the router holds. Invariant: a lease taken in by `hold` leaves by `release`."""

    def __init__(self, lease_s: float) -> None:
        self._lease_ms = int(lease_s * 1000)
        self._renew_after_s = lease_s / 3
        self._renewing: dict[bytes, tuple[Found, float]] = {}  # token -> (lease, when it was last renewed)
        self._held: dict[bytes, Found] = {}
        self._releasing: set[asyncio.Task[None]] = set()

    @property
    def held(self) -> int:
        return len(self._held)

    @property
    def lease_ms(self) -> int:
        return self._lease_ms

    def hold(self, found: Found) -> None:
        self._held[found.token] = found
        self._renewing[found.token] = (found, time.monotonic())

    def loaded(self, found: Found) -> None:
        """The KV has been read: no more renewals."""
        self._renewing.pop(found.token, None)

    def release(self, found: Found) -> None:
        """Gives the lease back in the background. Idempotent."""
        self._renewing.pop(found.token, None)
        if self._held.pop(found.token, None) is None or len(self._releasing) >= RELEASES_MAX:
            return
        task = asyncio.get_running_loop().create_task(self._release(found))
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
        """Waits for the releases under way."""
        await asyncio.gather(*self._releasing, return_exceptions=True)

    async def _renew(self, found: Found) -> None:
        try:
            await found.store.renew(found.token, self._lease_ms)
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
