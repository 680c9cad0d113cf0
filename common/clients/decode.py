"""The router's side of `Decode.Serve`: one long-lived stream per decode worker carries all its requests.

Life of a connection:

1. `describe()` asks who is there (epoch, namespace, load); `resident()` what its pool holds of a chain.
2. `serve()` opens the stream and runs until it is lost; then every live request on it gets
   `Unavailable` (retryable), and `serve` raises it. A lost connection is not used again.
3. In between, `start` sends a request and its steps arrive at the given sink; `cancel` ends one.

Both ends of the outgoing queue are bounded: full means refused now. Sinks are plain calls on the
event loop; they must not block.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import cast

import grpc
import grpc.aio
import msgspec

from common import rpc
from common.errors import Overloaded, PenstockError, Unavailable, from_code
from common.generation import FinishReason, Token
from common.pb import worker_pb2 as pb
from common.pb import worker_pb2_grpc
from common.routes import PATHS
from common.wire import tokens_from_pb

OUTGOING_MAX = 4096  # messages; a start or a cancel each


class Flow(msgspec.Struct, frozen=True):
    """What one path moved; `seconds` in which at least one transfer was under way."""

    bytes: int = 0
    seconds: float = 0.0


class Report(msgspec.Struct, frozen=True):
    """What really happened to a request (worker.proto Report)."""

    plan: str
    cached_tokens: int
    computed_tokens: int = 0
    prefill: str = ""
    carrier: str = ""
    storage_to_decode: Flow = Flow()
    storage_to_prefill: Flow = Flow()
    decode_to_prefill: Flow = Flow()
    prefill_to_decode: Flow = Flow()
    host_to_device: Flow = Flow()
    queue_s: float = 0.0
    prefill_s: float = 0.0
    preemptions: int = 0
    fallback: str = ""
    prefill_retries: int = 0
    kept_tokens: int = 0


class Step(msgspec.Struct, frozen=True):
    """What one engine step brought for one request. `stop_token` is also the last of `tokens`."""

    tokens: tuple[Token, ...] = ()
    finish: FinishReason | None = None
    stop_token: int | None = None
    error: PenstockError | None = None
    report: Report | None = None


Sink = Callable[[Step], None]


class DecodeConnection:
    """One incarnation of the connection to a decode worker."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = rpc.channel(address)
        self._stub = worker_pb2_grpc.DecodeStub(self._channel)
        self._outgoing: asyncio.Queue[pb.RouterMessage] = asyncio.Queue(OUTGOING_MAX)
        self._sinks: dict[str, Sink] = {}
        self._open = False

    def __repr__(self) -> str:
        return f"<DecodeConnection {self.address} {'open' if self._open else 'closed'} live={len(self._sinks)}>"

    @property
    def live(self) -> int:
        """Requests under way on this connection."""
        return len(self._sinks)

    async def describe(self, timeout_s: float) -> pb.WorkerInfo:
        pending = self._stub.Describe(pb.DescribeRequest(), timeout=timeout_s)
        return cast(pb.WorkerInfo, await rpc.call(pending, self.address))

    async def resident(self, keys: Sequence[bytes], timeout_s: float) -> int:
        """How many leading blocks of a chain are in the worker's pool at this moment."""
        if not self._open:
            raise Unavailable(f"decode worker {self.address}: not connected")
        pending = self._stub.Resident(pb.ResidentRequest(keys=keys), timeout=timeout_s)
        return min(len(keys), cast(pb.ResidentReply, await rpc.call(pending, self.address)).blocks)

    def start(self, message: pb.Start, sink: Sink) -> None:
        """Sends a request; its steps go to `sink`, the last one with `finish` set.

        Raises:
            Unavailable: the stream is lost.
            Overloaded: too much is waiting to be sent.
        """
        if not self._open:
            raise Unavailable(f"decode worker {self.address}: not connected")
        assert message.request_id not in self._sinks, "request ids are unique per stream"
        self._send(pb.RouterMessage(start=message))
        self._sinks[message.request_id] = sink

    def cancel(self, request_id: str) -> None:
        """Ends a request if it is live. Nothing more arrives at its sink."""
        if self._sinks.pop(request_id, None) is not None and self._open:
            with contextlib.suppress(Overloaded):  # 4096 unsent messages: the stream is as good as lost
                self._send(pb.RouterMessage(cancel=pb.Cancel(request_id=request_id)))

    async def serve(self, opened: Callable[[], None]) -> None:
        """Runs the stream until it is lost. `opened` is called once requests may be started.

        Raises:
            Unavailable: the stream is lost; live requests have been told.
        """
        call = self._stub.Serve()
        self._open = True
        writer = asyncio.create_task(self._write(call), name=f"decode-writer-{self.address}")
        reason = f"decode worker {self.address}: the stream ended"
        try:
            opened()
            async for batch in call:
                self._deliver(batch)
        except grpc.aio.AioRpcError as error:
            reason = f"decode worker {self.address}: the stream was lost: {error.details() or error.code().name}"
        finally:
            self._open = False
            writer.cancel()
            call.cancel()
            self._fail_all(reason)
        raise Unavailable(reason)

    async def close(self) -> None:
        self._open = False
        await self._channel.close()

    def _send(self, message: pb.RouterMessage) -> None:
        try:
            self._outgoing.put_nowait(message)
        except asyncio.QueueFull:
            raise Overloaded(
                f"decode worker {self.address}: {OUTGOING_MAX} messages wait to be sent", retry_after_s=1.0
            ) from None

    async def _write(self, call: grpc.aio.StreamStreamCall) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the reader sees the same loss
            while True:
                await call.write(await self._outgoing.get())

    def _deliver(self, batch: pb.StepBatch) -> None:
        for message in batch.sequences:
            sink = self._sinks.get(message.request_id)
            if sink is None:
                continue  # cancelled here, and the worker doesn't know yet
            if message.finish:
                del self._sinks[message.request_id]
            sink(step_from_pb(message))

    def _fail_all(self, reason: str) -> None:
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink(Step(finish=FinishReason.ERROR, error=Unavailable(reason, retry_after_s=1.0)))


def _finish(text: str) -> FinishReason | None:
    """A reason this version doesn't know ends the request as `stop` rather than the stream as an exception."""
    if not text:
        return None
    return FinishReason(text) if text in FinishReason.__members__.values() else FinishReason.STOP


def step_from_pb(message: pb.SequenceStep) -> Step:
    error = None
    if message.finish == FinishReason.ERROR:
        given = message.error
        error = from_code(given.code, given.message, param=given.param or None, retry_after_s=given.retry_after_s or None)
    return Step(
        tokens=tokens_from_pb(message.tokens),
        finish=_finish(message.finish),
        stop_token=message.stop_token - 1 if message.stop_token else None,
        error=error,
        report=report_from_pb(message.report) if message.HasField("report") else None,
    )


def report_from_pb(message: pb.Report) -> Report:
    values = {field: getattr(message, field) for field in Report.__struct_fields__}
    return Report(**(values | {path: Flow(values[path].bytes, values[path].seconds) for path in PATHS}))
