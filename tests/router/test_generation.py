"""Life of a request: leases, refusals, cancellation, and workers that die under it."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

from common.pb import worker_pb2 as pb
from common.routes import Plan
from tests.router.conftest import Stack, StackMaker
from tests.router.scripted import ScriptedDecode

PROMPT = [70 + i % 26 for i in range(100)]  # six full blocks of 16 and a tail


def hold_after(worker: ScriptedDecode, tokens: int, gate: asyncio.Event) -> None:
    """The worker stops after so many tokens of a request until `gate` opens."""
    plain = worker.plain

    async def script(start: pb.Start) -> AsyncIterator[pb.SequenceStep]:
        sent = 0
        async for step in plain(start):
            if sent == tokens:
                await gate.wait()
            yield step
            sent += 1

    worker.script = script


def fail_with(worker: ScriptedDecode, code: str, retry_after_s: float = 0.0) -> None:
    async def script(start: pb.Start) -> AsyncIterator[pb.SequenceStep]:
        yield pb.SequenceStep(
            finish="error", error=pb.Error(code=code, message=f"{worker.id} says {code}", retry_after_s=retry_after_s)
        )

    worker.script = script


async def idle(stack: Stack) -> None:
    await asyncio.wait_for(stack.router._generator.idle.wait(), 10)


async def test_a_stored_prefix_is_leased_handed_over_and_released(start_stack: StackMaker) -> None:
    async with start_stack(stores=1) as stack:
        stack.stores[0].blocks = 4
        assert (await stack.complete(prompt=PROMPT)).status_code == 200
        start = stack.decode.starts[0]
        assert start.route.plan == "direct"
        assert start.route.stored.blocks == 4 and len(start.route.stored.lease.token) == 16
        assert start.route.stored.kvstore == start.route.kvstore == stack.stores[0].address
        assert len(start.chain_root) == 32
        assert await asyncio.wait_for(stack.stores[0].released.get(), 10) == start.route.stored.lease.token
        assert not stack.stores[0].leases and stack.router._generator.keeper.held == 0


async def test_at_least_one_prompt_token_is_always_computed(start_stack: StackMaker) -> None:
    async with start_stack(stores=1) as stack:
        await stack.complete(prompt=PROMPT[:96])
        await stack.complete(prompt=PROMPT[:97])
        await stack.complete(prompt=PROMPT[:16])
        assert [len(lookup.keys) for lookup in stack.stores[0].lookups] == [5, 6]


async def test_a_cache_salt_makes_keys_of_its_own(start_stack: StackMaker) -> None:
    async with start_stack(stores=1) as stack:
        for salt in (None, "tenant-a", "tenant-b"):
            await stack.complete(prompt=PROMPT, **({"cache_salt": salt} if salt else {}))
        assert len({lookup.keys[0] for lookup in stack.stores[0].lookups}) == 3
        assert len({start.chain_root for start in stack.decode.starts}) == 3


async def test_a_kvstore_that_does_not_answer_is_a_miss(start_stack: StackMaker) -> None:
    async with start_stack(stores=1, lookup_timeout_ms=20) as stack:
        stack.stores[0].hang = True
        assert (await stack.complete(prompt=PROMPT)).status_code == 200
        assert stack.decode.starts[0].route.plan == "recompute"
        assert not stack.decode.starts[0].route.HasField("stored")


async def test_a_lease_is_renewed_while_its_request_waits_for_the_first_token(start_stack: StackMaker) -> None:
    async with start_stack(stores=1, lease_s=1.0) as stack:
        gate = asyncio.Event()
        hold_after(stack.decode, 0, gate)
        stack.stores[0].blocks = 2
        pending = asyncio.create_task(stack.complete(prompt=PROMPT))
        await asyncio.wait_for(stack.stores[0].renewed.wait(), 10)
        gate.set()
        assert (await pending).status_code == 200


async def test_a_client_that_goes_cancels_at_decode_streaming_or_not(start_stack: StackMaker) -> None:
    async with start_stack(stores=1) as stack:
        stack.stores[0].blocks = 2
        for stream in (True, False):
            gate = asyncio.Event()
            hold_after(stack.decode, 1, gate)
            stack.decode.started.clear()
            pending = asyncio.create_task(stack.complete(prompt=PROMPT, stream=stream))
            await asyncio.wait_for(stack.decode.started.wait(), 10)
            pending.cancel()
            cancelled = await asyncio.wait_for(stack.decode.cancelled.get(), 10)
            assert cancelled == stack.decode.starts[-1].request_id
            await idle(stack)
            await asyncio.wait_for(stack.stores[0].released.get(), 10)
        assert not stack.stores[0].leases
        peer = stack.router._generator.cluster.of("decode")[0]
        assert peer.account.sequences_live == 0 and peer.account.tokens_live == 0


async def test_a_full_router_refuses_at_once_with_retry_after(start_stack: StackMaker) -> None:
    async with start_stack(requests_max=2) as stack:
        gate = asyncio.Event()
        hold_after(stack.decode, 0, gate)
        pending = asyncio.create_task(stack.complete(n=2))
        await asyncio.wait_for(stack.decode.started.wait(), 10)
        refused = await stack.complete()
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "overloaded"
        gate.set()
        assert (await pending).status_code == 200
        assert (await stack.complete()).status_code == 200


async def test_a_refusal_of_the_only_decode_worker_reaches_the_client_as_429(stack: Stack) -> None:
    fail_with(stack.decode, "overloaded", retry_after_s=3.0)
    refused = await stack.complete()
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) in (2, 3)
    again = await stack.complete()
    assert again.status_code == 429
    assert len(stack.decode.starts) == 1, "a worker that is full is left alone until its time is over"


async def test_a_refusal_is_taken_to_another_worker_first(start_stack: StackMaker) -> None:
    async with start_stack(decodes=2) as stack:
        fail_with(stack.decodes[0], "overloaded", retry_after_s=60)
        for _ in range(3):
            assert (await stack.complete()).status_code == 200
        assert len(stack.decodes[1].starts) == 3


async def test_an_error_of_the_request_itself_is_not_tried_again(start_stack: StackMaker) -> None:
    async with start_stack(decodes=2) as stack:
        for worker in stack.decodes:
            fail_with(worker, "invalid_request_error")
        refused = await stack.complete()
        assert refused.status_code == 400
        assert sum(len(worker.starts) for worker in stack.decodes) == 1


async def test_a_worker_that_dies_before_the_first_token_costs_the_client_nothing(start_stack: StackMaker) -> None:
    async with start_stack(decodes=2) as stack:
        gate = asyncio.Event()
        for worker in stack.decodes:
            hold_after(worker, 0, gate)
        pending = asyncio.create_task(stack.complete())
        first, other = await one_that_started(stack)
        other.script = other.plain
        await first.die()
        answer = (await pending).json()
        assert answer["choices"][0]["text"] == "bcd"
        assert list(other.starts[0].output_ids) == []


async def test_a_worker_that_dies_mid_stream_loses_and_repeats_no_token(start_stack: StackMaker) -> None:
    async with start_stack(decodes=2) as stack:
        gate = asyncio.Event()
        for worker in stack.decodes:
            worker.tokens = tuple(range(70, 80))
            hold_after(worker, 4, gate)
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 10, "stream": True, "seed": 3, "return_token_ids": True}
        async with stack.http.stream("POST", "/v1/completions", json=body) as response:
            chunks = events(response)
            ids = [id_ for _ in range(4) for id_ in (await anext(chunks))["choices"][0]["token_ids"]]
            first, other = await one_that_started(stack)
            other.script = other.plain
            await first.die()
            async for chunk in chunks:
                ids += chunk["choices"][0]["token_ids"]
        assert ids == list(range(70, 80))
        moved = other.starts[0]
        assert list(moved.output_ids) == [70, 71, 72, 73] and list(moved.token_ids) == PROMPT
        assert moved.sampling.seed == first.starts[0].sampling.seed == 3
        assert moved.sampling.max_tokens == 10, "emitted tokens count as output"


async def test_the_only_worker_may_die_and_come_back_under_a_request(stack: Stack) -> None:
    gate = asyncio.Event()
    stack.decode.tokens = tuple(range(70, 76))
    hold_after(stack.decode, 2, gate)
    body = {"prompt": "a", "stream": True, "return_token_ids": True}
    async with stack.http.stream("POST", "/v1/completions", json=body) as response:
        chunks = events(response)
        ids = [id_ for _ in range(2) for id_ in (await anext(chunks))["choices"][0]["token_ids"]]
        stack.decode.script = stack.decode.plain
        await stack.decode.die()
        await stack.decode.come_back()
        async for chunk in chunks:
            ids += chunk["choices"][0]["token_ids"]
    assert ids == list(range(70, 76))


async def test_when_nobody_takes_over_the_stream_ends_in_an_error_event(start_stack: StackMaker) -> None:
    async with start_stack(failover_wait_s=0.1) as stack:
        hold_after(stack.decode, 1, asyncio.Event())
        async with stack.http.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True}) as response:
            chunks = events(response)
            await anext(chunks)
            await stack.decode.die()
            rest = [chunk async for chunk in chunks]
        assert rest[-1]["error"]["code"] == "unavailable"
        assert (await stack.complete()).status_code == 503


async def test_a_request_over_its_time_ends_with_504_and_is_cancelled(start_stack: StackMaker) -> None:
    async with start_stack(request_timeout_s=0.2) as stack:
        hold_after(stack.decode, 0, asyncio.Event())
        late = await stack.complete()
        assert late.status_code == 504 and "longer than 0.2 s" in late.json()["error"]["message"]
        assert 0 < stack.decode.starts[0].deadline_ms <= 201
        assert await asyncio.wait_for(stack.decode.cancelled.get(), 10)


async def test_every_request_is_logged_once_with_its_route(stack: Stack, caplog: Any) -> None:
    caplog.set_level("INFO", "penstock")
    await stack.complete(prompt=PROMPT)
    records = [record.fields for record in caplog.records if record.getMessage() == "request"]
    assert len(records) == 1
    logged = records[0]
    assert logged["route"] == Plan.RECOMPUTE and logged["status"] == "length"
    assert (logged["prompt_tokens"], logged["output_tokens"]) == (100, 3)
    assert logged["ttft_ms"] > 0 and "tokens_per_s" in logged


async def test_bursts_between_two_reports_are_spread(start_stack: StackMaker) -> None:
    async with start_stack(decodes=2) as stack:
        gate = asyncio.Event()
        for worker in stack.decodes:
            hold_after(worker, 0, gate)
        pending = [asyncio.create_task(stack.complete(prompt=PROMPT)) for _ in range(8)]
        while sum(len(worker.starts) for worker in stack.decodes) < 8:
            await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*pending)
        assert [len(worker.starts) for worker in stack.decodes] == [4, 4]


async def test_draining_refuses_what_is_new_and_finishes_what_runs(start_stack: StackMaker) -> None:
    async with start_stack(drain_s=10.0) as stack:
        gate = asyncio.Event()
        hold_after(stack.decode, 1, gate)
        pending = asyncio.create_task(stack.complete())
        await asyncio.wait_for(stack.decode.started.wait(), 10)
        stack.router._generator.draining = True
        assert (await stack.complete()).status_code == 503
        assert (await stack.http.get("/ready")).json()["reason"] == "the router is shutting down"
        gate.set()
        assert (await pending).status_code == 200


async def one_that_started(stack: Stack) -> tuple[ScriptedDecode, ScriptedDecode]:
    """(the worker that has a request, the other one)."""
    first, second = stack.decodes
    waiting = [asyncio.create_task(worker.started.wait()) for worker in stack.decodes]
    await asyncio.wait(waiting, timeout=10, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    return (first, second) if first.starts else (second, first)


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line[6:])
