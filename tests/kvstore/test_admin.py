"""The operators' gRPC service: what it refuses, and that a store of several disks tells of each."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from common import rpc
from common.clients.kvstore_admin import KvStoreAdmin
from common.errors import NotFound
from common.pb import kvstore_pb2 as pb
from common.pb import kvstore_pb2_grpc
from common.transport.region import Region
from tests.kvstore.support import NAMESPACE, chain
from tests.kvstore.test_process import LENGTH, get, put, running

KEY = b"k" * 32
BAD: dict[str, tuple[str, Callable[[], Any], str]] = {
    "short key": ("Inspect", lambda: pb.InspectRequest(key=b"ab"), "key has 2 bytes: expected 32"),
    "no key": ("Inspect", lambda: pb.InspectRequest(), "key has 0 bytes"),
    "nothing said": ("Evict", lambda: pb.EvictRequest(), "expected keys, coldest, or whole with a namespace"),
    "everything": ("Evict", lambda: pb.EvictRequest(whole=True), "expected keys, coldest, or whole with a namespace"),
    "whole, but not": ("Evict", lambda: pb.EvictRequest(namespace=NAMESPACE, whole=False), "expected keys"),
    "no keys": ("Evict", lambda: pb.EvictRequest(keys=pb.BlockKeys()), "0 keys: expected 1 to 4096"),
    "too many keys": ("Evict", lambda: pb.EvictRequest(keys=pb.BlockKeys(keys=[KEY] * 4097)), "4097 keys: expected 1 to 4096"),
    "a malformed key": ("Evict", lambda: pb.EvictRequest(keys=pb.BlockKeys(keys=[KEY, b""])), "key has 0 bytes"),
    "none": ("Evict", lambda: pb.EvictRequest(coldest=0), "coldest = 0: expected 1 to 4096"),
    "too many": ("Evict", lambda: pb.EvictRequest(coldest=2**32 - 1), "expected 1 to 4096"),
    "a namespace that climbs": ("Evict", lambda: pb.EvictRequest(namespace="../" * 21 + "a", coldest=1), "hex"),
}


@pytest.fixture
def region() -> Iterator[Region]:
    region = Region(64 * LENGTH)
    yield region
    region.close()


async def test_bad_requests_get_clear_errors_and_take_nothing_out(tmp_path: Path, region: Region) -> None:
    keys = chain(4)
    async with running(tmp_path) as (_, client, ready), rpc.channel(ready["grpc"]) as channel:
        await put(client, region, keys)
        stub = kvstore_pb2_grpc.AdminStub(channel)
        for name, (method, request, message) in BAD.items():
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await getattr(stub, method)(request(), timeout=20)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, name
            assert message in (caught.value.details() or ""), name
        assert await get(client, region, keys) == 4


async def test_a_block_is_inspected_and_one_that_is_not_there_is_not(tmp_path: Path, region: Region) -> None:
    keys = chain(3)
    async with running(tmp_path) as (_, client, ready):
        await put(client, region, keys)
        admin = KvStoreAdmin(ready["grpc"])
        found = await client.lookup(NAMESPACE, keys[:2], 30.0)
        assert found is not None
        blocks = [await admin.inspect(key) for key in keys]
        assert [(block.key, block.parent, block.payload_bytes) for block in blocks[1:]] == [
            (keys[1], keys[0], LENGTH),
            (keys[2], keys[1], LENGTH),
        ]
        assert [block.pinned for block in blocks] == [False, True, False]
        assert all(Path(block.path).stat().st_size > block.offset for block in blocks)
        with pytest.raises(NotFound):
            await admin.inspect(KEY)
        await client.release(found.token)
        await admin.close()


async def test_each_disk_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "broken").write_text("a file")
    async with running(tmp_path, "--data", str(tmp_path / "more"), "--data", str(tmp_path / "broken")) as (_, client, _):
        info = await client.describe()
        assert [disk.state for disk in info.disks] == ["serving", "serving", "lost"]
        assert info.disks[2].problem and info.disks[2].folder == str(tmp_path / "broken")
        assert sum(disk.budget_bytes for disk in info.disks) == info.budget_bytes
