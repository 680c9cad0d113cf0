"""The prefill role: its parts, wired to a node."""

import asyncio

import grpc.aio

from common.logs import Log
from common.pb import worker_pb2_grpc
from services.prefill.handoff import HandoffFactory
from services.prefill.runner import Runner
from services.prefill.service import PrefillService
from services.worker.engine.types import StepResult
from services.worker.node import Node

log = Log("prefill")


class PrefillWorker:
    """Life: runs, drains (`drain`), is done."""

    def __init__(self, node: Node) -> None:
        block_tokens = node.model.layout.block_tokens
        handoffs = HandoffFactory(node.engine, node.stage, node.send_slots, node.transports, block_tokens)
        self._node = node
        self.runner = Runner(node.id, node.engine, node.stage, node.reader, handoffs, block_tokens, node.requests_max)

    def on_step(self, result: StepResult) -> None:
        self.runner.on_step(result)

    def register(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_PrefillServicer_to_server(PrefillService(self._node, self.runner), server)

    @property
    def in_flight(self) -> int:
        return self.runner.in_flight

    async def drain(self, deadline_s: float) -> None:
        self.runner.draining = True
        try:
            async with asyncio.timeout(deadline_s):
                await self.runner.idle.wait()
        except TimeoutError:
            log.warning("runs_abandoned", runs=self.runner.in_flight)
