"""From a parsed request to `Work`: tokenise, check against the model's limits, resolve sampling."""

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from common.errors import ContextExceeded, InvalidRequest, NotFound
from common.generation import Sampling
from services.router.generator import Generator
from services.router.sampling import Asked, Limits, check, check_token_ids, choices, derived_seed, refused, resolve
from services.router.schema import ChatBody, CompletionBody, asked_of, messages_of, refuse_unsupported
from services.router.work import Work

COMPLETION_TOKENS_DEFAULT = 16  # OpenAI's, for /v1/completions
CACHE_SALT_CHARS_MAX = 1024
TEMPLATE_KWARGS_BYTES_MAX = 65536


class Envelope(msgspec.Struct, frozen=True):
    """What comes with a request, whatever carried it."""

    request_id: str
    timeout_s: float
    traceparent: str = ""


def check_model(generator: Generator, name: str, asked: str | None) -> None:
    if asked and asked != name:
        raise NotFound(f"model = {asked!r}: this router serves {name!r}", param="model")


async def completion_work(generator: Generator, body: CompletionBody, envelope: Envelope) -> Work | None:
    """Work of a /v1/completions body; None when only an echo is asked for (max_tokens = 0)."""
    refuse_unsupported(body)
    if body.echo and body.logprobs is not None:
        raise InvalidRequest("echo with logprobs is not supported: prompt tokens have no log-probabilities here", param="echo")
    prompts = await _prompts(generator, body)
    asked = asked_of(body)
    if body.echo and body.max_tokens == 0:
        return None
    return work_of(generator, prompts, asked, COMPLETION_TOKENS_DEFAULT, envelope, body.cache_salt, _options(body))


async def echo_prompts(generator: Generator, body: CompletionBody) -> list[list[int]]:
    return await _prompts(generator, body)


async def chat_work(generator: Generator, body: ChatBody, envelope: Envelope) -> Work:
    """Work of a /v1/chat/completions body."""
    refuse_unsupported(body)
    ids = await encode_chat(generator, messages_of(body), _template_options(body))
    return work_of(generator, [ids], asked_of(body), None, envelope, body.cache_salt, _options(body))


async def encode_chat(generator: Generator, messages: list[dict[str, Any]], options: dict[str, Any]) -> list[int]:
    chars = sum(len(str(message["content"])) for message in messages)
    return await generator.off_loop(chars > 4096, lambda: generator.model.chat(messages, options))


def work_of(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    asked: Asked,
    max_tokens_default: int | None,
    envelope: Envelope,
    cache_salt: str | None = None,
    options: dict[str, Any] | None = None,
) -> Work:
    """Checks everything that depends on the model and makes the samplings of every choice."""
    limits = limits_of(generator, max_tokens_default)
    check(asked, limits.vocab_size)
    per_request = generator.settings.sequences_per_request_max
    if len(prompts) * asked.n > per_request:
        raise refused("n", f"{len(prompts)} prompts x {asked.n}", f"at most {per_request} sequences in one request")
    seed = secrets.randbits(63)
    samplings: list[tuple[Sampling, ...]] = []
    for index, prompt in enumerate(prompts):
        first = resolve(asked, generator.model.defaults, len(prompt), limits, derived_seed(seed, index))
        samplings.append(choices(first, asked.n))
    return Work(
        id=envelope.request_id,
        prompts=tuple(prompts),
        samplings=tuple(samplings),
        timeout_s=envelope.timeout_s,
        stop=asked.stop,
        salt=_salt(cache_salt),
        traceparent=envelope.traceparent,
        **(options or {}),
    )


def limits_of(generator: Generator, max_tokens_default: int | None) -> Limits:
    model = generator.model
    return Limits(generator.cluster.context_tokens(model.context_tokens), model.vocab_size, max_tokens_default)


async def prompt_ids(generator: Generator, param: str, prompt: Any, *, special: bool = True) -> list[int]:
    """Token ids of one prompt, text or ids.

    Raises:
        InvalidRequest: empty, of another type, or ids out of range.
        ContextExceeded: so long that tokenising it would be a waste.
    """
    model = generator.model
    if isinstance(prompt, str):
        if not prompt:
            raise refused(param, prompt, "a text that is not empty")
        ids = await generator.encode(prompt, special=special)
    else:
        ids = prompt
        if ids and set(map(type, ids)) != {int}:
            raise refused(param, "a list", "a string, a list of strings, a list of token ids, or a list of such lists")
        check_token_ids(param, ids, model.vocab_size)
    if not ids:
        raise refused(param, prompt, "at least one token")
    context = generator.cluster.context_tokens(model.context_tokens)
    if len(ids) >= context:
        raise ContextExceeded(
            f"{param} has {len(ids)} tokens and the model's context is {context}: at most {context - 1} leave room for an answer",
            param=param,
        )
    return ids


async def _prompts(generator: Generator, body: CompletionBody) -> list[list[int]]:
    prompt = body.prompt
    special = body.add_special_tokens is not False
    if prompt is None:
        raise refused("prompt", None, "a string, a list of strings, a list of token ids, or a list of such lists")
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        return [await prompt_ids(generator, "prompt", prompt, special=special)]
    if len(prompt) > generator.settings.sequences_per_request_max:
        raise refused("prompt", f"{len(prompt)} prompts", f"at most {generator.settings.sequences_per_request_max}")
    if not all(isinstance(one, type(prompt[0])) and isinstance(one, str | list) for one in prompt):
        raise refused("prompt", "a mixed list", "strings only, or lists of token ids only")
    return [await prompt_ids(generator, f"prompt[{i}]", one, special=special) for i, one in enumerate(prompt)]


def _options(body: CompletionBody | ChatBody) -> dict[str, Any]:
    return {
        "include_stop": bool(body.include_stop_str_in_output),
        "skip_special": body.skip_special_tokens is not False,
    }


def _template_options(body: ChatBody) -> dict[str, Any]:
    options = dict(body.chat_template_kwargs or {})
    if len(msgspec.json.encode(options)) > TEMPLATE_KWARGS_BYTES_MAX:
        raise refused("chat_template_kwargs", "too long", f"at most {TEMPLATE_KWARGS_BYTES_MAX} bytes")
    for taken in ("chat_template", "tokenize", "tools", "documents", "conversation", "return_dict", "return_tensors"):
        if taken in options:
            raise InvalidRequest(f"chat_template_kwargs.{taken} is not supported: leave it out", param="chat_template_kwargs")
    final = bool(body.continue_final_message)
    if final and body.add_generation_prompt:
        raise refused("continue_final_message", True, "add_generation_prompt = false beside it")
    options["continue_final_message"] = final
    options["add_generation_prompt"] = not final and body.add_generation_prompt is not False
    if body.reasoning_effort is not None:
        options["reasoning_effort"] = body.reasoning_effort
    return options


def _salt(text: str | None) -> bytes:
    if text is None:
        return b""
    if not 0 < len(text) <= CACHE_SALT_CHARS_MAX:
        raise refused("cache_salt", text[:32], f"1 to {CACHE_SALT_CHARS_MAX} characters")
    return text.encode()
