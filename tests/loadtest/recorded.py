"""Samples as a test left them, rounded: the input of the tests of figures and report."""

from typing import Any

from loadtest.samples import Kind, Sample

_ROWS: tuple[tuple[Kind, int, int, float, str, int, int, tuple[float, ...]], ...] = (
    # kind, session, turn, sent, route, prompt, cached, chunks
    ("chat", 1, 1, 0.0, "recompute", 100, 0, (0.10, 0.12, 0.14)),
    ("chat", 1, 2, 1.0, "direct", 200, 128, (0.05, 0.07, 0.11)),
    ("chat", 2, 1, 2.5, "recompute", 100, 0, (0.30, 0.32)),
    ("agent", 1, 1, 0.1, "recompute", 1000, 0, (0.90, 0.93, 0.96)),
    ("agent", 1, 2, 1.9, "storage_to_prefill", 1400, 960, (0.40, 0.43, 0.50)),
    ("agent", 1, 4, 3.0, "direct", 1500, 1472, (0.08,)),
)


def finished() -> list[Sample]:
    return [
        Sample(
            kind=kind, user=1, session=session, turn=turn, sent_s=sent, total_s=chunks[-1] + 0.01, outcome="ok", chunk_s=chunks,
            prompt_tokens=prompt, cached_tokens=cached, output_tokens=len(chunks), route=route, status=200,
            finish_reason="length", request_id=f"load-0-{number}",
        )
        for number, (kind, session, turn, sent, route, prompt, cached, chunks) in enumerate(_ROWS, 1)
    ]  # fmt: skip


def unfinished() -> list[Sample]:
    """One that was refused, two errors, one that the end cut short."""
    common: dict[str, Any] = {"kind": "chat", "user": 2, "session": 1, "turn": 1}
    return [
        Sample(**common, sent_s=0.2, total_s=0.01, outcome="refused", status=429, code="overloaded", message="full"),
        Sample(
            **common, sent_s=1.4, total_s=0.2, outcome="error", status=500, code="internal_error", message="<script>x</script>"
        ),
        Sample(**common, sent_s=2.4, total_s=0.2, outcome="error", code="connection", message="ConnectError: refused"),
        Sample(**common, sent_s=3.4, total_s=0.6, outcome="cut", status=200, chunk_s=(0.1, 0.2)),
    ]
