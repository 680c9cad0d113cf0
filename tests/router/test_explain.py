"""Every decision can be explained: over HTTP, in a header, in a stream, in the terminal, in metrics."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from common.pb import worker_pb2 as pb
from services.cli import explain
from services.router.decisions import Decisions
from services.router.policy.view import Query
from services.router.policy.workers import Refusal, Why
from tests.router.clusters import view
from tests.router.conftest import Stack, StackMaker
from tests.router.test_cluster import ScriptedPrefill

PROMPT = [70 + i % 26 for i in range(100)]  # six full blocks of 16 and a tail


async def asked(stack: Stack, path: str = "", status: int = 200) -> dict[str, Any]:
    answer = await stack.http.get(f"/v1/penstock/explain{path}")
    assert answer.status_code == status, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def test_a_request_is_explained_by_its_id_and_by_its_answers_id(start_stack: StackMaker) -> None:
    async with start_stack(stores=1, prefill=()) as stack:
        stack.stores[0].blocks = 4
        answer = await stack.http.post(
            "/v1/completions", json={"model": "tiny", "prompt": PROMPT}, headers={"x-request-id": "cmpl-7"}
        )
        assert answer.json()["id"] == "cmpl-cmpl-7"
        for name in ("/cmpl-7", "/cmpl-cmpl-7", "/chatcmpl-cmpl-7"):
            body = await asked(stack, name)
            assert body["request_id"] == "cmpl-7" and len(body["decisions"]) == 1
        decision = body["decisions"][0]
        assert decision["query"]["prompt_tokens"] == 100 and decision["query"]["stored_blocks"] == 4
        assert [worker["id"] for worker in decision["workers"]] == ["decode-0"]
        plans = {candidate["plan"]: candidate for candidate in decision["candidates"]}
        assert {"direct", "recompute"} <= plans.keys() and sum(c["chosen"] for c in plans.values()) == 1
        assert plans["direct"]["chosen"] and plans["direct"]["legs"] == [
            {"first_block": 0, "last_block": 4, "source": "storage_to_decode"}
        ]
        took = decision["took"]
        assert took["plan"] == "direct" and took["ended"] == "length" and took["first_token_s"] > 0 < took["over_estimate"]
        assert took["paths"]["storage_to_decode"] == {"bytes": 0, "seconds": 0.0}


async def test_without_an_id_the_last_request_is_explained_and_an_unknown_one_is_not_found(stack: Stack) -> None:
    assert "no decision is known" in (await asked(stack, status=404))["error"]["message"]
    await stack.complete()
    await stack.complete(n=2)
    assert [decision["choice"] for decision in (await asked(stack))["decisions"]] == [0, 1]
    assert "'nobody'" in (await asked(stack, "/nobody", 404))["error"]["message"]


async def test_only_the_last_decisions_are_kept(start_stack: StackMaker) -> None:
    async with start_stack(decisions_max=2) as stack:
        for number in range(3):
            body = {"model": "tiny", "prompt": PROMPT}
            await stack.http.post("/v1/completions", json=body, headers={"x-request-id": f"r{number}"})
        await asked(stack, "/r0", 404)
        await asked(stack, "/r1")
        await asked(stack, "/r2")


async def test_the_header_comes_when_it_is_asked_for(stack: Stack) -> None:
    body = {"model": "tiny", "prompt": PROMPT}
    plain = await stack.http.post("/v1/completions", json=body)
    assert "x-penstock-explain" not in plain.headers
    told = await stack.http.post("/v1/completions", json=body, headers={"x-penstock-explain": "1"})
    summary = json.loads(told.headers["x-penstock-explain"])
    assert summary["plan"] == summary["carried_out"] == "recompute" and summary["decode"] == "decode-0"
    assert summary["took_s"] > 0 and summary["estimate_s"] > 0 and summary["candidates"][0][0] == "recompute"
    assert len(told.headers["x-penstock-explain"]) < 4096


async def test_a_stream_ends_with_a_comment_that_clients_skip(stack: Stack) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "stream": True, "stream_options": {"include_usage": True}}
    told = await stack.http.post("/v1/completions", json=body, headers={"x-penstock-explain": "1"})
    comment, done = [event for event in told.text.split("\n\n") if event][-2:]
    assert done == "data: [DONE]" and comment.startswith(": x-penstock-explain {")
    assert json.loads(comment.removeprefix(": x-penstock-explain "))["plan"] == "recompute"


async def test_the_openai_client_reads_a_stream_with_an_explanation(stack: Stack) -> None:
    openai = pytest.importorskip("openai")
    client = openai.AsyncOpenAI(base_url=f"http://{stack.router.http_address}/v1", api_key="-")
    stream = await client.completions.create(
        model="tiny", prompt=PROMPT, stream=True, extra_headers={"x-penstock-explain": "1"}, max_tokens=4
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices[0].finish_reason
    await client.close()


async def test_the_terminal_shows_workers_candidates_choice_and_outcome(
    start_stack: StackMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    async with ScriptedPrefill().running() as prefill, start_stack(stores=1, prefill=(prefill.address,)) as stack:
        stack.stores[0].blocks = 5
        await stack.complete(prompt=PROMPT)
        url = f"http://{stack.router.http_address}"
        assert await asyncio.to_thread(explain.main, ["--url", url]) == 0
        shown = capsys.readouterr().out
        assert "prompt of 100 tokens, 5 blocks of it stored at" in shown
        for text in (
            "* direct",
            "  storage_to_prefill",
            "[0, 5) storage_to_decode",
            "decode-0",
            "not measured",
            "times the estimate",
        ):
            assert text in shown, shown
        assert await asyncio.to_thread(explain.main, ["--url", url, "unknown"]) == 1
        assert "no decision is known for request 'unknown'" in capsys.readouterr().out


async def test_alternates_are_sent_along_and_those_that_were_asked_are_told_of(
    start_stack: StackMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    async def script(start: pb.Start) -> AsyncIterator[pb.SequenceStep]:
        report = pb.Report(plan=start.route.plan, prefill="prefill-1", prefill_retries=1, fallback="prefill: gone")
        yield pb.SequenceStep(tokens=[pb.Token(id=70)], finish="length", report=report)

    async with (
        ScriptedPrefill().running() as first,
        ScriptedPrefill().running() as second,
        start_stack(prefill=(first.address, second.address), direct_tail_tokens=7) as stack,
    ):
        stack.decode.script = script
        await stack.complete(prompt=PROMPT)
        route = stack.decode.starts[-1].route
        assert {route.prefill, *route.alternates} == {first.address, second.address} and route.tail_tokens == 7
        decision = (await asked(stack))["decisions"][0]
        assert decision["alternates"] == list(route.alternates) and decision["took"]["prefill_retries"] == 1
        assert await asyncio.to_thread(explain.main, ["--url", f"http://{stack.router.http_address}"]) == 0
        assert "asked 1 more of prefill; prefill-1 brought it to its end" in capsys.readouterr().out
        text = (await stack.http.get("/metrics")).text
        assert 'penstock:prefill_retries_total{model_name="tiny"} 1.0' in text


async def test_a_request_is_counted_at_the_prefill_worker_that_has_it(start_stack: StackMaker) -> None:
    """The route's, until decode says that it asked another; nobody's, once there is a token."""
    failing, working = asyncio.Event(), asyncio.Event()

    async def script(start: pb.Start) -> AsyncIterator[pb.SequenceStep]:
        await failing.wait()
        yield pb.SequenceStep(report=pb.Report(prefill_retries=1))
        await working.wait()
        yield pb.SequenceStep(tokens=[pb.Token(id=70)], report=pb.Report(prefill="prefill-1", prefill_retries=1))
        yield pb.SequenceStep(tokens=[pb.Token(id=71)], finish="length")

    async with (
        ScriptedPrefill().running() as one,
        ScriptedPrefill().running() as other,
        start_stack(prefill=(one.address, other.address), direct_tail_tokens=7) as stack,
    ):
        stack.decode.script = script
        cluster = stack.router._generator.cluster
        asking = asyncio.create_task(stack.complete(prompt=PROMPT, max_tokens=2))
        await stack.decode.started.wait()
        route = stack.decode.starts[-1].route
        first, second = (cluster.peers["prefill", address] for address in (route.prefill, route.alternates[0]))

        async def counted(here: int, there: int) -> None:
            async with asyncio.timeout(20):
                while (first.account.sequences_live, second.account.sequences_live) != (here, there):
                    await asyncio.sleep(0.01)  # a poll of the router, bounded above

        await counted(1, 0)
        assert first.account.compute.left(time.monotonic()) > 0
        failing.set()
        await counted(0, 1)
        assert first.account.compute.left(time.monotonic()) == 0 < second.account.compute.left(time.monotonic())
        working.set()
        await asking
        await counted(0, 0)


async def test_what_a_prefill_worker_holds_is_asked_for_routed_and_shown(
    start_stack: StackMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    async def script(start: pb.Start) -> AsyncIterator[pb.SequenceStep]:
        report = pb.Report(plan="resident", prefill="prefill-0", cached_tokens=64, kept_tokens=64)
        yield pb.SequenceStep(tokens=[pb.Token(id=70)], finish="length", report=report)

    async with (
        ScriptedPrefill().running() as prefill,
        start_stack(prefill=(prefill.address,), direct_tail_tokens=7, resident_timeout_ms=5000) as stack,
    ):
        stack.decode.script, prefill.resident_blocks = script, 4
        await stack.complete(prompt=PROMPT)
        (leg,) = stack.decode.starts[-1].route.legs
        assert (leg.first_block, leg.last_block, leg.source) == (0, 4, pb.RESIDENT_AT_PREFILL)
        assert stack.decode.starts[-1].route.prefill == prefill.address
        assert (await asked(stack))["decisions"][0]["query"]["resident"] == {prefill.address: 4}
        assert await asyncio.to_thread(explain.main, ["--url", f"http://{stack.router.http_address}"]) == 0
        shown = capsys.readouterr().out
        for text in ("prefill-0 still holds 4 blocks", "[0, 4) resident_at_prefill", "prefill-0 still held 64 of these tokens"):
            assert text in shown, shown
        assert 'penstock:kept_tokens_total{model_name="tiny"} 64.0' in (await stack.http.get("/metrics")).text


async def test_a_prefill_worker_that_does_not_say_what_it_holds_is_not_waited_for(start_stack: StackMaker) -> None:
    async with (
        ScriptedPrefill().running() as prefill,
        start_stack(prefill=(prefill.address,), direct_tail_tokens=7, resident_timeout_ms=20) as stack,
    ):
        prefill.resident_blocks, prefill.silent = 4, True
        await stack.complete(prompt=PROMPT)
        assert not stack.decode.starts[-1].route.legs
        assert (await asked(stack))["decisions"][0]["query"]["resident"] == {}


async def test_estimates_their_errors_and_queues_are_in_the_metrics(start_stack: StackMaker) -> None:
    async with start_stack() as stack:
        stack.decode.load = pb.Load(prefill_tokens_per_s=50.0, read_bytes_per_s=5e6, read_queue_bytes=7, queued_tokens=3)
        await stack.complete(prompt=PROMPT)
        text = (await stack.http.get("/metrics")).text
        assert 'penstock:first_token_over_estimate_count{model_name="tiny",plan="recompute"} 1.0' in text
        assert 'penstock:estimate_correction{model_name="tiny",plan="recompute"}' in text
        assert 'penstock:link_queue_bytes{link="storage",model_name="tiny",worker="decode-0"}' in text
        assert 'penstock:queued_tokens{model_name="tiny",worker="decode-0"}' in text


async def test_a_refused_request_is_explained_too(start_stack: StackMaker) -> None:
    async with start_stack() as stack:
        stack.router._generator.cluster.of("decode")[0].full_until = 1e18
        answer = await stack.http.post(
            "/v1/completions", json={"model": "tiny", "prompt": PROMPT}, headers={"x-request-id": "full"}
        )
        assert answer.status_code == httpx.codes.TOO_MANY_REQUESTS
        assert (await asked(stack, "/full"))["decisions"][0]["refused"] == "overloaded"


def test_a_refusal_in_brief() -> None:
    decision = Decisions(1).made("r", 0, 0, Query(10), view(), Refusal(Why.UNAVAILABLE, "nobody is there"))
    assert decision.summary() == {"refused": "unavailable", "reason": "nobody is there"}
    assert decision.modelled_s is None and decision.ratio == 0 and decision.plan is None


@pytest.mark.parametrize(("retries", "learned"), [(0, True), (1, False)])
async def test_the_first_report_teaches_what_the_first_token_took_if_the_route_was_carried_out(
    start_stack: StackMaker, retries: int, learned: bool
) -> None:
    """Prefill's token comes before any report; what an alternate took says nothing of the worker that was reckoned with."""

    async def script(start: pb.Start) -> AsyncIterator[pb.SequenceStep]:
        report = pb.Report(plan="recompute", prefill_retries=retries)
        yield pb.SequenceStep(tokens=[pb.Token(id=70)])
        yield pb.SequenceStep(tokens=[pb.Token(id=71)], report=report)
        yield pb.SequenceStep(tokens=[pb.Token(id=72)], finish="length", report=report)

    async with start_stack() as stack:
        stack.decode.script = script
        await stack.complete(prompt=PROMPT, max_tokens=3)
        text = (await stack.http.get("/metrics")).text
        assert ('penstock:first_token_over_estimate_count{model_name="tiny",plan="recompute"} 1.0' in text) is learned
        (decision,) = (await asked(stack))["decisions"]
        assert decision["took"]["first_token_s"] > 0
