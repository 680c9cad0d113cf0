"""Greedy tokens equal `transformers.generate` by every route, and what was to move by a path really moved there.

Every source, every split point around block borders, every mixture, in every order; then the same with each kind of failure.
"""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from common.errors import Cancelled, Overloaded
from common.routes import Leg, Order, Plan, Source, plan_of
from common.transport.interface import Endpoint, Part, PartStatus
from services.decode import prefill_client
from services.kvstore.area import StoreArea
from services.worker import links, loading
from services.worker.ledger import Ledger
from tests.families import VOCAB_SIZE
from tests.integration.oracle import greedy
from tests.integration.pair import Answer, Pair, faults, legs, running_pair, tiny_model

DECODE, PREFILL = Source.STORAGE_TO_DECODE, Source.STORAGE_TO_PREFILL
TOKENS = 8
LENGTH = 103  # 6 full blocks of 16 tokens that may come from storage, and 7 tokens more
BLOCKS = 6
LOGPROB_TOLERANCE = 1e-4
pytestmark = pytest.mark.timeout(240)


def prompt_of(tokens: int, seed: int = 0) -> list[int]:
    return random.Random(f"{seed}/{tokens}").choices(range(5, VOCAB_SIZE), k=tokens)


@pytest.fixture(scope="module")
def directory(tiny: Callable[[str], Path]) -> Path:
    return tiny("llama")


@pytest.fixture
async def pair(directory: Path, tmp_path: Path) -> AsyncIterator[Pair]:
    async with running_pair(directory, tmp_path) as pair:
        yield pair


def check(directory: Path, prompt: Sequence[int], answer: Answer) -> None:
    """The answer is the oracle's, to the log-probabilities."""
    expected, logprobs = greedy(directory, prompt, TOKENS)
    assert answer.error is None, answer.error
    assert answer.ids == expected, answer.report
    worst = max(abs((token.logprob or 0.0) - theirs) for token, theirs in zip(answer.tokens, logprobs, strict=True))
    assert worst < LOGPROB_TOLERANCE, worst


