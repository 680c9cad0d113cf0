"""A prefill worker fails within a route, and another goes on from what it left: the stream never shows it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from common import rpc
from common.errors import Cancelled, TransferFailed
from common.routes import Leg, Order, Plan
from common.transport.interface import PartStatus
from services.decode import prefill_client
from services.prefill.handoff import Handoff
from services.prefill.job import Job
from services.worker.requests import RequestStep
from tests.integration.oracle import greedy
from tests.integration.pair import SERVERS, Answer, Pair, faults, running_pair
from tests.integration.test_routes import BLOCKS, LENGTH, ROUTES, TOKENS, check, of_block, prompt_of

pytestmark = pytest.mark.timeout(240)
NOBODY = "127.0.0.1:9"
Failure = Callable[[Pair, pytest.MonkeyPatch], AbstractAsyncContextManager[None]]


@pytest.fixture(scope="module")
def directory(tiny: Callable[[str], Path]) -> Path:
    return tiny("llama")


@pytest.fixture
async def pair(directory: Path, tmp_path: Path) -> AsyncIterator[Pair]:
    async with running_pair(directory, tmp_path, spare=True) as pair:
        yield pair


@asynccontextmanager
async def unreachable(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    await SERVERS[pair.prefill.epoch].stop(0)
    with monkeypatch.context() as patched:
        patched.setattr(prefill_client, "CONNECT_DEADLINE_S", 0.3)
        yield
    await listen_again(pair)


@asynccontextmanager
async def refusing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    pair.runner.draining = True
    yield
    pair.runner.draining = False


@asynccontextmanager
async def silent(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Its connection stands and nothing comes."""
    with monkeypatch.context() as patched:
        patched.setattr(prefill_client, "SILENCE_S", 0.5)
        patched.setattr(pair.runner.means.engine, "add", lambda new: None)
        yield


