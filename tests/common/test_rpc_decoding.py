"""A server of ours refuses what can't be decoded, in every kind of call, and changes nothing else."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common import rpc
from common.pb import kvstore_pb2, kvstore_pb2_grpc, router_pb2, router_pb2_grpc, worker_pb2, worker_pb2_grpc

NOISE = b"\xff" * 7
GOOD = worker_pb2.RouterMessage(cancel=worker_pb2.Cancel(request_id="known"))


class Store(kvstore_pb2_grpc.KvStoreServicer):
    """Implements one method only."""

    async def Describe(self, request: kvstore_pb2.DescribeRequest, context: Any) -> kvstore_pb2.StoreInfo:
        return kvstore_pb2.StoreInfo(id="here")


class Router(router_pb2_grpc.PenstockServicer):
    async def Generate(self, request: router_pb2.GenerateRequest, context: Any) -> AsyncIterator[router_pb2.GenerateEvent]:
        for _ in range(2):
            yield router_pb2.GenerateEvent()


class Decode(worker_pb2_grpc.DecodeServicer):
    """Answers each message, and what isn't one as the real service does."""

    async def Serve(self, request_iterator: Any, context: Any) -> AsyncIterator[worker_pb2.StepBatch]:
        async with rpc.aborting(context, "Serve"):
            async for _ in request_iterator:
                yield worker_pb2.StepBatch()


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    def register(server: grpc.aio.Server) -> None:
        kvstore_pb2_grpc.add_KvStoreServicer_to_server(Store(), server)
        router_pb2_grpc.add_PenstockServicer_to_server(Router(), server)
        worker_pb2_grpc.add_DecodeServicer_to_server(Decode(), server)

    server = await rpc.serve("127.0.0.1", 0, ["penstock.kvstore.v1.KvStore"], register)
    async with rpc.channel(server.address) as channel:
        yield channel
    await server.stop(0)


def refused(caught: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> bool:
    """With the method, the length, and the decoder's reason."""
    details = caught.value.details() or ""
    return caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "got 7 bytes" in details and "corrupt" in details


async def test_a_request_that_cannot_be_decoded_is_refused(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/penstock.kvstore.v1.KvStore/Describe")(NOISE, timeout=20)
    assert refused(caught)
    stub = kvstore_pb2_grpc.KvStoreStub(channel)
    assert (await stub.Describe(kvstore_pb2.DescribeRequest(), timeout=20)).id == "here"


async def test_a_request_for_a_stream_that_cannot_be_decoded_is_refused(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in channel.unary_stream("/penstock.v1.Penstock/Generate")(NOISE, timeout=20):
            pass
    assert refused(caught)
    events = router_pb2_grpc.PenstockStub(channel).Generate(router_pb2.GenerateRequest(), timeout=20)
    assert len([event async for event in events]) == 2


async def test_a_message_of_a_stream_that_cannot_be_decoded_ends_it(channel: grpc.aio.Channel) -> None:
    answers = 0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in channel.stream_stream("/penstock.worker.v1.Decode/Serve")(iter([GOOD.SerializeToString(), NOISE])):
            answers += 1
    assert refused(caught) and answers == 1


async def test_what_is_not_implemented_or_not_known_says_so(channel: grpc.aio.Channel) -> None:
    for method in ("KvStore/Lookup", "KvStore/Nothing"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(f"/penstock.kvstore.v1.{method}")(b"", timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_health_is_served_as_before(channel: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    assert (await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)).status == health_pb2.HealthCheckResponse.NOT_SERVING
    async for seen in stub.Watch(health_pb2.HealthCheckRequest(), timeout=20):
        assert seen.status == health_pb2.HealthCheckResponse.NOT_SERVING
        break
