"""Calls to a kvstore, in the domain's terms. Every call has a deadline; errors are of our tree."""

from collections.abc import Sequence
from enum import IntEnum
from typing import cast

import msgspec

from common import rpc
from common.blocks import BlockKey, Namespace
from common.errors import Internal
from common.pb import kvstore_pb2 as pb
from common.pb import kvstore_pb2_grpc
from common.transport.interface import Endpoint, LeaseToken
from common.wire import lease_token

CALL_DEADLINE_S = 2.0


class Admission(IntEnum):
    """What a kvstore says to a block it is offered (kvstore.proto Admission)."""

    ACCEPTED = pb.ACCEPTED
    PRESENT = pb.PRESENT
    IN_FLIGHT = pb.IN_FLIGHT
    DROPPED = pb.DROPPED
    INVALID = pb.INVALID


class BlockMeta(msgspec.Struct, frozen=True):
    """A block that is offered: its key, its parent's key (or the chain's root), and its bytes."""

    key: BlockKey
    parent: bytes
    length: int


class Reservation(msgspec.Struct, frozen=True):
    """Item i of the lease is block i. `token` is None when nothing was accepted."""

    admissions: tuple[Admission, ...]
    token: LeaseToken | None
    endpoint: Endpoint


class KvStoreClient:
    """One kvstore, over a channel of its own."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = rpc.channel(address)
        self._stub = kvstore_pb2_grpc.KvStoreStub(self._channel)

    async def reserve(self, namespace: Namespace, blocks: Sequence[BlockMeta], lease_s: float) -> Reservation:
        """The right to write those blocks that are accepted."""
        metas = [pb.BlockMeta(key=block.key, parent=block.parent, length=block.length) for block in blocks]
        request = pb.ReserveRequest(namespace=namespace, blocks=metas, lease_ms=int(lease_s * 1e3))
        reply = cast(pb.ReserveReply, await rpc.call(self._stub.Reserve(request, timeout=CALL_DEADLINE_S), self.address))
        if len(reply.admissions) != len(blocks):
            raise Internal(f"{self.address} answered {len(reply.admissions)} of {len(blocks)} blocks")
        endpoint = Endpoint(shm=reply.endpoint.shm, tcp=reply.endpoint.tcp, grpc=reply.endpoint.grpc)
        token = lease_token(reply.token) if reply.token else None
        return Reservation(tuple(Admission(admission) for admission in reply.admissions), token, endpoint)

    async def renew(self, token: LeaseToken, lease_s: float) -> float:
        """Seconds the lease lives from now. Raises LeaseRejected when it has ended."""
        request = pb.RenewRequest(token=token, lease_ms=int(lease_s * 1e3))
        reply = cast(pb.RenewReply, await rpc.call(self._stub.Renew(request, timeout=CALL_DEADLINE_S), self.address))
        return reply.ttl_ms / 1e3

    async def release(self, token: LeaseToken) -> None:
        """Gives a lease back. Idempotent."""
        await rpc.call(self._stub.Release(pb.ReleaseRequest(token=token), timeout=CALL_DEADLINE_S), self.address)

    async def close(self) -> None:
        await self._channel.close()
