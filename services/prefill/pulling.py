"""Reads KV out of a decode worker's stage, while decode still pulls it from SSD.

Blocks come in batches, in the order in which decode pulls them; a batch is read in groups of layers, lowest first. The
first layer of a batch is asked for ahead: decode answers when the batch is there. From then on the batch competes with
the others that are there for its next group, and the lowest layers go first, because they are needed first.
"""

import asyncio
import heapq
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import count

import msgspec

from common.kv_layout import KvLayout
from common.transport.counters import Flow as Moved
from common.transport.interface import Part, PartStatus
from common.transport.pool import TransportPool
from services.worker.links import Link, Queued
from services.worker.loading import BLOCKS_PER_READ, Batches
from services.worker.requests import StageLease
from services.worker.stage import Stage

GROUP_BYTES = 2 << 20  # of one request: enough to be worth a message, little enough to be soon there
READS_IN_FLIGHT = 2
AHEAD = 2  # batches asked for that may not be there yet


class PeerPull(msgspec.Struct, frozen=True):
    """An order to a `PeerReader`.

    Attributes:
        lease: on the peer's stage; item i is block i.
        slots: by block, the stage slot it is to come to.
        batches: blocks to read, in the order in which they come to be there.
        lost: called with blocks that the peer can't give.
        landed: called when layers of some blocks have come.
    """

    lease: StageLease
    slots: Sequence[int]
    batches: Batches
    blocks: int
    lost: Callable[[Sequence[int]], None]
    landed: Callable[[Sequence[int], int], None]
    moved: Moved
    deadline_s: float


class PeerReader:
    """What all reads out of peers' stages share."""

    def __init__(self, stage: Stage, transports: TransportPool, layout: KvLayout, *, simulate_free_loads: bool = False) -> None:
        self.stage = stage
        self.transports = transports
        self.layout = layout
        self.free = simulate_free_loads  # as a `Reader`'s
        self.link = Link()

    async def pull(self, order: PeerPull) -> None:
        """Carries out an order. Never raises for a failed read. Queued is what the peer has and we don't, not what it still waits for."""
        with self.link.queued(0) as queued:
            await _Pulling(self, order, queued).run()


class _Pulling:
    """One order on its way. A tile is a batch and the first layer that is still to come of it."""

    def __init__(self, reader: PeerReader, order: PeerPull, queued: Queued) -> None:
        self._in = reader
        self._order = order
        self._queued = queued
        self._tiles: list[tuple[int, int, Sequence[int]]] = []  # a heap: first layer, serial, blocks
        self._serial = count()
        self._news = asyncio.Condition()
        self._open = 0  # batches that are not through yet
        self._all_asked = False
        self._until = time.monotonic() + order.deadline_s

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(AHEAD):
                group.create_task(self._ask_ahead())
            for _ in range(READS_IN_FLIGHT):
                group.create_task(self._fetch())

    async def _ask_ahead(self) -> None:
        while blocks := await self._order.batches(BLOCKS_PER_READ):
            self._open += 1
            await self._read(0, blocks)
        async with self._news:
            self._all_asked = True
            self._news.notify_all()

    async def _fetch(self) -> None:
        while True:
            async with self._news:
                await self._news.wait_for(lambda: self._tiles or (self._all_asked and not self._open))
                if not self._tiles:
                    return
                layer, _, blocks = heapq.heappop(self._tiles)
            await self._read(layer, blocks)

    async def _read(self, layer: int, blocks: Sequence[int]) -> None:
        """Reads the next group of layers of a batch; what came of it waits for its next turn."""
        layout = self._in.layout
        group = max(1, GROUP_BYTES // (len(blocks) * layout.bytes_per_layer_slice)) if layer else 1
        last = min(layout.layers, layer + group)
        came, lost = await self._transfer(layer, last, blocks)
        if came:
            self._order.landed(came, last)
        if lost:
            self._order.lost(lost)
        if layer:  # the peer has them since their first layer came
            self._queued.less(len(blocks) * (layout.layers - layer) * layout.bytes_per_layer_slice)
        self._queued.more(len(came) * (layout.layers - last) * layout.bytes_per_layer_slice)
        async with self._news:
            if came and last < layout.layers:
                heapq.heappush(self._tiles, (last, next(self._serial), came))
            else:
                self._open -= 1
            self._news.notify_all()

    async def _transfer(self, layer: int, last: int, blocks: Sequence[int]) -> tuple[list[int], list[int]]:
        """Blocks whose layers came, and blocks that won't."""
        if self._in.free:
            return list(blocks), []
        came: list[int] = []
        lost: list[int] = []
        waiting = list(blocks)
        while waiting:
            statuses = await self._request(layer, last, waiting)
            came += _with(waiting, statuses, (PartStatus.OK,))
            late = time.monotonic() >= self._until
            again = () if late else (PartStatus.EXPIRED,)  # the peer doesn't have it yet
            lost += _with(waiting, statuses, [status for status in PartStatus if status not in (PartStatus.OK, *again)])
            waiting = _with(waiting, statuses, again)
        return came, lost

    async def _request(self, layer: int, last: int, blocks: Sequence[int]) -> list[PartStatus]:
        order, size = self._order, self._in.layout.bytes_per_layer_slice
        offset, length = layer * size, (last - layer) * size
        parts = [Part(block, offset, length) for block in blocks]
        spans = [self._in.stage.span(order.slots[block], offset, length) for block in blocks]
        transport = self._in.transports.transport(order.lease.endpoint)
        with order.moved.transfer():
            if layer:  # the first layer waits for the peer, which says nothing of the link
                with self._in.link.moving() as moved:
                    statuses = await transport.read(order.lease.token, parts, spans, deadline_s=self._until - time.monotonic())
                    moved(length * statuses.count(PartStatus.OK))
            else:
                statuses = await transport.read(order.lease.token, parts, spans, deadline_s=self._until - time.monotonic())
        order.moved.count(statuses, [length] * len(blocks))
        return statuses


def _with(blocks: Sequence[int], statuses: Sequence[PartStatus], wanted: Iterable[PartStatus]) -> list[int]:
    chosen = set(wanted)
    return [block for block, status in zip(blocks, statuses, strict=True) if status in chosen]
