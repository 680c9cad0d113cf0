"""The HTTP side of `penstock chat`: streams one answer and keeps what it cost."""

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import msgspec

from common.errors import PenstockError, Unavailable

Message = dict[str, str]
_CONNECT_S = 10.0
_SILENCE_S = 300.0  # between two pieces: a long prompt on a slow machine


class Options(msgspec.Struct, frozen=True):
    max_tokens: int
    temperature: float | None = None


class Turn:
    """One answer and its cost; filled while it streams."""

    def __init__(self) -> None:
        self.text = ""
        self.ttft_s: float | None = None
        self.streaming_s = 0.0
        self.usage: dict[str, Any] = {}
        self.route = ""
        self.finish_reason = ""

    def in_words(self) -> str:
        parts = [self.route, self._cached()]
        if self.ttft_s is not None:
            parts.append(f"ttft {1000 * self.ttft_s:,.0f} ms")
        tokens = int(self.usage.get("completion_tokens", 0))
        if tokens:
            parts.append(f"{tokens} tokens")
        if tokens > 1 and self.streaming_s > 0:
            parts.append(f"{(tokens - 1) / self.streaming_s:.1f} tok/s")
        if self.finish_reason == "length":
            parts.append("cut at --max-tokens")
        return " · ".join(part for part in parts if part)

    def _cached(self) -> str:
        if not self.usage:
            return ""
        details = self.usage.get("prompt_tokens_details") or {}
        return f"cached {details.get('cached_tokens', 0):,} of {self.usage.get('prompt_tokens', 0):,}"


class ChatClient:
    """A connection to one router.

    Raises (when made):
        Unavailable: nobody answers there.
    """

    def __init__(self, url: str, model: str, api_key: str, options: Options) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(
            base_url=url, headers=headers, timeout=httpx.Timeout(_SILENCE_S, connect=_CONNECT_S), trust_env=False
        )
        self._options = options
        self._url = url
        self.model = model or self._served()

    def __enter__(self) -> "ChatClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def stream(self, messages: Sequence[Message], turn: Turn) -> Iterator[str]:
        """The answer, piece by piece. Closing the iterator early cancels the request.

        Raises:
            PenstockError: the server refused it, or the connection was lost.
        """
        body: dict[str, Any] = {"model": self.model, "messages": list(messages), "stream": True}
        body |= {"max_tokens": self._options.max_tokens, "stream_options": {"include_usage": True}}
        if self._options.temperature is not None:
            body["temperature"] = self._options.temperature
        began = time.monotonic()
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise PenstockError(_error_in(response))
                for line in response.iter_lines():
                    if piece := _piece(line, turn):
                        now = time.monotonic()
                        turn.ttft_s = now - began if turn.ttft_s is None else turn.ttft_s
                        turn.streaming_s = now - began - turn.ttft_s
                        turn.text += piece
                        yield piece
        except httpx.HTTPError as error:
            raise Unavailable(f"{self._url}: the connection was lost ({error or type(error).__name__})") from error

    def _served(self) -> str:
        try:
            response = self._client.get("/v1/models", timeout=_CONNECT_S)
        except httpx.HTTPError as error:
            raise Unavailable(f"nothing answers at {self._url}; start a cluster with: penstock up") from error
        if response.status_code != 200:
            raise PenstockError(f"{self._url}: {_error_in(response)}")
        return str(response.json()["data"][0]["id"])


def _piece(line: str, turn: Turn) -> str:
    """The text in one line of the event stream; usage and route go to `turn`."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return ""
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        raise PenstockError(str(event["error"].get("message", event["error"])))
    if event.get("usage"):
        turn.usage = event["usage"]
        turn.route = str((turn.usage.get("penstock") or {}).get("route", ""))
    for choice in event.get("choices", ()):
        turn.finish_reason = choice.get("finish_reason") or turn.finish_reason
        return str(choice.get("delta", {}).get("content") or "")
    return ""


def _error_in(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answers {response.status_code}"
