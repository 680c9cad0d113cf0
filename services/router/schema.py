"""Bodies of the OpenAI HTTP API as clients send them, and how they become `Asked`.

Fields that can't change the meaning of a request are ignored when unknown. Those that would, and
that we can't honour, are declared in `Refused` and refused by name unless they hold a value that
asks for nothing.
"""

import json
import math
import reprlib
from typing import Any, TypeVar

import msgspec

from common.errors import InvalidRequest
from services.router.sampling import Asked, refused

LOOSE_JSON_BYTES_MAX = 1 << 20  # of a refused body that is looked at twice to name the parameter's value
MESSAGES_MAX = 16384
B = TypeVar("B", bound=msgspec.Struct)
_SHORT = reprlib.Repr()  # at most a few items or some 30 characters of a value that is shown back


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Refused(msgspec.Struct, kw_only=True):
    """What we can't honour. Each is fine when it holds a value that asks for nothing."""

    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    logit_bias: Any = None
    suffix: Any = None
    best_of: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    logits_processors: Any = None
    prompt_logprobs: Any = None
    truncate_prompt_tokens: Any = None
    prompt_embeds: Any = None
    use_beam_search: Any = None
    chat_template: Any = None
    documents: Any = None
    kv_transfer_params: Any = None


_HARMLESS: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "use_beam_search": (False,),
}
_EMPTY: tuple[Any, ...] = (None, [], {}, "")


class Common(Refused, kw_only=True):
    """What both endpoints take."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    n: int | None = None
    user: str | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    add_special_tokens: bool | None = None


class CompletionBody(Common, kw_only=True):
    prompt: str | list[Any] | None = None
    echo: bool | None = None
    logprobs: int | None = None


class ContentPart(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: Any = None
    function_call: Any = None
    reasoning_content: str | None = None
    tool_call_id: str | None = None


class ChatBody(Common, kw_only=True):
    messages: list[ChatMessage] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def decode_body(data: bytes, kind: type[B]) -> B:
    """The body as `kind`.

    Raises:
        InvalidRequest: malformed, not UTF-8, or of wrong types; names the parameter and its value.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise _wrong_type(error, data) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error
    except msgspec.DecodeError as error:
        raise _malformed(data, str(error)) from error


def refuse_unsupported(body: Refused) -> None:
    """Raises for the first field that asks for something we can't do."""
    for name in Refused.__struct_fields__:
        value = getattr(body, name)
        if value in _EMPTY or value in _HARMLESS.get(name, ()):
            continue
        if name == "best_of" and value == (getattr(body, "n", None) or 1):
            continue
        raise InvalidRequest(f"{name} is not supported: leave it out", param=name)


def asked_of(body: CompletionBody | ChatBody) -> Asked:
    """The sampling parameters of a body, unchecked."""
    if isinstance(body, ChatBody):
        logprobs = _chat_logprobs(body)
        max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    else:
        logprobs, max_tokens = body.logprobs, body.max_tokens
    stop = () if body.stop is None or body.stop == "" else (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    return Asked(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        seed=body.seed,
        stop=stop,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
        logprobs=logprobs,
        n=1 if body.n is None else body.n,
    )


def messages_of(body: ChatBody) -> list[dict[str, Any]]:
    """The conversation for the chat template; content parts of text are joined."""
    if not body.messages:
        raise refused("messages", body.messages, "at least one message")
    if len(body.messages) > MESSAGES_MAX:
        raise refused("messages", f"{len(body.messages)} messages", f"at most {MESSAGES_MAX}")
    return [_message(f"messages[{index}]", message) for index, message in enumerate(body.messages)]


def _message(param: str, message: ChatMessage) -> dict[str, Any]:
    if message.tool_calls or message.function_call:
        raise InvalidRequest(f"{param}.tool_calls is not supported: tools are not", param=param)
    content = message.content
    if isinstance(content, list):
        for part in content:
            if part.type != "text" or part.text is None:
                raise refused(f"{param}.content", part.type, "parts of type 'text' with a text")
        content = "".join(part.text or "" for part in content)
    if content is None and message.role != "assistant":
        raise refused(f"{param}.content", None, "a string or a list of text parts")
    out = {"role": message.role, "content": content or ""}
    for key in ("name", "reasoning_content", "tool_call_id"):
        value = getattr(message, key)
        if value is not None:
            out[key] = value
    return out


def _chat_logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise refused("top_logprobs", body.top_logprobs, "logprobs = true beside it")
    return (body.top_logprobs or 0) if body.logprobs else None


def _wrong_type(error: msgspec.ValidationError, data: bytes) -> InvalidRequest:
    """`Expected `int`, got `str` - at `$.n`` as a message that names parameter and value."""
    text = str(error)
    what, _, path = text.partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    if not path:
        return InvalidRequest(f"the body: {what[0].lower() + what[1:]}")
    key = path.split(".")[0].split("[")[0]
    value = _loosely(data)
    shown = f" = {_SHORT.repr(value.get(key))}" if isinstance(value, dict) else ""
    expected = (what[0].lower() + what[1:]).replace("`", "")
    return InvalidRequest(f"{key}{shown}: {expected}" + (f" (at {path})" if path != key else ""), param=key)


def _loosely(data: bytes) -> Any:
    """What Python's own reader makes of a refused body, to say more about it; None when it is long or no better."""
    try:
        return json.loads(data) if len(data) <= LOOSE_JSON_BYTES_MAX else None
    except (ValueError, RecursionError):
        return None


def _malformed(data: bytes, reason: str) -> InvalidRequest:
    """NaN and Infinity, which JSON lacks and some clients send, are named; anything else is malformed."""
    value = _loosely(data)
    for key, number in value.items() if isinstance(value, dict) else ():
        if isinstance(number, float) and not math.isfinite(number):
            return refused(key, number, "a finite number")
    return InvalidRequest(f"the body is not valid JSON: {reason}")
