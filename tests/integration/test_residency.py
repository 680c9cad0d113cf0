"""What decode's pool still holds is used again: nothing moves, and the tokens are the oracle's."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.asking import ask, check, settled
from tests.integration.cluster import Cluster
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
