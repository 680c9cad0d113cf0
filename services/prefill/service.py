"""Prefill's gRPC service: protobuf <-> domain."""

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from common.errors import InvalidRequest
from common.pb import worker_pb2 as pb
from common.pb import worker_pb2_grpc
from common.rpc import aborting
from services.prefill.runner import Runner
from services.worker.convert import prefill_request, progress_to_pb
from services.worker.node import Node


class PrefillService(worker_pb2_grpc.PrefillServicer):
    """One streaming call per run; cancelling the call cancels the run."""

    def __init__(self, node: Node, runner: Runner) -> None:
        self._node = node
        self._runner = runner

    async def Describe(self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.WorkerInfo:
        return self._node.info()

    async def Run(self, request: pb.RunRequest, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[pb.RunEvent]:
        async with aborting(context, "Prefill.Run"):
            if request.namespace != self._node.model.namespace:
                ours = self._node.model.namespace
                raise InvalidRequest(
                    f"namespace {request.namespace[:12]}… differs from this worker's {ours[:12]}…: not the same model, dtype or block size"
                )
            yield progress_to_pb(await self._runner.run(prefill_request(request)))
