"""Fills a request's stage slots: the KV of its leading tokens, from storage, prefill or nowhere.

`Filler.fill` carries out the route, and falls down a ladder when a rung breaks, never to an error of the stream's:
decode can't pull a block -> prefill pulls it or computes it; prefill fails -> what came is kept, and an alternate goes on from
there (together.py); nobody is left to ask -> the rest of the stored prefix is pulled here; a block fails -> the prefix before it;
nothing left -> the engine recomputes. Only a full stage refuses the request, at once.

Slots belong to the `Filled` that is returned, and are given back by whoever takes it (`Filled.kv.on_copied`, or
`Filled.drop`).
"""

import asyncio
from collections.abc import Sequence

from common.routes import Leg, Order, Plan, Source, plan_of
from services.decode.filled import Filled, Shares
from services.decode.means import Means, prefix
from services.decode.pulls import Pulls
from services.decode.together import Listener, Together
from services.worker.engine.meeting import Meeting
from services.worker.engine.types import Claim, LoadedKv
from services.worker.ledger import Ledger
from services.worker.loading import Form, from_back
from services.worker.requests import DecodeRequest, Report

RELEASES_MAX = 1024  # under way; a store that has so many unanswered lets the next leases expire


class Filler:
    """Carries out routes into one stage."""

    def __init__(self, means: Means) -> None:
        self._in = means
        self._releases: set[asyncio.Task[None]] = set()

    async def fill(self, request: DecodeRequest, report: Report, listener: Listener, claim: Claim) -> Filled:
        """What the pool holds of the prompt is claimed.

        Raises Overloaded when the stage has no room now.
        """
        held = len(claim.blocks)
        pulls, route = Pulls(self._in.reader, request, report, self._in.block_tokens), request.route
        if route.order is Order.MEET and not route.prefill and not held:
            return _Alone(self._in, pulls).meeting()
        try:
            if route.prefill and not request.output:
                return await Together(self._in, pulls, listener, claim).fill()
            return await _Alone(self._in, pulls).fill(held)
        finally:
            self._release(request)

    def decline(self, request: DecodeRequest) -> None:
        """Nothing needs to be filled: what the route holds is given back."""
        self._release(request)

    def _release(self, request: DecodeRequest) -> None:
        """Gives the lease on storage back, beside what the request does next. A store that doesn't acknowledge in time lets it expire."""
        if request.route.stored is not None and len(self._releases) < RELEASES_MAX:
            task = asyncio.create_task(self._in.reader.release(request.route.stored), name=f"release {request.id}")
            self._releases.add(task)
            task.add_done_callback(self._releases.discard)

    async def released(self) -> None:
        """Waits until every lease on storage is given back: not longer than one call may take."""
        while self._releases:
            await asyncio.wait(self._releases)


class _Alone:
    """One request's filling, without prefill."""

    def __init__(self, means: Means, pulls: Pulls) -> None:
        self._in = means
        self._pulls = pulls
        self._report = pulls.report

    def meeting(self) -> Filled:
        """Pulls the legs from their end, while the engine computes from the prompt's front."""
        wanted = _leading(self._pulls.legs)
        request, block_tokens = self._pulls.request, self._in.block_tokens
        slots = self._in.stage.reserve(wanted)
        leg = Leg(0, wanted, Source.STORAGE_TO_DECODE)
        blocks = -(-(len(request.prompt) + len(request.output)) // block_tokens)
        ledger = Ledger(blocks, 1, [leg] if wanted else [])
        shares = Shares(lambda: self._in.stage.free(slots), 2)
        loading = asyncio.create_task(self._load_to_meet(slots, ledger, leg), name=f"loading {request.id}")
        loading.add_done_callback(lambda _: shares.let_go())
        views = self._in.views(slots, Form.STORED)
        meeting = Meeting(ledger, views, block_tokens, shares.threadsafe(asyncio.get_running_loop()))
        return Filled(meeting=meeting, loading=loading)

    async def _load_to_meet(self, slots: Sequence[int], ledger: Ledger, leg: Leg) -> None:
        pulls, report = self._pulls, self._report

        def landed(came: Sequence[int], failed: Sequence[int]) -> None:
            report.cached_tokens = len(pulls.came) * self._in.block_tokens
            report.storage_to_decode = pulls.flow
            report.plan = plan_of([leg.source] if pulls.came else [], Order.MEET, by_prefill=False)
            if came:
                ledger.arrived(came, 1)
            if failed:
                ledger.failed(failed)
            self._in.engine.wake()

        try:
            if leg.blocks:
                await pulls.pull(slots, from_back(ledger, leg), leg.blocks, Form.STORED, landed)
        finally:
            await asyncio.shield(pulls.release())

    async def fill(self, held: int) -> Filled:
        """Pulls what the pool doesn't hold of the legs from SSD; the engine computes the rest."""
        pulls, wanted = self._pulls, _leading(self._pulls.legs)
        if pulls.stored is None or held >= wanted:
            self._report.plan = Plan.RESIDENT if held else Plan.RECOMPUTE
            return Filled()
        slots = self._in.stage.reserve(wanted - held)
        good = held
        try:
            await pulls.pull_all(dict(zip(range(held, wanted), slots, strict=True)), range(held, wanted), Form.STORED)
            good = prefix(pulls.came | set(range(held)), wanted)
        finally:
            self._in.stage.free(slots[good - held :])
        self._report.cached_tokens = good * self._in.block_tokens
        self._report.plan = plan_of([Source.STORAGE_TO_DECODE] if good > held else [], Order.FORWARD, by_prefill=False)
        slots = slots[: good - held]
        if not slots:
            return Filled()
        kv = LoadedKv(self._report.cached_tokens, self._in.views(slots, Form.STORED), self._in.freer(slots), held)
        return Filled(kv, slots, good)


def _leading(legs: Sequence[Leg]) -> int:
    """Blocks that the legs cover without a gap from the prompt's start."""
    end = 0
    for leg in legs:
        if leg.first_block != end:
            break
        end = leg.last_block
    return end
