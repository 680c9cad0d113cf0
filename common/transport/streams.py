"""A byte stream with gathers, scatters and buffers that can be taken back.

`ByteStream` is what a connection runs over; `SocketStream` is the one over a TCP or unix socket,
`grpc_carrier.GrpcStream` the one over gRPC messages.

Taking back: between two system calls a stream holds no slice of a buffer. So the owner of a view may
`release()` it at any moment: what was still to be received into it is dropped, what was still to be
sent from it goes out as zeros (its checksum then doesn't match), and the framing stays whole.
"""

import asyncio
import os
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Protocol

from common.errors import TransferFailed
from common.transport.conversation import Listener
from common.transport.frames import Event

Bytes = memoryview | bytes | bytearray

_CALLS_PER_TURN = 8  # system calls before the event loop gets its turn
_PIECES_PER_CALL = 64  # well under IOV_MAX (1024)
_ZEROS = bytes(1 << 18)


class ByteStream(Protocol):
    """Attributes: received_bytes: so far. ended: the peer has closed its side, or the connection broke."""

    received_bytes: int
    ended: bool

    async def receive(self, into: memoryview, length: int) -> bool:
        """Fills `into`, of that length. False: it was taken back, its bytes were dropped. Raises `TransferFailed`."""
        ...

    async def send(self, pieces: Sequence[Bytes]) -> None:
        """Sends all bytes of all pieces. One sender at a time. Raises `TransferFailed`."""
        ...

    def take_fds(self) -> list[int]:
        """The descriptors that came with what was received; they are the caller's now."""
        ...

    def finish(self) -> None:
        """Nothing more will be sent; the peer reads end-of-stream."""
        ...

    def abort(self) -> None:
        """Ends both directions on this side: what is in progress raises `TransferFailed`. The peer notices at `close`."""
        ...

    async def close(self) -> None:
        """Gives the descriptor back. The peer reads end-of-stream."""
        ...


async def next_event(stream: ByteStream, listener: Listener, *, body_s: float) -> Event:
    """The next frame's event. Waits for its header without limit, for its body at most `body_s`."""
    header = bytearray(listener.need)
    await stream.receive(memoryview(header), len(header))
    listener.feed(bytes(header))
    body = bytearray(listener.need)
    if body:
        async with asyncio.timeout(body_s):
            await stream.receive(memoryview(body), len(body))
    event = listener.feed(bytes(body))
    assert event is not None
    return event


async def discard(stream: ByteStream, length: int) -> None:
    """Receives `length` bytes and forgets them."""
    sink = memoryview(bytearray(min(length, len(_ZEROS))))
    while length:
        take = min(length, len(sink))
        await stream.receive(sink[:take], take)
        length -= take


class SocketStream:
    """A connected, non-blocking stream socket.

    On a unix socket, up to `fds_max` descriptors may come with a piece; `take_fds` gives what has come. More
    than that the kernel drops.
    """

    def __init__(self, sock: socket.socket, fds_max: int = 0) -> None:
        sock.setblocking(False)
        self.fds_max = fds_max
        self.fds: list[int] = []
        self.received_bytes = 0
        self.ended = False
        self._sock = sock
        self._fd = sock.fileno()
        self._loop = asyncio.get_running_loop()
        self._waiting: set[asyncio.Future[None]] = set()
        self._over = False

    def take_fds(self) -> list[int]:
        fds, self.fds = self.fds, []
        return fds

    async def receive(self, into: memoryview, length: int) -> bool:
        task = _Receive(self, self._sock, into, length)
        try:
            await self._until(task.turn, self._loop.add_reader, self._loop.remove_reader)
        except TransferFailed:
            self.ended = self.ended or not self._over
            raise
        return not task.taken_back

    async def send(self, pieces: Sequence[Bytes], fds: Sequence[int] = ()) -> None:
        """As in `ByteStream`. On a unix socket, `fds` go along with the first byte."""
        task = _Send(self._sock, pieces, fds)
        await self._until(task.turn, self._loop.add_writer, self._loop.remove_writer)

    async def _until(
        self, turn: Callable[[], bool], watch: Callable[[int, Callable[[], None]], None], unwatch: Callable[[int], bool]
    ) -> None:
        """Calls `turn` whenever the socket is ready, until it says True."""
        if self._over:
            raise TransferFailed("the connection is closed")
        try:
            if turn():
                return
        except OSError as error:
            raise TransferFailed(f"the connection broke: {error}") from error
        finished = self._loop.create_future()

        def ready() -> None:
            if finished.done():
                return
            try:
                if turn():
                    finished.set_result(None)
            except TransferFailed as error:
                finished.set_exception(error)
            except OSError as error:
                finished.set_exception(TransferFailed(f"the connection broke: {error}"))

        self._waiting.add(finished)
        watch(self._fd, ready)
        try:
            await finished
        finally:
            self._waiting.discard(finished)
            if not self._over:
                unwatch(self._fd)

    def finish(self) -> None:
        if not self._over:
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError:  # the peer is gone already
                self.abort()

    def abort(self) -> None:
        if self._over:
            return
        self._over = True
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_exception(TransferFailed("the connection was closed"))

    async def close(self) -> None:
        self.abort()
        self._sock.close()
        for fd in self.take_fds():
            os.close(fd)


