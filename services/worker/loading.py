"""Pulls stored blocks from a kvstore into the stage.

A block comes as it is stored. Slots that others read are to hold raw records (`Form.RAW`): it is decoded in place. Slots
that only this worker's engine reads may keep it (`Form.STORED`): the pool decodes while it copies.

Every block that comes was verified by the transport. One that fails is told of as failed, and the caller computes it or
fetches it elsewhere; the others are not held up by it.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from itertools import count

import msgspec

from common.clients.kvstore import KvStoreClient
from common.errors import PenstockError
from common.logs import Log
from common.routes import Leg
from common.transport.counters import Flow as Moved
from common.transport.interface import Endpoint, LeaseToken, Part, PartStatus
from common.transport.pool import TransportPool
from services.worker.codec import Codec
from services.worker.ledger import Ledger
from services.worker.links import Link
from services.worker.stage import Stage
from services.worker.turns import Turns

log = Log("loading")
# One request's worth: deep enough to keep the disk busy, small enough to fail early. More of small blocks: up to READ_BYTES.
BLOCKS_PER_READ, SMALL_BLOCKS_PER_READ, READ_BYTES = 16, 64, 4 << 20
READS_IN_FLIGHT = 3  # from one kvstore, of all requests together: the disk has two while one is checked and the next asked for
MEET_SHARE = 8  # of what is left of a leg that meets compute, a batch is so small a part that the ends meet closely


# How reads end that a kvstore never answered.
UNANSWERED = frozenset({PartStatus.FAILED, PartStatus.EXPIRED})


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
    """What a read brought. `failure` names the first block that did not come; empty: everything came."""

    carrier: str
    failure: str


# The next blocks to pull, as often as it is asked, at most so many; empty when there are no more.
Batches = Callable[[int], Awaitable[Sequence[int]]]


def blocks_per_read(block_bytes: int) -> int:
    """Of one request."""
    return max(BLOCKS_PER_READ, min(SMALL_BLOCKS_PER_READ, READ_BYTES // block_bytes))


class Pull(msgspec.Struct, frozen=True):
    """An order to a `Reader`.

    Attributes:
        slots: by block, the stage slot it is to come to.
        batches: see `Batches`.
        blocks: how many will be asked for, as far as is known; for what is reported as queued.
        landed: called with blocks that came, and blocks that will not.
        moved: counts bytes and busy seconds.
    """

    stored: Stored
    slots: Sequence[int] | Mapping[int, int]
    batches: Batches
    blocks: int
    landed: Callable[[Sequence[int], Sequence[int]], None]
    moved: Moved
    deadline_s: float
    form: Form = Form.RAW


def in_order(blocks: Sequence[int]) -> Batches:
    """All of these blocks, from the first to the last."""
    first = 0

    async def following(most: int) -> Sequence[int]:
        nonlocal first
        first += most
        return blocks[first - most : first]

    return following


def from_back(ledger: Ledger, leg: Leg, claimed: Callable[[range], None] = lambda blocks: None) -> Batches:
    """A leg's blocks from its end, a batch at a time, until what is computed from the front is met."""

    async def following(most: int) -> Sequence[int]:
        blocks = ledger.claim_back(leg, max(1, min(most, ledger.left(leg) // MEET_SHARE)))
        if blocks:
            claimed(blocks)
        return blocks

    return following


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
    """Pulls leased blocks from a kvstore into stage slots, one request after another."""

    def __init__(
        self, stage: Stage, transports: TransportPool, stores: KvStores, codec: Codec, *, simulate_free_loads: bool = False
    ) -> None:
        self._stage = stage
        self._codec = codec
        self._transports = transports
        self._stores = stores
        self.free = simulate_free_loads  # for experiments: everything counts as loaded at once, whatever the slots hold
        self.link = Link()
        self._turns: defaultdict[str, Turns] = defaultdict(lambda: Turns(READS_IN_FLIGHT))
        self._pulls = count()

    def bytes_in_slot(self, form: Form) -> int:
        """How much of its slot a block takes in that form."""
        return self._codec.bytes_per_block if form is Form.STORED else self._stage.bytes_per_slot

    async def pull(self, pull: Pull) -> Loaded:
        """Carries out an order. Never raises for a failed read."""
        failed: dict[int, PartStatus] = {}
        carrier = ""
        until = time.monotonic() + pull.deadline_s
        number, turns = next(self._pulls), self._turns[pull.stored.kvstore]
        most = blocks_per_read(self._codec.bytes_per_block)
        renewing = asyncio.create_task(self._renew(pull.stored))
        with self.link.queued(pull.blocks * self._codec.bytes_per_block) as queued:

            async def work() -> None:
                nonlocal carrier
                while blocks := await pull.batches(most):
                    async with turns.turn(number) as answers:
                        silent = not carrier and not UNANSWERED.isdisjoint(failed.values())  # nobody is there: don't try again
                        if silent or not answers:
                            statuses: Sequence[PartStatus] = [PartStatus.FAILED] * len(blocks)
                        else:
                            statuses = await self._read(pull, blocks, until, turns)
                    if PartStatus.OK in statuses:
                        carrier = self._carrier(pull)
                    bad = {block: status for block, status in zip(blocks, statuses, strict=True) if status is not PartStatus.OK}
                    failed.update(bad)
                    queued.less(len(blocks) * self._codec.bytes_per_block)
                    pull.landed([block for block in blocks if block not in bad], list(bad))

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(READS_IN_FLIGHT + 1):  # one waits, so that the next turn is ours, not a later request's
                        group.create_task(work())
            finally:
                renewing.cancel()
        first = min(failed, default=0)
        return Loaded(carrier, f"block {first} of {pull.stored.blocks}: {failed[first].name.lower()}" if failed else "")

    async def _read(self, pull: Pull, blocks: Sequence[int], until: float, turns: Turns) -> Sequence[PartStatus]:
        if self.free:
            return [PartStatus.OK] * len(blocks)
        transport = self._transports.transport(pull.stored.endpoint)
        size = self._codec.bytes_per_block
        parts = [Part(block, 0, size) for block in blocks]
        spans = [self._stage.span(pull.slots[block], 0, size) for block in blocks]
        left_s, patience_s = max(0.0, until - time.monotonic()), self.link.patience_s
        with self.link.moving() as came, pull.moved.transfer():
            statuses = await transport.read(pull.stored.token, parts, spans, deadline_s=min(left_s, patience_s))
            came(size * statuses.count(PartStatus.OK))
        if PartStatus.EXPIRED in statuses and patience_s <= left_s:
            turns.stalled()
        pull.moved.count(statuses, [size] * len(blocks))
        if pull.form is Form.RAW:
            good = (block for block, status in zip(blocks, statuses, strict=True) if status is PartStatus.OK)
            await self._decode(pull.slots[block] for block in good)
        return statuses

    def _carrier(self, pull: Pull) -> str:
        return "none" if self.free else self._transports.transport(pull.stored.endpoint).carrier

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
