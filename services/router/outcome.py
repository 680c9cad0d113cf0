"""What came of a request, as its log event tells it. Pure."""

import asyncio
from collections.abc import Sequence
from typing import Any

from common.errors import Cancelled, PenstockError, meaning
from services.router.choice import Choice


def status_of(error: BaseException | None, choices: Sequence[Choice]) -> str:
    """How it ended: a finish reason, "cancelled", or an error's code."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit | Cancelled):
        return "cancelled"
    if error is not None:
        return meaning(error).code
    finish = choices[0].finish
    return str(finish) if finish is not None else "cancelled"


def timing_of(first_token_s: float, streaming_s: float, later_tokens: int) -> dict[str, float]:
    """`later_tokens`: those that came after the first of each sequence, within `streaming_s`."""
    timing = {"ttft_ms": round(1000 * first_token_s, 1)}
    if streaming_s > 0:
        timing["tokens_per_s"] = round(later_tokens / streaming_s, 1)
    return timing


def outcome_of(error: BaseException | None, choices: Sequence[Choice]) -> dict[str, Any]:
    """Where its first choice ran, how its bytes came, and what went wrong on the way."""
    first = choices[0]
    fields: dict[str, Any] = {"decode": first.route.decode if first.route else ""}
    if isinstance(error, PenstockError):
        fields["reason"] = error.message
    if first.last_report is not None:
        fields |= {"carrier": first.last_report.carrier, "preemptions": first.last_report.preemptions}
        if first.last_report.fallback:
            fields["fallback"] = first.last_report.fallback
    if moves := sum(choice.moves for choice in choices):
        fields["moves"] = moves
    return fields
