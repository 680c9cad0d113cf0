"""Writes filled blocks to the reservoir in the background, never on the token path.

A `Chain` follows one sequence:

1. `offer` says how many leading tokens are computed; newly full blocks go into a bounded lane.
2. The lane asks the chain's kvstores which of them they want, encodes those out of the pool into a few stage
   slots kept for this, and sends them, parents first.
3. A full lane, a refusal, values that the codec can't store or any failure drops the rest of that chain: a block without its parent
   would never be found.
4. When the sequence is over and nothing of it is pending, its pool blocks are released.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import islice

import msgspec

from common.blocks import BlockKey, ChainRoot, Namespace, chain_root, extend_keys
from common.clients.kvstore import Admission, BlockMeta, Reservation
from common.errors import PenstockError
from common.logs import Log
from common.storage import NO_TERMS, Terms
from common.transport.interface import Part, PartStatus
from common.transport.pool import TransportPool
from services.worker.codec import Codec
from services.worker.engine.engine import Engine
from services.worker.engine.loop import EngineLoop
from services.worker.loading import KvStores
from services.worker.slots import SlotPool
from services.worker.stage import Stage

log = Log("writeback")
WRITE_DEADLINE_S = 10.0
SEND_DEADLINE_S = 6.0  # shorter: one kvstore that hangs must not take the others' copies with it


class Chain:
    """The blocks of one sequence on their way to its kvstores, out of the engine's pool or out of `staged` slots.

    Invariant: `done <= offered <= full blocks of tokens`; blocks `[0, done)` are stored or given up.
    A kvstore that lacks one of them gets no more of this chain: they would never be found there.
    """

    def __init__(
        self, sequence_id: str, kvstores: Sequence[str], root: ChainRoot, tokens: list[int], stored_blocks: int, let_go: Callable[[], None],
        staged: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.sequence_id = sequence_id
        self.let_go = let_go  # called once, when the sequence is over and nothing of it is pending
        self.staged = staged  # stage slots that hold the blocks, of a sequence that never entered the engine
        self.kvstores = list(kvstores)  # that hold all of [0, done), the chain's own one first
        self.lane = next(iter(kvstores), "")
        self.tokens = tokens  # prompt and output; the request appends to it
        self.offered = stored_blocks
        self.done = stored_blocks
        self.dropped = not kvstores
        self.over = False
        self.root = root
        self._keys: list[BlockKey] = []

    def keys(self, blocks: int, block_tokens: int) -> list[BlockKey]:
        """Keys of the leading `blocks` blocks, computed once each."""
        have = len(self._keys)
        if blocks > have:
            parent = self._keys[-1] if have else self.root
            tail = self.tokens[have * block_tokens : blocks * block_tokens]
            self._keys += islice(extend_keys(parent, tail, block_tokens), blocks - have)
        return self._keys[:blocks]

    def parent_of(self, block: int) -> bytes:
        return self._keys[block - 1] if block else self.root

    @property
    def pending(self) -> bool:
        return not self.dropped and self.done < self.offered


class Writer:
    """Sends filled blocks to the kvstores, one lane for the chains that have the same one first.

    At most `pending_max` blocks wait at a time: they may be all that a finished sequence still holds of the pool.
    """

    def __init__(
        self, engine: EngineLoop[Engine], stage: Stage, slots: SlotPool, transports: TransportPool, stores: KvStores,
        codec: Codec, namespace: Namespace, block_tokens: int, pending_max: int,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._stage = stage
        self._slots = slots
        self._transports = transports
        self._stores = stores
        self._codec = codec
        self._namespace = namespace
        self._nobodys_root = chain_root(namespace)  # any other root tells of a tenant's salt or an adapter
        self._block_tokens = block_tokens
        self._pending_max = pending_max
        self._lanes: dict[str, _Lane] = {}
        self.written_blocks = 0
        self.written_bytes = 0
        self.dropped_blocks = 0

    @property
    def pending_blocks(self) -> int:
        return sum(lane.blocks for lane in self._lanes.values())

    def offer(self, chain: Chain, computed_tokens: int) -> None:
        """Queues the blocks of `chain` that became full; drops the chain when its lane is full."""
        full = min(computed_tokens, len(chain.tokens)) // self._block_tokens
        if chain.dropped or full <= chain.offered:
            return
        lane = self._lane(chain.lane)
        if self.pending_blocks + full - chain.offered > self._pending_max:
            self._drop(chain, "queue full")
            return
        lane.blocks += full - chain.offered
        chain.offered = full
        lane.put(chain)

    def preempted(self, chain: Chain) -> None:
        """The pool lost the sequence's blocks; those not written yet are offered again when recomputed."""
        if not chain.dropped:
            self._lane(chain.lane).blocks -= chain.offered - chain.done
            chain.offered = chain.done

    def finish(self, chain: Chain) -> None:
        """The sequence is over: its pool blocks go as soon as nothing of it is pending."""
        chain.over = True
        if not chain.pending:
            chain.let_go()

    def abandon(self, chain: Chain) -> None:
        """The engine has dropped the sequence: what is pending of it can't be written any more."""
        if chain.pending:
            self._drop(chain, "sequence ended early")
        chain.dropped = True

    def shed(self) -> None:
        """Drops what finished sequences still have pending: live ones need the pool."""
        for lane in self._lanes.values():
            for chain in lane.chains():
                if chain.over and chain.pending:
                    self._drop(chain, "pool full")

    async def drained(self, deadline_s: float) -> None:
        """Waits until nothing is pending, at most `deadline_s`."""
        try:
            async with asyncio.timeout(deadline_s):
                for lane in self._lanes.values():
                    await lane.idle.wait()
        except TimeoutError:
            log.warning("writes_abandoned", blocks=self.pending_blocks)

    async def close(self) -> None:
        for lane in self._lanes.values():
            lane.task.cancel()
        await asyncio.gather(*(lane.task for lane in self._lanes.values()), return_exceptions=True)

    def _lane(self, address: str) -> "_Lane":
        if address not in self._lanes:
            self._lanes[address] = _Lane(self._write_pending)
        return self._lanes[address]

    def _drop(self, chain: Chain, reason: str) -> None:
        lost = chain.offered - chain.done
        self._lane(chain.lane).blocks -= lost
        self.dropped_blocks += lost
        chain.dropped = True
        log.debug("blocks_dropped", sequence=chain.sequence_id, blocks=lost, reason=reason)
        if chain.over:
            chain.let_go()

    async def _write_pending(self, chain: Chain) -> None:
        """Writes what `chain` has pending, a batch at a time."""
        while chain.pending:
            first, last = chain.done, min(chain.done + self._slots.size, chain.offered)
            try:
                async with asyncio.timeout(WRITE_DEADLINE_S):
                    written = await self._write(chain, first, last)
            except (PenstockError, TimeoutError) as error:
                log.warning("write_failed", kvstores=chain.kvstores, reason=str(error) or "deadline")
                written = False
            if chain.dropped or chain.offered < last:
                continue  # shed or preempted meanwhile
            if not written:
                self._drop(chain, "not accepted")
                return
            chain.done = last
            self._lane(chain.lane).blocks -= last - first
            if chain.over and not chain.pending:
                chain.let_go()

    async def _write(self, chain: Chain, first: int, last: int) -> bool:
        """Whether blocks `[first, last)` are stored now, in one kvstore at least."""
        keys = chain.keys(last, self._block_tokens)
        size = self._codec.bytes_per_block
        metas = [BlockMeta(keys[block], chain.parent_of(block), size) for block in range(first, last)]
        terms = NO_TERMS if chain.root == self._nobodys_root else Terms(tenant=chain.root)
        copies = await asyncio.gather(*(self._reserve(kvstore, metas, terms) for kvstore in chain.kvstores))
        wanted = sorted({i for copy in copies for i in copy.wanted})
        try:
            if wanted:
                async with self._slots.lend(len(wanted)) as slots:
                    await self._encode(chain, [first + i for i in wanted], [self._stage.view(slot, 0, size) for slot in slots])
                    place = dict(zip(wanted, slots, strict=True))
                    await asyncio.gather(*(self._send(copy, place) for copy in copies if copy.wanted))
        finally:
            await asyncio.gather(*(self._release(copy) for copy in copies))
        chain.kvstores = [copy.kvstore for copy in copies if copy.complete]
        return bool(chain.kvstores)

    async def _reserve(self, kvstore: str, metas: Sequence[BlockMeta], terms: Terms) -> "_Copy":
        try:
            reservation = await self._stores.at(kvstore).reserve(self._namespace, metas, WRITE_DEADLINE_S, terms=terms)
        except PenstockError as error:
            log.warning("reserve_failed", kvstore=kvstore, reason=error.message)
            return _Copy(kvstore, None, [], complete=False)
        held = {Admission.ACCEPTED, Admission.PRESENT, Admission.IN_FLIGHT}
        wanted = [i for i, admission in enumerate(reservation.admissions) if admission is Admission.ACCEPTED]
        return _Copy(kvstore, reservation, wanted, complete=all(admission in held for admission in reservation.admissions))

    async def _release(self, copy: "_Copy") -> None:
        if copy.reservation is not None and copy.reservation.token:
            with contextlib.suppress(PenstockError):  # it ends with its time
                await self._stores.at(copy.kvstore).release(copy.reservation.token)

    async def _encode(self, chain: Chain, blocks: Sequence[int], views: Sequence[memoryview]) -> None:
        if chain.staged:
            await self._encode_staged([chain.staged[block] for block in blocks], views)
        else:
            copies = list(zip(blocks, views, strict=True))
            await self._engine.call(lambda engine: _encode(engine, chain.sequence_id, copies))

    async def _encode_staged(self, staged: Sequence[int], views: Sequence[memoryview]) -> None:
        for slot, view in zip(staged, views, strict=True):
            self._codec.encode(self._stage.view(slot), view)
            await asyncio.sleep(0)  # let others in after each block

    async def _send(self, copy: "_Copy", place: Mapping[int, int]) -> None:
        """Sends what one kvstore wants; `place[i]` is the slot of item i. What fails makes the copy incomplete."""
        assert copy.reservation is not None
        size = self._codec.bytes_per_block
        parts = [Part(item, 0, size) for item in copy.wanted]
        spans = [self._stage.span(place[item], 0, size) for item in copy.wanted]
        try:
            transport = self._transports.transport(copy.reservation.endpoint)
            statuses = await transport.write(copy.reservation.token, parts, spans, deadline_s=SEND_DEADLINE_S)
        except PenstockError as error:
            log.warning("write_failed", kvstore=copy.kvstore, reason=error.message)
            statuses = []
        stored = sum(status is PartStatus.OK for status in statuses)
        self.written_blocks += stored
        self.written_bytes += stored * size
        copy.complete = copy.complete and stored == len(copy.wanted)


