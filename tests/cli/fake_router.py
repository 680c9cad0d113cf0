"""An HTTP server that answers as the router does: models, a streamed chat, status. For the chat client's tests."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STATUS = {
    "ready": True,
    "reason": "",
    "in_flight": 1,
    "requests_max": 512,
    "nats": {"url": "nats://x", "connected": True},
    "members": [
        {"role": "decode", "id": "decode-0", "usable": True, "load": {"running": 2, "waiting": 1, "pool_blocks_free": 3, "pool_blocks_total": 4}},
        {"role": "kvstore", "id": "kvstore-0", "usable": True, "store": {"used_bytes": 1 << 20, "budget_bytes": 4 << 20, "blocks": 9, "evictions": 2}},
        {"role": "prefill", "id": "prefill-0", "usable": False, "detail": "lost: connection refused"},
    ],
}  # fmt: skip


class FakeRouter(ThreadingHTTPServer):
    """`asked` holds the bodies that came; `gone` is set when a client leaves in mid-stream."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[dict[str, Any]] = []
        self.gone = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeRouter

    def do_GET(self) -> None:
        self._json({"/v1/models": {"data": [{"id": "tiny"}]}, "/v1/penstock/status": STATUS}[self.path])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        said = body["messages"][-1]["content"]
        if said == "refuse":
            self._json({"error": {"message": "prompt has 9 tokens, the context 8"}}, 400)
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        try:
            self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": "you said "}}]})
            while said == "forever":
                self._event({"choices": [{"index": 0, "delta": {"content": "on "}}]})
            if said == "break":
                self._event({"error": {"message": "the worker died"}})
            self._event({"choices": [{"index": 0, "delta": {"content": said + "\x1b[2J"}, "finish_reason": "stop"}]})
            usage = {"prompt_tokens": 1100, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1024}}
            self._event({"choices": [], "usage": usage | {"penstock": {"route": "direct"}}})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.server.gone.set()

    def _event(self, payload: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(payload).encode() + b"\n\n")
        self.wfile.flush()

    def _json(self, payload: Any, status: int = 200) -> None:
        data = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def fake_router() -> Iterator[FakeRouter]:
    server = FakeRouter()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
