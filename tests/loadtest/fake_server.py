"""An OpenAI-style server on loopback that answers as told: what a real cluster does only when it is in trouble."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Behaviour = Literal["fine", "busy", "broken", "torn", "error_inside", "endless"]
CONTEXT_TOKENS = 1024
TOKENS = 3


class FakeServer(ThreadingHTTPServer):
    """`behave(n)` says how streamed request n (from 1) is answered. `bodies` keeps what came."""

    daemon_threads = True

    def __init__(self, behave: Callable[[int], Behaviour]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behave = behave
        self.bodies: list[dict[str, Any]] = []
        self.closing = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def fake_server(behave: Callable[[int], Behaviour] = lambda number: "fine") -> Iterator[FakeServer]:
    with FakeServer(behave) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        card = {"id": "fake", "object": "model", "max_model_len": CONTEXT_TOKENS}
        answers = {"/v1/models": {"object": "list", "data": [card]}, "/ready": {"ready": True}}
        self._json(200 if self.path in answers else 404, answers.get(self.path, {}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not body.get("stream"):
            self._json(200, {"usage": {"prompt_tokens": max(1, len(body["prompt"]) // 3)}})
            return
        with self.server.lock:
            self.server.bodies.append({"path": self.path, "request_id": self.headers["x-request-id"]} | body)
            number = len(self.server.bodies)
        behaviour = self.server.behave(number)
        if behaviour == "busy":
            self._json(429, {"error": {"message": "full", "code": "overloaded"}}, retry_after="1")
        elif behaviour == "broken":
            self._json(500, {"error": {"message": "<b>broken</b>", "code": "internal_error"}})
        else:
            self._stream(body, behaviour)

    def _stream(self, body: dict[str, Any], behaviour: Behaviour) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        prompt = len(json.dumps(body.get("messages") or body["prompt"])) // 3
        for index in range(TOKENS):
            finish = "length" if index == TOKENS - 1 else None
            text = {"delta": {"content": "ab"}} if "messages" in body else {"text": "ab"}
            self._event({"choices": [text | {"index": 0, "finish_reason": finish, "token_ids": [index]}]})
        if behaviour == "error_inside":
            self._event({"error": {"message": "lost a worker", "code": "unavailable"}})
        if behaviour == "endless":
            self.server.closing.wait()
        usage = {"prompt_tokens": prompt, "completion_tokens": TOKENS, "prompt_tokens_details": {"cached_tokens": prompt // 2}}
        self._event({"choices": [], "usage": usage | {"penstock": {"route": "direct"}}})
        if behaviour != "torn":
            self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, payload: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(payload).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        try:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        except OSError:
            self.close_connection = True

    def _json(self, status: int, payload: dict[str, Any], retry_after: str = "") -> None:
        data = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        if retry_after:
            self.send_header("retry-after", retry_after)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a test's output stays its own."""
