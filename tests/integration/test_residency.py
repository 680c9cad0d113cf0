"""What decode's pool still holds is used again: nothing moves, and the tokens are the oracle's."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.errors import Unavailable
from common.routes import PATHS, Leg, Order, Plan, Source, clipped
from common.transport.interface import PartStatus
from services.decode import together
from services.worker.engine.engine import Engine
from tests.integration.asking import ask, ask_together, check, settled
from tests.integration.cluster import Cluster
from tests.integration.oracle import greedy
from tests.integration.pair import Answer, Pair, faults, running_pair, tiny_model
from tests.integration.test_oracle import BLOCK_TOKENS, ROUTER_FLAGS, prompt_of
from tests.integration.test_routes import of_block

pytestmark = pytest.mark.timeout(300)
BOTH = ("decode", "prefill")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_conversation_goes_on_from_the_pool_without_a_byte_moved(
    family: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = tiny(family)
    with Cluster(directory, tmp_path, router_flags=ROUTER_FLAGS, block_tokens=BLOCK_TOKENS, resident=BOTH) as cluster:
        said = prompt_of(100)
        for turn in range(4):
            answer = ask(cluster, said)
            check(directory, said, answer)
            if turn:
                event = cluster.services["router"].events("request")[-1]
                assert event["route"] == "resident", event
                computed = len(said) - 6 - 1  # the last token of the answer was never an input
                assert answer.cached_tokens == computed // BLOCK_TOKENS * BLOCK_TOKENS
            said = [*said, *answer.token_ids, *prompt_of(6, seed=turn)]
        settled(cluster, 6)
        cluster.restart()
        answer = ask(cluster, said)
        check(directory, said, answer)
        assert answer.cached_tokens >= 96 and cluster.services["router"].events("request")[-1]["route"] != "resident"


def test_a_resident_beginning_and_a_long_tail_go_through_prefill_all_the_same(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = tiny("llama")
    flags = ("--context-tokens", "1024")
    with Cluster(
        directory, tmp_path, router_flags=ROUTER_FLAGS, worker_flags=flags, block_tokens=BLOCK_TOKENS, resident=BOTH
    ) as cluster:
        base = prompt_of(64)
        check(directory, base, ask(cluster, base))
        prompt = base + prompt_of(600, seed=1)
        check(directory, prompt, ask(cluster, prompt))
        assert decided(cluster)["took"]["prefill"]
        again = ask(cluster, prompt)
        check(directory, prompt, again)
        assert again.cached_tokens == 656


def decided(cluster: Cluster) -> dict[str, Any]:
    """The decision for the request that was placed last."""
    document = httpx.get(f"{cluster.url}/v1/penstock/explain", timeout=30, trust_env=False).json()
    decision: dict[str, Any] = document["decisions"][0]
    return decision


def test_each_conversation_goes_back_to_the_worker_that_holds_it(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tiny("llama")
    flags = ("--scheduler", "earliest_finish", "--resident-timeout-ms", "5000")
    with Cluster(
        directory, tmp_path, decodes=2, prefills=0, router_flags=flags, block_tokens=BLOCK_TOKENS, resident=BOTH
    ) as cluster:
        talks = [prompt_of(100, seed=seed) for seed in (1, 2)]
        answers = ask_together(cluster, talks)
        holders = []
        for said, answer in zip(talks, answers, strict=True):
            check(directory, said, answer)
            said += [*answer.token_ids, *prompt_of(6, seed=3)]
            again = ask(cluster, said)
            check(directory, said, again)
            decision = decided(cluster)
            chosen = next(candidate for candidate in decision["candidates"] if candidate["chosen"])
            holders.append(chosen["decode"])
            blocks = (len(said) - 6 - 1) // BLOCK_TOKENS
            assert decision["query"]["resident"] == {chosen["decode"]: blocks}
            assert chosen["legs"][0] == {"first_block": 0, "last_block": blocks, "source": "resident"}
            assert again.cached_tokens == blocks * BLOCK_TOKENS
            assert decision["took"]["plan"] == "resident" and not decision["took"]["fallback"]
            assert [decision["took"]["paths"][path]["bytes"] for path in PATHS] == [0] * len(PATHS)
        assert len(set(holders)) == 2, "two requests at once went to two workers, and each was found again"


@pytest.mark.parametrize("held", [0, 2, 4])
async def test_what_is_held_no_more_is_loaded_and_nothing_else(held: int, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """The route says that four blocks are held; two more are stored."""
    directory, prompt = tiny("llama"), prompt_of(103)
    async with running_pair(directory, tmp_path / "first") as pair:
        await pair.keep(prompt)
    async with running_pair(directory, tmp_path / "first", resident=True) as pair:
        if held:
            warm = await pair.ask(prompt[: held * 16 + 1], prefill="", tokens=1)
            assert warm.error is None
        route = (Leg(0, 4, Source.RESIDENT), Leg(4, 6, Source.STORAGE_TO_DECODE))
        answer = await pair.ask(prompt, route, Order.FORWARD, prefill="")
        assert answer.error is None and answer.ids == greedy(directory, prompt, 8)[0]
        report, size = answer.report, pair.model.layout.bytes_per_block
        assert report is not None and report.plan is Plan.DIRECT and not report.fallback
        assert report.storage_to_decode.bytes == report.host_to_device.bytes == (6 - held) * size
        assert report.storage_to_prefill.bytes == report.decode_to_prefill.bytes == report.prefill_to_decode.bytes == 0
        assert report.cached_tokens == 96


async def test_what_is_held_no_more_and_not_stored_is_computed(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    directory, prompt = tiny("llama"), prompt_of(103)
    async with running_pair(directory, tmp_path, resident=True) as pair:
        answer = await pair.ask(prompt, (Leg(0, 4, Source.RESIDENT),), prefill="")
        assert answer.error is None and answer.ids == greedy(directory, prompt, 8)[0]
        report = answer.report
        assert report is not None and report.plan is Plan.RECOMPUTE and report.cached_tokens == 0
        assert report.computed_tokens == 103


# With prefill: it reads what decode holds


HELD, DECODE, PREFILL = Source.RESIDENT, Source.STORAGE_TO_DECODE, Source.STORAGE_TO_PREFILL
LENGTH, BLOCKS = 103, 6  # tokens; full blocks of 16


@pytest.fixture(scope="module")
def directory(tiny: Callable[[str], Path]) -> Path:
    return tiny("llama")


@pytest.fixture
async def pair(directory: Path, tmp_path: Path) -> AsyncIterator[Pair]:
    """All of each prompt is stored, and nothing is held yet."""
    async with running_pair(directory, tmp_path, resident=True, spare=True) as pair:
        yield pair


async def hold(pair: Pair, prompt: list[int], blocks: int) -> None:
    """Decode's pool holds just the leading blocks of a prompt."""
    await pair.check_at_rest()
    await pair.decode.engine.call(_forget_all)
    if blocks:
        warm = await pair.ask(prompt[: blocks * 16 + 1], prefill="", tokens=1)
        assert warm.error is None
    assert pair.decoder.resident_blocks(pair.keys(prompt)) == blocks  # type: ignore[arg-type]


