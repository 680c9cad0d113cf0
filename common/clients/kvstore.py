"""A kvstore as its clients see it: protobuf and gRPC on the inside, the domain's types outside.

Every call has a deadline and raises errors of `common.errors`. Bytes don't pass here: they move on
the byte plane, to the endpoint and under the token that `lookup` and `reserve` return. Lookups at a store on this host
go over its unix socket (kvstore_near.py), but for the first, which tells of it; where that fails, over gRPC.
"""

import asyncio
from collections.abc import Sequence
from typing import cast

import msgspec

from common import rpc
from common.blocks import Namespace
from common.clients.kvstore_near import NearStore
from common.errors import Internal
from common.pb import kvstore_pb2 as pb
from common.pb import kvstore_pb2_grpc
from common.storage import NO_TERMS, Admission, BlockMeta, Terms
from common.transport.interface import Endpoint, LeaseToken
from common.wire import lease_token

__all__ = ["Admission", "BlockMeta", "KvStoreClient", "Reservation", "StoreInfo", "StoredPrefix"]
CALL_DEADLINE_S = 2.0


class StoredPrefix(msgspec.Struct, frozen=True):
    """The first `blocks` of the keys asked for are stored, leased for reading: item i is keys[i]."""

    blocks: int
    token: LeaseToken
    ttl_s: float
    endpoint: Endpoint
    epoch: bytes


class Reservation(msgspec.Struct, frozen=True):
    """One admission per offered block: item i is blocks[i]. `token` is empty when none was accepted."""

    admissions: tuple[Admission, ...]
    token: LeaseToken
    ttl_s: float
    endpoint: Endpoint
    epoch: bytes


class DiskInfo(msgspec.Struct, frozen=True):
    """One data directory of a kvstore: serving, read_only or lost, and why."""

    folder: str
    state: str
    problem: str
    budget_bytes: int
    used_bytes: int
    errors: int


class StoreInfo(msgspec.Struct, frozen=True):
    """Who a kvstore is, and its counters since it started. Sizes are in bytes."""

    id: str
    epoch: bytes
    endpoint: Endpoint
    budget_bytes: int
    used_bytes: int
    blocks: int
    reads: int
    writes: int
    evictions: int
    corrupt_blocks: int
    dropped_writes: int
    draining: bool
    read_bytes: int
    written_bytes: int
    leases: int
    disks: tuple[DiskInfo, ...] = ()


