"""Writers and readers of a store that is about to be killed, and the check of what it has kept."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from common.blocks import Namespace
from common.clients.kvstore import KvStoreClient
from common.storage import Admission, BlockMeta
from common.transport.client import connect
from common.transport.connection import Connection
from common.transport.interface import Endpoint, LeaseToken, Part, PartStatus, Span
from common.transport.region import Region
from loadtest.crash.ledger import BrokenPromise, Chain, Hold, Ledger, Promise, payload
from loadtest.crash.plan import Plan

NAMESPACE = Namespace("c4" * 32)
BLOCK_BYTES = 20_000  # not a whole page
BATCH_MAX = 6  # blocks of one write
CHAIN_MAX = 12
WRITERS, READERS = 3, 2
HELD_BLOCKS_MAX = 100  # a third of what the budget holds: the rest is evicted and written over
RELEASED_CHECKED = 20  # chains without a lease that are read after a restart
LEASE_S = 600.0
DEADLINE_S = 60.0


class Traffic:
    """The clients of one life. Each job has a connection and memory of its own, and ends only by an error.

    `dying` is set before the store is killed: from then on transfers may fail. Wrong bytes are wrong even then.
    """

    def __init__(self, client: KvStoreClient, ledger: Ledger, choice: random.Random, plan: Plan, counts: Counter[str]) -> None:
        self.dying = False
        self._client = client
        self._ledger = ledger
        self._choice = choice
        self._plan = plan
        self._counts = counts
        self._ports: list[Port] = []

    def jobs(self) -> list[Callable[[], Coroutine[Any, Any, None]]]:
        return [*[self._write] * WRITERS, *[self._read] * READERS]

    async def close(self) -> None:
        for port in self._ports:
            await port.close()

    # After a start

    async def check(self) -> None:
        """All that is promised is there, and leased again; what else is found is right."""
        port = self._port()
        for chain in self._ledger.held():
            chain.tokens.clear()
            if chain.committed:
                chain.tokens.append(await self._read_chain(port, chain))
            self._counts["checked_blocks"] += chain.committed
        for chain in self._ledger.some_released(RELEASED_CHECKED):
            await self._read_found(port, chain.keys[: chain.committed])
        for key in self._ledger.doubtful:
            await self._read_found(port, [key])
        self._ledger.doubtful.clear()

    async def _read_chain(self, port: "Port", chain: Chain) -> LeaseToken:
        """Reads a held chain whole; the lease that it was read under."""
        committed = chain.committed
        found = await self._client.lookup(NAMESPACE, chain.keys[:committed], LEASE_S)
        blocks = found.blocks if found is not None else 0
        if found is None or blocks < committed:
            where = f"{chain.name}: {committed} blocks were committed and leased, {blocks} are there"
            raise BrokenPromise(Promise.COMMITTED_STAYS, where)
        statuses = await port.read(found.endpoint, found.token, chain.keys[:committed])
        if set(statuses) != {PartStatus.OK} and not self.dying:
            where = f"{chain.name}: committed and leased blocks came as {[status.name for status in statuses]}"
            raise BrokenPromise(Promise.COMMITTED_STAYS, where)
        return found.token

    # Under load

    async def _write(self) -> None:
        port = self._port()
        while True:
            chain = self._ledger.start()
            for _ in range(CHAIN_MAX // BATCH_MAX):
                await self._extend(port, chain, self._choice.randint(1, BATCH_MAX))
            await self._make_room()

    async def _extend(self, port: "Port", chain: Chain, blocks: int) -> None:
        keys = chain.grow(self._plan.seed, blocks)
        parents = [chain.parent(), *keys[:-1]]
        self._ledger.doubtful += keys
        metas = [BlockMeta(key, parent, BLOCK_BYTES) for key, parent in zip(keys, parents, strict=True)]
        reserved = await self._client.reserve(NAMESPACE, metas, LEASE_S)
        accepted = 0
        while accepted < len(keys) and reserved.admissions[accepted] is Admission.ACCEPTED:
            accepted += 1
        if not accepted:
            return
        chain.tokens.append(reserved.token)
        statuses = await port.write(reserved.endpoint, reserved.token, keys[:accepted])
        for status in statuses:
            if status is not PartStatus.OK:
                break
            chain.committed += 1
            self._counts["committed_blocks"] += 1

    async def _make_room(self) -> None:
        """Lets the oldest chains go, so that they may be evicted."""
        held = self._ledger.held()
        while self._ledger.held_blocks > HELD_BLOCKS_MAX:
            chain = held.pop(0)
            chain.hold = Hold.RELEASED
            for token in chain.tokens:
                await self._client.release(token)
            chain.tokens.clear()

    async def _read(self) -> None:
        port = self._port()
        while True:
            chain = self._ledger.any_chain()
            if chain is None:
                await asyncio.sleep(0)
                continue
            if chain.hold is Hold.HELD and chain.tokens:
                await self._read_held(port, chain)
            else:
                await self._read_found(port, chain.keys[: chain.committed])
            self._counts["reads"] += 1

    async def _read_held(self, port: "Port", chain: Chain) -> None:
        try:
            await self._client.release(await self._read_chain(port, chain))
        except BrokenPromise as broken:
            if broken.promise is Promise.RIGHT_BYTES or chain.hold is Hold.HELD:
                raise  # else it was released meanwhile

    async def _read_found(self, port: "Port", keys: Sequence[bytes]) -> None:
        """Reads what is there of blocks that need not be there."""
        found = await self._client.lookup(NAMESPACE, keys, LEASE_S)
        if found is not None:
            await port.read(found.endpoint, found.token, keys[: found.blocks])
            await self._client.release(found.token)

    def _port(self) -> "Port":
        port = Port(self._plan.carrier)
        self._ports.append(port)
        return port


class Port:
    """Memory of one client, and its connection to the byte plane."""

    def __init__(self, carrier: str) -> None:
        self._carrier = carrier
        self._region = Region(CHAIN_MAX * BLOCK_BYTES)
        self._transport: Connection | None = None

    async def write(self, endpoint: Endpoint, token: LeaseToken, keys: Sequence[bytes]) -> list[PartStatus]:
        for i, key in enumerate(keys):
            self._region.view(_span(i))[:] = payload(key, BLOCK_BYTES)
        transport = await self._open(endpoint)
        return await transport.write(token, _parts(len(keys)), [_span(i) for i in range(len(keys))], deadline_s=DEADLINE_S)

    async def read(self, endpoint: Endpoint, token: LeaseToken, keys: Sequence[bytes]) -> list[PartStatus]:
        """Reads blocks and checks every byte. Raises `BrokenPromise` for wrong bytes and for corrupt blocks."""
        transport = await self._open(endpoint)
        spans = [_span(i) for i in range(len(keys))]
        statuses = await transport.read(token, _parts(len(keys)), spans, deadline_s=DEADLINE_S)
        for key, status, span in zip(keys, statuses, spans, strict=True):
            if status is PartStatus.CORRUPT:
                raise BrokenPromise(Promise.COMMITTED_STAYS, f"block {key.hex()} is corrupt: it must be whole or a miss")
            if status is PartStatus.OK and self._region.view(span) != payload(key, BLOCK_BYTES):
                raise BrokenPromise(Promise.RIGHT_BYTES, f"block {key.hex()}")
        return statuses

    async def close(self) -> None:
        if self._transport is not None:
            await self._transport.close()
        self._region.close()

    async def _open(self, endpoint: Endpoint) -> Connection:
        if self._transport is None:
            self._transport = await connect(Endpoint(**{self._carrier: getattr(endpoint, self._carrier)}), self._region)
        return self._transport


def _parts(count: int) -> list[Part]:
    return [Part(i, 0, BLOCK_BYTES) for i in range(count)]


def _span(index: int) -> Span:
    return Span(index * BLOCK_BYTES, BLOCK_BYTES)
