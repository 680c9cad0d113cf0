"""A kvstore's operators' side: what it holds, one block of it, evicting, pinning, scrubbing.

Every call has a deadline and raises errors of `common.errors`.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast

import msgspec

from common import rpc
from common.clients.kvstore import StoreInfo, store_info
from common.pb import kvstore_pb2 as pb
from common.pb import kvstore_pb2_grpc

CALL_DEADLINE_S = 10.0
EVICT_MAX = 4096  # blocks of one call
EVICT_DEADLINE_S = 120.0  # every evicted block is erased on disk


class NamespaceInfo(msgspec.Struct, frozen=True):
    """One namespace of a store. Sizes in bytes."""

    namespace: str
    payload_bytes: int
    slot_bytes: int
    slots_per_segment: int
    segments: int
    blocks: int
    free_slots: int


class ScrubReport(msgspec.Struct, frozen=True):
    """A pass of the background scrub that runs, or the last one."""

    state: str
    blocks_done: int
    blocks_total: int
    bytes_done: int
    corrupt: int
    seconds: float
    bytes_per_s_max: int
    passes: int


class StoreStat(msgspec.Struct, frozen=True):
    """Everything a store says of itself."""

    info: StoreInfo
    namespaces: tuple[NamespaceInfo, ...]
    counters: dict[str, int]
    scrub: ScrubReport
    pins: int
    pinned_bytes: int


class BlockInfo(msgspec.Struct, frozen=True):
    """One block's header, and where it lies."""

    namespace: str
    key: bytes
    parent: bytes
    sequence: int
    payload_bytes: int
    payload_crc32c: int
    path: str
    slot: int
    offset: int
    pinned: bool


class Evicted(msgspec.Struct, frozen=True):
    """What an evict call did. `kept`: leased, pinned, or on a disk that can't be written."""

    evicted: int
    kept: int
    freed_bytes: int


class KvStoreAdmin:
    """A client of the kvstore at `address` (host:port). Connects when first used; `close` when done."""

    def __init__(self, address: str, *, deadline_s: float = CALL_DEADLINE_S) -> None:
        self.address = address
        self._deadline_s = deadline_s
        self._channel = rpc.channel(address)
        self._stub = kvstore_pb2_grpc.AdminStub(self._channel)

    async def stat(self) -> StoreStat:
        reply = cast(pb.StatReply, await rpc.call(self._stub.Stat(pb.StatRequest(), timeout=self._deadline_s), self.address))
        namespaces = tuple(NamespaceInfo(**_plain(one, NamespaceInfo)) for one in reply.namespaces)
        counters, scrub = dict(reply.counters), _scrub(reply.scrub)
        return StoreStat(store_info(reply.info), namespaces, counters, scrub, reply.pins, reply.pinned_bytes)

    async def inspect(self, key: bytes) -> BlockInfo:
        """Raises `NotFound`, `CorruptBlock`."""
        pending = self._stub.Inspect(pb.InspectRequest(key=key), timeout=self._deadline_s)
        return BlockInfo(**_plain(await rpc.call(pending, self.address), BlockInfo))

    async def evict_keys(self, keys: Sequence[bytes], namespace: str = "") -> Evicted:
        """These blocks, at most `EVICT_MAX`, with all that hangs on them."""
        return await self._evict(pb.EvictRequest(namespace=namespace, keys=pb.BlockKeys(keys=keys)))

    async def evict_coldest(self, count: int, namespace: str = "") -> Evicted:
        """At most `EVICT_MAX` blocks, the ones that would go first anyway."""
        return await self._evict(pb.EvictRequest(namespace=namespace, coldest=count))

    async def evict_namespace(self, namespace: str) -> Evicted:
        """All of a namespace that may go, and its files."""
        return await self._evict(pb.EvictRequest(namespace=namespace, whole=True))

    async def pin(self, key: bytes, for_s: int) -> int:
        """Keeps a block and those before it in its chain for a time, 0: no longer. How many; 0: it isn't stored, or not pinned.

        Raises `Overloaded`: too much would be kept.
        """
        pending = self._stub.Pin(pb.PinRequest(last=key, for_s=for_s), timeout=self._deadline_s)
        return int((await rpc.call(pending, self.address)).blocks)

    async def scrub(self, action: Literal["REPORT", "START", "STOP"]) -> ScrubReport:
        request = pb.ScrubRequest(action=pb.ScrubAction.Value(action))
        return _scrub(cast(pb.ScrubReply, await rpc.call(self._stub.Scrub(request, timeout=self._deadline_s), self.address)))

    async def close(self) -> None:
        await self._channel.close()

    async def _evict(self, request: pb.EvictRequest) -> Evicted:
        pending = self._stub.Evict(request, timeout=max(self._deadline_s, EVICT_DEADLINE_S))
        return Evicted(**_plain(await rpc.call(pending, self.address), Evicted))


def _scrub(reply: pb.ScrubReply) -> ScrubReport:
    return ScrubReport(**_plain(reply, ScrubReport))


def _plain(message: object, kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {name: getattr(message, name) for name in kind.__struct_fields__}
