"""One line per finished request, from the router's `request` log event. Pure."""

from collections.abc import Mapping
from typing import Any

from services.cli.logfile import Record
from services.cli.messages import Served

EVENT = "request"


def line(record: Record, clock: str) -> Served:
    """What a request took: which route, what was cached, how fast."""
    fields = record.fields
    status = fields.get("status", 200)
    ok = not (isinstance(status, int) and status >= 400) and fields.get("finish") != "error"
    parts = [clock, f"{fields.get('route') or '-':<14}", _cached(fields)]
    parts += [_number(fields, "ttft_ms", "ttft {:>7,.0f} ms"), _number(fields, "tokens_per_s", "{:>7,.1f} tok/s")]
    parts += [_number(fields, "completion_tokens", "{:>5,.0f} tokens"), str(fields.get("finish_reason") or fields.get("finish") or "")]
    if not ok:
        parts += [str(status), str(fields.get("error") or "")]
    return Served(text="  ".join(part for part in parts if part), ok=ok)


def _cached(fields: Mapping[str, Any]) -> str:
    cached, prompt = fields.get("cached_tokens"), fields.get("prompt_tokens")
    if prompt is None:
        return ""
    return f"cached {cached or 0:>6,} of {prompt:>6,}"


def _number(fields: Mapping[str, Any], key: str, form: str) -> str:
    value = fields.get(key)
    return form.format(value) if isinstance(value, int | float) else ""
