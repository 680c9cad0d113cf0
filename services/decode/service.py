"""Decode's gRPC service: protobuf <-> domain."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from common import rpc
from common.blocks import BlockKey
from common.errors import InvalidRequest, PenstockError
from common.generation import FinishReason
from common.logs import Log
from common.pb import worker_pb2 as pb
from common.pb import worker_pb2_grpc
from services.decode.decoder import Decoder
from services.worker.convert import decode_request, step_to_pb
from services.worker.node import Node
from services.worker.requests import RequestStep

log = Log("service")
OUTBOX_STEPS_MAX = 65_536  # a router this far behind is not reading


class DecodeService(worker_pb2_grpc.DecodeServicer):
    """Serves any number of routers, each over one stream."""

    def __init__(self, node: Node[Any], decoder: Decoder) -> None:
        self._node = node
        self._decoder = decoder

    async def Describe(self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.WorkerInfo:
        return self._node.info()

    async def Resident(self, request: pb.ResidentRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.ResidentReply:
        return pb.ResidentReply(blocks=self._decoder.resident_blocks([BlockKey(key) for key in request.keys]))

    async def Serve(
        self, request_iterator: AsyncIterator[pb.RouterMessage], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.StepBatch]:
        session = _Session(self._decoder)
        reading = asyncio.create_task(session.read(request_iterator))
        try:
            async for batch in session.batches(reading):
                yield batch
            async with rpc.aborting(context, "Serve"):
                await reading
        finally:
            reading.cancel()
            session.close()


class _Session:
    """One router's stream. What several requests have to say in one engine step leaves in one message."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._keys: dict[str, str] = {}  # the router's request id -> the decoder's key
        self._outbox: list[pb.SequenceStep] = []
        self._wake = asyncio.Event()

    async def read(self, messages: AsyncIterator[pb.RouterMessage]) -> None:
        """Takes the router's messages until it closes its side."""
        async for message in messages:
            match message.WhichOneof("kind"):
                case "start":
                    self._start(message.start)
                case "cancel":
                    if message.cancel.request_id in self._keys:
                        self._decoder.cancel(self._keys[message.cancel.request_id])
                case unknown:
                    log.warning("message_ignored", kind=unknown)

    def _start(self, start: pb.Start) -> None:
        try:
            if start.request_id in self._keys:
                raise InvalidRequest(f"request_id {start.request_id!r} is in flight on this stream already")
            request = decode_request(start)
        except PenstockError as error:
            self._emit(RequestStep(start.request_id, finish=FinishReason.ERROR, error=error))
            return
        key = self._decoder.start(request, self._emit)
        if key is not None:
            self._keys[start.request_id] = key

    def _emit(self, step: RequestStep) -> None:
        if len(self._outbox) >= OUTBOX_STEPS_MAX:
            log.warning("router_not_reading", unread_steps=len(self._outbox))
            self.close()
            return
        if step.finish is not None:
            self._keys.pop(step.id, None)
        self._outbox.append(step_to_pb(step))
        self._wake.set()

    async def batches(self, reading: asyncio.Task[None]) -> AsyncIterator[pb.StepBatch]:
        """What there is to say, each time there is something; ends when the router has closed and all is said."""
        reading.add_done_callback(lambda _: self._wake.set())
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._outbox:
                steps, self._outbox = self._outbox, []
                yield pb.StepBatch(sequences=steps)
            elif reading.done() and not self._keys:
                return

    def close(self) -> None:
        """The stream is gone: so are its requests."""
        for key in list(self._keys.values()):
            self._decoder.cancel(key)
