"""One line per finished request, from the router's `request` log event. Pure."""

from collections.abc import Mapping
from typing import Any

from services.cli.logfile import Record
from services.cli.messages import Served

EVENT = "request"


def line(record: Record, clock: str) -> Served:
    """What a request took: which route, what was cached, how fast, how it ended."""
    fields = record.fields
    parts = [
        clock,
        f"{fields.get('route') or '-':<14}",
        _cached(fields),
        _number(fields, "ttft_ms", "ttft {:>7,.0f} ms"),
        _number(fields, "output_tokens", "{:>6,.0f} tokens"),
        _number(fields, "tokens_per_s", "{:>7,.1f} tok/s"),
        str(fields.get("status", "")),
        str(fields.get("reason", "")),
    ]
    return Served(text="  ".join(part for part in parts if part), ok="reason" not in fields)


def _cached(fields: Mapping[str, Any]) -> str:
    prompt = fields.get("prompt_tokens")
    return "" if prompt is None else f"cached {fields.get('cached_tokens') or 0:>6,} of {prompt:>6,}"


def _number(fields: Mapping[str, Any], key: str, form: str) -> str:
    value = fields.get(key)
    return form.format(value) if isinstance(value, int | float) else ""
