"""Connects to a peer by the best carrier that works: shm on the same host, else tcp, else grpc."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Literal

from common.errors import InvalidRequest, TransferFailed, Unavailable
from common.transport.connection import Connection
from common.transport.conversation import Listener, Role
from common.transport.frames import Goodbye, Hello, Mode, ProtocolError, Welcome, encode
from common.transport.grpc_carrier import open_grpc
from common.transport.interface import EXTENT_FILES_MAX, Endpoint
from common.transport.region import Region
from common.transport.server import prepare_tcp
from common.transport.streams import ByteStream, SocketStream, next_event

Prefer = Literal["auto", "shm", "tcp", "grpc"]


async def connect(endpoint: Endpoint, region: Region, *, prefer: Prefer = "auto", timeout_s: float = 5.0) -> Connection:
    """A transport between `region` and the peer's area.

    `auto` takes shm when its socket is on this host and the handshake works, else tcp, else grpc; any
    other value takes that carrier or none. Raises `Unavailable` and says why for each carrier tried.
    """
    reasons: list[str] = []
    for carrier in ("shm", "tcp", "grpc") if prefer == "auto" else (prefer,):
        address = getattr(endpoint, carrier)
        if not address or (prefer == "auto" and carrier == "shm" and not _on_this_host(address)):
            reasons.append(f"{carrier}: {'not on this host' if address else 'not served'}")
            continue
        try:
            async with asyncio.timeout(timeout_s):
                return await _CONNECT[carrier](address, region)
        except TimeoutError:
            reasons.append(f"{carrier} {address}: no answer within {timeout_s:g} s")
        except (OSError, TransferFailed, ProtocolError, Unavailable, InvalidRequest) as error:
            reasons.append(f"{carrier} {address}: {error}")
    raise Unavailable(f"byte plane: can't reach the peer by {prefer!r}: {'; '.join(reasons)}")


def _on_this_host(path: str) -> bool:
    return os.path.exists(path)


async def _connect_shm(path: str, region: Region) -> Connection:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, path)
        # The socket's buffer is empty, so these 56 bytes go at once, and the descriptor with the first of them.
        socket.send_fds(sock, [encode(Hello(Mode.REGION, region.size))], [region.fd])
    except BaseException:
        sock.close()
        raise
    return await _handshake("shm", Mode.REGION, SocketStream(sock, fds_max=EXTENT_FILES_MAX), region)


async def _connect_tcp(address: str, region: Region) -> Connection:
    host, port = _split(address)
    sock = await _open_tcp(host, port)
    stream = SocketStream(sock)
    return await _handshake("tcp", Mode.INLINE, stream, region, encode(Hello(Mode.INLINE, 0)))


async def _connect_grpc(address: str, region: Region) -> Connection:
    return await _handshake("grpc", Mode.INLINE, open_grpc(address), region, encode(Hello(Mode.INLINE, 0)))


async def _handshake(carrier: str, mode: Mode, stream: ByteStream, region: Region, hello: bytes = b"") -> Connection:
    listener = Listener(Role.CLIENT)
    try:
        await stream.send([hello])
        match await next_event(stream, listener, body_s=60):
            case Welcome() as welcome:
                return Connection(carrier, mode, stream, listener, welcome, region)
            case Goodbye(reason, text):
                raise Unavailable(f"the peer said goodbye: {reason.name}: {text}")
            case other:
                raise AssertionError(other)  # the table allows nothing else
    except BaseException:
        await stream.close()
        raise


async def _open_tcp(host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    last: OSError | None = None
    for family, kind, protocol, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, address)
            prepare_tcp(sock)
        except OSError as error:
            sock.close()
            last = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise last or OSError(f"{host}: no address")


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InvalidRequest(f"tcp address {address!r}: expected host:port", param="tcp")
    return host.strip("[]"), int(port)


_CONNECT: dict[str, Callable[[str, Region], Awaitable[Connection]]] = {
    "shm": _connect_shm,
    "tcp": _connect_tcp,
    "grpc": _connect_grpc,
}
