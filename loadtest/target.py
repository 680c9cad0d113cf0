"""Which cluster a load test is aimed at, whether it may be, and what it serves."""

import ipaddress
import random
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec

from common.errors import PenstockError, SettingsError, Unavailable
from loadtest.corpus import Corpus
from loadtest.streaming import connect
from services.cli import state

DEFAULT_URL = "http://127.0.0.1:8080"
DATA = Path("data")  # where `make up` keeps its state
MEASURED_CHARACTERS = 2000
ANSWER_S = 60.0


class Target(msgspec.Struct, frozen=True):
    """A cluster that answers."""

    url: str
    model: str
    context_tokens: int
    members: dict[str, int]  # how many workers of each role; empty when the server doesn't say


def choose(url: str, data: Path | None, allow_remote: bool) -> str:
    """The URL to load: `url`, else the cluster of `data`, else the one of ./data, else the default.

    Raises:
        SettingsError: not a URL, another machine's without `allow_remote`, or `data` has no running cluster.
    """
    if url:
        return _checked(url.rstrip("/"), allow_remote)
    cluster = state.read((data or DATA).expanduser().resolve())
    if cluster is not None and cluster.url and state.alive(cluster.launcher):
        return cluster.url.rstrip("/")
    if data is not None:
        raise SettingsError(f"--data {data}: no cluster runs there; start one with: penstock up --data {data} --detach")
    return DEFAULT_URL


def _checked(url: str, allow_remote: bool) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingsError(f"--url {url}: expected a URL such as {DEFAULT_URL}")
    if not is_loopback(parts.hostname) and not allow_remote:
        raise SettingsError(
            f"--url {url}: not on this machine; load is put on loopback addresses only, or give --allow-remote "
            "if that cluster is yours"
        )
    return url


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def inspect(url: str, api_key: str, model: str) -> Target:
    """Asks the cluster what it is.

    Raises:
        Unavailable: nothing answers, or it is not ready.
        PenstockError: it answers otherwise than an OpenAI-style server, or has no such model.
    """
    with connect(url, api_key) as http:
        try:
            cards = _get(http, url, "/v1/models")["data"]
            ready = http.get("/ready", timeout=ANSWER_S)
            status = http.get("/v1/penstock/status", timeout=ANSWER_S)
        except httpx.HTTPError as error:
            raise Unavailable(f"nothing answers at {url}; start a cluster with: make up") from error
        except (KeyError, TypeError) as error:
            raise PenstockError(f"{url}/v1/models: not the answer of an OpenAI-style server") from error
    if ready.status_code == 503:
        raise Unavailable(f"{url} is not ready: {ready.text[:200]}")
    card = next((card for card in cards if model in ("", card["id"])), None)
    if card is None:
        raise SettingsError(f"--model {model}: not served; there is {', '.join(card['id'] for card in cards)}")
    members = status.json()["members"] if status.status_code == 200 else []
    roles = [str(member["role"]) for member in members]
    return Target(url, card["id"], int(card["max_model_len"]), {role: roles.count(role) for role in sorted(set(roles))})


def tokens_per_character(target: Target, api_key: str, corpus: Corpus, rng: random.Random) -> float:
    """How the model's tokenizer cuts the corpus up: one short request, which also shows that the model answers."""
    _, text = corpus.excerpt(rng, min(MEASURED_CHARACTERS, target.context_tokens // 4))
    body = {"model": target.model, "prompt": text, "max_tokens": 1}
    with connect(target.url, api_key) as http:
        try:
            response = http.post("/v1/completions", json=body, timeout=ANSWER_S)
        except httpx.HTTPError as error:
            raise Unavailable(f"{target.url} lost the first request: {type(error).__name__}: {error}") from error
    if response.status_code != 200:
        raise Unavailable(f"{target.url} refused the first request with {response.status_code}: {response.text[:300]}")
    return float(response.json()["usage"]["prompt_tokens"] / len(text))


def _get(http: httpx.Client, url: str, path: str) -> Any:
    response = http.get(path, timeout=ANSWER_S)
    if response.status_code != 200:
        raise PenstockError(f"{url}{path} answers {response.status_code}: {response.text[:200]}")
    try:
        return response.json()
    except ValueError as error:
        raise PenstockError(f"{url}{path}: the answer is not JSON") from error
