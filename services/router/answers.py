"""A generation as HTTP tells it: whole, or as a stream of events."""

import json
from typing import Any

from services.router.choice import Delta
from services.router.exchange import Exchange
from services.router.generation import Generation
from services.router.schema import Common
from services.router.shapes import Shape, event, merge, usage

_EXPLAIN = "x-penstock-explain"  # 1 in a request asks for the header, or in a stream for a comment before the end


async def whole(exchange: Exchange, generation: Generation, shape: Shape) -> None:
    """One JSON body, when all is there."""
    parts: dict[int, list[Delta]] = {}
    async for deltas in generation:
        for delta in deltas:
            parts.setdefault(delta.index, []).append(delta)
    answer = shape.full([merge(parts[index]) for index in sorted(parts)])
    headers = ((_EXPLAIN.encode(), _explanation(generation)),) if _wants_explanation(exchange) else ()
    await exchange.json(answer | {"usage": _usage(generation)}, headers=headers)


async def stream(exchange: Exchange, body: Common, generation: Generation, shape: Shape) -> None:
    """Server-sent events, as the tokens come."""
    options = body.stream_options
    include = bool(options and options.include_usage)
    continuous = bool(options and options.continuous_usage_stats)
    begun: set[int] = set()
    async for deltas in generation:
        frames: list[bytes] = []
        for delta in deltas:
            first = delta.index not in begun
            if not first and not shape.worth_sending(delta):
                continue
            begun.add(delta.index)
            chunk = shape.chunk(delta, first)
            if include or continuous:
                chunk["usage"] = _usage(generation) if continuous else None
            frames.append(event(chunk))
        if frames:
            await exchange.stream(b"".join(frames))
    if include:
        await exchange.stream(event(shape.usage_chunk() | {"usage": _usage(generation)}))
    if _wants_explanation(exchange):
        await exchange.stream(b": %s %s\n\n" % (_EXPLAIN.encode(), _explanation(generation)))
    await exchange.end()


def _wants_explanation(exchange: Exchange) -> bool:
    return exchange.headers.get(_EXPLAIN, "0") not in ("", "0")


def _explanation(generation: Generation) -> bytes:
    """One line of ASCII: a header takes nothing else."""
    return json.dumps(generation.explanation, separators=(",", ":")).encode()


def _usage(generation: Generation) -> dict[str, Any]:
    counts = usage(generation.prompt_tokens, generation.completion_tokens, generation.cached_tokens)
    return counts | {"penstock": {"route": generation.route}}  # ours; OpenAI clients keep or ignore what they don't know
