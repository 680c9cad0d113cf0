"""The public gRPC service over a real socket."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from common.pb import router_pb2 as pb
from common.pb import router_pb2_grpc
from tests.router.conftest import Stack, StackMaker
from tests.router.test_generation import PROMPT, hold_after


@pytest.fixture
async def channel(stack: Stack) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(stack.router.grpc_address) as made:
        yield made


async def test_generate_streams_the_same_tokens_as_http(stack: Stack, channel: grpc.aio.Channel) -> None:
    stack.decode.cached_tokens = 16
    stub = router_pb2_grpc.PenstockStub(channel)
    request = pb.GenerateRequest(
        model="tiny", tokens=pb.TokenIds(ids=PROMPT), sampling=pb.Sampling(max_tokens=3, temperature=0, logprobs=1, seed=9)
    )
    events = [event async for event in stub.Generate(request, timeout=10)]
    assert "".join(event.text for event in events) == "bcd"
    assert [token.id for event in events for token in event.tokens] == [70, 71, 72]
    assert events[0].tokens[0].logprob == -0.5 and events[0].tokens[0].text == "b" and len(events[0].tokens[0].top) == 1
    last = events[-1]
    assert last.finish_reason == "length" and last.request_id
    assert last.usage == pb.Usage(prompt_tokens=100, completion_tokens=3, cached_tokens=16, route="recompute")
    assert all(not event.HasField("usage") for event in events[:-1])
    assert stack.decode.starts[0].sampling.seed == 9


async def test_text_and_chat_prompts_are_tokenised(stack: Stack, channel: grpc.aio.Channel) -> None:
    stub = router_pb2_grpc.PenstockStub(channel)
    chat = pb.Chat(messages=[pb.Message(role="user", content="hello")])
    for request in (pb.GenerateRequest(text="hello"), pb.GenerateRequest(chat=chat)):
        assert [event async for event in stub.Generate(request, timeout=10)]
    await stack.chat()
    text, chatted, over_http = stack.decode.starts
    assert chatted.token_ids == over_http.token_ids != text.token_ids


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "one of text, tokens and chat"),
        (pb.GenerateRequest(text="a", model="x"), grpc.StatusCode.NOT_FOUND, "this router serves 'tiny'"),
        (pb.GenerateRequest(text="a", sampling=pb.Sampling(temperature=-1)), grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        (pb.GenerateRequest(text="a", sampling=pb.Sampling(n=99)), grpc.StatusCode.INVALID_ARGUMENT, "n = 99"),
        (pb.GenerateRequest(text="a", sampling=pb.Sampling(max_tokens=9999)), grpc.StatusCode.OUT_OF_RANGE, "at most 511"),
        (pb.GenerateRequest(tokens=pb.TokenIds(ids=[999])), grpc.StatusCode.INVALID_ARGUMENT, "0 to 399"),
    ],
)
async def test_bad_requests_end_with_a_status_that_says_why(
    channel: grpc.aio.Channel, request_: pb.GenerateRequest, status: grpc.StatusCode, message: str
) -> None:
    stub = router_pb2_grpc.PenstockStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Generate(request_, timeout=10):
            pass
    assert caught.value.code() is status and message in (caught.value.details() or "")


async def test_cancelling_the_call_cancels_at_decode(stack: Stack, channel: grpc.aio.Channel) -> None:
    hold_after(stack.decode, 1, asyncio.Event())
    call = router_pb2_grpc.PenstockStub(channel).Generate(pb.GenerateRequest(text="a"), timeout=30)
    await call.read()
    call.cancel()
    assert await asyncio.wait_for(stack.decode.cancelled.get(), 10) == stack.decode.starts[0].request_id
    await asyncio.wait_for(stack.router._generator.idle.wait(), 10)


async def test_the_callers_deadline_travels(stack: Stack, channel: grpc.aio.Channel) -> None:
    stub = router_pb2_grpc.PenstockStub(channel)
    assert [event async for event in stub.Generate(pb.GenerateRequest(text="a"), timeout=20)]
    assert 0 < stack.decode.starts[0].deadline_ms <= 20_101  # gRPC rounds up to a tenth of a second


async def test_models_status_health_and_reflection_answer(stack: Stack, channel: grpc.aio.Channel) -> None:
    stub = router_pb2_grpc.PenstockStub(channel)
    models = await stub.ListModels(pb.ListModelsRequest(), timeout=10)
    assert [(model.id, model.context_tokens) for model in models.models] == [("tiny", 512)]
    status = await stub.Status(pb.StatusRequest(), timeout=10)
    assert status.ready and status.members[0].role == "decode" and status.members[0].connected
    health = await health_pb2_grpc.HealthStub(channel).Check(
        health_pb2.HealthCheckRequest(service="penstock.v1.Penstock"), timeout=10
    )
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([asked]), timeout=10)
    async for reply in call:
        assert "penstock.v1.Penstock" in {service.name for service in reply.list_services_response.service}
        break


async def test_keys_are_asked_for_in_metadata(start_stack: StackMaker) -> None:
    async with start_stack(keys=("alpha",)) as stack, grpc.aio.insecure_channel(stack.router.grpc_address) as channel:
        stub = router_pb2_grpc.PenstockStub(channel)

        async def generate(metadata: Any) -> list[pb.GenerateEvent]:
            return [event async for event in stub.Generate(pb.GenerateRequest(text="a"), timeout=10, metadata=metadata)]

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(())
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert await generate((("authorization", "Bearer alpha"),))
