"""A service with nothing inside: logs the events real ones log, answers /ready, ends as it is told.

`python fake_service.py KIND [BEHAVIOUR...]`, behaviours: fail (ends at once with a reason), stubborn
(ignores SIGTERM), crash-on FILE (ends when the file appears, and removes it), brood PIDFILE (starts a
child of its own in its group), unready (never ready), socket PATH (binds a unix socket).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def log(event: str, **fields: object) -> None:
    line = {"ts": time.time(), "level": fields.pop("level", "info"), "service": "fake", "event": event, **fields}
    sys.stderr.write(json.dumps(line) + "\n")
    sys.stderr.flush()


class Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/serve":  # stands for a request: the router logs one event for it
            log(
                "request",
                route="direct",
                prompt_tokens=1100,
                cached_tokens=1024,
                output_tokens=7,
                ttft_ms=41.0,
                tokens_per_s=37.25,
                status="stop",
            )
        self.send_response(503 if "unready" in sys.argv else 200)
        self.end_headers()
        self.wfile.write(b'{"reason": "no decode worker yet"}')

    def log_message(self, *_: object) -> None: ...


def main() -> None:
    kind, behaviours = sys.argv[1], sys.argv[2:]
    if "fail" in behaviours:
        log("failed", level="error", reason="model = '/nowhere': no config.json")
        sys.exit(1)
    stop = threading.Event()
    asked = 0

    def on_term(*_: object) -> None:
        nonlocal asked
        asked += 1
        log("draining")
        if "stubborn" not in behaviours:
            stop.set()

    signal.signal(signal.SIGTERM, on_term)
    if "socket" in behaviours:
        socket.socket(socket.AF_UNIX).bind(behaviours[behaviours.index("socket") + 1])
    if "brood" in behaviours:
        brood = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(behaviours[behaviours.index("brood") + 1]).write_text(str(brood.pid))
    log("loading", percent=50)
    addresses = {}
    if kind == "router":
        server = ThreadingHTTPServer(("127.0.0.1", 0), Ready)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        addresses["http"] = f"127.0.0.1:{server.server_port}"
    log("ready", grpc="127.0.0.1:1", **addresses)
    crash_on = Path(behaviours[behaviours.index("crash-on") + 1]) if "crash-on" in behaviours else None
    while not stop.wait(0.02):
        if crash_on is not None and crash_on.exists():
            crash_on.unlink()
            log("failed", level="error", reason="told to crash")
            os._exit(3)
    log("stopped")


if __name__ == "__main__":
    main()
