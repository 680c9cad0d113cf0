"""Fills a request's stage slots: the KV of its leading tokens, from storage, prefill or nowhere.

`Filler.fill` carries out the route, and falls down a ladder when a rung breaks, never to an error of the stream's:
decode can't pull a block -> prefill pulls it or computes it; prefill fails -> what came is kept, and the rest of the stored
prefix is pulled here; a block fails -> the prefix before it; nothing left -> the engine recomputes. Only a full stage refuses
the request, at once.

With a prefill worker, the slots of the whole prompt are shared with it under one lease (services/worker/lease.py): it reads
what is pulled here, and fills the rest. Slots belong to the `Filled` that is returned, and are given back by whoever
takes it (`Filled.kv.on_copied`, or `Filled.drop`).
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence

import msgspec

from common import tracing
from common.blocks import reusable_blocks
from common.errors import LeaseRejected, PenstockError
from common.logs import Log
from common.routes import Leg, Order, Plan, Source, clipped, plan_of
from common.transport.counters import Flow as Moved
from common.transport.interface import Endpoint, LeaseToken
from services.decode.filled import Filled, Shares
from services.decode.grants import Grants
from services.decode.prefill_client import PrefillPeers
from services.worker.engine.meeting import Meeting
from services.worker.engine.types import LoadedKv
from services.worker.lease import Lease, Right
from services.worker.ledger import Ledger
from services.worker.loading import Form, Loaded, Pull, Reader, Stored, from_back, in_order
from services.worker.requests import DecodeRequest, Flow, PrefillProgress, PrefillRequest, Report, StageLease
from services.worker.stage import Stage

log = Log("filling")
OnFirst = Callable[[PrefillProgress], None]


class Filler:
    """Carries out routes into one stage."""

    def __init__(
        self, stage: Stage, endpoint: Callable[[], Endpoint], reader: Reader, prefills: PrefillPeers, block_tokens: int, lease_s: float,
        wake: Callable[[], None],
    ) -> None:  # fmt: skip
        self.stage = stage
        self.endpoint = endpoint
        self.reader = reader
        self.prefills = prefills
        self.block_tokens = block_tokens
        self.lease_s = lease_s
        self.wake = wake  # the engine may wait for what has come

    async def fill(self, request: DecodeRequest, report: Report, on_first: OnFirst, held: int) -> Filled:
        """`on_first` is called once, if prefill samples a first token; `held` leading blocks are in the pool.

        Raises Overloaded when the stage has no room now.
        """
        filling = _Filling(self, request, report, on_first)
        if request.route.order is Order.MEET and not request.route.prefill and not held:
            return filling.meeting()
        filled = Filled()
        try:
            filled = await (filling.by_prefill() if request.route.prefill and not request.output else filling.alone(held))
        finally:
            try:
                await asyncio.shield(filling.release())
            except asyncio.CancelledError:
                filled.drop()
                raise
        return filled

    async def decline(self, request: DecodeRequest) -> None:
        """Nothing needs to be filled: what the route holds is given back."""
        if request.route.stored is not None:
            await self.reader.release(request.route.stored)


class _Filling:
    """One request's."""

    def __init__(self, filler: Filler, request: DecodeRequest, report: Report, on_first: OnFirst) -> None:
        self._in = filler
        self._request = request
        self._report = report
        self._on_first = on_first
        self._stored = self._usable()
        self._legs = clipped(request.route.legs, self._stored.blocks) if self._stored else ()
        self._moved = Moved()
        self._came: set[int] = set()  # blocks that were pulled here
        self._first = PrefillProgress(0)  # with the first token, once there is one

    def _usable(self) -> Stored | None:
        """The stored prefix, cut so that at least one token is left to compute."""
        stored = self._request.route.stored
        if stored is None:
            return None
        known = len(self._request.prompt) + len(self._request.output)
        blocks = min(stored.blocks, reusable_blocks(known, self._in.block_tokens))
        return msgspec.structs.replace(stored, blocks=blocks) if blocks else None

    async def release(self) -> None:
        """Gives the lease on storage back."""
        if self._request.route.stored is not None:
            await self._in.reader.release(self._request.route.stored)

    # Without prefill

    def meeting(self) -> Filled:
        """Pulls the legs from their end, while the engine computes from the prompt's front."""
        wanted = _leading(self._legs)
        request, block_tokens = self._request, self._in.block_tokens
        slots = self._in.stage.reserve(wanted)
        leg = Leg(0, wanted, Source.STORAGE_TO_DECODE)
        blocks = -(-(len(request.prompt) + len(request.output)) // block_tokens)
        ledger = Ledger(blocks, 1, [leg] if wanted else [])
        shares = Shares(lambda: self._in.stage.free(slots), 2)
        loading = asyncio.create_task(self._load_to_meet(slots, ledger, leg), name=f"loading {request.id}")
        loading.add_done_callback(lambda _: shares.let_go())
        views = [self._in.stage.view(slot, 0, self._in.reader.bytes_in_slot(Form.STORED)) for slot in slots]
        meeting = Meeting(ledger, views, block_tokens, shares.threadsafe(asyncio.get_running_loop()))
        return Filled(meeting=meeting, loading=loading)

    async def _load_to_meet(self, slots: Sequence[int], ledger: Ledger, leg: Leg) -> None:
        report = self._report

        def landed(came: Sequence[int], failed: Sequence[int]) -> None:
            self._came.update(came)
            report.cached_tokens = len(self._came) * self._in.block_tokens
            report.storage_to_decode = Flow(self._moved.bytes, self._moved.busy_s)
            report.plan = plan_of([leg.source] if self._came else [], Order.MEET, by_prefill=False)
            if came:
                ledger.arrived(came, 1)
            if failed:
                ledger.failed(failed)
            self._in.wake()

        try:
            if self._stored is not None and leg.blocks:
                batches = from_back(ledger, leg)
                pull = Pull(self._stored, slots, batches, leg.blocks, landed, self._moved, self._request.deadline_s, Form.STORED)
                self._noted(await self._in.reader.pull(pull))
        finally:
            await asyncio.shield(self.release())

    async def alone(self, held: int) -> Filled:
        """Pulls what the pool doesn't hold of the legs from SSD; the engine computes the rest."""
        stored, wanted = self._stored, _leading(self._legs)
        if stored is None or held >= wanted:
            self._report.plan = Plan.RESIDENT if held else Plan.RECOMPUTE
            return Filled()
        slots = self._in.stage.reserve(wanted - held)
        good = held
        try:
            self._noted(
                await self._pull(stored, dict(zip(range(held, wanted), slots, strict=True)), range(held, wanted), Form.STORED)
            )
            good = _prefix(self._came | set(range(held)), wanted)
        finally:
            self._in.stage.free(slots[good - held :])
        self._report.cached_tokens = good * self._in.block_tokens
        self._report.plan = plan_of([Source.STORAGE_TO_DECODE] if good > held else [], Order.FORWARD, by_prefill=False)
        return self._filled(slots[: good - held], self._report.cached_tokens, good, Form.STORED, first_block=held)

    async def _pull(self, stored: Stored, slots: Sequence[int] | Mapping[int, int], blocks: Sequence[int], form: Form) -> Loaded:
        def landed(came: Sequence[int], failed: Sequence[int]) -> None:
            self._came.update(came)

        return await self._in.reader.pull(
            Pull(stored, slots, in_order(blocks), len(blocks), landed, self._moved, self._request.deadline_s, form)
        )

    def _noted(self, loaded: Loaded) -> None:
        """A pull is over."""
        report, moved = self._report, self._moved
        report.storage_to_decode = Flow(moved.bytes, moved.busy_s)
        report.carrier = loaded.carrier or report.carrier
        parent = self._request.traceparent
        tracing.record("ssd_read", moved.busy_s, parent, blocks=moved.parts_ok, bytes=moved.bytes, carrier=loaded.carrier)
        if loaded.failure:
            self._fell(f"storage: {loaded.failure}")

    def _fell(self, reason: str) -> None:
        self._report.fallback = "; ".join(filter(None, (self._report.fallback, reason)))
        log.warning("fallback", request_id=self._request.id, reason=reason)

    # With prefill

    async def by_prefill(self) -> Filled:
        """Has a prefill worker fill what is not pulled here, and sample the first token."""
        stage, request = self._in.stage, self._request
        slots = stage.reserve(-(-len(request.prompt) // self._in.block_tokens))
        lease = stage.grant(slots, Right.SHARE, self._in.lease_s)
        good = 0
        try:
            report = await self._together(lease, slots)
            await asyncio.shield(stage.revoke(lease.token))  # from here on nothing is written but by us
            filled = {block for block in range(len(slots)) if lease.is_filled(block)}
            if self._in.reader.free:
                filled.update(block for leg in self._legs for block in range(leg.first_block, leg.last_block))
            if report is None:
                filled = await self._pull_missing(filled, slots)
            good = self._kept(_prefix(filled, len(slots)), len(slots))
        finally:
            stage.free(slots[good:])  # ends the lease, unless that is done
        if report is None:
            cached = min(good, self._stored.blocks if self._stored else 0)
            self._report.cached_tokens = cached * self._in.block_tokens
            self._report.plan = plan_of([Source.STORAGE_TO_DECODE] if cached else [], Order.FORWARD, by_prefill=False)
        else:
            self._merge(report)
            cached = self._report.cached_tokens // self._in.block_tokens
        tokens = min(good * self._in.block_tokens, len(request.prompt))
        return self._filled(slots[:good], tokens, 0 if self._report.fallback else cached, Form.RAW)

    def _kept(self, good: int, blocks: int) -> int:
        """Leading blocks the engine can start from: not the prompt's last token's, unless the first output token is there."""
        if self._first.first is not None:
            return good
        return min(good, reusable_blocks(len(self._request.prompt), self._in.block_tokens))

    async def _together(self, lease: Lease, slots: Sequence[int]) -> Report | None:
        """Prefill's report; None when it failed, and what it did until then is in the lease's items."""
        request = self._request
        run = PrefillRequest(
            request.id,
            request.prompt,
            request.sampling,
            StageLease(lease.token, self._in.endpoint(), self._in.lease_s),
            self._legs,
            request.route.order,
            self._stored,
            request.deadline_s,
            tracing.traceparent(),
        )
        grants = Grants(self._in.stage, lease, self._legs, request.route.order)
        report: Report | None = None

        def told(progress: PrefillProgress) -> None:
            grants.granted(progress.pull_from)
            if progress.first is not None:
                self._first = progress
                self._on_first(progress)

        async with asyncio.TaskGroup() as group:
            keeping = group.create_task(self._keep(lease.token))
            group.create_task(self._pull_granted(grants, slots))
            try:
                report = await self._in.prefills.run(request.route.prefill, run, told)
            except PenstockError as error:
                self._fell(f"prefill: {error.message}")
            finally:
                keeping.cancel()
                grants.close()
        return report

    async def _pull_granted(self, grants: Grants, slots: Sequence[int]) -> None:
        if self._stored is None or not grants.blocks:
            return

        def landed(came: Sequence[int], failed: Sequence[int]) -> None:
            self._came.update(came)
            grants.landed(came, failed)

        self._noted(
            await self._in.reader.pull(
                Pull(self._stored, slots, grants.following, grants.blocks, landed, self._moved, self._request.deadline_s)
            )
        )

    async def _pull_missing(self, filled: set[int], slots: Sequence[int]) -> set[int]:
        """After prefill's failure: what of the stored prefix is not there is pulled here."""
        missing = [block for block in range(self._stored.blocks if self._stored else 0) if block not in filled]
        if self._stored is not None and missing:
            self._noted(await self._pull(self._stored, slots, missing, Form.RAW))
        return filled | self._came

    def _merge(self, prefill: Report) -> None:
        """Takes over what the prefill worker measured."""
        report = self._report
        for field in (
            "cached_tokens",
            "computed_tokens",
            "prefill",
            "storage_to_prefill",
            "decode_to_prefill",
            "prefill_to_decode",
            "host_to_device",
            "queue_s",
            "prefill_s",
        ):
            setattr(report, field, getattr(prefill, field))
        report.carrier = prefill.carrier or report.carrier
        if prefill.fallback:
            self._fell(prefill.fallback)
        loaded = prefill.cached_tokens // self._in.block_tokens
        here = [Source.STORAGE_TO_DECODE] if self._came else []
        there = [Source.STORAGE_TO_PREFILL] if loaded > len(self._came) or prefill.storage_to_prefill.bytes else []
        report.plan = plan_of([*here, *there], self._request.route.order, by_prefill=True)

    async def _keep(self, token: LeaseToken) -> None:
        """Heartbeats the lease for as long as prefill works on it, or until it has ended all the same."""
        with contextlib.suppress(LeaseRejected):
            while True:
                await asyncio.sleep(self._in.lease_s / 3)
                self._in.stage.renew(token, self._in.lease_s)

    # What comes of it

    def _filled(self, slots: Sequence[int], tokens: int, stored_blocks: int, form: Form, first_block: int = 0) -> Filled:
        first = self._first
        if not slots:
            return Filled(None, (), 0, first.first, first.finish, first.stop_token)
        size = self._in.reader.bytes_in_slot(form)
        views = [self._in.stage.view(slot, 0, size) for slot in slots]
        kv = LoadedKv(tokens, views, self._freer(slots), first_block)
        return Filled(kv, slots, stored_blocks, first.first, first.finish, first.stop_token)

    def _freer(self, slots: Sequence[int]) -> Callable[[], None]:
        """Frees the slots, from whichever thread."""
        loop = asyncio.get_running_loop()

        def free() -> None:
            loop.call_soon_threadsafe(self._in.stage.free, slots)

        return free


def _prefix(blocks: set[int], limit: int) -> int:
    """How many of the blocks `[0, limit)` come before the first that is missing."""
    return next((block for block in range(limit) if block not in blocks), limit)


def _leading(legs: Sequence[Leg]) -> int:
    """Blocks that the legs cover without a gap from the prompt's start."""
    end = 0
    for leg in legs:
        if leg.first_block != end:
            break
        end = leg.last_block
    return end
