"""Prefill's gRPC service: protobuf <-> domain."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from common.blocks import BlockKey
from common.errors import InvalidRequest
from common.pb import worker_pb2 as pb
from common.pb import worker_pb2_grpc
from common.rpc import aborting
from services.prefill.runner import Runner
from services.worker.convert import prefill_request, progress_to_pb
from services.worker.node import Node
from services.worker.requests import PrefillProgress, PrefillRequest


class PrefillService(worker_pb2_grpc.PrefillServicer):
    """One streaming call per run; cancelling the call cancels the run."""

    def __init__(self, node: Node[Any], runner: Runner) -> None:
        self._node = node
        self._runner = runner

    async def Describe(self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.WorkerInfo:
        return self._node.info()

    async def Resident(self, request: pb.ResidentRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.ResidentReply:
        return pb.ResidentReply(blocks=self._runner.held_blocks([BlockKey(key) for key in request.keys]))

    async def Run(self, request: pb.RunRequest, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[pb.RunEvent]:
        async with aborting(context, "Prefill.Run"):
            if request.namespace != self._node.model.namespace:
                ours = self._node.model.namespace
                raise InvalidRequest(
                    f"namespace {request.namespace[:12]}… differs from this worker's {ours[:12]}…: not the same model, dtype or block size"
                )
            async for progress in self._progress(prefill_request(request, self._node.model.layout.block_tokens)):
                yield progress_to_pb(progress)

    async def _progress(self, request: PrefillRequest) -> AsyncIterator[PrefillProgress]:
        """A run's news as they come; ends, or raises, when the run has."""
        news: asyncio.Queue[PrefillProgress | None] = asyncio.Queue()  # at most a few for each block of the prompt
        running = asyncio.create_task(self._runner.run(request, news.put_nowait))
        running.add_done_callback(lambda _: news.put_nowait(None))
        try:
            while (progress := await news.get()) is not None:
                yield progress
            await running
        finally:
            running.cancel()
            await asyncio.wait([running])