class KvStoreClient:
    """A client of the kvstore at `address` (host:port). Connects when first used; `close` when done."""

    def __init__(self, address: str, *, deadline_s: float = CALL_DEADLINE_S) -> None:
        self.address = address
        self._deadline_s = deadline_s
        self._channel = rpc.channel(address)
        self._stub = kvstore_pb2_grpc.KvStoreStub(self._channel)
        self._near = NearStore()

    @property
    def near(self) -> bool:
        """Whether lookups go over the store's unix socket by now."""
        return self._near.connected

    async def lookup(
        self, namespace: Namespace, keys: Sequence[bytes], lease_s: float, *, deadline_s: float | None = None
    ) -> StoredPrefix | None:
        """The longest stored prefix of a chain, leased; None when not even its first block is stored."""
        return await self._look_up(namespace, keys, _ms(lease_s), deadline_s or self._deadline_s)

    async def count(self, namespace: Namespace, keys: Sequence[bytes], *, deadline_s: float | None = None) -> int:
        """How many leading blocks of a chain are stored, without a lease."""
        prefix = await self._look_up(namespace, keys, 0, deadline_s or self._deadline_s)
        return prefix.blocks if prefix is not None else 0

    async def _look_up(
        self, namespace: Namespace, keys: Sequence[bytes], lease_ms: int, deadline_s: float
    ) -> StoredPrefix | None:
        """`lease_ms` 0: only count; the token is empty then."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + deadline_s
        near = await self._near.look_up(namespace, keys, lease_ms, deadline_s=deadline_s)
        if near is not None:
            token = near.token if lease_ms else LeaseToken(b"")
            found = StoredPrefix(near.blocks, token, near.ttl_ms / 1000, self._near.endpoint, near.epoch)
            return found if near.blocks else None
        request = pb.LookupRequest(namespace=namespace, keys=keys, lease_ms=lease_ms, lease=lease_ms > 0)
        pending = self._stub.Lookup(request, timeout=max(0.0, deadline - clock()))
        reply = cast(pb.LookupReply, await rpc.call(pending, self.address))
        endpoint = _endpoint(reply.endpoint)
        self._near.learn(endpoint, reply.epoch)
        if not reply.blocks:
            return None
        if reply.blocks > len(keys):
            raise Internal(f"kvstore {self.address} found {reply.blocks} of {len(keys)} blocks")
        token = lease_token(reply.token) if lease_ms else LeaseToken(b"")
        return StoredPrefix(reply.blocks, token, reply.ttl_ms / 1000, endpoint, reply.epoch)

    async def reserve(
        self,
        namespace: Namespace,
        blocks: Sequence[BlockMeta],
        lease_s: float,
        *,
        terms: Terms = NO_TERMS,
        deadline_s: float | None = None,
    ) -> Reservation:
        """Asks to write blocks, parents first."""
        metas = [pb.BlockMeta(key=block.key, parent=block.parent, length=block.length) for block in blocks]
        request = pb.ReserveRequest(
            namespace=namespace, blocks=metas, lease_ms=_ms(lease_s), tenant=terms.tenant, keep_s=terms.keep_s
        )
        pending = self._stub.Reserve(request, timeout=deadline_s or self._deadline_s)
        reply = cast(pb.ReserveReply, await rpc.call(pending, self.address))
        if len(reply.admissions) != len(blocks):
            raise Internal(f"kvstore {self.address} answered {len(reply.admissions)} of {len(blocks)} blocks")
        admissions = tuple(map(Admission, reply.admissions))
        token = lease_token(reply.token) if reply.token else LeaseToken(b"")
        return Reservation(admissions, token, reply.ttl_ms / 1000, _endpoint(reply.endpoint), reply.epoch)

    async def renew(self, token: LeaseToken, lease_s: float, *, deadline_s: float | None = None) -> float:
        """The seconds granted from now on. Raises `LeaseRejected`."""
        pending = self._stub.Renew(pb.RenewRequest(token=token, lease_ms=_ms(lease_s)), timeout=deadline_s or self._deadline_s)
        return cast(pb.RenewReply, await rpc.call(pending, self.address)).ttl_ms / 1000

    async def release(self, token: LeaseToken, *, deadline_s: float | None = None) -> None:
        """Ends a lease. Idempotent."""
        pending = self._stub.Release(pb.ReleaseRequest(token=token), timeout=deadline_s or self._deadline_s)
        await rpc.call(pending, self.address)

    async def describe(self, *, deadline_s: float | None = None) -> StoreInfo:
        pending = self._stub.Describe(pb.DescribeRequest(), timeout=deadline_s or self._deadline_s)
        return store_info(cast(pb.StoreInfo, await rpc.call(pending, self.address)))

    async def close(self) -> None:
        await self._near.close()
        await self._channel.close()


def store_info(message: pb.StoreInfo) -> StoreInfo:
    """A kvstore's description of itself."""
    plain = {name: getattr(message, name) for name in StoreInfo.__struct_fields__ if name not in ("endpoint", "disks")}
    disks = tuple(DiskInfo(**{name: getattr(disk, name) for name in DiskInfo.__struct_fields__}) for disk in message.disks)
    return StoreInfo(endpoint=_endpoint(message.endpoint), disks=disks, **plain)


def _endpoint(message: pb.Endpoint) -> Endpoint:
    return Endpoint(shm=message.shm, tcp=message.tcp, grpc=message.grpc)


def _ms(seconds: float) -> int:
    return max(1, min(round(seconds * 1000), 0xFFFFFFFF))
