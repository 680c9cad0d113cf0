"""What a plan would take: a model of one request on a decode worker and perhaps a prefill worker. Pure.

A prompt of T tokens has n leading blocks stored. Decode still holds the first d, prefill the first p, and r is the more of both.
The model:

- *Links.* Bytes over a link wait for those queued there, then move at its measured rate. Blocks that decode
  pulls for prefill go on to it while others are pulled; blocks that prefill pulls go on to decode likewise: two
  links in a row move at the pace of the slower. What one of them holds and the other lacks takes its way there, and no
  storage link: blocks [p, d) to prefill, or [d, p) to decode. What both hold moves nowhere.
- *Compute.* One worker computes tokens one after another at its measured speed, after those queued there that go first: at
  prefill, what is due before a run of its size (common/runs.py).
- *Filling.* The blocks [r, n) are shared out so that all sources of the plan are done at once (`shares.py`). With
  MEET, compute is one of the sources: the rates add up, but for the claim that a load has begun when they meet.
- *First token.* What is not stored is computed when both the stored blocks are there and the worker is free; the step
  takes a little beside its tokens.
- *Finish.* Whatever decode lacks has been handed over: beside the computing when layerwise, else after it.

The estimate is this times the correction that finished requests have taught (`corrections.py`). What the
model leaves out, attention's growth with the context among it, is what the correction and `error` are for.
"""

import functools

import msgspec

from common.routes import Leg, Order, Plan, Source
from services.router.policy.division import Division, Held, claim, legs_of, traffic_of
from services.router.policy.paths import Moved, Paths
from services.router.policy.plans import SHAPES, Shape
from services.router.policy.rates import Rates
from services.router.policy.settings import PolicySettings, Scheduler
from services.router.policy.shares import Filler, share
from services.router.policy.view import ClusterView, DecodeView, PrefillView, Query

RUN_S = 0.005  # a prefill run's round trips: the call, its leases, the first slices
GUESS_ERROR = 1.0  # of an estimate that rests on a rate nobody measured


