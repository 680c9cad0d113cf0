"""What a prefill worker's stage still holds is used again: no storage byte for it, and the tokens are the oracle's."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from common.blocks import Namespace, block_keys, chain_root
from common.errors import Cancelled
from common.routes import PATHS, Leg, Order, Plan, Source
from common.transport.interface import PartStatus
from services.router.policy.plans import PLANS
from services.worker.node import Node
from tests.integration.asking import ask
from tests.integration.cluster import Cluster
from tests.integration.oracle import greedy
from tests.integration.pair import SERVERS, Answer, Pair, faults, reborn, running_pair
from tests.integration.test_alternates import breaking, listen_again, refusing
from tests.integration.test_residency import decided, hold
from tests.integration.test_routes import TOKENS, check, of_block, prompt_of

pytestmark = pytest.mark.timeout(240)
HERE, KEPT, DECODE, PREFILL = (
    Source.RESIDENT, Source.RESIDENT_AT_PREFILL, Source.STORAGE_TO_DECODE, Source.STORAGE_TO_PREFILL,
)  # fmt: skip
LENGTH, BLOCKS = 199, 12  # tokens; full blocks of 16


@pytest.fixture(scope="module")
def directory(tiny: Callable[[str], Path]) -> Path:
    return tiny("llama")


@pytest.fixture
async def pair(directory: Path, tmp_path: Path) -> AsyncIterator[Pair]:
    async with running_pair(directory, tmp_path, resident=True, keeping=True, spare=True) as pair:
        yield pair


async def keep(pair: Pair, prompt: Sequence[int], blocks: int) -> None:
    """The prefill worker's stage holds just the leading blocks of a prompt, and decode's pool none of them."""
    await hold(pair, [*prompt], 0)
    give_up(pair.prefill)
    if blocks:
        answer = await pair.ask(prompt[: blocks * 16 + 1], tokens=1)
        assert answer.error is None and answer.report is not None and answer.report.prefill
    await hold(pair, [*prompt], 0)
    assert pair.runner.held_blocks(pair.keys(prompt)) == blocks  # type: ignore[arg-type]


def give_up(node: Node[object]) -> None:
    """Somebody needs all of the stage's memory for a moment."""
    node.stage.free(node.stage.reserve(node.stage.slots_free))


