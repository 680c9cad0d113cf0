"""What a client asks for, checked and resolved into `common.generation.Sampling`. Pure.

HTTP and gRPC both fill an `Asked`; None means that the client was silent, and then the model's
generation_config holds, then the API's default. Every refusal names the parameter, the value and
what would be accepted.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import msgspec

from common.errors import ContextExceeded, InvalidRequest
from common.generation import CHOICES_MAX, LOGPROBS_MAX, Sampling
from services.router.model import GenerationDefaults

STOP_STRINGS_MAX = 16  # OpenAI takes 4, vLLM any number
STOP_STRING_CHARS_MAX = 1024
STOP_TOKENS_MAX = 1024
SEED_BITS = 64


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling parameters as a client gave them; None: not given."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    n: int = 1


class Limits(msgspec.Struct, frozen=True):
    """What bounds a request: the model's context and vocabulary, and the API's default length (None: rest of the context)."""

    context_tokens: int
    vocab_size: int
    max_tokens_default: int | None


def resolve(asked: Asked, defaults: GenerationDefaults, prompt_tokens: int, limits: Limits, seed: int) -> Sampling:
    """The sampling of a prompt's first choice. `seed` is taken where the client gave none.

    Raises:
        InvalidRequest: a parameter out of range.
        ContextExceeded: prompt and output don't fit.
    """
    check(asked, limits.vocab_size)
    max_tokens = _max_tokens(asked, prompt_tokens, limits)
    if asked.min_tokens > max_tokens:
        raise refused("min_tokens", asked.min_tokens, f"at most max_tokens, which is {max_tokens}")
    top_k = _first(asked.top_k, defaults.top_k, 0)
    return Sampling(
        max_tokens=max_tokens,
        temperature=_first(asked.temperature, defaults.temperature, 1.0),
        top_p=_first(asked.top_p, defaults.top_p, 1.0),
        top_k=max(0, top_k),
        min_p=_first(asked.min_p, defaults.min_p, 0.0),
        repetition_penalty=_first(asked.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=_first(asked.presence_penalty, None, 0.0),
        frequency_penalty=_first(asked.frequency_penalty, None, 0.0),
        seed=(seed if asked.seed is None else asked.seed) % (1 << SEED_BITS),
        stop_token_ids=tuple(sorted(set(asked.stop_token_ids))),
        eos_token_ids=defaults.eos_token_ids,
        ignore_eos=asked.ignore_eos,
        min_tokens=asked.min_tokens,
        logprobs=asked.logprobs,
    )


def check(asked: Asked, vocab_size: int) -> None:
    """Ranges that don't depend on the prompt."""
    _in_range("temperature", asked.temperature, 0, 100)
    _in_range("top_p", asked.top_p, 0, 1, above=True)
    _in_range("min_p", asked.min_p, 0, 1)
    _in_range("repetition_penalty", asked.repetition_penalty, 0, 100, above=True)
    _in_range("presence_penalty", asked.presence_penalty, -2, 2)
    _in_range("frequency_penalty", asked.frequency_penalty, -2, 2)
    _in_range("top_k", asked.top_k, -1, 1 << 31)
    _in_range("n", asked.n, 1, CHOICES_MAX)
    _in_range("logprobs", asked.logprobs, 0, LOGPROBS_MAX)
    _in_range("seed", asked.seed, -(1 << 63), (1 << 64) - 1)
    _in_range("min_tokens", asked.min_tokens, 0, 1 << 31)
    if len(asked.stop) > STOP_STRINGS_MAX:
        raise refused("stop", f"{len(asked.stop)} strings", f"at most {STOP_STRINGS_MAX}")
    for stop in asked.stop:
        if not 0 < len(stop) <= STOP_STRING_CHARS_MAX:
            raise refused("stop", stop[:32], f"strings of 1 to {STOP_STRING_CHARS_MAX} characters")
    if len(asked.stop_token_ids) > STOP_TOKENS_MAX:
        raise refused("stop_token_ids", f"{len(asked.stop_token_ids)} ids", f"at most {STOP_TOKENS_MAX}")
    check_token_ids("stop_token_ids", asked.stop_token_ids, vocab_size)


def check_token_ids(param: str, ids: Sequence[int], vocab_size: int) -> None:
    if not ids:
        return
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        raise refused(param, low if low < 0 else high, f"token ids from 0 to {vocab_size - 1}")


def choices(first: Sampling, n: int) -> tuple[Sampling, ...]:
    """One sampling per choice: the first keeps the seed, the others derive theirs from it."""
    return (first, *(msgspec.structs.replace(first, seed=derived_seed(first.seed, index)) for index in range(1, n)))


def derived_seed(seed: int, index: int) -> int:
    digest = hashlib.sha256(seed.to_bytes(8, "little") + index.to_bytes(4, "little")).digest()
    return int.from_bytes(digest[:8], "little")


def refused(param: str, value: Any, accepted: str) -> InvalidRequest:
    return InvalidRequest(f"{param} = {value!r}: expected {accepted}", param=param)


def _max_tokens(asked: Asked, prompt_tokens: int, limits: Limits) -> int:
    room = limits.context_tokens - prompt_tokens
    if room < 1:
        raise ContextExceeded(
            f"the prompt has {prompt_tokens} tokens and the model's context is {limits.context_tokens}: "
            f"at most {limits.context_tokens - 1} prompt tokens leave room for an answer",
            param="prompt",
        )
    if asked.max_tokens is None:
        return room if limits.max_tokens_default is None else min(room, limits.max_tokens_default)
    if asked.max_tokens < 1:
        raise refused("max_tokens", asked.max_tokens, "at least 1")
    if asked.max_tokens > room:
        raise ContextExceeded(
            f"max_tokens = {asked.max_tokens}: the model's context is {limits.context_tokens} tokens and the prompt has "
            f"{prompt_tokens}, so at most {room} can be generated",
            param="max_tokens",
        )
    return asked.max_tokens


def _in_range(param: str, value: float | None, low: float, high: float, *, above: bool = False) -> None:
    if value is None:
        return
    if not math.isfinite(value) or value < low or value > high or (above and value == low):
        raise refused(param, value, f"a number {'above' if above else 'from'} {low} {'up ' if above else ''}to {high}")


def _first(given: Any, default: Any, last: Any) -> Any:
    return given if given is not None else default if default is not None else last
