"""Peers that follow a script, over real sockets and the real protocol.

`ScriptedDecode` answers every request with the token ids of its script: it knows nothing of models, and
stands in for a decode worker only where the router's own behaviour is under test.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

from common import rpc
from common.pb import kvstore_pb2 as kv
from common.pb import kvstore_pb2_grpc as kv_grpc
from common.pb import worker_pb2 as pb
from common.pb import worker_pb2_grpc as pb_grpc
from services.router.router import Router
from services.router.settings import RouterSettings

NAMESPACE = "ab" * 32
Script = Callable[[pb.Start], AsyncIterator[pb.SequenceStep]]


class ScriptedDecode(pb_grpc.DecodeServicer):
    """Emits `tokens` one a step, then finishes; tests replace `script` for anything else."""

    def __init__(self, id_: str, model: str = "tiny", namespace: str = NAMESPACE) -> None:
        self.id = id_
        self.model = model
        self.namespace = namespace
        self.epoch = os.urandom(16)
        self.address = ""
        self.tokens: tuple[int, ...] = (70, 71, 72)
        self.stop_token: int | None = None
        self.cached_tokens = 0
        self.resident_blocks = 0
        self.draining = False
        self.load = pb.Load(pool_blocks_total=64, pool_blocks_free=64)
        self.context_tokens = 512
        self.starts: list[pb.Start] = []
        self.started = asyncio.Event()
        self.cancelled: asyncio.Queue[str] = asyncio.Queue()
        self.script: Script = self.plain
        self.serves = 0
        self._server: rpc.Server | None = None
        self._calls: set[asyncio.Task[Any]] = set()

    async def plain(self, start: pb.Start) -> AsyncIterator[pb.SequenceStep]:
        """The script's tokens that aren't out yet, at most max_tokens."""
        done = len(start.output_ids)
        wanted = self.tokens[done : start.sampling.max_tokens]
        report = pb.Report(plan=start.route.plan, cached_tokens=self.cached_tokens)
        stops = self.stop_token is not None and done + len(wanted) == len(self.tokens)
        for position, id_ in enumerate(wanted):
            last = position == len(wanted) - 1
            logprobs: dict[str, Any] = {}
            if start.sampling.HasField("logprobs"):
                top = [pb.TopLogprob(id=id_ + i, logprob=-0.5 - i) for i in range(start.sampling.logprobs)]
                logprobs = {"logprob": -0.5, "top": top}
            yield pb.SequenceStep(
                tokens=[pb.Token(id=id_, **logprobs)],
                finish=("stop" if stops else "length") if last else "",
                stop_token=id_ + 1 if last and stops else 0,
                report=report if position == 0 or last else None,
            )

    async def Resident(self, request: pb.ResidentRequest, context: Any) -> pb.ResidentReply:
        return pb.ResidentReply(blocks=min(self.resident_blocks, len(request.keys)))

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.WorkerInfo:
        return pb.WorkerInfo(
            role="decode",
            id=self.id,
            epoch=self.epoch,
            model=self.model,
            namespace=self.namespace,
            block_tokens=16,
            bytes_per_block=1 << 16,
            context_tokens=self.context_tokens,
            vocab_size=400,
            draining=self.draining,
            load=self.load,
        )

    async def Serve(self, requests: AsyncIterator[pb.RouterMessage], context: Any) -> AsyncIterator[pb.StepBatch]:
        self.serves += 1
        out: asyncio.Queue[pb.StepBatch | None] = asyncio.Queue()
        live: dict[str, asyncio.Task[None]] = {}

        async def run(start: pb.Start) -> None:
            async for step in self.script(start):
                step.request_id = start.request_id
                out.put_nowait(pb.StepBatch(sequences=[step]))

        async def read() -> None:
            async for message in requests:
                if message.WhichOneof("kind") == "start":
                    self.starts.append(message.start)
                    self.started.set()
                    live[message.start.request_id] = asyncio.create_task(run(message.start))
                else:
                    self.cancelled.put_nowait(message.cancel.request_id)
                    live.pop(message.cancel.request_id).cancel()
            out.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (batch := await out.get()) is not None:
                yield batch
        finally:
            reader.cancel()
            for task in live.values():
                task.cancel()

    @asynccontextmanager
    async def running(self, port: int = 0) -> AsyncIterator["ScriptedDecode"]:
        await self.listen(port)
        try:
            yield self
        finally:
            await self.die()

    async def listen(self, port: int = 0) -> None:
        def register(server: grpc.aio.Server) -> None:
            pb_grpc.add_DecodeServicer_to_server(self, server)

        self._server = await rpc.serve("127.0.0.1", port, ("penstock.worker.v1.Decode",), register)
        self.address = self._server.address

    async def die(self) -> None:
        """Drops every connection at once, as a killed process does."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(0)

    async def come_back(self) -> None:
        """Listens on the same address as a new incarnation."""
        self.epoch = os.urandom(16)
        await self.listen(int(self.address.rpartition(":")[2]))


