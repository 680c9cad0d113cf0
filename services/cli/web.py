"""Small HTTP requests to the router, with the standard library: the launcher's probe, `status`, `doctor`."""

import http.client
import json
from typing import Any, NamedTuple
from urllib.parse import urlsplit


class Answer(NamedTuple):
    """An HTTP answer; `body` is None where it is not JSON."""

    status: int
    body: Any


def get(url: str, timeout_s: float) -> Answer | None:
    """GET; None when nobody answers in time."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        connection.request("GET", parts.path or "/")
        response = connection.getresponse()
        text = response.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    try:
        return Answer(response.status, json.loads(text))
    except ValueError:
        return Answer(response.status, None)


def reachable_host(host: str) -> str:
    """The host a client on this machine uses for a server that listens on `host`, ready for a URL."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"[{shown}]" if ":" in shown else shown


def base_url(host: str, address: str) -> str:
    """`http://host:port` of a router that reported `address` (host:port, or a URL)."""
    port = address.rstrip("/").rpartition(":")[2]
    return f"http://{reachable_host(host)}:{port}"


def reason_in(answer: Answer | None) -> str:
    """Why a router is not ready, in its own words where it has some."""
    if answer is None:
        return "the router does not answer yet"
    body = answer.body if isinstance(answer.body, dict) else {}
    error = body.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or body.get("reason") or f"the router answers {answer.status}")
