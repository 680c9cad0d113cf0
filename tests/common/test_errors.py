"""The error table is complete and survives the trip over gRPC."""

import inspect

import grpc
import pytest

from common import errors, rpc
from common.errors import MEANING, Internal, Overloaded, PenstockError, from_code, meaning
from common.pb import kvstore_pb2 as pb
from common.pb import kvstore_pb2_grpc

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, PenstockError) and kind is not PenstockError
]


def test_every_error_has_a_meaning_and_a_code_of_its_own() -> None:
    assert set(MEANING) == set(KINDS)
    assert len({sense.code for sense in MEANING.values()}) == len(MEANING)


def test_errors_that_are_not_ours_are_internal() -> None:
    assert meaning(KeyError("x")) is MEANING[Internal]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_crosses_grpc_with_its_kind_message_and_retry(kind: type[PenstockError]) -> None:
    assert type(from_code(MEANING[kind].code, "m")) is kind


class Failing(kvstore_pb2_grpc.KvStoreServicer):
    def __init__(self, error: Exception) -> None:
        self.error = error

    async def Describe(self, request, context):  # type: ignore[no-untyped-def]
        async with rpc.aborting(context, "Describe"):
            raise self.error


@pytest.mark.parametrize(
    "error", [Overloaded("full: at most 3", retry_after_s=1.5), errors.CorruptBlock("bad"), ValueError("secret")]
)
async def test_a_servicer_raises_and_the_caller_gets_the_same_error(error: Exception) -> None:
    server = await rpc.serve(
        "127.0.0.1",
        0,
        ["penstock.kvstore.v1.KvStore"],
        lambda s: kvstore_pb2_grpc.add_KvStoreServicer_to_server(Failing(error), s),
    )
    try:
        async with rpc.channel(server.address) as channel:
            with pytest.raises(PenstockError) as caught:
                await rpc.call(kvstore_pb2_grpc.KvStoreStub(channel).Describe(pb.DescribeRequest(), timeout=5), server.address)
    finally:
        await server.stop(0)
    if isinstance(error, PenstockError):
        assert (type(caught.value), caught.value.message, caught.value.retry_after_s) == (
            type(error),
            error.message,
            error.retry_after_s,
        )
    else:
        assert type(caught.value) is Internal
        assert "secret" not in caught.value.message


async def test_a_port_in_use_is_named() -> None:
    server = await rpc.serve("127.0.0.1", 0, [], lambda s: None)
    try:
        port = int(server.address.rpartition(":")[2])
        with pytest.raises(errors.Unavailable, match=str(port)):
            await rpc.serve("127.0.0.1", port, [], lambda s: None)
    finally:
        await server.stop(0)


async def test_a_peer_that_is_not_there_is_unavailable() -> None:
    async with rpc.channel("127.0.0.1:1") as channel:
        with pytest.raises(errors.Unavailable, match=r"127\.0\.0\.1:1"):
            await rpc.call(kvstore_pb2_grpc.KvStoreStub(channel).Describe(pb.DescribeRequest(), timeout=3), "127.0.0.1:1")


def test_every_grpc_status_maps_back_to_something_retryable_or_not() -> None:
    for status in grpc.StatusCode:
        if status is not grpc.StatusCode.OK:
            assert issubclass(rpc._BY_STATUS.get(status, errors.Unavailable), PenstockError)
