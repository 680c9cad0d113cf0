"""What is known of one request of a load test."""

from typing import Literal

import msgspec

Kind = Literal["chat", "agent"]
Outcome = Literal["ok", "refused", "error", "cut"]  # refused: 429. cut: still running when the test ended


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One request, as its client saw it. Times in seconds.

    Attributes:
        turn: its number in its session, from 1.
        sent_s: when it was sent, since the test began.
        total_s: until its last byte.
        chunk_s: when each event that carries tokens came, since it was sent.
        code: of an error: the server's, or `connection`, `timeout`, `truncated`.
    """

    kind: Kind
    user: int
    session: int
    turn: int
    sent_s: float
    total_s: float
    outcome: Outcome
    chunk_s: tuple[float, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    route: str = ""
    finish_reason: str = ""
    request_id: str = ""
    status: int = 0
    code: str = ""
    message: str = ""

    @property
    def ttft_s(self) -> float | None:
        return self.chunk_s[0] if self.chunk_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None with fewer than two."""
        if self.output_tokens < 2 or len(self.chunk_s) < 2:
            return None
        return (self.chunk_s[-1] - self.chunk_s[0]) / (self.output_tokens - 1)

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Times between one event and the next: what a reader sees as stutter."""
        return tuple(after - before for before, after in zip(self.chunk_s, self.chunk_s[1:], strict=False))

    @property
    def cached_share(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
