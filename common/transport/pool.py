"""Transports to many peers: connected when first used, replaced when they break, bounded in number.

A peer's trouble is its own: its parts come back FAILED or EXPIRED, nobody else waits for it.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from common.disk.buffers import BufferPool
from common.disk.engine import Engine, Machine, open_engine
from common.errors import Unavailable
from common.transport.client import Prefer, connect
from common.transport.connection import Connection
from common.transport.counters import Counters
from common.transport.extents import ExtentTransport
from common.transport.frames import Offers, Op
from common.transport.interface import Endpoint, LeaseToken, Part, PartStatus, Span
from common.transport.region import Region

log = logging.getLogger(__name__)
DISK_READS = 32
DISK_READS_PENDING_MAX = 65_536
DISK_BUFFER_BYTES = 128 << 20  # for reads of extents on their way into a region; more wait
PoolPrefer = Prefer | Literal["extent"]


class TransportPool:
    """One per process and region. `transport(endpoint)` never waits and never fails; `close` when done."""

    def __init__(
        self,
        region: Region,
        *,
        prefer: PoolPrefer = "auto",
        connect_s: float = 5.0,
        connections_per_peer: int = 1,
        peers_max: int = 256,
        disk_reads: int = DISK_READS,
    ) -> None:
        """`disk_reads`: at once, of extents."""
        self._region, self._prefer, self._connect_s = region, prefer, connect_s
        self._connections_per_peer, self._peers_max = connections_per_peer, peers_max
        self._peers: OrderedDict[Endpoint, PeerTransport] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False
        self._disk_reads = disk_reads
        self._disk: Engine | None = None  # for extents, made when first offered some
        self._disk_buffers = None if region.huge else BufferPool(DISK_BUFFER_BYTES)

    def transport(self, endpoint: Endpoint) -> "PeerTransport":
        """The peer's transport. Keep it as long as you like: a dropped connection is made anew when next used."""
        peer = self._peers.get(endpoint)
        if peer is None:
            peer = self._peers[endpoint] = PeerTransport(self, endpoint)
        self._peers.move_to_end(endpoint)
        for old in [old for old in self._peers.values() if old.idle][: max(0, len(self._peers) - self._peers_max)]:
            if old is not peer:
                del self._peers[old.endpoint]
                self._close_later(old)
        return peer

    async def close(self) -> None:
        """Ends all connections. Idempotent."""
        self._closed = True
        for peer in list(self._peers.values()):
            self._close_later(peer)
        self._peers.clear()
        while self._closing:
            await asyncio.wait(self._closing)
        if self._disk is not None:
            await asyncio.to_thread(self._disk.close)

    def _close_later(self, peer: "PeerTransport") -> None:
        task = asyncio.get_running_loop().create_task(peer.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def open(self, endpoint: Endpoint) -> "PooledTransport":
        """A new connection; one that offers extents is read by them, unless shm was asked for. Raises `Unavailable`."""
        if self._closed:
            raise Unavailable("byte plane: the transport pool is closed")
        prefer = "shm" if self._prefer == "extent" else self._prefer
        connection = await connect(endpoint, self._region, prefer=prefer, timeout_s=self._connect_s)
        if self._prefer not in ("auto", "extent") or not connection.offers & Offers.EXTENTS:
            return connection
        if self._disk is None:
            self._disk = open_engine(
                Machine(), "auto", label="extents", depth=self._disk_reads, pending_max=DISK_READS_PENDING_MAX
            )
        return ExtentTransport(connection, self._region, self._disk, self._disk_buffers)

    @property
    def connections_per_peer(self) -> int:
        return self._connections_per_peer

    def __repr__(self) -> str:
        return f"TransportPool({list(self._peers.values())})"


PooledTransport = Connection | ExtentTransport


class PeerTransport:
    """A `Transport` that connects by itself."""

    def __init__(self, pool: TransportPool, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.carrier = ""  # of the newest transfer; empty before the first
        self.counters = Counters()
        self.last_error = ""  # why the last attempt to connect failed
        self._pool = pool
        self._connections: list[PooledTransport] = []
        self._connecting = asyncio.Lock()
        self._users = 0

    @property
    def idle(self) -> bool:
        return not self._users

    async def read(
        self, token: LeaseToken, parts: Sequence[Part], into: Sequence[Span], *, deadline_s: float
    ) -> list[PartStatus]:
        return await self._transfer(Op.READ, token, parts, into, deadline_s)

    async def write(
        self, token: LeaseToken, parts: Sequence[Part], source: Sequence[Span], *, deadline_s: float
    ) -> list[PartStatus]:
        return await self._transfer(Op.WRITE, token, parts, source, deadline_s)

    async def close(self) -> None:
        """Closes its connections; a later transfer opens new ones."""
        connections, self._connections = self._connections, []
        for connection in connections:
            await connection.close()

    async def _transfer(
        self, op: Op, token: LeaseToken, parts: Sequence[Part], spans: Sequence[Span], deadline_s: float
    ) -> list[PartStatus]:
        clock = asyncio.get_running_loop().time
        deadline = clock() + deadline_s
        flow = self.counters.read if op is Op.READ else self.counters.write
        self._users += 1
        try:
            async with asyncio.timeout_at(deadline):
                connection = await self._connection()
            transfer = connection.read if op is Op.READ else connection.write
            with flow.transfer():
                statuses = await transfer(token, parts, spans, deadline_s=deadline - clock())
            self.carrier = connection.carrier
        except TimeoutError:
            statuses = [PartStatus.EXPIRED] * len(parts)
        except Unavailable as error:
            if error.message != self.last_error:
                log.warning("%s", error.message)
            self.last_error = error.message
            statuses = [PartStatus.FAILED] * len(parts)
        finally:
            self._users -= 1
        flow.count(statuses, [part.length for part in parts])
        return statuses

    async def _connection(self) -> PooledTransport:
        """The least loaded usable connection; a new one while there are fewer than allowed and all are in use."""
        best = self._best()
        if best is not None:
            return best
        async with self._connecting:
            best = self._best()
            if best is not None:
                return best
            await self._bury()
            connection = await self._pool.open(self.endpoint)
            self._connections.append(connection)
            self.last_error = ""
            return connection

    def _best(self) -> PooledTransport | None:
        usable = [connection for connection in self._connections if connection.usable]
        best = min(usable, key=lambda connection: connection.in_flight_bytes, default=None)
        if best is not None and (not best.in_flight_bytes or len(usable) >= self._pool.connections_per_peer):
            return best
        return None

    async def _bury(self) -> None:
        """Closes connections that take no more requests and have none left."""
        for connection in [
            connection for connection in self._connections if not connection.usable and not connection.in_flight_bytes
        ]:
            self._connections.remove(connection)
            await connection.close()

    def __repr__(self) -> str:
        return f"PeerTransport({self.endpoint}, {self._connections}, last_error={self.last_error!r})"
