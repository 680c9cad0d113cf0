"""uvicorn inside our own event loop and signals: bind first, serve, stop when told."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from common.errors import Unavailable

KEEP_ALIVE_S = 75  # longer than most load balancers' idle time-out
BACKLOG = 2048


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals are the process's (common/process.py)


class Web:
    """An HTTP server. `address` is host:port as bound."""

    def __init__(self, app: Any, host: str, port: int) -> None:
        self._socket = bind(host, port)
        bound_host, bound_port = self._socket.getsockname()[:2]
        self.address = f"[{bound_host}]:{bound_port}" if ":" in bound_host else f"{bound_host}:{bound_port}"
        config = uvicorn.Config(
            app,
            loop="none",
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="http")

    async def stop(self, grace_s: float) -> None:
        """No new connections; what runs has `grace_s`."""
        assert self._task is not None
        self._server.config.timeout_graceful_shutdown = max(1, int(grace_s))
        self._server.should_exit = True
        await self._task


def bind(host: str, port: int) -> socket.socket:
    """Raises `Unavailable` that names the address when it can't be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(BACKLOG)
        made.setblocking(False)
        return made
    except OSError as error:
        raise Unavailable(f"can't listen on {host}:{port}: {error.strerror or error}; choose another --host or --port") from error
