"""Members of a cluster: found over NATS, told apart by namespace, routed to over gRPC."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from common import rpc
from common.membership import Announcer, MemberRecord
from common.pb import worker_pb2 as pb
from common.pb import worker_pb2_grpc as pb_grpc
from common.routes import Plan
from tests.common.test_membership import Nats
from tests.router.conftest import Stack, StackMaker
from tests.router.scripted import NAMESPACE, ScriptedDecode
from tests.router.test_generation import PROMPT


class ScriptedPrefill(pb_grpc.PrefillServicer):
    """Answers Describe and Resident: the router never calls anything else of a prefill worker."""

    def __init__(self, namespace: str = NAMESPACE) -> None:
        self.namespace = namespace
        self.address = ""
        self.resident_blocks = 0
        self.silent = False

    async def Resident(self, request: pb.ResidentRequest, context: Any) -> pb.ResidentReply:
        if self.silent:
            await asyncio.Event().wait()
        return pb.ResidentReply(blocks=min(self.resident_blocks, len(request.keys)))

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.WorkerInfo:
        return pb.WorkerInfo(
            role="prefill", id="prefill-0", epoch=b"p" * 16, model="tiny", namespace=self.namespace, block_tokens=16
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator["ScriptedPrefill"]:
        server = await rpc.serve(
            "127.0.0.1", 0, ("penstock.worker.v1.Prefill",), lambda s: pb_grpc.add_PrefillServicer_to_server(self, s)
        )
        self.address = server.address
        yield self
        await server.stop(0)


@asynccontextmanager
async def announced(nats: Nats, worker: ScriptedDecode) -> AsyncIterator[Announcer]:
    def record() -> MemberRecord:
        return MemberRecord(role="decode", id=worker.id, epoch=worker.epoch.hex(), address=worker.address)

    announcer = Announcer(nats.url, record, refresh_s=0.1)
    task = asyncio.create_task(announcer.run())
    try:
        yield announcer
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until_members(stack: Stack, count: int) -> None:
    cluster = stack.router._generator.cluster
    async with asyncio.timeout(30):
        while len(cluster.serving()) != count or len(cluster.peers) != count:
            await cluster.changed()


async def test_prompts_are_handed_to_prefill_by_length_and_store(start_stack: StackMaker) -> None:
    async with (
        ScriptedPrefill().running() as prefill,
        start_stack(
            stores=1, prefill=(prefill.address,), direct_tail_tokens=32, plans=(Plan.DIRECT, Plan.STORAGE_TO_PREFILL)
        ) as stack,
    ):
        await stack.complete(prompt=PROMPT)
        stack.stores[0].blocks = 2
        await stack.complete(prompt=PROMPT)
        stack.stores[0].blocks = 5
        await stack.complete(prompt=PROMPT)
        await stack.complete(prompt=PROMPT[:8])
        routes = [(start.route.plan, start.route.prefill) for start in stack.decode.starts]
        assert routes == [
            ("recompute", prefill.address),
            ("storage_to_prefill", prefill.address),
            ("direct", ""),
            ("recompute", ""),
        ]


async def test_a_prefill_worker_of_another_namespace_is_not_used_and_named(start_stack: StackMaker) -> None:
    async with ScriptedPrefill("cd" * 32).running() as prefill, start_stack(direct_tail_tokens=0) as stack:
        cluster = stack.router._generator.cluster
        await stack.complete(prompt=PROMPT)
        assert stack.decode.starts[0].route.prefill == ""
        assert cluster.not_ready(needs_kvstore=False) == ""
        async with start_stack(decodes=0, decode=(stack.decode.address,), prefill=(prefill.address,)) as other:
            while "has another namespace" not in (await other.http.get("/ready")).json().get("reason", ""):
                await other.router._generator.cluster.changed()


async def test_workers_are_found_over_nats_and_kept_when_it_dies(start_stack: StackMaker, tmp_path: Path) -> None:
    nats = Nats(tmp_path)
    await nats.start()
    try:
        async with (
            ScriptedDecode("d0").running() as first,
            ScriptedDecode("d1").running() as second,
            start_stack(decodes=0, nats=nats.url) as stack,
            announced(nats, first),
        ):
            async with announced(nats, second) as leaving:
                await until_members(stack, 2)
                await leaving.withdraw()
            await second.die()
            await until_members(stack, 1)
            await nats.kill()
            assert (await stack.complete()).status_code == 200
            assert len(first.starts) == 1
            assert (await stack.http.get("/ready")).status_code == 200
    finally:
        await nats.kill()


async def test_a_clean_stop_over_nats_alone_drops_nobody_that_still_answers(start_stack: StackMaker, tmp_path: Path) -> None:
    nats = Nats(tmp_path)
    await nats.start()
    try:
        async with ScriptedDecode("d0").running() as worker, start_stack(decodes=0, nats=nats.url) as stack:
            async with announced(nats, worker) as leaving:
                await until_members(stack, 1)
                await leaving.withdraw()
            assert (await stack.complete()).status_code == 200
    finally:
        await nats.kill()


async def test_a_draining_worker_gets_nothing_new(start_stack: StackMaker) -> None:
    async with start_stack(decodes=2) as stack:
        stack.decodes[0].draining = True
        peer = stack.router._generator.cluster.of("decode")[0]
        async with asyncio.timeout(20):
            while peer.info is None or not peer.info.draining:
                await stack.router._generator.cluster.changed()
        for _ in range(3):
            await stack.complete()
        assert not stack.decodes[0].starts and len(stack.decodes[1].starts) == 3
