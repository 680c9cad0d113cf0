"""gRPC servers and channels, set up in one way: limits, keepalive, health, reflection, errors.

Services raise the errors of `common.errors`; `aborting` turns them into a status whose trailing
metadata carries the error's code, and `raised` turns that back on the calling side.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from common.errors import (
    MEANING,
    Cancelled,
    DeadlineExceeded,
    Internal,
    Overloaded,
    PenstockError,
    Unavailable,
    from_code,
    meaning,
)
from common.logs import Log
from common.rpc_decoding import RefuseMalformed

log = Log("rpc")
T = TypeVar("T")
MESSAGE_BYTES_MAX = 32 << 20  # a 4M-token prompt; KV bytes never ride in messages but on Bytes.Carry
_CODE_KEY = "penstock-code"
_RETRY_KEY = "penstock-retry-after-s"
OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
]
SERVER_OPTIONS = [*OPTIONS, ("grpc.so_reuseport", 0)]
CLIENT_OPTIONS = [
    *OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
]


class Server:
    """A listening gRPC server with health and reflection. `address` is host:port as bound."""

    def __init__(self, server: grpc.aio.Server, address: str, health: health_aio.HealthServicer, names: Iterable[str]) -> None:
        self._server = server
        self._health = health
        self._names = ("", *names)
        self.address = address

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        await self.set_serving(False)
        await self._server.stop(grace_s)


async def serve(host: str, port: int, names: Iterable[str], register: Callable[[grpc.aio.Server], None]) -> Server:
    """Binds and starts; health says NOT_SERVING until `set_serving(True)`.

    Args:
        names: full names of the services, for health and reflection.
        register: adds the servicers.

    Raises:
        Unavailable: the address is in use.
    """
    server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=[RefuseMalformed(abort)])
    health = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    register(server)
    names = tuple(names)
    reflection.enable_server_reflection((*names, reflection.SERVICE_NAME, "grpc.health.v1.Health"), server)
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise Unavailable(
            f"can't listen on {host}:{port}: the port is in use or the address isn't ours; choose another"
        ) from error
    await server.start()
    out = Server(server, f"{host}:{bound}", health, names)
    await out.set_serving(False)
    return out


def channel(address: str) -> grpc.aio.Channel:
    """A channel to a peer; connects when it is used and reconnects within a second."""
    return grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: BaseException) -> None:
    """Ends a call with the status an error means. Raises."""
    sense = meaning(error)
    message = error.message if isinstance(error, PenstockError) else "internal error"
    metadata = [(_CODE_KEY, sense.code)]
    if isinstance(error, PenstockError) and error.retry_after_s is not None:
        metadata.append((_RETRY_KEY, str(error.retry_after_s)))
    await context.abort(sense.grpc_status, message, tuple(metadata))


@asynccontextmanager
async def aborting(context: grpc.aio.ServicerContext[Any, Any], what: str) -> AsyncIterator[None]:
    """Inside a servicer method: turns errors into statuses; our bugs are logged with traceback."""
    try:
        yield
    except PenstockError as error:
        if isinstance(error, Internal):
            log.exception("call_failed", call=what)
        await abort(context, error)
    except (grpc.aio.AbortError, grpc.aio.BaseError):
        raise
    except Exception as error:
        log.exception("call_failed", call=what)
        await abort(context, error)


_BY_STATUS: dict[grpc.StatusCode, type[PenstockError]] = {
    sense.grpc_status: kind for kind, sense in reversed(MEANING.items())
} | {
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNKNOWN: Internal,
    grpc.StatusCode.UNIMPLEMENTED: Internal,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}


def raised(error: grpc.aio.AioRpcError, peer: str) -> PenstockError:
    """The error of our tree behind a failed call."""
    trailing = dict(error.trailing_metadata() or ())
    details = error.details() or error.code().name
    retry_after = trailing.get(_RETRY_KEY)
    retry_after_s = float(str(retry_after)) if retry_after is not None else None
    code = trailing.get(_CODE_KEY)
    if code is not None:
        return from_code(str(code), details, retry_after_s=retry_after_s)
    kind = _BY_STATUS.get(error.code(), Unavailable)
    return kind(f"{peer}: {details}", retry_after_s=retry_after_s)


async def call(pending: Awaitable[T], peer: str) -> T:
    """Awaits a unary call and raises errors of our tree. The call carries its own `timeout=`.

    A channel that is closed meanwhile cancels its calls, but not who awaits them: that is `Unavailable`.
    """
    try:
        return await pending
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise Unavailable(f"{peer}: the connection was closed") from None
    except grpc.aio.AioRpcError as error:
        raise raised(error, peer) from error
