"""The kvstore's gRPC face: protobuf to the domain and back, every bound checked here."""

from collections.abc import Callable
from typing import Any, cast

import grpc.aio
import msgspec

from common import rpc
from common.blocks import KEY_BYTES, Namespace
from common.errors import InvalidRequest
from common.pb import kvstore_pb2 as pb
from common.pb import kvstore_pb2_grpc
from common.storage import BlockMeta, Terms
from common.transport.interface import TOKEN_BYTES, Endpoint, LeaseToken
from services.kvstore.store import Store

SERVICE = "penstock.kvstore.v1.KvStore"
KEYS_MAX = 262_144  # a 4M-token prompt in blocks of 16
TENANT_BYTES_MAX = 64
KEEP_S_MAX = 1_000_000_000  # 31 years: an expiry fits 32 bits
_HEX = frozenset("0123456789abcdef")


class KvStoreService(kvstore_pb2_grpc.KvStoreServicer):
    """Serves one store. `endpoint` is asked for with every reply: it is known once all ports are bound."""

    def __init__(self, store: Store, id_: str, endpoint: Callable[[], Endpoint]) -> None:
        self._store = store
        self._id = id_
        self._endpoint = endpoint

    async def Lookup(self, request: pb.LookupRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.LookupReply:
        async with rpc.aborting(context, "Lookup"):
            namespace = namespace_from_pb(request.namespace)
            _check_count("keys", len(request.keys))
            for i, key in enumerate(request.keys):
                if len(key) != KEY_BYTES:
                    raise InvalidRequest(f"keys[{i}] has {len(key)} bytes: expected {KEY_BYTES}", param="keys")
            found = self._store.lookup(namespace, request.keys, _seconds(request.lease_ms), lease=request.lease)
            return pb.LookupReply(
                blocks=found.blocks,
                token=found.token or b"",
                ttl_ms=round(found.ttl_s * 1000),
                endpoint=self._endpoint_pb(),
                epoch=self._store.epoch,
            )
        raise AssertionError("unreachable")

    async def Reserve(self, request: pb.ReserveRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.ReserveReply:
        async with rpc.aborting(context, "Reserve"):
            namespace = namespace_from_pb(request.namespace)
            _check_count("blocks", len(request.blocks))
            offers = [BlockMeta(block.key, block.parent, block.length) for block in request.blocks]
            if len(request.tenant) > TENANT_BYTES_MAX:
                raise InvalidRequest(f"tenant has {len(request.tenant)} bytes: at most {TENANT_BYTES_MAX}", param="tenant")
            terms = Terms(request.tenant, min(request.keep_s, KEEP_S_MAX))
            reserved = await self._store.reserve(namespace, offers, _seconds(request.lease_ms), terms)
            return pb.ReserveReply(
                admissions=cast("list[pb.Admission]", reserved.admissions),  # the same numbers
                token=reserved.token or b"",
                ttl_ms=round(reserved.ttl_s * 1000),
                endpoint=self._endpoint_pb(),
                epoch=self._store.epoch,
            )
        raise AssertionError("unreachable")

    async def Renew(self, request: pb.RenewRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.RenewReply:
        async with rpc.aborting(context, "Renew"):
            granted_s = self._store.renew(_token(request.token), _seconds(request.lease_ms))
            return pb.RenewReply(ttl_ms=round(granted_s * 1000))
        raise AssertionError("unreachable")

    async def Release(self, request: pb.ReleaseRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.ReleaseReply:
        async with rpc.aborting(context, "Release"):
            self._store.release(_token(request.token))
        return pb.ReleaseReply()

    async def Describe(self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.StoreInfo:
        return self.info()

    def info(self) -> pb.StoreInfo:
        """What the store says of itself."""
        store, metrics = self._store, self._store.metrics
        return pb.StoreInfo(
            id=self._id,
            epoch=store.epoch,
            endpoint=self._endpoint_pb(),
            budget_bytes=store.space.budget_bytes,
            used_bytes=store.space.used_bytes,
            blocks=store.blocks,
            reads=metrics.reads,
            writes=metrics.writes,
            evictions=metrics.evictions + metrics.segment_evictions,
            corrupt_blocks=metrics.corrupt_blocks,
            dropped_writes=metrics.dropped_writes,
            draining=store.draining,
            read_bytes=metrics.read_bytes,
            written_bytes=metrics.written_bytes,
            leases=len(store.leases),
            disks=[
                pb.DiskInfo(
                    folder=str(disk.folder),
                    state=disk.state,
                    problem=disk.problem,
                    budget_bytes=disk.budget_bytes,
                    used_bytes=disk.used_bytes,
                    errors=disk.errors,
                )
                for disk in store.disks
            ],
        )

    def _endpoint_pb(self) -> pb.Endpoint:
        return pb.Endpoint(**msgspec.structs.asdict(self._endpoint()))


def namespace_from_pb(text: str) -> Namespace:
    """A namespace as it came in a request. Raises `InvalidRequest`."""
    if len(text) != 2 * KEY_BYTES or not _HEX.issuperset(text):
        raise InvalidRequest(f"namespace {text[:80]!r}: expected {2 * KEY_BYTES} lower-case hex digits", param="namespace")
    return Namespace(text)


def _check_count(name: str, count: int) -> None:
    if not 1 <= count <= KEYS_MAX:
        raise InvalidRequest(f"{count} {name}: expected 1 to {KEYS_MAX}", param=name)


def _token(raw: bytes) -> LeaseToken:
    if len(raw) != TOKEN_BYTES:
        raise InvalidRequest(f"token has {len(raw)} bytes: expected {TOKEN_BYTES}", param="token")
    return LeaseToken(raw)


def _seconds(lease_ms: int) -> float | None:
    return lease_ms / 1000 if lease_ms else None