@asynccontextmanager
async def breaking(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Its engine fails in the middle of a step, and it answers with an error."""
    layerwise = pair.prefill.engine.engine._layerwise
    attend = layerwise.attend

    def breaks(layer: int, *rest: Any) -> Any:
        if layer == 1:
            raise RuntimeError("out of luck")
        return attend(layer, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(layerwise, "attend", breaks)
        yield


@asynccontextmanager
async def handing_over_badly(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Its last block can't reach decode."""
    with faults(pair.prefill, of_block("write", lambda _: True, {BLOCKS}, PartStatus.FAILED)):
        yield


@asynccontextmanager
async def restarting(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Once it has computed a layer its connections break, as a killed process's do; then somebody listens there again, who
    knows of nothing."""
    engine, computed, send = pair.prefill.engine, asyncio.Event(), Handoff.run
    engine.engine.announce = engine.posting(lambda layer, blocks: computed.set())

    async def in_vain(handoff: Handoff) -> None:
        if handoff._in is pair.runner.means.handoffs:
            await asyncio.Event().wait()
        await send(handoff)

    async def restart() -> None:
        await computed.wait()
        await SERVERS[pair.prefill.epoch].stop(0)
        await listen_again(pair)

    dying = asyncio.create_task(restart())
    with monkeypatch.context() as patched:
        patched.setattr(Handoff, "run", in_vain)
        yield
    await dying
    engine.engine.announce = engine.posting(pair.runner.on_layer)


async def listen_again(pair: Pair) -> None:
    node, name = pair.prefill, "penstock.worker.v1.Prefill"
    assert node.worker is not None
    port = int(node.address.rpartition(":")[2])
    SERVERS[node.epoch] = await rpc.serve("127.0.0.1", port, [name], node.worker.register)


FAILURES = (unreachable, refusing, silent, breaking, handing_over_badly, restarting)


async def asked(
    pair: Pair, prompt: Sequence[int], route: Sequence[Leg] = (), order: Order = Order.FORWARD, **more: Any
) -> Answer:
    """With the spare worker as alternate."""
    assert pair.spare is not None
    return await pair.ask(prompt, route, order, **({"alternates": [pair.spare.address]} | more))


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("failure", FAILURES, ids=lambda f: f.__name__)
async def test_another_prefill_worker_goes_on(
    failure: Failure, order: Order, pair: Pair, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompt_of(LENGTH)
    await pair.keep(prompt)
    assert pair.spare is not None
    for name, route in (*ROUTES.items(), ("recompute", ())):
        async with failure(pair, monkeypatch):
            answer = await asked(pair, prompt, route, order)
        check(directory, prompt, answer)
        report = answer.report
        assert report is not None and report.prefill == pair.spare.id and report.prefill_retries == 1, (name, report)
        assert "prefill:" in report.fallback and report.cached_tokens + report.computed_tokens == LENGTH
        if order is not Order.MEET:
            assert report.cached_tokens == 16 * sum(leg.blocks for leg in route), (name, report)
    await pair.check_at_rest()


async def test_what_the_first_has_handed_over_is_not_made_again(
    pair: Pair, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order WHOLE all leaves in one message, and all but the last block arrives."""
    prompt, size = prompt_of(LENGTH), pair.model.layout.bytes_per_block
    await pair.keep(prompt)
    for route in ((), ROUTES["prefill"]):
        async with handing_over_badly(pair, monkeypatch):
            answer = await asked(pair, prompt, route, Order.WHOLE)
        check(directory, prompt, answer)
        report = answer.report
        assert report is not None and report.prefill_retries == 1
        assert report.decode_to_prefill.bytes == BLOCKS * size and report.prefill_to_decode.bytes == (BLOCKS + 1) * size
        assert report.storage_to_prefill.bytes == (BLOCKS * size if route else 0) and report.storage_to_decode.bytes == 0
        assert report.plan is (Plan.STORAGE_TO_PREFILL if route else Plan.RECOMPUTE)
        assert report.cached_tokens == (16 * BLOCKS if route else 0)


async def test_what_a_worker_had_moved_before_it_failed_is_reported_also_when_nobody_goes_on(
    pair: Pair, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, size = prompt_of(LENGTH), pair.model.layout.bytes_per_block
    await pair.keep(prompt)
    async with handing_over_badly(pair, monkeypatch):
        answer = await asked(pair, prompt, ROUTES["prefill"], Order.WHOLE, alternates=[])
    check(directory, prompt, answer)
    report = answer.report
    assert report is not None and not report.prefill and report.storage_to_decode.bytes == 0
    assert report.storage_to_prefill.bytes == report.prefill_to_decode.bytes == BLOCKS * size


async def test_who_listens_hears_that_another_is_asked_before_there_is_a_token(
    pair: Pair, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pair.spare is not None
    request = await pair.request(prompt_of(LENGTH), alternates=[pair.spare.address])
    steps: list[RequestStep] = []
    honest = pair.decoder.start
    monkeypatch.setattr(pair.decoder, "start", lambda asked, emit: honest(asked, lambda step: (steps.append(step), emit(step))))
    async with refusing(pair, monkeypatch):
        check(directory, request.prompt, await pair.run(request))
    first, *rest = steps
    assert first.report is not None and first.report.prefill_retries == 1 and not first.tokens and first.finish is None
    assert all(step.tokens or step.finish for step in rest)


async def test_little_that_is_left_decode_does_by_itself(pair: Pair, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that is stored, or handed over, 7 tokens are left."""
    prompt = prompt_of(LENGTH)
    await pair.keep(prompt)
    for tail_tokens, retries in ((7, 0), (6, 1)):
        async with refusing(pair, monkeypatch):
            answer = await asked(pair, prompt, ROUTES["prefill"], tail_tokens=tail_tokens)
        check(directory, prompt, answer)
        assert answer.report is not None and answer.report.prefill_retries == retries
        async with handing_over_badly(pair, monkeypatch):
            answer = await asked(pair, prompt, (), Order.WHOLE, tail_tokens=tail_tokens)
        check(directory, prompt, answer)
        assert answer.report is not None and answer.report.prefill_retries == retries


async def test_stored_blocks_that_can_not_be_read_are_left_to_compute(
    pair: Pair, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompt_of(LENGTH)
    await pair.keep(prompt)
    assert pair.spare is not None
    gone = of_block("read", lambda _: True, {0, 3}, PartStatus.MISSING)
    with faults(pair.decode, gone), faults(pair.spare, gone):
        async with refusing(pair, monkeypatch):
            answer = await asked(pair, prompt, ROUTES["decode"], tail_tokens=50)
    check(directory, prompt, answer)
    assert answer.report is not None and answer.report.prefill == pair.spare.id


async def test_when_all_fail_decode_goes_on_alone(pair: Pair, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_of(LENGTH)
    await pair.keep(prompt)
    monkeypatch.setattr(prefill_client, "CONNECT_DEADLINE_S", 0.3)
    for name, route in ROUTES.items():
        async with refusing(pair, monkeypatch):
            answer = await asked(pair, prompt, route, alternates=[NOBODY, pair.prefill.address])
        check(directory, prompt, answer)
        report = answer.report
        assert report is not None and report.plan is Plan.DIRECT and report.prefill == "", name
        assert report.prefill_retries == 2 and report.fallback.count("prefill:") == 3
        assert report.cached_tokens == 16 * BLOCKS


async def test_a_first_token_that_is_out_stays_the_first(pair: Pair, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hand-over fails once the token was told: the other worker samples it too, and it is not shown again."""
    prompt = prompt_of(LENGTH)
    told = asyncio.Event()
    honest_tell, honest_send = Job._told_first, Handoff._send

    def tells(run: Any, step: Any) -> None:
        honest_tell(run, step)
        told.set()

    async def fails_then(handoff: Any, parts: Any) -> None:
        if handoff._in is pair.runner.means.handoffs:
            await told.wait()
            raise TransferFailed("out of luck")
        await honest_send(handoff, parts)

    monkeypatch.setattr(Job, "_told_first", tells)
    monkeypatch.setattr(Handoff, "_send", fails_then)
    for tokens in (1, TOKENS):
        told.clear()
        answer = await asked(pair, prompt, tokens=tokens)
        assert answer.ids == greedy(directory, prompt, tokens)[0]
        assert answer.report is not None and answer.report.prefill_retries == 1


@pytest.mark.parametrize("order", Order)
async def test_cancelled_at_any_moment_leaves_nothing(order: Order, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_of(400)
    await pair.keep(prompt)
    assert pair.spare is not None
    for turns in (*range(0, 60, 6), *range(60, 600, 60)):
        async with handing_over_badly(pair, monkeypatch):
            request = await pair.request(
                prompt, ROUTES["split"], order, alternates=[pair.spare.address], tokens=60, ignore_eos=True
            )
            assert isinstance(await pair.cancelled(request, turns), Cancelled)
    await pair.check_at_rest()
