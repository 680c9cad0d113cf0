"""Fills a prompt's slots together with prefill workers: the route's, and when it fails the next of its alternates.

The slots of the whole prompt are shared with the worker under one lease (services/worker/lease.py): it reads what is here or is
pulled here, and fills the rest.

Life (`Together.fill`):
1. Slots for the whole prompt are reserved, or the request is refused.
2. A worker runs under a lease of its own. What it is to read is meanwhile copied out of the pool, as far as that holds the
   prompt's front, or pulled (grants.py); the first token goes out as soon as there is one.
3. The worker fails: its lease is revoked, so that nothing of it lands any more, and blocks that are whole are kept. While
   more than the route's `tail_tokens` are left to compute, the next worker goes on from there: what is kept it reads here, the
   rest comes as the route says. Every worker is asked once; the request's deadline is that of all of them together.
4. Nobody is left to ask, or little is left to do: the rest of the stored prefix is pulled here, and the engine computes
   what is missing behind it.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Protocol

from common import tracing
from common.errors import LeaseRejected, PenstockError
from common.logs import Log
from common.routes import BY_PREFILL, Leg, Order, Source, plan_of, with_resident
from common.transport.interface import LeaseToken
from services.decode.filled import Filled
from services.decode.grants import Grants
from services.decode.means import Means, prefix
from services.decode.pulls import Pulls
from services.worker.engine.types import Claim, LoadedKv
from services.worker.lease import Lease, Right
from services.worker.loading import Form
from services.worker.requests import PrefillProgress, PrefillRequest, Report, StageLease

log = Log("filling")
COPY_BYTES = 16 << 20  # of the pool, between two steps of the engine: a few milliseconds


class Listener(Protocol):
    """Who is told how it goes."""

    def first(self, progress: PrefillProgress) -> None:
        """A first token was sampled; at most once."""
        ...

    def asking_another(self) -> None:
        """A prefill worker has failed, and the next is asked, as the report says."""
        ...


FROM_PREFILL = ("prefill", "queue_s", "prefill_s", "kept_tokens")


class Together:
    """One request's."""

    def __init__(self, means: Means, pulls: Pulls, listener: Listener, claim: Claim) -> None:
        self._in = means
        self._pulls = pulls
        self._request = pulls.request
        self._report = pulls.report
        self._listener = listener
        self._claim = claim
        self._held = min(len(claim.blocks), pulls.reusable) if pulls.request.route.legs else 0  # blocks that the pool has
        self._first = PrefillProgress(0)  # with the first token, once there is one
        self._slots: Sequence[int] = ()
        self._whole: set[int] = set()  # blocks that are in their slots, all of them
        self._kept: Sequence[int] = ()  # those that were when the present worker began

    async def fill(self) -> Filled:
        """Raises Overloaded when the stage has no room now."""
        stage, prompt, block_tokens = self._in.stage, self._request.prompt, self._in.block_tokens
        self._slots = stage.reserve(-(-len(prompt) // block_tokens))
        good = 0
        try:
            finished = await self._by_prefill()
            if not finished:
                await self._pull_missing()
            good = self._usable()
        finally:
            stage.free(self._slots[good:])  # ends the lease, unless that is done
        if not finished:
            cached = min(good, max(self._held, self._stored_blocks))
            self._report.cached_tokens = cached * block_tokens
            self._report.plan = plan_of(self._here(cached > self._held), Order.FORWARD, by_prefill=False)
        return self._filled(good)

    @property
    def _stored_blocks(self) -> int:
        return self._pulls.stored.blocks if self._pulls.stored is not None else 0

    def _usable(self) -> int:
        """Leading blocks the engine can start from: not the prompt's last token's, unless the first output token is there."""
        good = prefix(self._whole, len(self._slots))
        return good if self._first.first is not None else min(good, self._pulls.reusable)

    def _filled(self, good: int) -> Filled:
        first, slots = self._first, self._slots[:good]
        if not slots:
            return Filled(first=first.first, finish=first.finish, stop_token=first.stop_token)
        tokens = min(good * self._in.block_tokens, len(self._request.prompt))
        kv = LoadedKv(tokens, self._in.views(slots, Form.RAW), self._in.freer(slots))
        cached = min(self._report.cached_tokens // self._in.block_tokens, self._stored_blocks)
        stored = 0 if self._report.fallback else cached
        return Filled(kv, slots, stored, first.first, first.finish, first.stop_token)

    # One worker after another

    async def _by_prefill(self) -> bool:
        """Whether a worker brought it to its end. However it ends, nobody else writes to the slots any more."""
        route = self._request.route
        for number, address in enumerate((route.prefill, *route.alternates)):
            if number:
                left_tokens = self._left_tokens()
                if left_tokens <= route.tail_tokens:
                    return False
                self._report.prefill_retries += 1
                log.warning("asking_another", request_id=self._request.id, prefill=address, left_tokens=left_tokens)
                self._listener.asking_another()
            report = await self._by(address)
            if report is not None:
                self._merge(report)
                return True
        return False

    def _left_tokens(self) -> int:
        """What decode would have to compute by itself."""
        there = self._whole | set(range(self._held)) | (set(range(self._stored_blocks)) - self._pulls.failed)
        return max(0, len(self._request.prompt) - prefix(there, len(self._slots)) * self._in.block_tokens)

    async def _by(self, address: str) -> Report | None:
        """A worker's report; None when it failed. What is whole afterwards is known."""
        stage = self._in.stage
        self._kept = sorted(block for block in self._whole if block < self._pulls.reusable)
        lease = stage.grant(self._slots, Right.SHARE, self._in.lease_s)
        resident = self._whole.intersection(self._kept).union(range(self._held))
        lease.await_own(resident)
        for block in self._kept:
            lease.fill(block)
        legs = with_resident(self._pulls.legs, resident)
        report = await self._run(address, lease, legs)
        await asyncio.shield(stage.revoke(lease.token))  # from here on nothing is written but by us
        self._whole.update(block for block in range(len(self._slots)) if lease.is_filled(block))
        if self._in.reader.free:
            self._whole.update(block for leg in legs for block in range(leg.first_block, leg.last_block))
        return report

    async def _run(self, address: str, lease: Lease, legs: Sequence[Leg]) -> Report | None:
        request, pulls = self._request, self._pulls
        run = PrefillRequest(
            request.id,
            request.prompt,
            request.sampling,
            StageLease(lease.token, self._in.endpoint(), self._in.lease_s),
            tuple(legs),
            request.route.order,
            pulls.stored,
            pulls.left_s,
            request.chain_root,
            tracing.traceparent(),
        )
        grants = Grants(lease, legs, request.route.order)
        report: Report | None = None
        last = PrefillProgress(0)

        def told(progress: PrefillProgress) -> None:
            nonlocal last
            last = progress
            grants.granted(progress.pull_from)
            if progress.first is not None and self._first.first is None:
                self._first = progress
                self._listener.first(progress)

        async with asyncio.TaskGroup() as group:
            keeping = group.create_task(self._keep(lease.token))
            group.create_task(self._copy_held(lease))
            if grants.blocks:
                group.create_task(pulls.pull(self._slots, grants.following, grants.blocks, Form.RAW, grants.landed))
            try:
                report = await self._in.prefills.run(address, run, told)
            except PenstockError as error:
                pulls.fell(f"prefill: {error.message}")
            finally:
                keeping.cancel()
                grants.close()
        for path in BY_PREFILL:
            setattr(self._report, path, getattr(self._report, path) + getattr(last, path))
        return report

    async def _copy_held(self, lease: Lease) -> None:
        """What the pool holds of the prompt comes into its slots, for prefill to read: a few blocks between two of the engine's steps."""
        stage, blocks = self._in.stage, [block for block in range(self._held) if block not in self._whole]
        count = max(1, COPY_BYTES // stage.bytes_per_slot)
        try:
            while blocks:
                batch = blocks[:count]
                views = self._in.views([self._slots[block] for block in batch], Form.RAW)
                await self._in.engine.export_claimed(self._claim, batch, views)
                for block in batch:
                    lease.fill(block)
                blocks = blocks[count:]
        except PenstockError as error:
            self._pulls.fell(f"pool: {error.message}")
            for block in blocks:
                lease.give_up(block)

    async def _keep(self, token: LeaseToken) -> None:
        """Heartbeats the lease for as long as prefill works on it, or until it has ended all the same."""
        with contextlib.suppress(LeaseRejected):
            while True:
                await asyncio.sleep(self._in.lease_s / 3)
                self._in.stage.renew(token, self._in.lease_s)

    # What comes of it

    async def _pull_missing(self) -> None:
        """What of the stored prefix is not there is pulled here."""
        missing = [block for block in range(self._stored_blocks) if block not in self._whole]
        if missing:
            await self._pulls.pull_all(self._slots, missing, Form.RAW)
        self._whole |= self._pulls.came

    def _merge(self, prefill: Report) -> None:
        """Takes over what the prefill worker measured. What those before it computed, it found here: that is not cached."""
        report, legs, block_tokens = self._report, self._pulls.legs, self._in.block_tokens
        for field in FROM_PREFILL:
            setattr(report, field, getattr(prefill, field))
        report.carrier = prefill.carrier or report.carrier
        if prefill.fallback:
            self._pulls.fell(prefill.fallback)
        before = {block for block in self._kept if not any(leg.first_block <= block < leg.last_block for leg in legs)}
        cached = max(0, prefill.cached_tokens // block_tokens - len(before.difference(range(self._held))))
        report.cached_tokens = cached * block_tokens
        report.computed_tokens = len(self._request.prompt) - report.cached_tokens
        kept = prefill.kept_tokens // block_tokens  # of the prompt's front, as what decode holds: the longer covers the shorter
        elsewhere = cached - max(self._held, kept) > len(self._pulls.came) or prefill.storage_to_prefill.bytes
        there = [Source.RESIDENT_AT_PREFILL] * bool(kept) + [Source.STORAGE_TO_PREFILL] * bool(elsewhere)
        report.plan = plan_of([*self._here(bool(self._pulls.came)), *there], self._request.route.order, by_prefill=True)

    def _here(self, pulled: bool) -> list[Source]:
        """Where KV came from at decode."""
        return [Source.RESIDENT] * bool(self._held) + [Source.STORAGE_TO_DECODE] * pulled
