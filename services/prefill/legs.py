"""A run's loaders: they bring its legs into the run's stage slots.

A leg from SSD is pulled in full blocks, and every block goes on to decode as it is. A leg from decode, of what it has or of
what it pulls, is read layer by layer. A block that decode can't give is pulled from SSD here; one that SSD can't give is left
to compute.

What the stage held before the run is there already, and no loader's. It is handed to decode, unless decode has it too.

Orders FORWARD and WHOLE: each leg is claimed at once and comes from its front. Order MEET: a leg from SSD is claimed from its
end, a batch at a time, until it meets what the engine has claimed; `pull_from` says how far, for decode to pull no further.
"""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from common.routes import Leg, Order, Source
from common.transport.counters import Flow as Moved
from services.prefill.handoff import Handoff
from services.prefill.pulling import PeerPull, PeerReader
from services.prefill.run_slots import RunSlots
from services.worker.ledger import Ledger
from services.worker.loading import Batches, Pull, Reader, from_back, in_order
from services.worker.requests import PrefillRequest


class Loading(Protocol):
    """The run that is loaded for."""

    request: PrefillRequest
    slots: RunSlots
    ledger: Ledger
    handoff: Handoff

    def landed(self, blocks: Sequence[int], layers: int) -> None: ...

    def lost(self, blocks: Sequence[int]) -> None: ...

    def tell(self) -> None: ...


class Legs:
    """All loaders of one run.

    Attributes:
        came: blocks that were loaded.
        pull_from: per leg that decode pulls, in order, the first block that was asked of decode.
        fallback: why blocks came another way than asked for, or were computed; empty: none did.
    """

    def __init__(self, reader: Reader, peers: PeerReader, run: Loading) -> None:
        self.from_storage = Moved()
        self.from_decode = Moved()
        self.came: set[int] = set()
        self.fallback = ""
        self.carrier = ""
        self._reader = reader
        self._peers = peers
        self._run = run
        self._meets = run.request.order is Order.MEET
        self._asked = {leg: leg.last_block for leg in run.request.legs if leg.source is Source.STORAGE_TO_DECODE}
        self._batches = {leg: self._claims(leg) for leg in run.request.legs}
        self._rescues: asyncio.TaskGroup | None = None

    @property
    def pull_from(self) -> tuple[int, ...]:
        return tuple(self._asked.values())

    async def load(self) -> None:
        """Runs the loaders to their end. Raises nothing for what can't be loaded."""
        async with asyncio.TaskGroup() as self._rescues:
            for leg in self._run.request.legs:
                work = self._pull_storage if leg.source is Source.STORAGE_TO_PREFILL else self._read_peer
                missing = sum(block not in self._run.slots.held for block in range(leg.first_block, leg.last_block))
                if missing:
                    self._rescues.create_task(work(self._batches[leg], missing))

    def _claims(self, leg: Leg) -> Batches:
        """The leg's blocks, as their loader may claim them."""
        if not self._meets or leg.source is Source.RESIDENT:
            return in_order(self._run.ledger.claim_leg(leg))

        def claimed(blocks: range) -> None:
            if leg in self._asked:
                self._asked[leg] = blocks.start
                self._run.tell()

        return from_back(self._run.ledger, leg, claimed)

    async def _pull_storage(self, batches: Batches, blocks: int) -> None:
        request = self._run.request
        assert request.stored is not None, "a leg from storage without a lease on it"
        loaded = await self._reader.pull(
            Pull(request.stored, self._run.slots.all, batches, blocks, self._stored, self.from_storage, request.deadline_s)
        )
        self.carrier = self.carrier or loaded.carrier
        if loaded.failure:
            self._note(f"storage: {loaded.failure}")

    def _stored(self, came: Sequence[int], failed: Sequence[int]) -> None:
        if came:
            self.came.update(came)
            self._run.landed(came, self._run.ledger.layers)
            if not self._reader.free:
                self._run.handoff.ready(came, self._run.ledger.layers)
        if failed:
            self._run.lost(failed)

    async def _read_peer(self, batches: Batches, blocks: int) -> None:
        run = self._run
        await self._peers.pull(
            PeerPull(
                run.request.stage, run.slots.all, batches, blocks, self._not_there, self._read, self.from_decode, run.request.deadline_s
            )
        )  # fmt: skip

    def _read(self, blocks: Sequence[int], layers: int) -> None:
        if layers == self._run.ledger.layers:
            self.came.update(blocks)
        self._run.landed(blocks, layers)

    def _not_there(self, blocks: Sequence[int]) -> None:
        """Decode can't give them."""
        self._note(f"decode: block {min(blocks)} is not to be had there")
        stored = self._run.request.stored
        there = [block for block in blocks if stored is not None and block < stored.blocks]
        if len(there) < len(blocks):
            self._run.lost([block for block in blocks if block not in there])
        if there:
            assert self._rescues is not None
            self._rescues.create_task(self._pull_storage(in_order(there), len(there)))

    def _note(self, reason: str) -> None:
        self.fallback = "; ".join(filter(None, (self.fallback, reason)))