class _Receive:
    """Fills one buffer, a few system calls at a time."""

    def __init__(self, stream: SocketStream, sock: socket.socket, into: memoryview, length: int) -> None:
        self._stream, self._sock, self._into, self._length = stream, sock, into, length
        self.done = 0
        self.taken_back = False

    def turn(self) -> bool:
        for _ in range(_CALLS_PER_TURN):
            if self.done == self._length:
                return True
            try:
                got = self._receive_with_fds() if self._stream.fds_max else self._sock.recv_into(self._target())
            except (BlockingIOError, InterruptedError):
                return False
            if not got:
                raise TransferFailed(f"the peer closed the connection, {self._length - self.done} bytes short")
            self.done += got
            self._stream.received_bytes += got
        return self.done == self._length

    def _receive_with_fds(self) -> int:
        room = socket.CMSG_LEN(self._stream.fds_max * struct.calcsize("i"))  # the kernel closes what doesn't fit
        got, ancillary, _, _ = self._sock.recvmsg_into([self._target()], room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._stream.fds.extend(struct.unpack(f"{len(data) // struct.calcsize('i')}i", data))
        return got

    def _target(self) -> memoryview:
        try:
            return self._into[self.done :]
        except ValueError:  # released: taken back by its owner
            self.taken_back = True
            return memoryview(bytearray(min(len(_ZEROS), self._length - self.done)))


class _Send:
    """Sends a list of buffers, a few system calls at a time."""

    def __init__(self, sock: socket.socket, pieces: Sequence[Bytes], fds: Sequence[int]) -> None:
        self._sock = sock
        self._pieces = [piece for piece in pieces if len(piece)]
        self._lengths = [len(piece) for piece in self._pieces]
        self._index, self._offset = 0, 0
        self._ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []

    def turn(self) -> bool:
        for _ in range(_CALLS_PER_TURN):
            if self._index == len(self._pieces):
                return True
            try:
                sent = self._sock.sendmsg(self._gather(), self._ancillary)
                self._ancillary = []
            except (BlockingIOError, InterruptedError):
                return False
            self._advance(sent)
        return self._index == len(self._pieces)

    def _gather(self) -> list[Bytes]:
        last = min(len(self._pieces), self._index + _PIECES_PER_CALL)
        first = zeros_if_released(self._pieces[self._index], self._offset, self._lengths[self._index])
        if len(first) < self._lengths[self._index] - self._offset:
            return [first]  # a stretch of zeros: what follows has to wait for the rest of them
        rest = [zeros_if_released(self._pieces[i], 0, self._lengths[i]) for i in range(self._index + 1, last)]
        for count, piece in enumerate(rest):
            if len(piece) < self._lengths[self._index + 1 + count]:
                return [first, *rest[: count + 1]]
        return [first, *rest]

    def _advance(self, sent: int) -> None:
        while sent:
            step = min(sent, self._lengths[self._index] - self._offset)
            self._offset += step
            sent -= step
            if self._offset == self._lengths[self._index]:
                self._index, self._offset = self._index + 1, 0


def zeros_if_released(piece: Bytes, start: int, end: int) -> Bytes:
    """`piece[start:end]`, or zeros (perhaps fewer) when its owner took it back."""
    try:
        return memoryview(piece)[start:end]
    except ValueError:
        return memoryview(_ZEROS)[: end - start]
