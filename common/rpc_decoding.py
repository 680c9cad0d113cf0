"""What a gRPC server does with a message that isn't one of its method's type: the call ends with INVALID_ARGUMENT.

gRPC by itself answers UNKNOWN when a request can't be decoded, as if the fault were ours. `RefuseMalformed` decodes
unary requests to a `Malformed`, which the wrapped method refuses; of a stream of requests, iterating or reading raises
`InvalidRequest`, which the method handles as it does any other.
"""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import msgspec
from google.protobuf.message import DecodeError

from common.errors import InvalidRequest

Refuse = Callable[[Any, BaseException], Awaitable[None]]


class Malformed(msgspec.Struct, frozen=True):
    """Stands in for a request that can't be decoded."""

    error: InvalidRequest


class RefuseMalformed(grpc.aio.ServerInterceptor):
    """For every method of a server. `refuse` ends a call with an error; it raises."""

    def __init__(self, refuse: Refuse) -> None:
        self._refuse = refuse
        self._checked: dict[str, Any] = {}  # by method, of those that exist

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        method = handler_call_details.method
        if method not in self._checked:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None  # nobody implements it
            self._checked[method] = self._check(method, handler)
        return self._checked[method]

    def _check(self, method: str, handler: Any) -> Any:
        decode, encode = handler.request_deserializer, handler.response_serializer
        match handler.request_streaming, handler.response_streaming:
            case False, False:
                make, answer = grpc.unary_unary_rpc_method_handler, handler.unary_unary
            case False, True:
                make, answer = grpc.unary_stream_rpc_method_handler, handler.unary_stream
            case True, False:
                make, answer = grpc.stream_unary_rpc_method_handler, handler.stream_unary
            case _:
                make, answer = grpc.stream_stream_rpc_method_handler, handler.stream_stream
        if handler.request_streaming:
            return make(answer, _or_raise(method, decode), encode)
        if inspect.isasyncgenfunction(answer):
            return make(self._stream(answer), _or_malformed(method, decode), encode)
        if inspect.iscoroutinefunction(answer):
            return make(self._unary(answer), _or_malformed(method, decode), encode)
        return handler  # generated, and says that it isn't implemented

    def _unary(self, answer: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        async def checked(request: Any, context: Any) -> Any:
            if isinstance(request, Malformed):
                await self._refuse(context, request.error)
            return await answer(request, context)

        return checked

    def _stream(self, answer: Callable[[Any, Any], AsyncIterator[Any]]) -> Callable[[Any, Any], AsyncIterator[Any]]:
        async def checked(request: Any, context: Any) -> AsyncIterator[Any]:
            if isinstance(request, Malformed):
                await self._refuse(context, request.error)
            async for message in answer(request, context):
                yield message

        return checked


def _or_raise(method: str, decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def decoded(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError as error:
            raise InvalidRequest(f"{method} got {len(data)} bytes that are no message of its type: {error}") from error

    return decoded


def _or_malformed(method: str, decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    or_raise = _or_raise(method, decode)

    def decoded(data: bytes) -> Any:
        try:
            return or_raise(data)
        except InvalidRequest as error:
            return Malformed(error)

    return decoded