class ScriptedStore(kv_grpc.KvStoreServicer):
    """Says that the first `blocks` keys of any chain are stored, and keeps count of its leases."""

    def __init__(self, id_: str) -> None:
        self.id = id_
        self.address = ""
        self.blocks = 0
        self.hang = False
        self.gate: asyncio.Event | None = None  # if set, a lease is granted, and told of when it opens
        self.granted = asyncio.Event()
        self.lookups: list[kv.LookupRequest] = []
        self.leases: set[bytes] = set()
        self.renewed = asyncio.Event()
        self.released: asyncio.Queue[bytes] = asyncio.Queue()

    async def Describe(self, request: kv.DescribeRequest, context: Any) -> kv.StoreInfo:
        return kv.StoreInfo(id=self.id, epoch=b"e" * 16, budget_bytes=1 << 20)

    async def Lookup(self, request: kv.LookupRequest, context: Any) -> kv.LookupReply:
        self.lookups.append(request)
        if self.hang:
            await asyncio.Event().wait()
        blocks = min(self.blocks, len(request.keys))
        if not blocks:
            return kv.LookupReply()
        if not request.lease:
            return kv.LookupReply(blocks=blocks)
        token = os.urandom(16)
        self.leases.add(token)
        self.granted.set()
        if self.gate is not None:
            await self.gate.wait()
        return kv.LookupReply(blocks=blocks, token=token, ttl_ms=request.lease_ms, epoch=b"e" * 16)

    async def Renew(self, request: kv.RenewRequest, context: Any) -> kv.RenewReply:
        self.renewed.set()
        return kv.RenewReply(ttl_ms=request.lease_ms)

    async def Release(self, request: kv.ReleaseRequest, context: Any) -> kv.ReleaseReply:
        self.leases.discard(request.token)
        self.released.put_nowait(request.token)
        return kv.ReleaseReply()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["ScriptedStore"]:
        def register(server: grpc.aio.Server) -> None:
            kv_grpc.add_KvStoreServicer_to_server(self, server)

        server = await rpc.serve("127.0.0.1", 0, ("penstock.kvstore.v1.KvStore",), register)
        self.address = server.address
        try:
            yield self
        finally:
            await server.stop(0)


@asynccontextmanager
async def running_router(config: RouterSettings, keys: tuple[str, ...] = (), *, ready: bool = True) -> AsyncIterator[Router]:
    router = await Router.open(config, keys)
    stop = asyncio.Event()
    task = asyncio.create_task(router.run(stop))
    try:
        if ready:
            waiting = asyncio.create_task(router.ready.wait())
            done, _ = await asyncio.wait({waiting, task}, timeout=20, return_when=asyncio.FIRST_COMPLETED)
            assert waiting in done, "the router did not become ready"
        yield router
    finally:
        stop.set()
        await task
