"""The kvstore as a service: another process owns the disk, this one asks over gRPC and gets blocks in its stage.

Reads are as a worker makes them: READS_IN_FLIGHT requests of `blocks_per_read`. The disk, whoever reads it, has at most
`depth` blocks at once; the others wait. Latencies are of a request. CPU seconds are of both processes.
"""

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.blocks import Namespace
from common.clients.kvstore import KvStoreClient, StoredPrefix
from common.storage import BlockMeta
from common.transport.interface import LeaseToken, Part, PartStatus, Span
from common.transport.pool import PeerTransport, PoolPrefer, TransportPool
from common.transport.region import Region
from loadtest.store.blocks import Blocks, keys
from loadtest.store.fio import BATCH_BYTES, READS_IN_FLIGHT, Sample, blocks_per_read, requests_in_flight
from loadtest.store.slices import Slice

CARRIERS: tuple[PoolPrefer, ...] = ("extent", "shm", "tcp")
DEADLINE_S = 60.0
LEASE_S = 600.0


class Service:
    """A kvstore process, and one way to it per carrier."""

    def __init__(self, process: asyncio.subprocess.Process, address: str, region_bytes: int, depth: int) -> None:
        self.client = KvStoreClient(address, deadline_s=DEADLINE_S)
        self._process = process
        self._region = Region(region_bytes)
        self._pools = {carrier: TransportPool(self._region, prefer=carrier, disk_reads=depth) for carrier in CARRIERS}

    @classmethod
    async def start(cls, folder: Path, region_bytes: int, budget_bytes: int, io: str, depth: int) -> "Service":
        """`depth`: reads at the disk at once."""
        flags = ["--data", str(folder), "--run-dir", str(folder), "--budget-bytes", str(budget_bytes), "--io", io]
        flags += ["--read-depth", str(depth)]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.kvstore", *flags, stderr=asyncio.subprocess.PIPE
        )
        assert process.stderr is not None
        while line := await process.stderr.readline():
            event = json.loads(line)
            if event["event"] == "ready":
                return cls(process, event["grpc"], region_bytes, depth)
        raise SystemExit(f"the kvstore ended with status {await process.wait()}")

    async def fill(self, namespace: Namespace, blocks: Blocks, count: int) -> StoredPrefix:
        """Writes a chain; its lease."""
        size = blocks.block_bytes
        chain = blocks.chain(count)
        step = max(1, BATCH_BYTES // size)
        for i in range(min(step, count)):
            self._region.view(Span(i * size, size))[:] = blocks.payload
        for first in range(0, count, step):
            await self._write(namespace, chain[first : first + step], size)
        stored = await self.client.lookup(namespace, keys(chain), LEASE_S)
        assert stored is not None and stored.blocks == count, stored
        return stored

    async def _write(self, namespace: Namespace, batch: Sequence[BlockMeta], size: int) -> None:
        """Of the region's first blocks, which all hold the same bytes."""
        reservation = await self.client.reserve(namespace, batch, LEASE_S)
        transport = self._pools["shm"].transport(reservation.endpoint)
        parts = [Part(i, 0, size) for i in range(len(batch))]
        spans = [Span(i * size, size) for i in range(len(batch))]
        statuses = await transport.write(reservation.token, parts, spans, deadline_s=DEADLINE_S)
        assert set(statuses) == {PartStatus.OK}, statuses
        await self.client.release(reservation.token)

    async def write(self, namespace: Namespace, blocks: Blocks, depth: int, ramp_s: float, seconds: float) -> Sample:
        """Durable writes of new chains out of this process' memory; latencies are of requests of BATCH_BYTES."""
        size = blocks.block_bytes
        per_request = max(1, BATCH_BYTES // size)
        clock = Slice(ramp_s, seconds, self._cpu_s)
        for i in range(per_request):
            self._region.view(Span(i * size, size))[:] = blocks.payload

        async def write_on() -> None:
            while clock.running:
                began = time.perf_counter()
                await self._write(namespace, blocks.chain(per_request), size)
                clock.note(began, per_request * size)

        await asyncio.gather(*(write_on() for _ in range(requests_in_flight(size, depth))))
        return clock.sample()

    async def read(self, stored: StoredPrefix, carrier: PoolPrefer, block_bytes: int, ramp_s: float, seconds: float) -> Sample:
        transport = self._pools[carrier].transport(stored.endpoint)
        clock = Slice(ramp_s, seconds, self._cpu_s)
        blocks = blocks_per_read(block_bytes)

        async def read_on(number: int) -> None:
            spans = [Span((number * blocks + i) * block_bytes, block_bytes) for i in range(blocks)]
            while clock.running:
                began = time.perf_counter()
                await _read_once(transport, stored.token, stored.blocks, spans)
                clock.note(began, blocks * block_bytes)

        await asyncio.gather(*map(read_on, range(READS_IN_FLIGHT)))
        assert transport.carrier == carrier, f"read by {transport.carrier}, not by {carrier}"
        return clock.sample()

    async def close(self) -> None:
        for pool in self._pools.values():
            await pool.close()
        await self.client.close()
        self._process.terminate()
        await self._process.communicate()
        self._region.close()

    def _cpu_s(self) -> float:
        """Of both processes."""
        with open(f"/proc/{self._process.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") + time.process_time()


async def _read_once(transport: PeerTransport, token: LeaseToken, stored: int, spans: list[Span]) -> None:
    parts = [Part(random.randrange(stored), 0, span.length) for span in spans]
    statuses = await transport.read(token, parts, spans, deadline_s=DEADLINE_S)
    assert set(statuses) == {PartStatus.OK}, statuses
