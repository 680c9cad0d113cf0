"""Responses of the OpenAI HTTP API, as JSON and as server-sent events. Pure.

A `Shape` is one endpoint's way of writing choices. Golden examples: tests/router/test_shapes.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from common.errors import PenstockError, meaning
from common.generation import Token
from services.router.choice import Delta
from services.router.model import Model

DONE = b"data: [DONE]\n\n"
_LOGPROB_MIN = -9999.0  # JSON has no -Infinity; OpenAI writes this
_TYPE_OF_STATUS = {401: "authentication_error", 429: "rate_limit_error"}


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def error_body(error: BaseException) -> dict[str, Any]:
    """OpenAI's error object. What is not of our tree is our bug and says nothing of itself."""
    sense = meaning(error)
    return {
        "error": {
            "message": error.message if isinstance(error, PenstockError) else "internal error: see the router's log",
            "type": _TYPE_OF_STATUS.get(
                sense.http_status, "invalid_request_error" if sense.http_status < 500 else "server_error"
            ),
            "param": error.param if isinstance(error, PenstockError) else None,
            "code": sense.code,
        }
    }


def event(payload: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"


class Head(msgspec.Struct, frozen=True):
    """What every message of one response repeats."""

    id: str
    created: int
    model: str


class Wanted(msgspec.Struct, frozen=True):
    """Which optional parts the client asked for."""

    logprobs: int | None = None
    token_ids: bool = False


class CompletionShape:
    """/v1/completions. `echo` is what comes before a prompt's choices, by choice index."""

    def __init__(
        self, head: Head, model: Model, wanted: Wanted, prompts: Sequence[Sequence[int]], n: int, echo: Sequence[str] = ()
    ) -> None:
        self._head = {"id": head.id, "object": "text_completion", "created": head.created, "model": head.model}
        self._model = model
        self._wanted = wanted
        self._prompts = prompts
        self._n = n
        self._echo = echo
        self._offsets: dict[int, int] = {}

    def chunk(self, delta: Delta, first: bool) -> dict[str, Any]:
        choice = self._choice(delta, first)
        return self._head | {"choices": [choice]}

    def usage_chunk(self) -> dict[str, Any]:
        return self._head | {"choices": []}

    def full(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        return self._head | {"choices": [self._choice(delta, True) for delta in deltas]}

    def worth_sending(self, delta: Delta) -> bool:
        return bool(delta.text or delta.finish or self._wanted.token_ids or self._wanted.logprobs is not None)

    def _choice(self, delta: Delta, first: bool) -> dict[str, Any]:
        prompt = delta.index // self._n
        echoed = self._echo[prompt] if self._echo and first else ""
        choice: dict[str, Any] = {
            "index": delta.index,
            "text": echoed + delta.text,
            "logprobs": self._logprobs(delta, len(echoed)),
        }
        choice["finish_reason"] = delta.finish
        choice["stop_reason"] = delta.stop_reason
        if self._wanted.token_ids:
            choice["token_ids"] = [token.id for token in delta.tokens]
            if first:
                choice["prompt_token_ids"] = self._prompts[prompt]
        return choice

    def _logprobs(self, delta: Delta, echoed: int) -> dict[str, Any] | None:
        if self._wanted.logprobs is None:
            return None
        offset = self._offsets.get(delta.index, 0) + echoed
        texts = [self._model.token_text(token.id) for token in delta.tokens]
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        self._offsets[delta.index] = offset
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.logprob) for token in delta.tokens],
            "top_logprobs": [self._top(token, text) for token, text in zip(delta.tokens, texts, strict=True)],
            "text_offset": offsets,
        }

    def _top(self, token: Token, text: str) -> dict[str, float | None]:
        out: dict[str, float | None] = {}
        for id_, logprob in token.top:
            out.setdefault(self._model.token_text(id_), _finite(logprob))
        out.setdefault(text, _finite(token.logprob))
        return out


class ChatShape:
    """/v1/chat/completions."""

    def __init__(self, head: Head, model: Model, wanted: Wanted, prompts: Sequence[Sequence[int]]) -> None:
        self._id, self._created, self._name = head.id, head.created, head.model
        self._model = model
        self._wanted = wanted
        self._prompts = prompts

    def chunk(self, delta: Delta, first: bool) -> dict[str, Any]:
        content = {"role": "assistant", "content": delta.text} if first else {"content": delta.text} if delta.text else {}
        choice = {"index": delta.index, "delta": content} | self._tail(delta)
        out = self._head("chat.completion.chunk") | {"choices": [choice]}
        if self._wanted.token_ids and first:
            out["prompt_token_ids"] = self._prompts[0]
        return out

    def usage_chunk(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk") | {"choices": []}

    def full(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        choices = [
            {"index": delta.index, "message": {"role": "assistant", "content": delta.text, "refusal": None}} | self._tail(delta)
            for delta in deltas
        ]
        out = self._head("chat.completion") | {"choices": choices}
        if self._wanted.token_ids:
            out["prompt_token_ids"] = self._prompts[0]
        return out

    def worth_sending(self, delta: Delta) -> bool:
        return bool(delta.text or delta.finish or self._wanted.token_ids or self._wanted.logprobs is not None)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._name}

    def _tail(self, delta: Delta) -> dict[str, Any]:
        logprobs = None
        if self._wanted.logprobs is not None:
            logprobs = {"content": [self._token(token) for token in delta.tokens], "refusal": None}
        tail: dict[str, Any] = {"logprobs": logprobs, "finish_reason": delta.finish, "stop_reason": delta.stop_reason}
        if self._wanted.token_ids:
            tail["token_ids"] = [token.id for token in delta.tokens]
        return tail

    def _token(self, token: Token) -> dict[str, Any]:
        top = [self._one(id_, logprob) for id_, logprob in token.top[: self._wanted.logprobs]]
        return self._one(token.id, token.logprob) | {"top_logprobs": top}

    def _one(self, id_: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self._model.token_text(id_), "logprob": _finite(logprob), "bytes": self._model.token_bytes(id_)}


Shape = CompletionShape | ChatShape


def merge(deltas: Sequence[Delta]) -> Delta:
    """All of one choice's deltas as one."""
    last = deltas[-1]
    tokens = tuple(token for delta in deltas for token in delta.tokens)
    return Delta(last.index, "".join(delta.text for delta in deltas), tokens, last.finish, last.stop_reason)


def _finite(logprob: float | None) -> float | None:
    return logprob if logprob is None or math.isfinite(logprob) else _LOGPROB_MIN
