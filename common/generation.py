"""What a request asks for and what a generated token is: shared by router, decode and prefill."""

from enum import StrEnum

import msgspec

LOGPROBS_MAX = 20
CHOICES_MAX = 16


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-sequence or stop token, or a stop string
    LENGTH = "length"  # max_tokens or the context's end
    CANCELLED = "cancelled"
    ERROR = "error"


class Sampling(msgspec.Struct, frozen=True):
    """Sampling of one sequence, already validated, every default resolved.

    Attributes:
        max_tokens: tokens to generate at most, at least 1.
        temperature: 0 is greedy.
        top_k: 0 is off. top_p: 1 is off. min_p: 0 is off.
        repetition_penalty: over prompt and output, as in `transformers`; 1 is off.
        presence_penalty, frequency_penalty: over the output only, as in OpenAI's API; 0 is off.
        seed: a token depends on (seed, position) alone.
        stop_token_ids: end the sequence; the token itself is not shown in the text.
        eos_token_ids: likewise, unless `ignore_eos`.
        min_tokens: until so many are generated, stop and eos tokens can't be sampled.
        logprobs: how many alternatives to report per token; None reports nothing, 0 only the
            chosen token's log-probability (of the raw distribution, before temperature and penalties).
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None


class Token(msgspec.Struct, frozen=True):
    """One generated token. `top` holds (token id, log-probability), most likely first."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