def _forget_all(engine: Engine) -> None:
    allocator = engine.pool.allocator
    while allocator._idle:
        allocator._free.append(allocator._evict())


def check_moved(pair: Pair, answer: Answer, directory: Path, prompt: list[int], *, held: int, decode: int, prefill: int) -> None:
    """The oracle's tokens, and so many blocks came from each source."""
    assert answer.error is None and answer.ids == greedy(directory, prompt, 8)[0]
    report, size = answer.report, pair.model.layout.bytes_per_block
    assert report is not None and not report.fallback, report
    assert report.storage_to_decode.bytes == decode * size and report.storage_to_prefill.bytes == prefill * size
    assert report.decode_to_prefill.bytes == (held + decode) * size
    assert report.prefill_to_decode.bytes == (BLOCKS + 1 - held - decode) * size
    assert report.host_to_device.bytes == (BLOCKS + 1 - held) * size, "what the pool holds is not copied to it again"
    assert report.cached_tokens == 16 * (held + decode + prefill)
    assert report.cached_tokens + report.computed_tokens == LENGTH


@pytest.mark.parametrize("order", [Order.FORWARD, Order.WHOLE])
async def test_prefill_reads_what_decode_holds_and_none_of_it_comes_from_storage(
    order: Order, pair: Pair, directory: Path
) -> None:
    """The route says that four blocks are held; fewer are, just these, or more."""
    prompt = prompt_of(LENGTH)
    await pair.keep(prompt)
    for held in (0, 1, 4, 5, 6):
        for rest in ((Leg(4, 6, DECODE),), (Leg(4, 6, PREFILL),), (Leg(4, 5, PREFILL), Leg(5, 6, DECODE)), ()):
            await hold(pair, prompt, held)
            answer = await pair.ask(prompt, (Leg(0, 4, HELD), *rest), order)
            late = [leg for leg in (*clipped(rest, 6),) for _ in range(max(leg.first_block, held), leg.last_block)]
            by_decode = max(0, 4 - held) + sum(leg.source is DECODE for leg in late)
            by_prefill = sum(leg.source is PREFILL for leg in late)
            check_moved(pair, answer, directory, prompt, held=held, decode=by_decode, prefill=by_prefill)
            if held >= 4 and not late:
                assert answer.report is not None and answer.report.plan is Plan.RESIDENT


