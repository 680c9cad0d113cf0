"""Sends what a run loaded or computed into decode's stage, layer by layer, while other layers are computed.

Slices gather while a request is under way, and leave together in the next one: many slices in a message, the layers of one
block that follow each other as one part, lowest layers first. A slice counts as sent when decode has verified it. A slice
is sent once, also when its block had to be computed again: decode keeps what it has.
"""

import asyncio
from collections.abc import Iterable, Sequence

from common.errors import LeaseRejected, TransferFailed
from common.kv_layout import KvLayout
from common.transport.counters import Flow as Moved
from common.transport.interface import Part, PartStatus
from common.transport.pool import TransportPool
from services.worker.links import Link
from services.worker.requests import StageLease
from services.worker.stage import Stage

SEND_DEADLINE_S = 30.0
REQUEST_BYTES = 4 << 20
PARTS_MAX = 1024
SENDS_IN_FLIGHT = 2
ATTEMPTS_MAX = 3  # of a part that arrived corrupt: its block may have been computed again meanwhile


class Handoffs:
    """What every hand-off of this worker shares."""

    def __init__(self, stage: Stage, transports: TransportPool, layout: KvLayout) -> None:
        self.stage = stage
        self.transports = transports
        self.layout = layout
        self.link = Link()


class Handoff:
    """One run's slices on their way.

    Invariant, per block: `sent <= ready <= layers`, where sent counts what has been put into a request.
    """

    def __init__(self, shared: Handoffs, lease: StageLease, slots: Sequence[int]) -> None:
        self._in = shared
        self._lease = lease
        self._slots = slots
        self._ready = [0] * len(slots)  # leading layers that can be sent
        self._sent = [0] * len(slots)
        self._pending: set[int] = set()  # blocks with sent < ready
        self._news = asyncio.Event()
        self._complete = False
        self.moved = Moved()
        self.carrier = ""

    def ready(self, blocks: Iterable[int], layers: int) -> None:
        """The leading `layers` layers of these blocks can be sent."""
        for block in blocks:
            if layers > self._ready[block]:
                self._ready[block] = layers
                self._pending.add(block)
        self._news.set()

    def complete(self) -> None:
        """Nothing more becomes ready: `run` ends when everything is sent."""
        self._complete = True
        self._news.set()

    async def run(self) -> None:
        """Sends until everything is sent. Raises what stopped it, and with it the run."""
        async with asyncio.TaskGroup() as group:
            for _ in range(SENDS_IN_FLIGHT):
                group.create_task(self._send_all())

    async def _send_all(self) -> None:
        while True:
            if self._pending:
                await self._send(self._take())
            elif self._complete:
                return
            else:
                self._news.clear()
                await self._news.wait()

    def _take(self) -> list[Part]:
        """The next request's parts: of the blocks with the lowest layers to send, as far as they fit."""
        size = self._in.layout.bytes_per_layer_slice
        parts: list[Part] = []
        total = 0
        for block in sorted(self._pending, key=lambda block: (self._sent[block], block)):
            length = (self._ready[block] - self._sent[block]) * size
            if parts and (total + length > REQUEST_BYTES or len(parts) == PARTS_MAX):
                break
            parts.append(Part(block, self._sent[block] * size, length))
            self._sent[block] = self._ready[block]
            self._pending.discard(block)
            total += length
        return parts

    async def _send(self, parts: list[Part]) -> None:
        link = self._in.link
        with link.queued(sum(part.length for part in parts)) as queued:
            for _ in range(ATTEMPTS_MAX):
                with link.moving() as came, self.moved.transfer():
                    statuses = await self._write(parts)
                    arrived = sum(part.length for part, status in zip(parts, statuses, strict=True) if status is PartStatus.OK)
                    came(arrived)
                queued.less(arrived)
                self.moved.count(statuses, [part.length for part in parts])
                parts = [part for part, status in zip(parts, statuses, strict=True) if self._again(part, status)]
                if not parts:
                    return
        raise TransferFailed(f"block {parts[0].item} reached decode corrupt {ATTEMPTS_MAX} times")

    async def _write(self, parts: Sequence[Part]) -> list[PartStatus]:
        transport = self._in.transports.transport(self._lease.endpoint)
        spans = [self._in.stage.span(self._slots[part.item], part.offset, part.length) for part in parts]
        statuses = await transport.write(self._lease.token, parts, spans, deadline_s=SEND_DEADLINE_S)
        self.carrier = transport.carrier
        return statuses

    def _again(self, part: Part, status: PartStatus) -> bool:
        """Whether a part is to be sent again. Raises when that would be in vain."""
        if status is PartStatus.REJECTED:
            raise LeaseRejected(f"decode refused block {part.item}: the stage lease is gone")
        if status not in (PartStatus.OK, PartStatus.CORRUPT):
            raise TransferFailed(f"block {part.item} did not reach decode: {status.name.lower()}")
        return status is PartStatus.CORRUPT
