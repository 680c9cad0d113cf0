"""What decode's pool still holds is used again: nothing moves, and the tokens are the oracle's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.routes import PATHS, Leg, Order, Plan, Source
from tests.integration.asking import ask, ask_together, check, settled
from tests.integration.cluster import Cluster
from tests.integration.oracle import greedy
from tests.integration.pair import running_pair
from tests.integration.test_oracle import BLOCK_TOKENS, ROUTER_FLAGS, prompt_of

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_conversation_goes_on_from_the_pool_without_a_byte_moved(
    family: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = tiny(family)
    with Cluster(directory, tmp_path, router_flags=ROUTER_FLAGS, block_tokens=BLOCK_TOKENS, resident=True) as cluster:
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
        directory, tmp_path, router_flags=ROUTER_FLAGS, worker_flags=flags, block_tokens=BLOCK_TOKENS, resident=True
    ) as cluster:
        base = prompt_of(64)
        check(directory, base, ask(cluster, base))
        prompt = base + prompt_of(600, seed=1)
        check(directory, prompt, ask(cluster, prompt))
        assert cluster.services["router"].events("request")[-1]["route"] != "resident"
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
        directory, tmp_path, decodes=2, prefills=0, router_flags=flags, block_tokens=BLOCK_TOKENS, resident=True
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