class Demand(msgspec.Struct, frozen=True):
    """What a route asks of one worker. `tokens`: of KV to hold; at prefill, to compute. `shared`: load and compute divide it among them."""

    tokens: int
    computed_tokens: int = 0
    storage_bytes: int = 0
    peer_read_bytes: int = 0
    peer_write_bytes: int = 0
    shared: bool = False


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate route and what it would take, in seconds from now.

    Attributes:
        decode, prefill: addresses; an empty `prefill`: decode computes.
        legs: what is loaded. With MEET, compute may take blocks off their fronts.
        read_wait_s: until the storage links are ours. `serve_wait_s`: until decode serves prefill's reads, if there are any.
        wait_s: until the computing worker is free. `load_s`: until the stored blocks are there.
        compute_s: of the computing worker's time. `first_token_s`, `finish_s`: see the module.
        correction: in both of these, what finished requests have taught.
        moving_s: seconds of links that it keeps busy, all added up.
        error: how far off it may be, relative.
        computed_tokens: prompt tokens that are computed, those of stored blocks included.
        moved: bytes over each path. `queued`: those of them that will wait there: what comes no faster than it goes on does not.
        guess, busy_guess: see `rates.py`.
    """

    plan: Plan
    decode: str
    prefill: str = ""
    order: Order = Order.FORWARD
    legs: tuple[Leg, ...] = ()
    read_wait_s: float = 0.0
    serve_wait_s: float = 0.0
    wait_s: float = 0.0
    load_s: float = 0.0
    compute_s: float = 0.0
    first_token_s: float
    finish_s: float
    correction: float = 1.0
    moving_s: float
    error: float
    computed_tokens: int
    moved: Moved = Moved()
    queued: Moved = Moved()
    guess: bool = False
    busy_guess: bool = False

    def of_decode(self, tokens: int) -> Demand:
        """What it asks of the decode worker, for a request of so many tokens."""
        queued, computed = self.queued, 0 if self.prefill else self.computed_tokens
        meets = self.order is Order.MEET
        return Demand(tokens, computed, queued.storage_to_decode, queued.decode_to_prefill, queued.prefill_to_decode, meets)

    def of_prefill(self) -> Demand:
        queued, computed = self.queued, self.computed_tokens
        meets = self.order is Order.MEET
        return Demand(computed, computed, queued.storage_to_prefill, queued.decode_to_prefill, queued.prefill_to_decode, meets)


class Pair:
    """One decode worker, with the prefill worker that computes for it or None. `estimate` asks about one plan."""

    def __init__(
        self,
        query: Query,
        view: ClusterView,
        settings: PolicySettings,
        rates: Rates,
        decode: DecodeView,
        prefill: PrefillView | None,
    ) -> None:
        self._view = view
        self._settings = settings
        self._tokens = query.prompt_tokens
        self._held = Held(query.resident.get(decode.address, 0), query.resident.get(prefill.address, 0) if prefill else 0)
        self.stored_blocks = max(query.stored_blocks, self._held.blocks)
        self._step_s = (prefill or decode).prefill_step_s
        self._decode = decode.address
        self._prefill = prefill.address if prefill else ""
        self._made = functools.cache(lambda tokens, meets: Paths.of(rates, view, decode, prefill, tokens, bold=meets))

    def estimate(self, plan: Plan) -> Estimate | None:
        """None when the plan comes to another one here: it would load nothing, or compute nothing beside its loads."""
        shape = SHAPES[plan]
        if not shape.loads:
            return self._reckon(plan, shape, Division((), 0))
        held = self._held
        missing = self.stored_blocks - held.blocks
        shares = share(self._fillers(shape), missing)
        division = Division(shares[: len(shape.loads)], sum(shares[len(shape.loads) :]), held)
        if shape.meets and held.blocks and not self._prefill:  # alone, decode loads what is missing, then computes
            return None
        if missing == 0 and (shape.meets or shape.loads != (self._would_load,)):
            return None
        if missing and not all(division.loaded):
            return None
        estimate = self._reckon(plan, shape, division)
        idle = shape.meets and not division.computed
        return None if idle and not estimate.guess and self._settings.scheduler is Scheduler.EARLIEST_FINISH else estimate

    @property
    def _would_load(self) -> Source:
        """Over whose link the plan would load that stands for everything being held: the one's who holds most."""
        return Source.STORAGE_TO_PREFILL if self._held.to_decode else Source.STORAGE_TO_DECODE

    def _paths(self, shape: Shape) -> Paths:
        """As they are for a run of the plan's size: of what isn't loaded, or, with MEET, all that compute may come to."""
        there = self._held.blocks if shape.meets else self.stored_blocks if shape.loads else 0
        return self._made(self._tokens - there * self._view.block_tokens, shape.meets)

    def _fillers(self, shape: Shape) -> list[Filler]:
        paths = self._paths(shape)
        fillers = [Filler(pipe.wait_s, pipe.per_s) for pipe in map(paths.load, shape.loads)]
        if shape.meets:
            begins_s = max(paths.compute.wait_s, self._held_s(paths))
            fillers.append(Filler(begins_s, paths.compute.per_s / self._view.block_tokens))
        return fillers

    def _held_s(self, paths: Paths) -> float:
        """Until prefill has read what only decode holds."""
        if paths.peer_read is None or not self._held.to_prefill:
            return 0.0
        return paths.peer_read.wait_s + paths.peer_read.over_s(self._held.to_prefill)

    def _reckon(self, plan: Plan, shape: Shape, division: Division) -> Estimate:
        """The model of the module's text, for one division of the stored blocks."""
        paths, block_tokens = self._paths(shape), self._view.block_tokens
        loads, legs = division.loaded, legs_of(shape, division)
        filled = [f.filled_s(n) for f, n in zip(self._fillers(shape), (*loads, division.computed), strict=False)]
        traffic = traffic_of(shape, division, -(-self._tokens // block_tokens) if self._prefill else None)
        load_s = max(filled[: len(loads)], default=0.0)
        if paths.peer_read is not None and division.held.to_prefill:
            load_s = max(load_s, paths.peer_read.wait_s + paths.peer_read.over_s(traffic.decode_to_prefill))
        tail = self._tokens - division.blocks * block_tokens
        computed_tokens = tail + division.computed * block_tokens
        start_s = max(load_s, max(filled, default=0.0), paths.compute.wait_s)
        if shape.meets:
            start_s += max(paths.load(leg.source).over_s(claim(leg.blocks)) for leg in legs if leg.source in shape.loads)
        first_token_s = finish_s = start_s + self._step_s + paths.compute.over_s(tail)
        order = Order.MEET if shape.meets else Order.FORWARD if self._settings.layerwise else Order.WHOLE
        if paths.peer_write is not None:
            begins_s = first_token_s if order is Order.WHOLE else 0.0
            handed_over_s = max(begins_s, paths.peer_write.wait_s) + paths.peer_write.over_s(traffic.prefill_to_decode)
            finish_s = RUN_S + max(first_token_s, handed_over_s)
            first_token_s += RUN_S
        correction = self._view.corrections.get(plan, 1.0)
        loading = [source for source, blocks in zip(shape.loads, loads, strict=False) if blocks]
        used = paths.used(loading, bool(division.held.to_prefill))
        guess = any(pipe.guess for pipe in used)
        return Estimate(
            plan=plan,
            decode=self._decode,
            prefill=self._prefill,
            order=order,
            legs=legs,
            read_wait_s=max((paths.storage(source).wait_s for source in loading), default=0.0),
            serve_wait_s=paths.peer_read.wait_s if paths.peer_read and traffic.decode_to_prefill else 0.0,
            wait_s=paths.compute.wait_s,
            load_s=load_s,
            compute_s=paths.compute.over_s(computed_tokens),
            first_token_s=first_token_s * correction,
            finish_s=finish_s * correction,
            correction=correction,
            moving_s=paths.moving_s(traffic),
            error=GUESS_ERROR if guess else self._settings.error_band,
            computed_tokens=computed_tokens,
            moved=traffic.in_bytes(self._view.stored_bytes_per_block, self._view.bytes_per_block),
            queued=paths.queued(traffic, division.held.to_decode if self._prefill else 0).in_bytes(
                self._view.stored_bytes_per_block, self._view.bytes_per_block
            ),
            guess=guess,
            busy_guess=any(pipe.busy_guess for pipe in used),
        )
