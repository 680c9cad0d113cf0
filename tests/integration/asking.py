"""A client's side of the integration tests: completions of token-id prompts over HTTP."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec

from tests.integration.cluster import Cluster
from tests.integration.oracle import greedy

SETTLE_DEADLINE_S = 30.0
LOGPROB_TOLERANCE = 1e-4


class Answer(msgspec.Struct, frozen=True):
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    cached_tokens: int


def ask(cluster: Cluster, prompt: Sequence[int], tokens: int = 24, **more: Any) -> Answer:
    """A greedy completion with log-probabilities."""
    body = {"prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "logprobs": 0, "return_token_ids": True} | more
    reply = httpx.post(f"{cluster.url}/v1/completions", json=body | {"model": cluster.model.name}, timeout=120, trust_env=False)
    assert reply.status_code == 200, reply.text
    document = reply.json()
    choice = document["choices"][0]
    assert document["usage"]["completion_tokens"] == len(choice["token_ids"])
    assert document["usage"]["prompt_tokens"] == len(prompt)
    cached = document["usage"]["prompt_tokens_details"]["cached_tokens"]
    return Answer(tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]), cached)


def ask_together(cluster: Cluster, prompts: Sequence[Sequence[int]], tokens: int = 24) -> list[Answer]:
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: ask(cluster, prompt, tokens), prompts))


def check(directory: Path, prompt: Sequence[int], answer: Answer, tokens: int = 24) -> None:
    """The answer is what `transformers.generate` says."""
    expected, logprobs = greedy(directory, prompt, tokens)
    assert list(answer.token_ids) == expected
    worst = max(abs(ours - theirs) for ours, theirs in zip(answer.logprobs, logprobs, strict=True))
    assert worst < LOGPROB_TOLERANCE, worst


def settled(cluster: Cluster, blocks: int) -> None:
    """Waits until the reservoir holds at least so many blocks."""
    until = time.monotonic() + SETTLE_DEADLINE_S
    while time.monotonic() < until:
        blocks_now = stored_blocks(cluster)
        if blocks_now >= blocks:
            return
        time.sleep(0.1)  # a poll of another process, bounded above
    raise AssertionError(f"fewer than {blocks} blocks after {SETTLE_DEADLINE_S} s: {blocks_now}")


def stored_blocks(cluster: Cluster) -> int:
    """Blocks in all kvstores, as the router last heard."""
    members = httpx.get(f"{cluster.url}/v1/penstock/status", timeout=10, trust_env=False).json()["members"]
    return sum((member.get("store") or {}).get("blocks", 0) for member in members)
