"""The decode role: its parts, wired to a node."""

import grpc.aio

from common.pb import worker_pb2_grpc
from services.decode.decoder import Decoder
from services.decode.filling import Filler
from services.decode.prefill_client import PrefillPeers
from services.decode.service import DecodeService
from services.worker.engine.types import StepResult
from services.worker.node import Node
from services.worker.writeback import Writer

WRITE_PENDING_SHARE = 2  # at most this fraction of the pool may wait to be written back
WRITE_DRAIN_S = 5.0


class DecodeWorker:
    """Life: runs, drains (`drain`), is done."""

    def __init__(self, node: Node) -> None:
        layout = node.model.layout
        self._node = node
        self._prefills = PrefillPeers(node.model.namespace)
        pending_max = max(1, node.engine.load.pool_blocks_total // WRITE_PENDING_SHARE)
        self._writer = Writer(
            node.engine, node.stage, node.send_slots, node.transports, node.stores, node.codec, node.model.namespace, layout.block_tokens,
            pending_max,
        )  # fmt: skip
        filler = Filler(
            node.stage, lambda: node.endpoint, node.reader, self._prefills, layout.block_tokens, node.settings.lease_s
        )
        self.decoder = Decoder(node.engine, filler, self._writer, node.requests_max)

    def on_step(self, result: StepResult) -> None:
        self.decoder.on_step(result)

    def register(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_DecodeServicer_to_server(DecodeService(self._node, self.decoder), server)

    @property
    def in_flight(self) -> int:
        return self.decoder.in_flight

    async def drain(self, deadline_s: float) -> None:
        await self.decoder.drain(deadline_s)
        await self._writer.drained(WRITE_DRAIN_S)
        await self._writer.close()
        await self._prefills.close()
        self.decoder.check_integrity()
