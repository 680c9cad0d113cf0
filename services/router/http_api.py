"""The HTTP application: OpenAI's endpoints, health, readiness, metrics, status."""

import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from common import tracing
from common.errors import Cancelled, InvalidRequest, NotFound, PenstockError, Unauthenticated, meaning
from services.router.answers import stream, whole
from services.router.choice import Delta
from services.router.exchange import REQUEST_ID, Exchange, Receive, Scope, Send, retry_after
from services.router.generation import Generation
from services.router.generator import Generator
from services.router.prepare import Envelope, chat_work, check_model, completion_work, echo_prompts
from services.router.schema import ChatBody, Common, CompletionBody, decode_body
from services.router.shapes import ChatShape, CompletionShape, Head, Shape, Wanted, error_body, event, usage
from services.router.status import Facts
from services.router.work import Work

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}\Z")  # longer or stranger ones are replaced
_OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})  # probes and scrapers carry no key


class Api:
    """Endpoints over one generator."""

    def __init__(self, generator: Generator, facts: Facts, keys: Sequence[str]) -> None:
        self._g = generator
        self._facts = facts
        self._name = facts.model_name
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]

    def app(self) -> "Gate":
        posts = {
            "/v1/completions": _Endpoint(self, self._completions),
            "/v1/chat/completions": _Endpoint(self, self._chat),
        }
        routes = [
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{id:path}", self._one_model, methods=["GET"]),
            Route("/v1/penstock/status", self._status, methods=["GET"]),
            Route("/v1/penstock/explain", self._explain, methods=["GET"]),
            Route("/v1/penstock/explain/{id:path}", self._explain, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/ready", self._ready, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
        ]
        handlers: dict[Any, Any] = {HTTPException: _http_problem, PenstockError: _problem, Exception: _problem}
        return Gate(Starlette(routes=routes, exception_handlers=handlers), posts, self._keys)

    @property
    def body_bytes_max(self) -> int:
        return self._g.settings.body_bytes_max

    async def _completions(self, exchange: Exchange, data: bytes) -> None:
        body = decode_body(data, CompletionBody)
        self._check(body)
        work = await completion_work(self._g, body, self._envelope(exchange))
        wanted = Wanted(body.logprobs, bool(body.return_token_ids))
        head = Head(f"cmpl-{exchange.request_id}", int(time.time()), self._name)
        prompts = await echo_prompts(self._g, body) if work is None else work.prompts
        echo = [self._echo(body.prompt, i, ids) for i, ids in enumerate(prompts)] if body.echo else []
        shape = CompletionShape(head, self._g.model, wanted, prompts, (body.n or 1), echo)
        if work is None:
            await self._echo_only(exchange, body, shape, sum(map(len, prompts)), len(prompts))
        else:
            await self._answer(exchange, body, work, shape)

    async def _chat(self, exchange: Exchange, data: bytes) -> None:
        body = decode_body(data, ChatBody)
        self._check(body)
        work = await chat_work(self._g, body, self._envelope(exchange))
        wanted = Wanted(work.samplings[0][0].logprobs, bool(body.return_token_ids))
        head = Head(f"chatcmpl-{exchange.request_id}", int(time.time()), self._name)
        await self._answer(exchange, body, work, ChatShape(head, self._g.model, wanted, work.prompts))

    def _check(self, body: Common) -> None:
        check_model(self._g, self._name, body.model)
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("stream_options: expected stream = true beside it", param="stream_options")

    def _envelope(self, exchange: Exchange) -> Envelope:
        return Envelope(exchange.request_id, self._g.settings.request_timeout_s, tracing.from_headers(exchange.headers))

    async def _answer(self, exchange: Exchange, body: Common, work: Work, shape: Shape) -> None:
        async with Generation(self._g, work) as generation:
            if body.stream:
                await stream(exchange, body, generation, shape)
            else:
                await whole(exchange, generation, shape)

    async def _echo_only(
        self, exchange: Exchange, body: CompletionBody, shape: CompletionShape, prompt_tokens: int, n: int
    ) -> None:
        """max_tokens = 0 with echo: the prompt comes back and nothing is generated."""
        deltas = [Delta(index, "", (), None) for index in range(n)]
        answer = shape.full(deltas)
        for choice in answer["choices"]:
            choice["finish_reason"] = "length"
        if not body.stream:
            await exchange.json(answer | {"usage": usage(prompt_tokens, 0, 0)})
            return
        await exchange.stream(event(answer))
        await exchange.end()

    def _echo(self, prompt: Any, index: int, ids: Sequence[int]) -> str:
        given = prompt if isinstance(prompt, str) else prompt[index]
        return given if isinstance(given, str) else self._g.model.decode(ids)

    async def _models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._facts.model_card()]})

    async def _one_model(self, request: Request) -> Response:
        check_model(self._g, self._name, request.path_params["id"])
        return _json(self._facts.model_card())

    async def _status(self, request: Request) -> Response:
        return _json(self._facts.status())

    async def _explain(self, request: Request) -> Response:
        return _json(self._facts.explained(request.path_params.get("id")))

    async def _health(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        reason = self._facts.not_ready()
        return _json({"ready": not reason} | ({"reason": reason} if reason else {}), 503 if reason else 200)

    async def _metrics(self, request: Request) -> Response:
        return Response(self._g.metrics.expose(self._g.cluster), media_type="text/plain; version=0.0.4; charset=utf-8")


class _Endpoint:
    """An ASGI application for one POST endpoint."""

    def __init__(self, api: Api, handler: Any) -> None:
        self._api = api
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        try:
            self._api._g.refuse_when_full(1)
            data = await exchange.body(self._api.body_bytes_max)
        except Cancelled:
            return
        except PenstockError as error:
            await exchange.fail(error)
            return
        await exchange.run(lambda answering: self._handler(answering, data))


class Gate:
    """In front of everything: the request id, and the API key. `posts`, by path, need nothing of the framework's on their way."""

    def __init__(self, app: Any, posts: Mapping[str, Any], keys: Sequence[bytes]) -> None:
        self._app = app
        self._posts = posts
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID.match(given) else uuid.uuid4().hex
        scope[REQUEST_ID] = request_id

        async def send_with_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        if self._keys and scope["path"] not in _OPEN_PATHS and not self._known(headers.get(b"authorization", b"")):
            await Exchange(scope, receive, send_with_id).fail(
                Unauthenticated("missing or wrong API key: expected the header 'Authorization: Bearer <key>'")
            )
            return
        app = self._posts.get(scope["path"], self._app) if scope["method"] == "POST" else self._app
        await app(scope, receive, send_with_id)

    def _known(self, header: bytes) -> bool:
        """Compares in constant time, over hashes, with every key."""
        scheme, _, key = header.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


def _json(payload: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(payload), status, media_type="application/json")


async def _problem(request: Request, error: Exception) -> Response:
    response = _json(error_body(error), meaning(error).http_status)
    for name, value in retry_after(error):
        response.headers[name.decode()] = value.decode()
    return response


async def _http_problem(request: Request, error: HTTPException) -> Response:
    """404 and 405 of the framework, in OpenAI's shape."""
    path = f"{request.method} {request.url.path}"
    known = (
        "/v1/completions, /v1/chat/completions, /v1/models, /v1/penstock/status, /v1/penstock/explain, /health, /ready, /metrics"
    )
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        problem: PenstockError = InvalidRequest(f"{path}: expected the method {allowed}")
    else:
        problem = NotFound(f"{path}: no such endpoint; there are {known}")
    return Response(
        msgspec.json.encode(error_body(problem)),
        error.status_code,
        headers=dict(error.headers or {}),
        media_type="application/json",
    )
