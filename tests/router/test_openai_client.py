"""The `openai` client, and the request shapes of stock benchmark clients, against a real socket."""

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from tests.router.conftest import Stack


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"http://{stack.router.http_address}/v1", api_key="none", max_retries=0) as made:
        yield made


async def test_models_can_be_listed(client: openai.AsyncOpenAI) -> None:
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == ["tiny"]
    assert (await client.models.retrieve("tiny")).owned_by == "penstock"


async def test_chat_answers_whole_and_streamed_alike(stack: Stack, client: openai.AsyncOpenAI) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    whole = await client.chat.completions.create(model="tiny", messages=messages, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content == "bcd" and whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and whole.usage.prompt_tokens_details is not None
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [len(token.top_logprobs) for token in logprobs.content] == [2, 2, 2]
    text, usage = "", None
    stream = await client.chat.completions.create(
        model="tiny", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == "bcd" and usage is not None and usage.completion_tokens == 3


async def test_completions_carry_logprobs_in_their_own_shape(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="tiny", prompt=["a", "b"], n=2, logprobs=2, max_tokens=2, seed=1)
    assert len(answer.choices) == 4
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["b", "c"] and logprobs.text_offset == [0, 1]
    assert logprobs.top_logprobs is not None and set(logprobs.top_logprobs[0]) == {"b", "c"}


async def test_errors_arrive_as_the_clients_own_classes(stack: Stack, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.completions.create(model="tiny", prompt="a", max_tokens=10**9)
    assert bad.value.code == "context_length_exceeded" and bad.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="other", prompt="a")
    stack.router._generator.settings = _with(stack.router._generator.settings, requests_max=1)
    stack.router._generator.in_flight = 1
    with pytest.raises(openai.RateLimitError):
        await client.completions.create(model="tiny", prompt="a")
    stack.router._generator.in_flight = 0


async def test_an_error_in_the_middle_of_a_stream_is_raised(stack: Stack, client: openai.AsyncOpenAI) -> None:
    from common.pb import worker_pb2 as pb

    async def script(start: pb.Start) -> AsyncIterator[pb.SequenceStep]:
        yield pb.SequenceStep(tokens=[pb.Token(id=70)])
        yield pb.SequenceStep(finish="error", error=pb.Error(code="internal_error", message="broken"))

    stack.decode.script = script
    stream = await client.completions.create(model="tiny", prompt="a", stream=True)
    with pytest.raises(openai.APIError, match="broken"):
        async for _ in stream:
            pass


BENCH_BODIES = [
    # vllm bench serve, --backend openai with random token ids
    (
        "/v1/completions",
        {
            "model": "tiny",
            "prompt": [70, 71, 72],
            "repetition_penalty": 1.0,
            "max_tokens": 3,
            "logprobs": None,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "temperature": 0.0,
        },
    ),
    # vllm bench serve, --backend openai-chat
    (
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
            "max_completion_tokens": 3,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        },
    ),
    # sglang bench_serving
    (
        "/v1/completions",
        {
            "model": "tiny",
            "prompt": "hello",
            "temperature": 0.0,
            "best_of": 1,
            "max_tokens": 3,
            "stream": True,
            "ignore_eos": True,
            "min_tokens": 0,
            "logit_bias": {},
            "tools": [],
        },
    ),
    # aiperf: a list of strings
    (
        "/v1/completions",
        {"model": "tiny", "prompt": ["hello"], "max_tokens": 3, "stream": True, "min_tokens": 3, "unknown_field": 1},
    ),
    # LMCache multi-round-qa
    (
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "hi"}],
            "stream": True,
            "max_tokens": 3,
            "temperature": 0,
            "stream_options": {"include_usage": True},
            "user": "u1",
        },
    ),
]


@pytest.mark.parametrize(("path", "body"), BENCH_BODIES)
async def test_benchmark_clients_get_what_they_read(stack: Stack, path: str, body: dict[str, Any]) -> None:
    response = await stack.http.post(path, json=body, headers={"x-user-id": "1", "authorization": "Bearer none"})
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    with_choices = [chunk for chunk in chunks if chunk["choices"]]
    assert len(with_choices) == 3 and with_choices[-1]["choices"][0]["finish_reason"] == "length"
    kind = "chat.completion.chunk" if "chat" in path else "text_completion"
    assert {chunk["object"] for chunk in chunks} == {kind}
    asked = bool(body.get("stream_options"))
    assert (chunks[-1].get("usage") is not None) is asked
    if asked:
        assert chunks[-1]["usage"]["completion_tokens"] == 3


def _with(settings: Any, **changes: Any) -> Any:
    import msgspec

    return msgspec.structs.replace(settings, **changes)
