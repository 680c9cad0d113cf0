"""What decode pulls from storage for one request, and what its report says of how the route went."""

import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from common import tracing
from common.blocks import reusable_blocks
from common.logs import Log
from common.routes import Leg, Source, clipped
from common.transport.counters import Flow as Moved
from services.worker.loading import Batches, Form, Pull, Reader, Stored, in_order
from services.worker.requests import DecodeRequest, Flow, Report

log = Log("filling")
INSTEAD = {Source.RESIDENT: Source.STORAGE_TO_DECODE, Source.RESIDENT_AT_PREFILL: Source.STORAGE_TO_PREFILL}
Landed = Callable[[Sequence[int], Sequence[int]], None]


class Pulls:
    """Of one request.

    Attributes:
        stored: the stored prefix, cut so that at least one token is left to compute; None: nothing is stored.
        legs: where the route has stored blocks come from. What it thinks held is loaded by the worker that turns out not to hold it.
        came: blocks that were pulled. `failed`: blocks that were tried and did not come.
        moved: bytes and busy seconds of all pulls.
    """

    def __init__(self, reader: Reader, request: DecodeRequest, report: Report, block_tokens: int) -> None:
        self.reader = reader
        self.request = request
        self.report = report
        self.block_tokens = block_tokens
        self.reusable = reusable_blocks(len(request.prompt) + len(request.output), block_tokens)
        self.stored = self._usable(request.route.stored)
        self.legs = self._loadable(request.route.legs)
        self.came: set[int] = set()
        self.failed: set[int] = set()
        self.moved = Moved()
        self._until = time.monotonic() + request.deadline_s

    def _usable(self, stored: Stored | None) -> Stored | None:
        blocks = min(stored.blocks, self.reusable) if stored is not None else 0
        return msgspec.structs.replace(stored, blocks=blocks) if stored is not None and blocks else None

    def _loadable(self, legs: Sequence[Leg]) -> tuple[Leg, ...]:
        stored = clipped(legs, self.stored.blocks) if self.stored is not None else ()
        return tuple(Leg(leg.first_block, leg.last_block, INSTEAD.get(leg.source, leg.source)) for leg in stored)

    @property
    def flow(self) -> Flow:
        """As reports tell it."""
        return Flow(self.moved.bytes, self.moved.busy_s)

    @property
    def left_s(self) -> float:
        """Of the request's time."""
        return max(0.001, self._until - time.monotonic())

    async def pull(
        self, slots: Sequence[int] | Mapping[int, int], batches: Batches, blocks: int, form: Form, landed: Landed | None = None
    ) -> None:
        """Pulls what `batches` says into these slots, and notes what came of it. Never raises for a failed read."""
        assert self.stored is not None, "nothing is stored"

        def noted(came: Sequence[int], failed: Sequence[int]) -> None:
            self.came.update(came)
            self.failed.update(failed)
            if landed is not None:
                landed(came, failed)

        loaded = await self.reader.pull(Pull(self.stored, slots, batches, blocks, noted, self.moved, self.left_s, form))
        moved, report = self.moved, self.report
        report.storage_to_decode = self.flow
        report.carrier = loaded.carrier or report.carrier
        parent = self.request.traceparent
        tracing.record("ssd_read", moved.busy_s, parent, blocks=moved.parts_ok, bytes=moved.bytes, carrier=loaded.carrier)
        if loaded.failure:
            self.fell(f"storage: {loaded.failure}")

    async def pull_all(self, slots: Sequence[int] | Mapping[int, int], blocks: Sequence[int], form: Form) -> None:
        """The same for known blocks."""
        await self.pull(slots, in_order(blocks), len(blocks), form)

    def fell(self, reason: str) -> None:
        """Something did not go as the route says."""
        self.report.fallback = "; ".join(filter(None, (self.report.fallback, reason)))
        log.warning("fallback", request_id=self.request.id, reason=reason)

    async def release(self) -> None:
        """Gives the lease on storage back."""
        if self.request.route.stored is not None:
            await self.reader.release(self.request.route.stored)
