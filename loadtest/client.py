"""A measuring client: one streamed completion over HTTP, with the times that matter."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import httpx
import msgspec

REQUEST_DEADLINE_S = 600.0


class Outcome(msgspec.Struct, frozen=True):
    """One finished request. Times in seconds from the moment it was sent."""

    ttft_s: float
    seconds: float
    output_tokens: int
    cached_tokens: int
    token_ids: tuple[int, ...]

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first."""
        return (self.seconds - self.ttft_s) / max(1, self.output_tokens - 1)


def client() -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=256, max_keepalive_connections=256)
    return httpx.AsyncClient(timeout=REQUEST_DEADLINE_S, limits=limits, trust_env=False)


async def complete(http: httpx.AsyncClient, url: str, model: str, prompt: Sequence[int], tokens: int, **more: Any) -> Outcome:
    """Streams exactly `tokens` tokens after `prompt`. Raises RuntimeError when the server says no."""
    body = {
        "model": model, "prompt": list(prompt), "max_tokens": tokens, "ignore_eos": True, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True,
    } | more  # fmt: skip
    began = time.perf_counter()
    first = last = 0.0
    ids: list[int] = []
    usage: dict[str, Any] = {}
    async with http.stream("POST", f"{url}/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()[:300]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = msgspec.json.decode(line[6:])
            if "error" in chunk:
                raise RuntimeError(str(chunk["error"]))
            if chunk["choices"]:
                last = time.perf_counter()
                first = first or last
                ids += chunk["choices"][0].get("token_ids") or []
            usage = chunk.get("usage") or usage
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Outcome(first - began, last - began, usage["completion_tokens"], cached, tuple(ids))


async def at_concurrency(
    http: httpx.AsyncClient, url: str, model: str, prompts: Sequence[Sequence[int]], tokens: int, concurrency: int
) -> tuple[float, list[Outcome]]:
    """All prompts, `concurrency` in flight; wall seconds and the outcomes."""
    gate = asyncio.Semaphore(concurrency)

    async def one(prompt: Sequence[int]) -> Outcome:
        async with gate:
            return await complete(http, url, model, prompt, tokens)

    began = time.perf_counter()
    outcomes = await asyncio.gather(*(one(prompt) for prompt in prompts))
    return time.perf_counter() - began, outcomes
