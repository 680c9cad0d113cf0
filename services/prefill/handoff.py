"""Sends a run's KV blocks into a decode worker's stage, while the engine still computes others.

Blocks go in order. Stored blocks are forwarded from the stage slots they were loaded into; computed
ones are exported from the pool through a few slots set aside for sending. A block counts as sent
when decode has verified it. Any failure ends the hand-off, and with it the run.
"""

import asyncio
import time
from collections.abc import Callable, Sequence

from common.errors import LeaseRejected, TransferFailed
from common.transport.interface import Part, PartStatus, Span
from common.transport.pool import TransportPool
from services.worker.engine.loop import EngineLoop
from services.worker.requests import PrefillRequest
from services.worker.slots import SlotPool
from services.worker.stage import Stage

SEND_DEADLINE_S = 30.0


class HandoffFactory:
    """What every hand-off of this worker shares."""

    def __init__(self, engine: EngineLoop, stage: Stage, slots: SlotPool, transports: TransportPool, block_tokens: int) -> None:
        self.engine = engine
        self.stage = stage
        self.slots = slots
        self.transports = transports
        self.block_tokens = block_tokens

    def open(self, sequence_id: str, request: PrefillRequest) -> "Handoff":
        return Handoff(self, sequence_id, request)


class Handoff:
    """One run's blocks on their way. Invariant: `sent_blocks <= ready blocks <= blocks`."""

    def __init__(self, parts: HandoffFactory, sequence_id: str, request: PrefillRequest) -> None:
        self._in = parts
        self._sequence_id = sequence_id
        self._stage_lease = request.stage
        self._tokens = len(request.prompt)
        self.blocks = -(-self._tokens // parts.block_tokens)
        self.sent_blocks = 0
        self.sent_bytes = 0
        self.sending_s = 0.0  # of the byte plane, overlapped with compute
        self.carrier = ""
        self._staged: Sequence[int] = ()
        self._staged_sent: Callable[[], None] | None = None
        self._ready = 0
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._send_all(), name=f"handoff {sequence_id}")

    def staged(self, slots: Sequence[int], sent: Callable[[], None]) -> None:
        """The leading blocks are in these slots; `sent` is called once, when they are no longer needed."""
        self._staged, self._staged_sent = slots, sent
        self._advance(len(slots))

    def computed(self, tokens: int) -> None:
        """So many leading tokens are in the pool; a partial block is ready when it is the prompt's last.

        Raises what has stopped the sending, if something has, so that the run stops computing too.
        """
        if self._task.done():
            self._task.result()
        self._advance(self.blocks if tokens == self._tokens else tokens // self._in.block_tokens)

    async def finish(self) -> None:
        """Waits until every block is sent. Raises what stopped it."""
        assert self._ready == self.blocks, (self._ready, self.blocks)
        await self._task

    async def close(self) -> None:
        """Stops sending; nothing is left of it afterwards."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._let_staged_go()

    def _advance(self, ready: int) -> None:
        self._ready = max(self._ready, ready)
        self._news.set()

    async def _send_all(self) -> None:
        while self.sent_blocks < self.blocks:
            while self.sent_blocks >= self._ready:
                self._news.clear()
                await self._news.wait()
            await self._send(self.sent_blocks)

    async def _send(self, first: int) -> None:
        """Sends the next batch, which starts at block `first`."""
        staged = self._staged[first : first + self._in.slots.size]
        if staged:
            await self._write(range(first, first + len(staged)), [self._in.stage.span(slot) for slot in staged])
            if self.sent_blocks >= len(self._staged):
                self._let_staged_go()
            return
        blocks = range(first, min(self._ready, first + self._in.slots.size // 2))
        async with self._in.slots.lend(len(blocks)) as slots:
            views = [self._in.stage.view(slot) for slot in slots]
            await self._in.engine.call(lambda engine: engine.export(self._sequence_id, blocks.start, blocks.stop, views))
            await self._write(blocks, [self._in.stage.span(slot) for slot in slots])

    async def _write(self, blocks: range, spans: Sequence[Span]) -> None:
        size = self._in.stage.bytes_per_slot
        began = time.perf_counter()
        transport = self._in.transports.transport(self._stage_lease.endpoint)
        statuses = await transport.write(
            self._stage_lease.token, [Part(block, 0, size) for block in blocks], spans, deadline_s=SEND_DEADLINE_S
        )
        for block, status in zip(blocks, statuses, strict=True):
            if status is PartStatus.REJECTED:
                raise LeaseRejected(f"decode refused block {block}: the stage lease is gone")
            if status is not PartStatus.OK:
                raise TransferFailed(f"block {block} did not reach decode: {status.name.lower()}")
        self.sending_s += time.perf_counter() - began
        self.carrier = transport.carrier
        self.sent_blocks = blocks.stop
        self.sent_bytes += len(blocks) * size

    def _let_staged_go(self) -> None:
        if self._staged_sent is not None:
            self._staged_sent()
            self._staged_sent = None
