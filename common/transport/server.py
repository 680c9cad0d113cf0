"""Serves an area over tcp and, on one host, over shared memory.

`serve_bytes` listens; each connection is a `Session`. The shm carrier is a unix socket on which HELLO
brings the client's memfd along: the server reads and writes the client's region, never the other way
round, so a client can't reach the server's memory.
"""

import asyncio
import errno
import logging
import os
import socket
from pathlib import Path

from common.errors import InvalidRequest, PenstockError, TransferFailed, Unavailable
from common.transport.conversation import Listener, Role
from common.transport.frames import Goodbye, Hello, Mode, ProtocolError, Reason, encode
from common.transport.interface import Area, Endpoint
from common.transport.reception import Limits, Reception
from common.transport.region import RemoteRegion
from common.transport.session import Session
from common.transport.streams import SocketStream

log = logging.getLogger(__name__)
UNIX_PATH_BYTES_MAX = 107  # sun_path, unix(7)
_BACKLOG = 128
# A peer that vanished without a word is noticed after about 30 s, tcp(7).
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3), (socket.TCP_USER_TIMEOUT, 30_000))


class BytesServer:
    """The listening sockets of an area, and all their connections."""

    def __init__(self, reception: Reception, endpoint: Endpoint, listeners: list[socket.socket], shm_path: Path | None) -> None:
        self.endpoint = endpoint
        self.reception = reception
        self.counters = reception.counters
        self._listeners = listeners
        self._shm_path = shm_path
        self._shm_inode = shm_path.stat().st_ino if shm_path else 0
        self._accepting = [asyncio.get_running_loop().create_task(self._accept(listener)) for listener in listeners]

    async def close(self) -> None:
        """Stops listening, lets what is in flight finish, then ends every connection. Idempotent."""
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        for listener in self._listeners:
            listener.close()
        if self._shm_path and self._shm_path.exists() and self._shm_path.stat().st_ino == self._shm_inode:
            self._shm_path.unlink()
        await self.reception.drain()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:  # out of descriptors, or the client left before we looked
                log.warning("byte plane: can't accept a connection: %s", error)
                await asyncio.sleep(0.05 if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS) else 0)
                continue
            if self.reception.full or self.reception.draining:
                turn_away(sock, Reason.DRAINING if self.reception.draining else Reason.FULL)
            elif listener.family == socket.AF_UNIX:
                self.reception.start(_serve_shm(SocketStream(sock, fds_max=1), self.reception))
            else:
                prepare_tcp(sock)
                self.reception.start(Session(SocketStream(sock), self.reception).run())


async def serve_bytes(
    area: Area,
    *,
    tcp: tuple[str, int] | None = None,
    shm_path: str | Path | None = None,
    advertise_host: str = "",
    limits: Limits | None = None,
    reception: Reception | None = None,
) -> BytesServer:
    """Listens on what is given. Port 0 takes a free one; `endpoint` names it, by `advertise_host` if given.

    `reception` is given when a `BytesServicer` serves the same area, so that both share their bounds.
    Raises `Unavailable` when a port or path is in use, `InvalidRequest` for an impossible path.
    """
    reception = reception or Reception(area, limits)
    listeners: list[socket.socket] = []
    address = ""
    try:
        if tcp:
            listeners.append(_listen_tcp(*tcp))
            address = f"{advertise_host or tcp[0]}:{listeners[-1].getsockname()[1]}"
        if shm_path:
            listeners.append(_listen_unix(Path(shm_path)))
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    endpoint = Endpoint(tcp=address, shm=str(shm_path or ""))
    return BytesServer(reception, endpoint, listeners, Path(shm_path) if shm_path else None)


def prepare_tcp(sock: socket.socket) -> None:
    """No delay, and a dead peer is noticed."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEP_ALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def turn_away(sock: socket.socket, reason: Reason) -> None:
    """Says why, without waiting, and closes."""
    with sock:
        try:
            sock.setblocking(False)
            sock.send(encode(Goodbye(reason, "no new connections")))
        except OSError:
            pass  # it has left already


async def _serve_shm(stream: SocketStream, reception: Reception) -> None:
    listener = Listener(Role.SERVER)
    fds: list[int] = []  # the region's
    region: RemoteRegion | None = None
    try:
        async with asyncio.timeout(reception.limits.body_s):
            hello = await _receive_hello(stream, listener)
            fds = stream.take_fds()
            if hello.mode is not Mode.REGION or len(fds) != 1:
                raise ProtocolError(f"HELLO in mode {hello.mode.name} with {len(fds)} descriptors: expected REGION with one")
            region = RemoteRegion.map(fds[0], hello.region_bytes)
    except (ProtocolError, InvalidRequest) as error:
        await _refuse_shm(stream, error)
    except (TransferFailed, TimeoutError):
        pass  # the client left, or said nothing
    finally:
        for fd in fds:
            os.close(fd)
        if region is None:
            await stream.close()
    if region is not None:
        stream.fds_max = 0  # nothing more is to come
        await Session(stream, reception, region, listener=listener, passes_fds=stream).run(hello)


async def _receive_hello(stream: SocketStream, listener: Listener) -> Hello:
    header = bytearray(listener.need)
    await stream.receive(memoryview(header), len(header))
    listener.feed(bytes(header))
    body = bytearray(listener.need)
    await stream.receive(memoryview(body), len(body))
    event = listener.feed(bytes(body))
    assert isinstance(event, Hello)  # the table allows nothing else
    return event


async def _refuse_shm(stream: SocketStream, error: PenstockError) -> None:
    log.warning("byte plane: refusing a shared-memory client: %s", error.message)
    try:
        async with asyncio.timeout(1.0):
            await stream.send([encode(Goodbye(Reason.MALFORMED, error.message))])
    except (TransferFailed, TimeoutError):
        pass  # it isn't listening


def _listen_tcp(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise Unavailable(f"byte plane: can't listen on {host}:{port}: {error.strerror}", param="bytes_port") from error
    return sock


def _listen_unix(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > UNIX_PATH_BYTES_MAX:
        raise InvalidRequest(f"unix socket path {path}: expected at most {UNIX_PATH_BYTES_MAX} bytes", param="run_dir")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        sock.bind(str(path))
        path.chmod(0o600)  # before `listen`: nobody can have connected yet
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise Unavailable(f"byte plane: can't listen on {path}: {error.strerror}", param="run_dir") from error
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: Path) -> None:
    """Removes the socket file of a process that is gone; a live one's raises `Unavailable`."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except BlockingIOError:
            raise Unavailable(f"byte plane: {path} is in use by another process", param="run_dir") from None
        else:
            raise Unavailable(f"byte plane: {path} is in use by another process", param="run_dir")
