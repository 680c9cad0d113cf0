"""Fills a request's stage slots: the KV of its leading tokens, from storage, prefill or nowhere.

`Filler.fill` tries the route, and falls down a ladder when a rung breaks, never to an error of the
stream's: prefill fails -> load the stored prefix here; a block fails -> the prefix before it; nothing
left -> the engine recomputes. Only a full stage refuses the request, at once.

Slots belong to the `Filled` that is returned, and are given back by whoever takes it
(`Filled.kv.on_copied`, or `Filled.drop`).
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence

import msgspec

from common import tracing
from common.blocks import reusable_blocks
from common.errors import LeaseRejected, PenstockError
from common.generation import FinishReason, Token
from common.logs import Log
from common.routes import Plan
from common.transport.interface import Endpoint, LeaseToken
from services.decode.prefill_client import PrefillPeers
from services.worker.engine.types import LoadedKv
from services.worker.loading import Form, Reader, Stored
from services.worker.requests import DecodeRequest, Flow, PrefillProgress, PrefillRequest, Report, StageLease
from services.worker.stage import Lease, Right, Stage

log = Log("filling")


class Filled(msgspec.Struct, frozen=True):
    """What the engine starts from.

    `kv` is None when nothing was filled; its bytes are in `slots`. `first` came from prefill, with how it ended the sequence.
    `stored_blocks` leading blocks are in the reservoir already.
    """

    kv: LoadedKv | None = None
    slots: Sequence[int] = ()
    stored_blocks: int = 0
    first: Token | None = None
    finish: FinishReason | None = None
    stop_token: int | None = None

    def drop(self) -> None:
        """Gives the slots back when no engine will."""
        if self.kv is not None:
            self.kv.on_copied()


class Filler:
    """Carries out routes into one stage."""

    def __init__(
        self, stage: Stage, endpoint: Callable[[], Endpoint], reader: Reader, prefills: PrefillPeers, block_tokens: int, lease_s: float
    ) -> None:  # fmt: skip
        self._stage = stage
        self._endpoint = endpoint
        self._reader = reader
        self._prefills = prefills
        self._block_tokens = block_tokens
        self._lease_s = lease_s

    async def fill(self, request: DecodeRequest, report: Report) -> Filled:
        """Raises Overloaded when the stage has no room now."""
        route = request.route
        stored = self._usable(request)
        try:
            if route.prefill and not request.output:
                return await self._by_prefill(request, stored, report)
            return await self._direct(request, stored, report)
        finally:
            if route.stored is not None:
                await asyncio.shield(self._reader.release(route.stored))

    def _usable(self, request: DecodeRequest) -> Stored | None:
        """The stored prefix, cut so that at least one token is left to compute."""
        stored = request.route.stored
        if stored is None:
            return None
        known = len(request.prompt) + len(request.output)
        blocks = min(stored.blocks, reusable_blocks(known, self._block_tokens))
        return msgspec.structs.replace(stored, blocks=blocks) if blocks else None

    async def _direct(self, request: DecodeRequest, stored: Stored | None, report: Report) -> Filled:
        """Pulls the stored prefix from SSD; the engine computes the rest."""
        if stored is None:
            return Filled()
        slots = self._stage.reserve(stored.blocks)
        good = 0
        try:
            loaded = await self._reader.load(stored, slots, request.deadline_s, Form.STORED)
            good = loaded.blocks
        finally:
            self._stage.free(slots[good:])
        report.storage_to_decode = Flow(loaded.bytes, loaded.seconds)
        report.carrier = loaded.carrier
        tracing.record("ssd_read", loaded.seconds, request.traceparent, blocks=good, bytes=loaded.bytes, carrier=loaded.carrier)
        if loaded.failure:
            report.fallback = "; ".join(filter(None, (report.fallback, f"storage: {loaded.failure}")))
            log.warning("fallback", request_id=request.id, reason=report.fallback)
        if not good:
            return Filled()
        report.plan = Plan.DIRECT
        report.cached_tokens = good * self._block_tokens
        views = [self._stage.view(slot, 0, loaded.bytes_per_block) for slot in slots[:good]]
        return Filled(LoadedKv(report.cached_tokens, views, self._freer(slots[:good])), slots[:good], good)

    async def _by_prefill(self, request: DecodeRequest, stored: Stored | None, report: Report) -> Filled:
        """Has a prefill worker fill the whole prompt and sample the first token.

        When it fails, the blocks that had come are used; without any, the stored prefix is pulled here.
        """
        route = request.route
        slots = self._stage.reserve(-(-len(request.prompt) // self._block_tokens))
        granted = self._stage.grant(slots, Right.WRITE, self._lease_s)
        lease = StageLease(granted.token, self._endpoint(), self._lease_s)
        run = PrefillRequest(
            request.id,
            request.prompt,
            request.sampling,
            lease,
            route.legs,
            route.order,
            stored,
            request.deadline_s,
            tracing.traceparent(),
        )
        keeping = asyncio.create_task(self._keep(granted.token))
        last: PrefillProgress | None = None
        good = 0
        try:
            last = await self._prefills.run(request.route.prefill, run)
            good = len(slots)
        except PenstockError as error:
            good = min(_filled_prefix(granted), reusable_blocks(len(request.prompt), self._block_tokens))
            report.fallback = f"prefill: {error.message}"
            log.warning("fallback", request_id=request.id, reason=report.fallback, blocks_kept=good)
        finally:
            keeping.cancel()
            await asyncio.shield(self._stage.revoke(granted.token))
            self._stage.free(slots[good:])
        if last is not None:
            self._merge(report, last.report or Report())
            kv = LoadedKv(len(request.prompt), self._views(slots), self._freer(slots))
            return Filled(kv, slots, report.cached_tokens // self._block_tokens, last.first, last.finish, last.stop_token)
        if not good:
            return await self._direct(request, stored, report)
        stored_blocks = min(good, stored.blocks if stored else 0)
        report.cached_tokens = stored_blocks * self._block_tokens
        return Filled(
            LoadedKv(good * self._block_tokens, self._views(slots[:good]), self._freer(slots[:good])), slots[:good], stored_blocks
        )

    def _merge(self, report: Report, prefill: Report) -> None:
        """Takes over what the prefill worker measured."""
        for field in (
            "cached_tokens",
            "computed_tokens",
            "prefill",
            "carrier",
            "storage_to_prefill",
            "prefill_to_decode",
            "queue_s",
            "prefill_s",
        ):
            setattr(report, field, getattr(prefill, field))
        report.plan = Plan.STORAGE_TO_PREFILL if prefill.cached_tokens else Plan.RECOMPUTE
        report.fallback = prefill.fallback

    async def _keep(self, token: LeaseToken) -> None:
        """Heartbeats the lease for as long as prefill works on it, or until it has ended all the same."""
        with contextlib.suppress(LeaseRejected):
            while True:
                await asyncio.sleep(self._lease_s / 3)
                self._stage.renew(token, self._lease_s)

    def _views(self, slots: Sequence[int]) -> list[memoryview]:
        return [self._stage.view(slot) for slot in slots]

    def _freer(self, slots: Sequence[int]) -> Callable[[], None]:
        """Frees the slots, from whichever thread."""
        loop = asyncio.get_running_loop()

        def free() -> None:
            loop.call_soon_threadsafe(self._stage.free, slots)

        return free


def _filled_prefix(lease: Lease) -> int:
    """Leading items of a lease that are filled."""
    return next((item for item in range(len(lease.slots)) if not lease.is_filled(item)), len(lease.slots))