def check_paths(pair: Pair, prompt: Sequence[int], answer: Answer, route: Sequence[Leg]) -> None:
    """In order FORWARD or WHOLE: each path moved just what its legs say."""
    report, size = answer.report, pair.model.layout.bytes_per_block
    assert report is not None and report.fallback == "", report
    by_decode = sum(leg.blocks for leg in route if leg.source is DECODE)
    by_prefill = sum(leg.blocks for leg in route if leg.source is PREFILL)
    blocks = -(-len(prompt) // pair.block_tokens)
    assert report.plan == plan_of([leg.source for leg in route], Order.FORWARD, by_prefill=True)
    assert report.storage_to_decode.bytes == report.decode_to_prefill.bytes == by_decode * size
    assert report.storage_to_prefill.bytes == by_prefill * size
    assert report.prefill_to_decode.bytes == (blocks - by_decode) * size
    assert report.host_to_device.bytes == blocks * size
    assert report.cached_tokens == (by_decode + by_prefill) * pair.block_tokens
    assert report.computed_tokens == len(prompt) - report.cached_tokens


async def test_every_source_by_block(pair: Pair, directory: Path) -> None:
    """Every way to give each of the first four blocks a source, the others by prefill; some of them leave holes."""
    prompt = prompt_of(LENGTH)
    await pair.keep(prompt)
    for number, sources in enumerate(itertools.product((DECODE, PREFILL, None), repeat=4)):
        route = tuple(Leg(block, block + 1, source) for block, source in enumerate((*sources, PREFILL, PREFILL)) if source)
        answer = await pair.ask(prompt, route, (Order.FORWARD, Order.WHOLE)[number % 2])
        check(directory, prompt, answer)
        check_paths(pair, prompt, answer, route)


@pytest.mark.parametrize("order", Order)
async def test_every_split_point_and_every_length_around_block_borders(order: Order, pair: Pair, directory: Path) -> None:
    for length in (80, 81, 95, 96, 97, 112, 113):
        prompt = prompt_of(length)
        await pair.keep(prompt)
        stored = (length - 1) // pair.block_tokens
        for split in range(stored + 1):
            for first, second in ((DECODE, PREFILL), (PREFILL, DECODE)):
                route = legs(*((a, b, s) for a, b, s in ((0, split, first), (split, stored, second)) if a < b))
                answer = await pair.ask(prompt, route, order)
                check(directory, prompt, answer)
                if order is not Order.MEET:
                    check_paths(pair, prompt, answer, route)


async def test_direct_loads_on_decode_and_touches_no_prefill(pair: Pair, directory: Path) -> None:
    prompt = prompt_of(LENGTH)
    await pair.keep(prompt)
    for blocks in range(1, BLOCKS + 1):
        answer = await pair.ask(prompt, legs((0, blocks, DECODE)), prefill="")
        check(directory, prompt, answer)
        report = answer.report
        assert report is not None and report.plan is Plan.DIRECT and report.prefill == ""
        assert report.storage_to_decode.bytes == blocks * pair.model.layout.bytes_per_block
        assert report.cached_tokens == blocks * pair.block_tokens
    assert pair.prefill.stage.counters.write.bytes == pair.prefill.reader.link.bytes_per_s == 0


@contextmanager
def storage_waits(monkeypatch: pytest.MonkeyPatch, owner: type, method: str) -> Iterator[None]:
    """After its first read, storage answers only when `owner.method` was called: so compute has begun before all is loaded."""
    loop, begun, reads = asyncio.get_running_loop(), asyncio.Event(), itertools.count()
    read, inner = StoreArea.read, getattr(owner, method)

    async def waiting(self: StoreArea, *rest: Any) -> Any:
        if next(reads):
            await begun.wait()
        return await read(self, *rest)

    def beginning(*rest: Any) -> Any:
        loop.call_soon_threadsafe(begun.set)
        return inner(*rest)

    with monkeypatch.context() as patched:
        patched.setattr(StoreArea, "read", waiting)
        patched.setattr(owner, method, beginning)
        yield


async def test_what_loads_meet_with_compute_is_never_made_twice(
    pair: Pair, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompt_of(500)
    await pair.keep(prompt)
    size = pair.model.layout.bytes_per_block
    for route in (legs((0, 31, DECODE)), legs((0, 31, PREFILL)), legs((0, 10, PREFILL), (10, 31, DECODE))):
        with storage_waits(monkeypatch, Ledger, "computed"):
            answer = await pair.ask(prompt, route, Order.MEET)
        check(directory, prompt, answer)
        report = answer.report
        assert report is not None and report.plan.endswith("+meet") and not report.fallback
        assert report.cached_tokens + report.computed_tokens == 500
        loaded = report.cached_tokens // pair.block_tokens
        assert report.storage_to_decode.bytes + report.storage_to_prefill.bytes == loaded * size
        assert report.storage_to_decode.bytes == report.decode_to_prefill.bytes
        assert report.prefill_to_decode.bytes == 32 * size - report.storage_to_decode.bytes
        assert 0 < loaded < 31, "one end made it all, so they never met"


async def test_decode_alone_computes_from_the_front_while_it_loads_from_the_end(
    pair: Pair, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = pair.model.layout.bytes_per_block
    for length in (96, 97, 103, 112, 500):
        prompt = prompt_of(length)
        await pair.keep(prompt)
        stored = (length - 1) // pair.block_tokens
        for blocks in {1, 2, stored // 2, stored}:
            answer = await pair.ask(prompt, legs((0, blocks, DECODE)), Order.MEET, prefill="")
            check(directory, prompt, answer)
            report = answer.report
            assert report is not None and not report.fallback and not report.prefill
            loaded = report.cached_tokens // pair.block_tokens
            assert report.plan is (Plan.DIRECT_MEET if loaded else Plan.RECOMPUTE)
            assert report.storage_to_decode.bytes == report.host_to_device.bytes == loaded * size
            assert report.cached_tokens + report.computed_tokens == length
    with storage_waits(monkeypatch, Ledger, "computed"):
        answer = await pair.ask(prompt, legs((0, 31, DECODE)), Order.MEET, prefill="")
    check(directory, prompt, answer)
    assert answer.report is not None and 0 < answer.report.cached_tokens < 31 * pair.block_tokens


@pytest.mark.parametrize("status", [PartStatus.CORRUPT, PartStatus.FAILED], ids=lambda s: s.name.lower())
async def test_a_block_that_does_not_come_to_a_meeting_is_computed(status: PartStatus, pair: Pair, directory: Path) -> None:
    prompt = prompt_of(LENGTH)
    await pair.keep(prompt)
    for block in range(BLOCKS):
        with faults(pair.decode, of_block("read", lambda _: True, {block}, status)) as failed:
            answer = await pair.ask(prompt, legs((0, 6, DECODE)), Order.MEET, prefill="")
        check(directory, prompt, answer)
        assert answer.report is not None and bool(failed) == bool(answer.report.fallback)


async def test_meetings_in_a_pool_too_small_for_them(directory: Path, tmp_path: Path) -> None:
    model = tiny_model(directory)
    prompts = [prompt_of(150 + number, seed=number) for number in range(5)]
    few = {"pool_bytes": 24 * model.layout.bytes_per_block, "step_tokens_max": 32}
    async with running_pair(directory, tmp_path, model=model, decode=few) as pair:
        for prompt in prompts:
            await pair.keep(prompt)
        asking = (pair.ask(prompt, legs((0, 9, DECODE)), Order.MEET, prefill="") for prompt in prompts)
        for prompt, answer in zip(prompts, await asyncio.gather(*asking), strict=True):
            check(directory, prompt, answer)


@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_other_carriers_bring_the_same(transport: str, directory: Path, tmp_path: Path) -> None:
    prompt = prompt_of(LENGTH)
    async with running_pair(directory, tmp_path, transport=transport) as pair:
        await pair.keep(prompt)
        for route in (legs((0, 6, DECODE)), legs((0, 6, PREFILL)), legs((0, 3, DECODE), (3, 6, PREFILL))):
            answer = await pair.ask(prompt, route)
            check(directory, prompt, answer)
            check_paths(pair, prompt, answer, route)
            assert answer.report is not None and answer.report.carrier == transport


@pytest.mark.parametrize("family", ["gemma3", "qwen2_window", "gpt_oss"])
async def test_families_with_windows_sinks_and_more_layers(family: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    directory, prompt = tiny(family), prompt_of(LENGTH)
    async with running_pair(directory, tmp_path, prefill={"step_tokens_max": 32}) as pair:
        await pair.keep(prompt)
        for order in Order:
            for route in ((), legs((0, 6, DECODE)), legs((0, 2, DECODE), (3, 6, PREFILL))):
                check(directory, prompt, await pair.ask(prompt, route, order))


async def test_many_at_once_share_steps_and_links(pair: Pair, directory: Path) -> None:
    prompts = [prompt_of(60 + 13 * number, seed=number) for number in range(8)]
    for prompt in prompts:
        await pair.keep(prompt)
    orders = itertools.cycle(Order)
    routes = itertools.cycle((legs((0, 3, DECODE)), legs((0, 3, PREFILL)), legs((0, 1, DECODE), (1, 3, PREFILL)), ()))
    answers = await asyncio.gather(*(pair.ask(prompt, next(routes), next(orders)) for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        check(directory, prompt, answer)


# Failures


def of_block(op: str, peer: Callable[[Endpoint], bool], blocks: set[int], status: PartStatus) -> Any:
    return lambda o, endpoint, part: status if o == op and peer(endpoint) and part.item in blocks else None


ROUTES = {
    "decode": legs((0, 6, DECODE)),
    "prefill": legs((0, 6, PREFILL)),
    "split": legs((0, 3, DECODE), (3, 6, PREFILL)),
    "crossed": legs((0, 3, PREFILL), (3, 6, DECODE)),
}


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("status", [PartStatus.CORRUPT, PartStatus.MISSING, PartStatus.FAILED], ids=lambda s: s.name.lower())
async def test_a_block_that_storage_can_not_give(
    status: PartStatus, name: str, order: Order, pair: Pair, directory: Path
) -> None:
    """Whichever block, at whichever worker: it comes another way, and the others still come theirs."""
    prompt = prompt_of(LENGTH)
    await pair.keep(prompt)
    store = (await pair.store.describe()).endpoint
    for block in range(BLOCKS):
        rule = of_block("read", lambda endpoint: endpoint == store, {block}, status)
        with faults(pair.decode, rule) as at_decode, faults(pair.prefill, rule) as at_prefill:
            answer = await pair.ask(prompt, ROUTES[name], order)
        check(directory, prompt, answer)
        assert answer.report is not None
        assert bool(at_decode or at_prefill) <= bool(answer.report.fallback), answer.report
        assert order is Order.MEET or at_decode or at_prefill


async def test_a_block_that_only_decodes_link_can_not_bring_comes_by_prefills(pair: Pair, directory: Path) -> None:
    prompt = prompt_of(LENGTH)
    await pair.keep(prompt)
    with faults(pair.decode, of_block("read", lambda _: True, {2, 4}, PartStatus.FAILED)):
        answer = await pair.ask(prompt, ROUTES["decode"])
    check(directory, prompt, answer)
    report, size = answer.report, pair.model.layout.bytes_per_block
    assert report is not None and report.plan is Plan.SPLIT and "block 2" in report.fallback
    assert (report.storage_to_decode.bytes, report.storage_to_prefill.bytes) == (4 * size, 2 * size)
    assert report.cached_tokens == 96 and report.prefill_to_decode.bytes == 3 * size


@pytest.mark.parametrize("status", [PartStatus.CORRUPT, PartStatus.FAILED, PartStatus.REJECTED], ids=lambda s: s.name.lower())
async def test_a_stage_that_can_not_be_read(status: PartStatus, pair: Pair, directory: Path) -> None:
    """Of any layer of any block: prefill gets it from storage instead."""
    prompt = prompt_of(LENGTH)
    await pair.keep(prompt)
    slice_bytes = pair.model.layout.bytes_per_layer_slice
    for layer, block in itertools.product(range(pair.model.layout.layers), (0, 3, 5)):

        def rule(op: str, peer: Endpoint, part: Part, layer: int = layer, block: int = block) -> PartStatus | None:
            reads = op == "read" and peer == pair.decode.endpoint and part.item == block
            return status if reads and part.offset <= layer * slice_bytes < part.offset + part.length else None

        with faults(pair.prefill, rule) as failed:
            answer = await pair.ask(prompt, ROUTES["decode"])
        check(directory, prompt, answer)
        assert (
            failed and answer.report is not None and answer.report.storage_to_prefill.bytes == pair.model.layout.bytes_per_block
        )


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("name", ROUTES)
async def test_a_hand_off_that_breaks_off(name: str, order: Order, pair: Pair, directory: Path) -> None:
    """At any block: decode keeps what came, pulls what is stored and computes the rest; the stream shows nothing."""
    prompt = prompt_of(LENGTH)
    await pair.keep(prompt)
    for block in range(BLOCKS + 1):
        for status in (PartStatus.FAILED, PartStatus.REJECTED, PartStatus.CORRUPT):
            with faults(pair.prefill, of_block("write", lambda _: True, {block}, status)) as failed:
                answer = await pair.ask(prompt, ROUTES[name], order)
            check(directory, prompt, answer)
            assert answer.report is not None and bool(failed) == ("prefill:" in answer.report.fallback)


async def test_a_slice_that_arrives_corrupt_once_is_sent_again(pair: Pair, directory: Path) -> None:
    prompt, seen = prompt_of(LENGTH), set()

    def rule(op: str, peer: Endpoint, part: Part) -> PartStatus | None:
        first = op == "write" and part not in seen
        seen.add(part)
        return PartStatus.CORRUPT if first else None

    with faults(pair.prefill, rule) as failed:
        answer = await pair.ask(prompt)
    check(directory, prompt, answer)
    assert failed and answer.report is not None and answer.report.fallback == ""


@pytest.mark.parametrize("name", ROUTES)
async def test_prefill_that_can_not_be_reached(name: str, pair: Pair, directory: Path) -> None:
    prompt = prompt_of(LENGTH)
    await pair.keep(prompt)
    answer = await pair.ask(prompt, ROUTES[name], prefill="127.0.0.1:9")
    check(directory, prompt, answer)
    report = answer.report
    assert report is not None and report.plan is Plan.DIRECT and report.cached_tokens == 96 and "prefill:" in report.fallback


async def test_prefill_that_breaks_in_the_middle_of_a_step(pair: Pair, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_of(LENGTH)
    await pair.keep(prompt)
    layerwise = pair.prefill.engine.engine._layerwise
    attend = layerwise.attend

    def breaks(layer: int, *rest: Any) -> Any:
        if layer == 1:
            raise RuntimeError("out of luck")
        return attend(layer, *rest)

    monkeypatch.setattr(layerwise, "attend", breaks)
    for name in ROUTES:
        answer = await pair.ask(prompt, ROUTES[name])
        check(directory, prompt, answer)
        assert answer.report is not None and "out of luck" in answer.report.fallback


async def test_prefill_that_falls_silent(pair: Pair, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection stands and nothing comes: a process that is stopped, or an engine that is stuck."""
    prompt = prompt_of(LENGTH)
    await pair.keep(prompt)
    monkeypatch.setattr(prefill_client, "SILENCE_S", 0.3)
    monkeypatch.setattr(pair.runner.means.engine, "add", lambda new: None)
    for name in ROUTES:
        answer = await pair.ask(prompt, ROUTES[name])
        check(directory, prompt, answer)
        assert answer.report is not None and "has said nothing" in answer.report.fallback
        assert answer.report.cached_tokens == 96


@pytest.mark.parametrize("order", Order)
async def test_a_kvstore_that_stops_in_the_middle(
    order: Order, pair: Pair, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers for some blocks and never for the others; nobody waits for it until the request's deadline."""
    prompt = prompt_of(LENGTH)
    await pair.keep(prompt)
    monkeypatch.setattr(links, "PATIENCE_S", 0.3)
    monkeypatch.setattr(links, "PATIENCE_FACTOR", 0.0)
    monkeypatch.setattr(loading, "blocks_per_read", lambda block_bytes: 2)
    answered = StoreArea.read

    async def stops(self: StoreArea, token: Any, parts: Sequence[Part], into: Any) -> Any:
        if any(part.item in (2, 5) for part in parts):
            await stopped.wait()
        return await answered(self, token, parts, into)

    for name in ROUTES:
        stopped = asyncio.Event()
        monkeypatch.setattr(StoreArea, "read", stops)
        answer = await pair.ask(prompt, ROUTES[name], order)
        stopped.set()
        check(directory, prompt, answer)


async def test_a_kvstore_that_is_gone(pair: Pair, directory: Path) -> None:
    prompt = prompt_of(LENGTH)
    await pair.keep(prompt)
    store = (await pair.store.describe()).endpoint
    rule = lambda op, peer, part: PartStatus.FAILED if peer == store else None  # noqa: E731
    for name, order in itertools.product(ROUTES, Order):
        with faults(pair.decode, rule), faults(pair.prefill, rule):
            answer = await pair.ask(prompt, ROUTES[name], order)
        check(directory, prompt, answer)
        assert answer.report is not None and answer.report.plan is Plan.RECOMPUTE and answer.report.cached_tokens == 0


async def test_a_lease_on_storage_that_has_ended(pair: Pair, directory: Path) -> None:
    """A kvstore that restarted knows no token: nothing is loaded, nothing is wrong."""
    prompt = prompt_of(LENGTH)
    await pair.keep(prompt)
    for name in ROUTES:
        request = await pair.request(prompt, ROUTES[name])
        assert request.route.stored is not None
        await pair.store.release(request.route.stored.token)
        answer = await pair.run(request)
        check(directory, prompt, answer)
        assert answer.report is not None and answer.report.plan is Plan.RECOMPUTE


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("alone", [False, True], ids=["with prefill", "alone"])
async def test_cancelled_at_any_moment_leaves_nothing(alone: bool, order: Order, pair: Pair) -> None:
    prompt = prompt_of(400)
    await pair.keep(prompt)
    for turns in (*range(0, 40, 4), *range(40, 400, 40)):
        route, prefill = legs((0, 12, DECODE), (12, 24, PREFILL)), "" if alone else None
        request = await pair.request(prompt, route, order, prefill=prefill, tokens=60, ignore_eos=True)
        assert isinstance(await pair.cancelled(request, turns), Cancelled)
    await pair.check_at_rest()


async def test_a_stage_without_room_refuses_at_once(directory: Path, tmp_path: Path) -> None:
    model = tiny_model(directory)
    prompt = prompt_of(LENGTH)
    few = {"stage_bytes": 20 * model.layout.bytes_per_block}  # 16 for write-back
    async with running_pair(directory, tmp_path, model=model, decode=few) as pair:
        answer = await pair.ask(prompt)
        assert isinstance(answer.error, Overloaded) and answer.error.retry_after_s
    few = {"stage_bytes": 4 * model.layout.bytes_per_block}
    async with running_pair(directory, tmp_path / "prefill", model=model, prefill=few) as pair:
        answer = await pair.ask(prompt)  # prefill refuses: decode computes by itself
        check(directory, prompt, answer)
        assert answer.report is not None and "slots asked for" in answer.report.fallback


async def test_free_loads_move_nothing_and_take_every_route(directory: Path, tmp_path: Path) -> None:
    """The setting of experiments: what loading costs is the difference to it. Answers are wrong, and must still end."""
    prompt, free = prompt_of(LENGTH), {"simulate_free_loads": True}
    async with running_pair(directory, tmp_path, prefill=free, decode=free) as pair:
        await pair.keep(prompt)
        for name, order in itertools.product(ROUTES, Order):
            answer = await pair.ask(prompt, ROUTES[name], order, ignore_eos=True)
            report = answer.report
            assert answer.error is None and len(answer.ids) == TOKENS and report is not None and not report.fallback
            assert report.storage_to_decode.bytes == report.storage_to_prefill.bytes == report.decode_to_prefill.bytes == 0
            computed = report.computed_tokens // pair.block_tokens + 1
            assert report.prefill_to_decode.bytes == computed * pair.model.layout.bytes_per_block
        answer = await pair.ask(prompt, ROUTES["decode"], prefill="")
        assert answer.error is None and answer.report is not None and answer.report.cached_tokens == 96
