"""The operators' gRPC face: protobuf to the domain and back, every bound checked here."""

import asyncio
from functools import partial
from typing import Any

import grpc.aio
import msgspec

from common import rpc
from common.blocks import KEY_BYTES
from common.disk.pages import aligned
from common.errors import CorruptBlock, DeadlineExceeded, InvalidRequest, NotFound
from common.pb import kvstore_pb2 as pb
from common.pb import kvstore_pb2_grpc
from services.kvstore.record import PAGE_BYTES, SlotHeader, decode_slot
from services.kvstore.removal import BLOCKS_MAX, Removed, remove_coldest, remove_keys, remove_namespace
from services.kvstore.scrub import Scrub
from services.kvstore.segment import Segment
from services.kvstore.service import KEYS_MAX, KvStoreService, namespace_from_pb
from services.kvstore.shelf import Shelf
from services.kvstore.store import Store

SERVICE = "penstock.kvstore.v1.Admin"
NAMESPACES_MAX = 1024  # listed in one reply
INSPECT_DEADLINE_S = 5.0


class AdminService(kvstore_pb2_grpc.AdminServicer):
    """Serves one store."""

    def __init__(self, store: Store, scrub: Scrub, service: KvStoreService) -> None:
        self._store = store
        self._scrub = scrub
        self._service = service

    async def Stat(self, request: pb.StatRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.StatReply:
        shelves = list(self._store.space.shelves.values())[:NAMESPACES_MAX]
        return pb.StatReply(
            info=self._service.info(),
            namespaces=[_namespace_info(shelf) for shelf in shelves],
            counters=self._store.metrics.counters(),
            scrub=self._scrub_reply(),
            pins=len(self._store.pins),
            pinned_bytes=self._store.pins.kept_bytes,
        )

    async def Inspect(self, request: pb.InspectRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.BlockInfo:
        async with rpc.aborting(context, "Inspect"):
            _check_key(request.key)
            for shelf in self._store.space.shelves.values():
                slot = shelf.index.find(request.key)
                if slot is not None:
                    return await self._inspect(shelf, slot)
            raise NotFound(f"block {request.key.hex()} is not stored here")
        raise AssertionError("unreachable")

    async def Evict(self, request: pb.EvictRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.EvictReply:
        async with rpc.aborting(context, "Evict"):
            removed = await self._evict(request)
            return pb.EvictReply(evicted=removed.evicted, kept=removed.kept, freed_bytes=removed.freed_bytes)
        raise AssertionError("unreachable")

    async def Pin(self, request: pb.PinRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.PinReply:
        async with rpc.aborting(context, "Pin"):
            return pb.PinReply(blocks=self._pin(request))
        raise AssertionError("unreachable")

    async def Scrub(self, request: pb.ScrubRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.ScrubReply:
        async with rpc.aborting(context, "Scrub"):
            if request.action == pb.START and not self._scrub.bytes_per_s:
                raise InvalidRequest("the scrub is off: this kvstore runs with scrub_bytes_per_s = 0", param="action")
            if request.action == pb.START:
                self._scrub.start()
            elif request.action == pb.STOP:
                self._scrub.stop()
            return self._scrub_reply()
        raise AssertionError("unreachable")

    def _pin(self, request: pb.PinRequest) -> int:
        if request.last:
            if request.keys or request.namespace:
                raise InvalidRequest("give last, or keys with a namespace, not both", param="last")
            _check_key(request.last)
            return self._store.pins.keep_block(request.last, request.for_s)
        namespace = namespace_from_pb(request.namespace)
        if not 1 <= len(request.keys) <= KEYS_MAX:
            raise InvalidRequest(f"{len(request.keys)} keys: expected 1 to {KEYS_MAX}", param="keys")
        for key in request.keys:
            _check_key(key)
        return self._store.pins.keep(namespace, request.keys, request.for_s)

    async def _evict(self, request: pb.EvictRequest) -> Removed:
        namespace = namespace_from_pb(request.namespace) if request.namespace else None
        match request.WhichOneof("what"):
            case "keys":
                keys = request.keys.keys
                if not 1 <= len(keys) <= BLOCKS_MAX:
                    raise InvalidRequest(f"{len(keys)} keys: expected 1 to {BLOCKS_MAX}", param="keys")
                for key in keys:
                    _check_key(key)
                return await remove_keys(self._store, namespace, keys)
            case "coldest":
                if not 1 <= request.coldest <= BLOCKS_MAX:
                    raise InvalidRequest(f"coldest = {request.coldest}: expected 1 to {BLOCKS_MAX}", param="coldest")
                return await remove_coldest(self._store, namespace, request.coldest)
            case "whole" if namespace is not None and request.whole:
                return await remove_namespace(self._store, namespace)
        raise InvalidRequest("expected keys, coldest, or whole with a namespace", param="what")

    async def _inspect(self, shelf: Shelf, slot: int) -> pb.BlockInfo:
        segment, within = shelf.place(slot)
        pinned = shelf.index.offers.pinned(slot)
        shelf.index.offers.pin(slot)
        try:
            async with asyncio.timeout(INSPECT_DEADLINE_S):
                header = await self._store.file_calls.run(segment.disk, partial(_read_header, segment, within))
        except TimeoutError as error:
            raise DeadlineExceeded(f"slot {within} of {segment.path} could not be read in {INSPECT_DEADLINE_S:g} s") from error
        finally:
            shelf.index.offers.unpin(slot)
        if not isinstance(header, SlotHeader):
            raise CorruptBlock(f"slot {within} of {segment.path}: {header}")
        return pb.BlockInfo(
            namespace=header.namespace.hex(),
            key=header.key,
            parent=header.parent,
            sequence=header.sequence,
            payload_bytes=header.payload_bytes,
            payload_crc32c=header.payload_crc32c,
            path=str(segment.path),
            slot=within,
            offset=segment.geometry.slot_offset(within),
            pinned=pinned,
        )

    def _scrub_reply(self) -> pb.ScrubReply:
        progress = msgspec.structs.asdict(self._scrub.progress)
        return pb.ScrubReply(
            state=self._scrub.state, passes=self._scrub.passes, bytes_per_s_max=self._scrub.bytes_per_s, **progress
        )


def _namespace_info(shelf: Shelf) -> pb.NamespaceInfo:
    geometry = shelf.geometry
    return pb.NamespaceInfo(
        namespace=shelf.namespace,
        payload_bytes=geometry.payload_bytes,
        slot_bytes=geometry.slot_bytes,
        slots_per_segment=geometry.slots_per_segment,
        segments=len(shelf.segments),
        blocks=len(shelf.index),
        free_slots=shelf.free_slots,
    )


def _read_header(segment: Segment, within: int) -> SlotHeader:
    page = aligned(PAGE_BYTES)
    segment.read_header(within, page)
    header = decode_slot(page)
    if not isinstance(header, SlotHeader):
        raise CorruptBlock(f"its header is {header.name.lower()}")
    return header


def _check_key(key: bytes) -> None:
    if len(key) != KEY_BYTES:
        raise InvalidRequest(f"key has {len(key)} bytes: expected {KEY_BYTES}", param="key")
