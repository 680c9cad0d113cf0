"""Pulls stored blocks from a kvstore into the stage.

A block comes as it is stored. Slots that others read are to hold raw records (`Form.RAW`): it is decoded in place. Slots
that only this worker's engine reads may keep it (`Form.STORED`): the pool decodes while it copies.

Every block that comes is verified by the transport; what is usable is the prefix before the first
block that failed, and the caller recomputes or fetches the rest.
"""

import asyncio
import time
from collections.abc import Iterable, Sequence
from enum import StrEnum

import msgspec

from common.clients.kvstore import KvStoreClient
from common.errors import PenstockError
from common.logs import Log
from common.transport.interface import Endpoint, LeaseToken, Part, PartStatus
from common.transport.pool import TransportPool
from services.worker.codec import Codec
from services.worker.stage import Stage

log = Log("loading")
BLOCKS_PER_READ = 16  # one request's worth: deep enough to keep the disk busy, small enough to fail early
READS_IN_FLIGHT = 2


class Form(StrEnum):
    """What a loaded block's slot holds."""

    RAW = "raw"
    STORED = "stored"


class Stored(msgspec.Struct, frozen=True):
    """The longest stored prefix of a prompt, leased: item i of the lease is block i."""

    blocks: int
    token: LeaseToken
    endpoint: Endpoint
    kvstore: str  # host:port of its gRPC
    ttl_s: float


class Loaded(msgspec.Struct, frozen=True):
    """What a read brought: `blocks` leading blocks are in the stage, verified. `bytes` were read, and each block takes
    `bytes_per_block` of its slot."""

    blocks: int
    bytes: int
    bytes_per_block: int
    seconds: float
    carrier: str
    failure: str  # empty: everything came


class KvStores:
    """One client per kvstore address, made when first used."""

    def __init__(self) -> None:
        self._clients: dict[str, KvStoreClient] = {}

    def at(self, address: str) -> KvStoreClient:
        if address not in self._clients:
            self._clients[address] = KvStoreClient(address)
        return self._clients[address]

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()


class Reader:
    """Pulls leased blocks from a kvstore into stage slots."""

    def __init__(self, stage: Stage, transports: TransportPool, stores: KvStores, codec: Codec) -> None:
        self._stage = stage
        self._codec = codec
        self._transports = transports
        self._stores = stores
        self.queued_bytes = 0
        self.bytes_per_s = 0.0

    async def load(self, stored: Stored, slots: Sequence[int], deadline_s: float, form: Form = Form.RAW) -> Loaded:
        """Fills `slots[i]` with block i of the lease. Never raises for a failed read: it comes back shorter."""
        began = time.perf_counter()
        size = self._codec.bytes_per_block
        self.queued_bytes += len(slots) * size
        try:
            statuses, carrier = await self._read(stored, slots, deadline_s, form)
        except PenstockError as error:
            statuses, carrier = [], ""
            failure = error.message
        else:
            failure = ""
        finally:
            self.queued_bytes -= len(slots) * size
        good = next((i for i, status in enumerate(statuses) if status is not PartStatus.OK), len(statuses))
        if good < len(slots) and not failure:
            failure = f"block {good} of {len(slots)}: {statuses[good].name.lower() if good < len(statuses) else 'not read'}"
        seconds = time.perf_counter() - began
        if good:
            rate = good * size / max(seconds, 1e-6)
            self.bytes_per_s = rate if not self.bytes_per_s else 0.8 * self.bytes_per_s + 0.2 * rate
        in_slot = size if form is Form.STORED else self._stage.bytes_per_slot
        return Loaded(good, good * size, in_slot, seconds, carrier, failure)

    async def _read(self, stored: Stored, slots: Sequence[int], deadline_s: float, form: Form) -> tuple[list[PartStatus], str]:
        transport = self._transports.transport(stored.endpoint)
        size = self._codec.bytes_per_block
        until = time.monotonic() + deadline_s
        gate = asyncio.Semaphore(READS_IN_FLIGHT)

        async def one(first: int) -> list[PartStatus]:
            async with gate:
                part_slots = slots[first : first + BLOCKS_PER_READ]
                parts = [Part(first + i, 0, size) for i in range(len(part_slots))]
                spans = [self._stage.span(slot, 0, size) for slot in part_slots]
                statuses = await transport.read(stored.token, parts, spans, deadline_s=max(0.0, until - time.monotonic()))
            if form is Form.RAW:
                await self._decode(slot for slot, status in zip(part_slots, statuses, strict=True) if status is PartStatus.OK)
            return statuses

        renewing = asyncio.create_task(self._renew(stored))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(first)) for first in range(0, len(slots), BLOCKS_PER_READ)]
        finally:
            renewing.cancel()
        return [status for task in tasks for status in task.result()], transport.carrier

    async def _decode(self, slots: Iterable[int]) -> None:
        """In place, on the event loop: no thread may still write to a slot when its request is cancelled and gives it back."""
        for slot in slots:
            self._codec.decode_in_place(self._stage.view(slot))
            await asyncio.sleep(0)  # let others in after each block

    async def _renew(self, stored: Stored) -> None:
        """Keeps the lease alive while a long read runs."""
        while True:
            await asyncio.sleep(max(stored.ttl_s / 3, 0.5))
            try:
                await self._stores.at(stored.kvstore).renew(stored.token, stored.ttl_s)
            except PenstockError as error:
                log.warning("lease_not_renewed", kvstore=stored.kvstore, reason=error.message)
                return

    async def release(self, stored: Stored) -> None:
        """Gives a lease back; a lost kvstore lets it expire."""
        try:
            await self._stores.at(stored.kvstore).release(stored.token)
        except PenstockError as error:
            log.debug("lease_not_released", kvstore=stored.kvstore, reason=error.message)