async def test_what_is_held_and_not_stored_is_read_all_the_same(pair: Pair, directory: Path) -> None:
    prompt = prompt_of(LENGTH)
    for order in Order:
        await hold(pair, prompt, 5)
        answer = await pair.ask(prompt, (Leg(0, 5, HELD),), order)
        check_moved(pair, answer, directory, prompt, held=5, decode=0, prefill=0)
        assert answer.report is not None and answer.report.plan is Plan.RESIDENT


async def test_what_is_held_meets_what_loads(pair: Pair, directory: Path) -> None:
    prompt = prompt_of(LENGTH)
    await pair.keep(prompt)
    size = pair.model.layout.bytes_per_block
    for source in (DECODE, PREFILL):
        await hold(pair, prompt, 3)
        answer = await pair.ask(prompt, (Leg(0, 3, HELD), Leg(3, 6, source)), Order.MEET)
        assert answer.error is None and answer.ids == greedy(directory, prompt, 8)[0]
        report = answer.report
        assert report is not None and not report.fallback
        loaded = report.storage_to_decode.bytes + report.storage_to_prefill.bytes
        assert report.cached_tokens * size == 16 * (3 * size + loaded)
        assert report.decode_to_prefill.bytes == 3 * size + report.storage_to_decode.bytes


async def test_what_is_held_is_left_alone_by_a_route_that_computes_all(pair: Pair, directory: Path) -> None:
    prompt = prompt_of(LENGTH)
    await hold(pair, prompt, 4)
    answer = await pair.ask(prompt)
    assert answer.error is None and answer.ids == greedy(directory, prompt, 8)[0]
    report, size = answer.report, pair.model.layout.bytes_per_block
    assert report is not None and report.plan is Plan.RECOMPUTE and report.computed_tokens == LENGTH and not report.cached_tokens
    assert report.decode_to_prefill.bytes == 0 and report.prefill_to_decode.bytes == (BLOCKS + 1) * size


@contextmanager
def pool_that_fails(monkeypatch: pytest.MonkeyPatch, after: int) -> Iterator[None]:
    """Blocks leave the pool one by one, and after so many none does."""
    left = iter(range(after))
    export = Engine.export_claimed

    def fails(engine: Engine, *rest: Any) -> None:
        if next(left, None) is None:
            raise Unavailable("out of luck")
        export(engine, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "export_claimed", fails)
        patched.setattr(together, "COPY_BYTES", 1)
        yield


