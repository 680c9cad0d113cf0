"""Penstock's kvstore as a real service: its process owns the disk, this one asks over gRPC and gets the
bytes in its stage over the byte plane.

`put` reserves a chain and writes it; a write is answered when it is durable. `get` looks the chain up
once and then reads block by block, each awaited before the next; `batched_get` reads all in one call.
All times include the lookup or the reservation, and end when the bytes are there, or durable. The lease goes back after that, as
a worker's does (and as what the peers' gets return is given back).
"""

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop

from common.blocks import Namespace
from common.clients.kvstore import KvStoreClient
from common.process import PARENT_VARIABLE
from common.storage import Admission, BlockMeta
from common.transport.interface import Part, PartStatus, Span
from common.transport.pool import TransportPool
from common.transport.region import Region
from loadtest.peers.worker import Got, Put, Shape, serve

NAMESPACE = Namespace("70" * 32)
DEADLINE_S = 60.0
LEASE_S = 120.0
BUDGET_BYTES = 64 << 30


class PenstockKvStore:
    """A kvstore process and one connection to it."""

    def __init__(self, folder: Path, shape: Shape, flags: list[str]) -> None:
        self._shape = shape
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._carrier = ""  # that the last read came by
        self._region = Region(shape.blocks * shape.block_bytes)
        argv = ["--data", str(folder), "--run-dir", str(folder), "--budget-bytes", str(BUDGET_BYTES), *flags]
        environ = os.environ | {PARENT_VARIABLE: str(os.getpid())}  # it ends when we do
        self._service = subprocess.Popen(
            [sys.executable, "-m", "services.kvstore", *argv], stderr=subprocess.PIPE, text=True, env=environ
        )
        try:
            self._runner.run(self._connect(self._address()))
        except BaseException:
            self._service.kill()
            raise

    def _address(self) -> str:
        """From its log, the rest of which goes to our stderr."""
        log = self._service.stderr
        assert log is not None
        for line in log:
            sys.stderr.write(line)
            event = json.loads(line)
            if event["event"] == "ready":
                threading.Thread(target=shutil.copyfileobj, args=(log, sys.stderr), daemon=True).start()
                return str(event["grpc"])
        raise RuntimeError("the kvstore ended before it was ready")

    async def _connect(self, address: str) -> None:
        self._client = KvStoreClient(address, deadline_s=DEADLINE_S)
        self._transports = TransportPool(self._region)  # as a worker has

    @property
    def how(self) -> str:
        return self._carrier

    def forget(self) -> None:
        self._region.view(Span(0, self._region.size))[:] = bytes(self._region.size)

    def put(self, round_: int, blocks: Sequence[bytes]) -> Put:
        for i, block in enumerate(blocks):
            self._region.view(self._span(i))[:] = block
        return self._runner.run(self._put(round_))

    async def _put(self, round_: int) -> Put:
        keys = self._chain(round_)
        began_s = time.perf_counter()
        metas = [BlockMeta(key, parent, self._shape.block_bytes) for parent, key in zip([b"\0" * 32, *keys], keys, strict=False)]
        reserved = await self._client.reserve(NAMESPACE, metas, LEASE_S)
        wanted = [i for i, admission in enumerate(reserved.admissions) if admission is Admission.ACCEPTED]
        transport = self._transports.transport(reserved.endpoint)
        statuses = await transport.write(
            reserved.token, [self._part(i) for i in wanted], [self._span(i) for i in wanted], deadline_s=DEADLINE_S
        )
        seconds = time.perf_counter() - began_s
        await self._client.release(reserved.token)
        return Put([i for i, status in zip(wanted, statuses, strict=True) if status is PartStatus.OK], seconds, seconds, seconds)

    def get(self, round_: int, indices: Sequence[int]) -> Got:
        return self._runner.run(self._get(round_, [[i] for i in indices]))

    def batched_get(self, round_: int, indices: Sequence[int]) -> Got:
        return self._runner.run(self._get(round_, [list(indices)]))

    async def _get(self, round_: int, pieces: list[list[int]]) -> Got:
        """Reads piece after piece."""
        keys = self._chain(round_)
        indices = [i for piece in pieces for i in piece]
        began_s = time.perf_counter()
        found = await self._client.lookup(NAMESPACE, keys, LEASE_S)
        if found is None:
            return Got(time.perf_counter() - began_s, [None for _ in indices])
        transport = self._transports.transport(found.endpoint)
        statuses: list[PartStatus] = []
        for piece in pieces:
            parts, spans = [self._part(i) for i in piece], [self._span(i) for i in piece]
            statuses += await transport.read(found.token, parts, spans, deadline_s=DEADLINE_S)
        seconds = time.perf_counter() - began_s
        await self._client.release(found.token)
        self._carrier = transport.carrier
        views = zip(indices, statuses, strict=True)
        return Got(seconds, [self._region.view(self._span(i)) if status is PartStatus.OK else None for i, status in views])

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.run(self._transports.close())
        self._service.terminate()
        self._service.wait()

    def _chain(self, round_: int) -> list[bytes]:
        return [hashlib.sha256(f"{round_}/{i}".encode()).digest() for i in range(self._shape.blocks)]

    def _part(self, index: int) -> Part:
        return Part(index, 0, self._shape.block_bytes)

    def _span(self, index: int) -> Span:
        return Span(index * self._shape.block_bytes, self._shape.block_bytes)


if __name__ == "__main__":
    serve(PenstockKvStore)
