"""One HTTP exchange over ASGI: body with a limit, JSON or event stream out, client gone.

`run` drives a handler and watches the connection beside it: when the client goes, the handler is
cancelled, and with it everything it started.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from common.errors import Cancelled, Internal, PayloadTooLarge, PenstockError, meaning
from common.logs import Log
from services.router.shapes import DONE, error_body, event

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
REQUEST_ID = "penstock.request_id"

log = Log("http")


class Exchange:
    """A request that is being answered. States: nothing sent -> streaming -> ended."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._streaming = False
        self.request_id: str = scope[REQUEST_ID]
        self.headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}

    async def body(self, limit: int) -> bytes:
        """The whole body.

        Raises:
            PayloadTooLarge: over the limit, as announced or as counted.
            Cancelled: the client is gone already.
        """
        announced = self.headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > limit:
            raise PayloadTooLarge(f"the body has {announced} bytes: at most {limit}")
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Cancelled("the client went away before its body was there")
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise PayloadTooLarge(f"the body has more than {limit} bytes")
            parts.append(part)
            if not message.get("more_body"):
                return b"".join(parts)

    async def run(self, handler: Callable[["Exchange"], Awaitable[None]]) -> None:
        """Runs the handler until it ends or the client goes."""
        main = asyncio.ensure_future(self._answered(handler))
        gone = asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait({main, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            main.cancel()
            await asyncio.gather(main, gone, return_exceptions=True)

    async def json(self, payload: Any, status: int = 200, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        data = msgspec.json.encode(payload)
        length = (b"content-length", str(len(data)).encode())
        await self._start(status, ((b"content-type", b"application/json"), length, *headers))
        await self._send({"type": "http.response.body", "body": data})

    async def stream(self, data: bytes) -> None:
        """A piece of the event stream; the first one sends the headers."""
        if not self._streaming:
            self._streaming = True
            kind = (b"content-type", b"text/event-stream; charset=utf-8")
            await self._start(200, (kind, (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")))
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": DONE})

    async def fail(self, error: BaseException) -> None:
        """The error as a response, or as the stream's last event."""
        if not isinstance(error, PenstockError) or isinstance(error, Internal):
            log.exception("request_failed", request_id=self.request_id)
        body = error_body(error)
        if self._streaming:
            await self.stream(event(body))
            await self.end()
        else:
            await self.json(body, meaning(error).http_status, retry_after(error))

    async def _answered(self, handler: Callable[["Exchange"], Awaitable[None]]) -> None:
        try:
            await handler(self)
        except Exception as error:
            await self.fail(error)

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _start(self, status: int, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        await self._send({"type": "http.response.start", "status": status, "headers": list(headers)})


def retry_after(error: BaseException) -> tuple[tuple[bytes, bytes], ...]:
    """The Retry-After header, in whole seconds, of an error that says when to come back."""
    if not isinstance(error, PenstockError) or not meaning(error).retry:
        return ()
    return ((b"retry-after", str(max(1, math.ceil(error.retry_after_s or 1))).encode()),)