@pytest.mark.parametrize("order", Order)
async def test_blocks_that_do_not_leave_the_pool_come_another_way(
    order: Order, pair: Pair, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From storage, if they are stored, else they are computed."""
    prompt, other = prompt_of(LENGTH), prompt_of(LENGTH, seed=1)
    await pair.keep(prompt)
    for asked, route in ((prompt, (Leg(0, 4, HELD), Leg(4, 6, DECODE))), (other, (Leg(0, 4, HELD),))):
        for after in (0, 1, 3):
            await hold(pair, asked, 4)
            with pool_that_fails(monkeypatch, after):
                answer = await pair.ask(asked, route, order)
            assert answer.error is None and answer.ids == greedy(directory, asked, 8)[0]
            assert answer.report is not None and "pool: out of luck" in answer.report.fallback


@pytest.mark.parametrize("order", Order)
async def test_another_prefill_worker_reads_what_is_held_too(
    order: Order, pair: Pair, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompt_of(LENGTH)
    await pair.keep(prompt)
    assert pair.spare is not None
    broken = of_block("write", lambda _: True, {BLOCKS}, PartStatus.FAILED)
    for tail_tokens, by in ((0, pair.spare.id), (7, "")):
        await hold(pair, prompt, 4)
        with faults(pair.prefill, broken):
            answer = await pair.ask(
                prompt, (Leg(0, 4, HELD), Leg(4, 6, PREFILL)), order, alternates=[pair.spare.address], tail_tokens=tail_tokens
            )
        assert answer.error is None and answer.ids == greedy(directory, prompt, 8)[0]
        report = answer.report
        assert report is not None and report.prefill == by and report.prefill_retries == bool(by)


async def test_cancelled_while_the_pool_is_read_leaves_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_of(400)
    monkeypatch.setattr(together, "COPY_BYTES", 1)
    for turns in (*range(0, 60, 4), *range(60, 400, 40)):
        await hold(pair, prompt, 20)
        request = await pair.request(prompt, (Leg(0, 20, HELD),), tokens=60, ignore_eos=True)
        over = asyncio.Event()
        key = pair.decoder.start(request, lambda step, over=over: over.set() if step.finish is not None else None)  # type: ignore[misc]
        assert key is not None
        for _ in range(turns):
            await asyncio.sleep(0)
        pair.decoder.cancel(key)
        await over.wait()
        await pair.check_at_rest()


@pytest.mark.parametrize("resident", [("decode",), BOTH], ids=" and ".join)
def test_a_conversation_goes_on_through_prefill_and_nothing_comes_from_storage(
    resident: tuple[str, ...], directory: Path, tmp_path: Path
) -> None:
    """Decode may compute nothing itself here, so that every turn goes through prefill."""
    flags = ("--scheduler", "earliest_finish", "--plans", "storage_to_decode,recompute", "--direct-tail-tokens", "0")
    flags = (*flags, "--resident-timeout-ms", "5000")
    size = tiny_model(directory).layout.bytes_per_block
    with Cluster(directory, tmp_path, router_flags=flags, block_tokens=BLOCK_TOKENS, resident=resident) as cluster:
        said, kept = prompt_of(200), 0
        for turn in range(3):
            answer = ask(cluster, said)
            check(directory, said, answer)
            took = decided(cluster)["took"]
            assert took["prefill"] and not took["fallback"]
            if turn:
                assert took["plan"] == "resident", decided(cluster)
                blocks = (len(said) - 6 - 1) // BLOCK_TOKENS
                assert answer.cached_tokens == blocks * BLOCK_TOKENS
                assert took["paths"]["storage_to_decode"]["bytes"] == took["paths"]["storage_to_prefill"]["bytes"] == 0
                if "prefill" in resident:  # of what both hold nothing moves
                    assert took["kept_tokens"] == kept and took["paths"]["decode_to_prefill"]["bytes"] <= size
                else:
                    assert took["paths"]["decode_to_prefill"]["bytes"] == blocks * size
            kept = len(said) // BLOCK_TOKENS * BLOCK_TOKENS
            said = [*said, *answer.token_ids, *prompt_of(6, seed=turn)]