class _Copy(msgspec.Struct):
    """One kvstore's part in a batch: which blocks it wants, and whether it has all of them."""

    kvstore: str
    reservation: Reservation | None
    wanted: list[int]
    complete: bool


def _encode(engine: Engine, sequence_id: str, copies: Sequence[tuple[int, memoryview]]) -> None:
    """On the engine's thread: single blocks into the views, as they are stored."""
    for block, view in copies:
        engine.encode(sequence_id, block, view)


class _Lane:
    """The chains that have something to write to one kvstore, and the task that works on them.

    `blocks` counts what is offered and not done, over all of them.
    """

    def __init__(self, work: Callable[[Chain], Awaitable[None]]) -> None:
        self.blocks = 0
        self._work = work
        self._waiting: deque[Chain] = deque()
        self._current: Chain | None = None
        self._wake = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()
        self.task = asyncio.create_task(self._run())

    def put(self, chain: Chain) -> None:
        """Queues a chain; one that is queued already stays where it is."""
        if chain is not self._current and chain not in self._waiting:
            self._waiting.append(chain)
            self.idle.clear()
            self._wake.set()

    def chains(self) -> list[Chain]:
        return [*([self._current] if self._current else []), *self._waiting]

    async def _run(self) -> None:
        while True:
            while not self._waiting:
                self.idle.set()
                self._wake.clear()
                await self._wake.wait()
            self._current = self._waiting.popleft()
            try:
                await self._work(self._current)
            except Exception:
                log.exception("lane_failed", sequence=self._current.sequence_id)
            finally:
                self._current = None
