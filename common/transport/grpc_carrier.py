"""The frames over one gRPC port: a bidirectional stream of chunks, for networks where only that is open.

Chunk borders carry no meaning. Messages are `Chunk`s on the wire; their one field is packed and
unpacked here rather than by protobuf, which would copy every byte twice more.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import grpc
import grpc.aio

from common.errors import InvalidRequest, TransferFailed
from common.pb import bytes_pb2
from common.transport.frames import ProtocolError
from common.transport.interface import Area
from common.transport.reception import Limits, Reception
from common.transport.session import Session
from common.transport.streams import Bytes, zeros_if_released

T = TypeVar("T")
SERVICE = "penstock.bytes.v1.Bytes"
CHUNK_BYTES = 1 << 19  # measured: 256 KiB and 1-2 MiB cost a third more CPU (larger messages live in fresh pages)
_SMALL_MAX = 16  # pieces, each under CHUNK_BYTES / 8
_TAG = b"\x0a"  # field 1, length-delimited


def pack_chunk(data: Bytes) -> bytes:
    """`Chunk(data=data).SerializeToString()`, with one copy."""
    size, varint = len(data), bytearray()
    while size > 127:
        varint.append(size & 127 | 128)
        size >>= 7
    varint.append(size)
    return b"".join((_TAG, varint, data))


def unpack_chunk(message: bytes) -> memoryview:
    """`Chunk.FromString(message).data`, without a copy where the message is just that field."""
    size = shift = 0
    for index in range(1, min(len(message), 6)):
        size |= (message[index] & 127) << shift
        shift += 7
        if message[index] < 128:
            if message[:1] == _TAG and len(message) == index + 1 + size:
                return memoryview(message)[index + 1 :]
            break
    return memoryview(bytes_pb2.Chunk.FromString(message).data)


class BytesServicer:
    """Serves `penstock.bytes.v1.Bytes` from a gRPC server of the owner's. One per area; it may share a `BytesServer`'s bounds."""

    def __init__(self, area: Area, *, limits: Limits | None = None, reception: Reception | None = None) -> None:
        self.reception = reception or Reception(area, limits)
        self.counters = self.reception.counters

    def add_to(self, server: grpc.aio.Server) -> None:
        """Before the server starts."""
        handler = grpc.stream_stream_rpc_method_handler(self.Carry, request_deserializer=unpack_chunk, response_serializer=None)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Carry": handler}),))

    async def close(self) -> None:
        """Drains; call it before the gRPC server stops. Idempotent."""
        await self.reception.drain()

    async def Carry(self, _: object, context: "grpc.aio.ServicerContext[bytes, memoryview]") -> None:
        if self.reception.full or self.reception.draining:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no new byte-plane connections")
        stream = GrpcStream(context.read, context.write, _nothing)
        session = Session(stream, self.reception)
        self.reception.start(session.run())
        try:
            await session.ended.wait()
        finally:  # the call was cancelled, or the session is over
            stream.abort()


class GrpcStream:
    """A `ByteStream` over a gRPC call; `read` and `write` are the call's or the servicer context's."""

    def __init__(
        self, read: Callable[[], Awaitable[Any]], write: Callable[[bytes], Awaitable[None]], close: Callable[[], Awaitable[None]]
    ) -> None:
        self.received_bytes = 0
        self.ended = False
        self._read, self._write, self._close = read, write, close
        self._left = memoryview(b"")
        self._working: set[asyncio.Future[Any]] = set()
        self._over = False

    async def receive(self, into: memoryview, length: int) -> bool:
        done, kept = 0, True
        while done < length:
            if not self._left:
                self._left = await self._next()
            take = min(length - done, len(self._left))
            try:
                into[done : done + take] = self._left[:take]
            except ValueError:  # released: taken back by its owner
                kept = False
            self._left = self._left[take:]
            done += take
        return kept

    async def _next(self) -> memoryview:
        try:
            message = await self._unless_over(self._read())
        except InvalidRequest as error:  # not even a chunk
            raise ProtocolError(error.message) from error
        if not isinstance(message, memoryview):  # grpc.aio.EOF
            self.ended = True
            raise TransferFailed("the peer closed the connection")
        self.received_bytes += len(message)
        return message

    def take_fds(self) -> list[int]:
        return []

    async def send(self, pieces: Sequence[Bytes]) -> None:
        """Small pieces share a message, large ones are cut."""
        small: list[tuple[Bytes, int]] = []
        for piece, size in [(piece, len(piece)) for piece in pieces]:
            if size < CHUNK_BYTES // 8:
                small.append((piece, size))
            else:
                await self._flush(small)
                for start in range(0, size, CHUNK_BYTES):
                    await self._unless_over(self._write(pack_chunk(_slice(piece, start, min(size, start + CHUNK_BYTES)))))
            if len(small) == _SMALL_MAX:
                await self._flush(small)
        await self._flush(small)

    async def _flush(self, small: list[tuple[Bytes, int]]) -> None:
        if small:
            data = b"".join([_slice(piece, 0, size) for piece, size in small])
            small.clear()
            await self._unless_over(self._write(pack_chunk(data)))

    async def _unless_over(self, work: Awaitable[T]) -> T:
        """Awaits the call; `abort` and everything that a broken call raises become `TransferFailed`."""
        task = asyncio.ensure_future(work)
        if self._over:
            task.cancel()
        self._working.add(task)
        try:
            return await task
        except (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError) as error:
            self.ended = True
            details = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
            raise TransferFailed(f"the call broke: {details}") from error
        except asyncio.CancelledError:
            this = asyncio.current_task()
            if this is not None and this.cancelling():
                raise
            raise TransferFailed("the connection was closed") from None
        finally:
            self._working.discard(task)

    def finish(self) -> None:
        """Nothing to do: only a shared-memory client waits for the peer's end-of-stream."""

    def abort(self) -> None:
        self._over = True
        for task in self._working:
            task.cancel()

    async def close(self) -> None:
        self.abort()
        await self._close()


def open_grpc(address: str) -> GrpcStream:
    """A stream to the `Bytes` service at host:port. Nothing is sent yet."""
    channel = grpc.aio.insecure_channel(address)
    carry = channel.stream_stream(f"/{SERVICE}/Carry", request_serializer=None, response_deserializer=unpack_chunk)
    call = carry()

    async def close() -> None:
        call.cancel()
        await channel.close()

    return GrpcStream(call.read, call.write, close)


def _slice(piece: Bytes, start: int, end: int) -> Bytes:
    data = zeros_if_released(piece, start, end)
    return data if len(data) == end - start else bytes(end - start)


async def _nothing() -> None:
    """The servicer's call ends with its handler."""