def check_moved(
    pair: Pair, answer: Answer, prompt: Sequence[int], *, held: int = 0, kept: int = 0, decode: int = 0, prefill: int = 0
) -> None:
    """Leading blocks that decode and prefill held; how many storage brought to each. Nothing of what both held moved."""
    report, size = answer.report, pair.model.layout.bytes_per_block
    assert report is not None and not report.fallback, report
    blocks = -(-len(prompt) // 16)
    assert report.storage_to_decode.bytes == decode * size
    assert report.storage_to_prefill.bytes == prefill * size
    assert report.decode_to_prefill.bytes == (max(0, held - kept) + decode) * size
    assert report.prefill_to_decode.bytes == (blocks - held - decode) * size
    assert report.kept_tokens == 16 * kept
    assert report.cached_tokens == 16 * (max(held, kept) + decode + prefill)
    assert report.cached_tokens + report.computed_tokens == len(prompt)


@pytest.mark.parametrize("order", Order)
async def test_an_agents_turns_go_on_from_prefills_stage_without_a_byte_from_storage(
    order: Order, pair: Pair, directory: Path
) -> None:
    """Each turn adds to what prefill made and kept in the turn before; decode keeps nothing."""
    said, kept = prompt_of(100), 0
    for turn in range(4):
        await hold(pair, said, 0)
        answer = await pair.ask(said, [Leg(0, kept, KEPT)] if kept else (), order)
        check(directory, said, answer)
        check_moved(pair, answer, said, kept=kept)
        assert answer.report is not None and answer.report.plan is (Plan.RESIDENT if kept else Plan.RECOMPUTE)
        kept = len(said) // 16
        said = [*said, *answer.ids, *prompt_of(23, seed=turn)]
    await pair.check_at_rest()


@pytest.mark.parametrize("order", [Order.FORWARD, Order.WHOLE])
async def test_kept_blocks_then_both_links_then_computing(order: Order, pair: Pair, directory: Path) -> None:
    prompt = prompt_of(LENGTH)
    await pair.keep(prompt)
    for kept in (1, 4, 7):
        for route in (
            (Leg(kept, 9, PREFILL), Leg(9, 11, DECODE)),
            (Leg(kept, 9, DECODE), Leg(9, 11, PREFILL)),
            (Leg(kept, 11, DECODE),),
            (Leg(kept, 11, PREFILL),),
        ):
            await keep(pair, prompt, kept)
            answer = await pair.ask(prompt, (Leg(0, kept, KEPT), *route), order)
            check(directory, prompt, answer)
            by = {source: sum(leg.blocks for leg in route if leg.source is source) for source in (DECODE, PREFILL)}
            check_moved(pair, answer, prompt, kept=kept, decode=by[DECODE], prefill=by[PREFILL])
            plans = {(True, True): Plan.SPLIT, (True, False): Plan.STORAGE_TO_DECODE, (False, True): Plan.STORAGE_TO_PREFILL}
            assert answer.report is not None and answer.report.plan is plans[by[DECODE] > 0, by[PREFILL] > 0]


async def test_what_is_kept_meets_what_loads(pair: Pair, directory: Path) -> None:
    prompt, size = prompt_of(LENGTH), pair.model.layout.bytes_per_block
    await pair.keep(prompt)
    for route in ((Leg(3, 12, DECODE),), (Leg(3, 12, PREFILL),), (Leg(3, 8, PREFILL), Leg(8, 12, DECODE))):
        await keep(pair, prompt, 3)
        answer = await pair.ask(prompt, (Leg(0, 3, KEPT), *route), Order.MEET)
        check(directory, prompt, answer)
        report = answer.report
        assert report is not None and not report.fallback and report.kept_tokens == 48
        loaded = report.storage_to_decode.bytes + report.storage_to_prefill.bytes
        assert report.cached_tokens * size == 16 * (3 * size + loaded)
        assert report.decode_to_prefill.bytes == report.storage_to_decode.bytes
        assert report.prefill_to_decode.bytes == 13 * size - report.storage_to_decode.bytes


@pytest.mark.parametrize("order", Order)
async def test_prefill_uses_what_it_holds_whatever_the_route_knows(order: Order, pair: Pair, directory: Path) -> None:
    """The route knows of none, of less or of more, and takes the rest from storage by prefill, or computes it."""
    prompt, size = prompt_of(LENGTH), pair.model.layout.bytes_per_block
    await pair.keep(prompt)
    for kept in (0, 2, 5, 12):
        for known in (0, 5):
            for route in ((Leg(known, 12, PREFILL),), ()):
                await keep(pair, prompt, kept)
                legs = (*((Leg(0, known, KEPT),) if known else ()), *route)
                answer = await pair.ask(prompt, legs, order)
                check(directory, prompt, answer)
                report = answer.report
                assert report is not None and not report.fallback and report.kept_tokens == 16 * kept
                loaded = report.storage_to_prefill.bytes // size
                assert report.cached_tokens == 16 * (kept + loaded) and report.storage_to_decode.bytes == 0
                if order is not Order.MEET:
                    assert loaded == (max(0, legs[-1].last_block - kept) if legs else 0)


async def test_what_decode_pulls_by_itself_is_read_there_also_where_it_is_kept(pair: Pair, directory: Path) -> None:
    """Only a read tells that decode could not pull it. In order MEET decode pulls what prefill lets it, which is none of that."""
    prompt = prompt_of(LENGTH)
    await pair.keep(prompt)
    for order, kept, decode in ((Order.FORWARD, 0, 12), (Order.WHOLE, 0, 12), (Order.MEET, 12, 0)):
        await keep(pair, prompt, 12)
        answer = await pair.ask(prompt, (Leg(0, 12, DECODE),), order)
        check(directory, prompt, answer)
        check_moved(pair, answer, prompt, kept=kept, decode=decode)


@pytest.mark.parametrize("order", Order)
async def test_of_what_both_hold_nothing_moves(order: Order, pair: Pair, directory: Path) -> None:
    """Decode's pool holds a part and prefill's stage another: the difference moves, and no storage byte."""
    prompt = prompt_of(LENGTH)
    for held, kept in ((3, 7), (7, 3), (5, 5), (12, 2), (2, 12), (12, 12)):
        await keep(pair, prompt, kept)
        await hold(pair, prompt, held)
        legs = [Leg(0, held, HERE), *([Leg(held, kept, KEPT)] if kept > held else [])]
        answer = await pair.ask(prompt, legs, order)
        check(directory, prompt, answer)
        check_moved(pair, answer, prompt, held=held, kept=kept)
        assert answer.report is not None and answer.report.plan is Plan.RESIDENT


@pytest.mark.parametrize("order", Order)
async def test_kept_blocks_that_went_meanwhile_come_from_storage_or_are_computed(
    order: Order, pair: Pair, directory: Path
) -> None:
    """All of them, or the last ones: pressure takes those first."""
    stored, other = prompt_of(LENGTH), prompt_of(LENGTH, seed=1)
    await pair.keep(stored)
    size = pair.model.layout.bytes_per_block
    for prompt in (stored, other):
        for left in (0, 5):
            await keep(pair, prompt, 8)
            taken = pair.prefill.stage.reserve(pair.prefill.stage.slots_free - left)
            pair.prefill.stage.free(taken)
            assert pair.runner.held_blocks(pair.keys(prompt)) == left  # type: ignore[arg-type]
            answer = await pair.ask(prompt, (Leg(0, 8, KEPT),), order)
            check(directory, prompt, answer)
            report = answer.report
            assert report is not None and not report.fallback and report.kept_tokens == 16 * left
            loaded = report.storage_to_prefill.bytes // size
            assert report.cached_tokens == 16 * (left + loaded)
            assert loaded == 0 if prompt is other else order is Order.MEET or loaded == 8 - left


async def test_another_worker_at_that_address_holds_nothing_of_it(pair: Pair, directory: Path) -> None:
    """As one that restarted between the question and the run."""
    stored, other = prompt_of(LENGTH), prompt_of(LENGTH, seed=1)
    await pair.keep(stored)
    assert pair.spare is not None
    for prompt, prefill in ((stored, 8), (other, 0)):
        await keep(pair, prompt, 8)
        answer = await pair.ask(prompt, (Leg(0, 8, KEPT),), prefill=pair.spare.address)
        check(directory, prompt, answer)
        check_moved(pair, answer, prompt, prefill=prefill)


async def test_a_worker_that_restarts_between_the_question_and_the_run_is_a_clean_miss(pair: Pair, directory: Path) -> None:
    """It listens where the other did, and is of another epoch."""
    stored, other = prompt_of(LENGTH), prompt_of(LENGTH, seed=1)
    await pair.keep(stored)
    old = pair.prefill
    for prompt, prefill in ((stored, 8), (other, 0)):
        await keep(pair, prompt, 8)
        await SERVERS[old.epoch].stop(0)
        async with reborn(pair, port=int(old.address.rpartition(":")[2])) as new:
            assert new.epoch != old.epoch and new.address == old.address
            answer = await pair.ask(prompt, (Leg(0, 8, KEPT),))
        await listen_again(pair)
        check(directory, prompt, answer)
        check_moved(pair, answer, prompt, prefill=prefill)


@pytest.mark.parametrize("failure", [refusing, breaking], ids=lambda f: f.__name__)
async def test_when_the_holder_fails_another_goes_on_without_what_it_held(
    failure: Callable[..., object], pair: Pair, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, other = prompt_of(LENGTH), prompt_of(LENGTH, seed=1)
    await pair.keep(stored)
    assert pair.spare is not None
    for prompt in (stored, other):
        for alternates in ([pair.spare.address], []):
            await keep(pair, prompt, 8)
            give_up(pair.spare)
            async with failure(pair, monkeypatch):  # type: ignore[attr-defined]
                answer = await pair.ask(prompt, (Leg(0, 8, KEPT),), alternates=alternates)
            check(directory, prompt, answer)
            assert answer.report is not None and answer.report.prefill == (pair.spare.id if alternates else "")
    await pair.check_at_rest()


async def test_what_a_broken_engine_worked_on_is_neither_kept_nor_found(
    pair: Pair, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompt_of(LENGTH)
    await keep(pair, prompt, 8)
    async with breaking(pair, monkeypatch):
        check(directory, prompt, await pair.ask(prompt, (Leg(0, 8, KEPT),)))
    assert pair.runner.held_blocks(pair.keys(prompt)) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("status", [PartStatus.CORRUPT, PartStatus.FAILED], ids=lambda s: s.name.lower())
async def test_what_a_failed_transfer_left_is_not_kept(status: PartStatus, pair: Pair, directory: Path) -> None:
    """A block that storage can't give is computed: that is what is kept, and the next turn is right."""
    prompt = prompt_of(LENGTH)
    await pair.keep(prompt)
    await keep(pair, prompt, 2)
    with faults(pair.prefill, of_block("read", lambda _: True, {4, 6}, status)) as failed:
        answer = await pair.ask(prompt, (Leg(0, 2, KEPT), Leg(2, 12, PREFILL)))
    check(directory, prompt, answer)
    assert {part.item for part in failed} == {4, 6}
    await hold(pair, prompt, 0)
    answer = await pair.ask(prompt, (Leg(0, 12, KEPT),))
    check(directory, prompt, answer)
    check_moved(pair, answer, prompt, kept=12)


async def test_agents_that_begin_alike_share_what_is_kept_at_the_same_time(pair: Pair, directory: Path) -> None:
    prompts = [[*prompt_of(100), *prompt_of(60 + 7 * number, seed=number)] for number in range(6)]
    await keep(pair, prompts[0], 6)
    answers = await asyncio.gather(*(pair.ask(prompt, (Leg(0, 6, KEPT),)) for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        check(directory, prompt, answer)
        assert answer.report is not None and answer.report.kept_tokens >= 96
        assert answer.report.storage_to_prefill.bytes == answer.report.storage_to_decode.bytes == 0
    await pair.check_at_rest()
    assert all(pair.runner.held_blocks(pair.keys(prompt)) == len(prompt) // 16 for prompt in prompts)  # type: ignore[arg-type]


async def test_a_stage_too_small_for_what_it_kept_refuses_nothing(directory: Path, tmp_path: Path) -> None:
    prompts = [prompt_of(LENGTH, seed=number) for number in range(4)]
    async with running_pair(directory, tmp_path, keeping=True) as pair:
        pair.prefill.stage.reserve(512 - 30)  # room for two prompts and a bit
        for prompt in (*prompts, *prompts[::-1]):
            answer = await pair.ask(prompt)
            check(directory, prompt, answer)
            assert answer.report is not None and answer.report.prefill
        pair.prefill.stage.check_integrity()
        pair.prefill.stage.free([slot for slot in range(512) if pair.prefill.stage._slots.owns(slot)])


async def test_nobody_is_served_what_another_tenant_left(pair: Pair, directory: Path) -> None:
    prompt = prompt_of(LENGTH)
    await keep(pair, prompt, 12)
    salted = chain_root(Namespace(pair.model.namespace), b"another")
    request = msgspec.structs.replace(await pair.request(prompt, (Leg(0, 12, KEPT),)), chain_root=salted)
    answer = await pair.run(request)
    check(directory, prompt, answer)
    assert answer.report is not None and answer.report.kept_tokens == 0 and answer.report.computed_tokens == LENGTH
    assert pair.runner.held_blocks(block_keys(salted, prompt, 16)) == 12


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
async def test_families_with_windows_and_sinks(family: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    directory, prompt = tiny(family), prompt_of(LENGTH)
    async with running_pair(directory, tmp_path, keeping=True, prefill={"step_tokens_max": 32}) as pair:
        await pair.keep(prompt)
        for order in Order:
            for route in ((), (Leg(0, 4, KEPT), Leg(4, 8, PREFILL), Leg(8, 12, DECODE))):
                await keep(pair, prompt, 4)
                answer = await pair.ask(prompt, route, order)
                check(directory, prompt, answer)
                assert answer.report is not None and answer.report.kept_tokens == 64


async def test_a_worker_that_is_to_keep_nothing_keeps_nothing(directory: Path, tmp_path: Path) -> None:
    prompt = prompt_of(LENGTH)
    async with running_pair(directory, tmp_path, keeping=False) as pair:
        for _ in range(2):
            answer = await pair.ask(prompt, (Leg(0, 12, KEPT),))
            check(directory, prompt, answer)
            check_moved(pair, answer, prompt)
        assert pair.runner.held_blocks(pair.keys(prompt)) == 0  # type: ignore[arg-type]


async def test_a_request_that_ends_with_prefills_token_leaves_its_blocks_too(pair: Pair, directory: Path) -> None:
    prompt = prompt_of(LENGTH)
    await keep(pair, prompt, 0)
    for kept in (0, 12):
        answer = await pair.ask(prompt, (), tokens=1)
        assert answer.ids == greedy(directory, prompt, TOKENS)[0][:1]
        check_moved(pair, answer, prompt, kept=kept)


def test_each_agent_goes_back_to_the_prefill_worker_that_holds_its_context(directory: Path, tmp_path: Path) -> None:
    """By the estimate. Decode keeps nothing and computes nothing, and the kvstore has gone: elsewhere all must be computed."""
    flags = ("--plans", ",".join(PLANS), "--direct-tail-tokens", "0", "--resident-timeout-ms", "5000", "--scheduler")
    with Cluster(
        directory, tmp_path, prefills=2, router_flags=(*flags, "round_robin"), resident=("prefill",)
    ) as cluster:  # fmt: skip
        talks, holders = [prompt_of(200, seed=seed) for seed in range(4)], []
        answers = [ask(cluster, said, TOKENS) for said in talks]
        cluster.services.pop("router").stop()
        cluster.router_flags = [*flags, "earliest_finish"]
        cluster.start_router()
        cluster.kill_one("kvstore")
        for said, answer in zip(talks, answers, strict=True):
            blocks = len(said) // 16
            said += [*answer.token_ids, *prompt_of(6, seed=3)]
            again = ask(cluster, said, TOKENS)
            assert list(again.token_ids) == greedy(directory, said, TOKENS)[0]
            decision = decided(cluster)
            chosen = next(candidate for candidate in decision["candidates"] if candidate["chosen"])
            holders.append(chosen["prefill"])
            assert decision["query"]["resident"] == {chosen["prefill"]: blocks} and not decision["query"]["stored_blocks"]
            assert chosen["legs"] == [{"first_block": 0, "last_block": blocks, "source": "resident_at_prefill"}]
            took = decision["took"]
            assert took["plan"] == "resident" and took["kept_tokens"] == 16 * blocks and not took["fallback"]
            assert [took["paths"][path]["bytes"] for path in PATHS if path.startswith("storage")] == [0, 0]
            assert took["paths"]["prefill_to_decode"]["bytes"] and not took["paths"]["decode_to_prefill"]["bytes"]
        assert holders[:2] == holders[2:] and len(set(holders)) == 2, "they had gone there in turn"


@pytest.mark.parametrize("order", Order)
async def test_cancelled_at_any_moment_leaves_slots_free_or_kept(order: Order, pair: Pair, directory: Path) -> None:
    prompt = prompt_of(400)
    await pair.keep(prompt)
    for turns in (0, 6, 12, 24, 36, 48, 60, 120, 240, 420):
        await keep(pair, prompt, 8)
        route = (Leg(0, 8, KEPT), Leg(8, 14, PREFILL), Leg(14, 20, DECODE))
        request = await pair.request(prompt, route, order, tokens=60, ignore_eos=True)
        assert isinstance(await pair.cancelled(request, turns), Cancelled)
        await pair.check_at_rest()
    kept = pair.runner.held_blocks(pair.keys(prompt))  # type: ignore[arg-type]
    assert kept >= 8
    check(directory, prompt, await pair.ask(prompt, (Leg(0, kept, KEPT),)))
