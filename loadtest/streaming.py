"""One streamed request to an OpenAI-style server, with the times that matter and how it went."""

import time
from typing import Any

import httpx
import msgspec

from loadtest.samples import Outcome

SILENCE_S = 120.0  # between two bytes; the end of the test comes first as a rule
CONNECT_S = 10.0
RETRY_AFTER_MAX_S = 10.0
MESSAGE_CHARS_MAX = 300


def connect(url: str, api_key: str) -> httpx.Client:
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S), trust_env=False)


class Answer:
    """One answer. It is filled while it streams, so that one that is cut short says what came until then."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.total_s = 0.0
        self.chunk_s: list[float] = []
        self.text = ""
        self.token_ids: list[int] = []  # where the request asked for them
        self.usage: dict[str, Any] = {}
        self.finish_reason = ""
        self.status = 0
        self.retry_after_s = 0.0
        self.code = ""
        self.message = ""
        self._done = False

    @property
    def outcome(self) -> Outcome:
        if self.code:
            return "refused" if self.status == 429 else "error"
        return "ok" if self._done else "cut"

    def stream(self, http: httpx.Client, path: str, body: dict[str, Any], request_id: str) -> None:
        """Sends and reads to the end. What goes wrong is in `code` and `message`; nothing is raised for it."""
        self.began = time.perf_counter()
        try:
            with http.stream("POST", path, json=body, headers={"x-request-id": request_id}) as response:
                self.status = response.status_code
                if self.status != 200:
                    self._refused(response)
                    return
                for line in response.iter_lines():
                    self._line(line)
            if not self._done and not self.code:
                self._fail("truncated", "the stream ended without [DONE]")
        except httpx.TimeoutException as error:
            self._fail("timeout", f"{type(error).__name__}: {error}")
        except httpx.HTTPError as error:
            self._fail("connection", f"{type(error).__name__}: {error}")
        except (msgspec.DecodeError, KeyError, TypeError, AttributeError) as error:
            self._fail("unreadable", f"{type(error).__name__}: {error}")
        finally:
            self.total_s = time.perf_counter() - self.began

    def _line(self, line: str) -> None:
        if not line.startswith("data: "):
            return
        if line == "data: [DONE]":
            self._done = True
            return
        now = time.perf_counter()
        event = msgspec.json.decode(line[6:])
        if "error" in event:
            self._error(event["error"])
            return
        self.usage = event.get("usage") or self.usage
        for choice in event["choices"]:
            text = (choice["delta"].get("content") if "delta" in choice else choice["text"]) or ""
            if text or choice.get("token_ids") or choice.get("finish_reason"):  # some servers begin with a role alone
                self.chunk_s.append(now - self.began)
            self.token_ids += choice.get("token_ids") or []
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            self.text += text

    def _refused(self, response: httpx.Response) -> None:
        content = response.read()
        try:
            self._error(msgspec.json.decode(content)["error"])
        except (msgspec.DecodeError, KeyError, TypeError):
            self._fail(f"http_{self.status}", content.decode(errors="replace"))
        given = response.headers.get("retry-after", "")
        self.retry_after_s = min(RETRY_AFTER_MAX_S, float(given)) if given.isdigit() else 1.0

    def _error(self, error: Any) -> None:
        fields = error if isinstance(error, dict) else {"message": error}
        self._fail(str(fields.get("code") or f"http_{self.status}"), str(fields.get("message")))

    def _fail(self, code: str, message: str) -> None:
        self.code, self.message = code, message[:MESSAGE_CHARS_MAX]
