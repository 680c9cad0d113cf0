"""Must show 2: greedy output through the running services equals `transformers.generate`, whatever happens in between."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families import CORE_FAMILIES, VOCAB_SIZE
from tests.integration.asking import ask, ask_together, check, settled
from tests.integration.cluster import Cluster

BLOCK_TOKENS = 16
TOKENS = 24
# Tails over this go to the prefill worker, shorter ones are decode's own.
ROUTER_FLAGS = ("--direct-tail-tokens", "40")

pytestmark = pytest.mark.timeout(300)


def prompt_of(tokens: int, seed: int = 0) -> list[int]:
    return random.Random(1000 * seed + tokens).choices(range(5, VOCAB_SIZE), k=tokens)


def full_blocks(tokens: int) -> int:
    return tokens // BLOCK_TOKENS


@pytest.mark.parametrize("family", CORE_FAMILIES)
def test_a_family_fresh_crowded_from_every_prefix_after_restarts_and_over_every_carrier(
    family: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = tiny(family)
    block = _bytes_per_block(directory)
    # A pool too small for sixteen requests at once.
    flags = ("--pool-bytes", str(28 * block), "--stage-bytes", str(400 * block), "--step-tokens-max", "64")
    with Cluster(
        directory, tmp_path, transport="extent", worker_flags=flags, router_flags=ROUTER_FLAGS, block_tokens=BLOCK_TOKENS
    ) as cluster:
        fresh(cluster, directory)
        crowded(cluster, directory)
        for transport in ("extent", "shm", "tcp", "grpc"):
            if transport != cluster.transport:
                cluster.restart(transport=transport)
            stored(cluster, directory)
            finished = cluster.services["router"].events("request")
            carriers = {event["carrier"] for event in finished if event["cached_tokens"]}
            # Extents are of the SSD: from prefill's stage to decode's, blocks still go by shm.
            assert transport in carriers and carriers <= {transport, "shm" if transport == "extent" else transport}


LENGTHS = (3, BLOCK_TOKENS, 35, 90)


def fresh(cluster: Cluster, directory: Path) -> None:
    """Prompts never seen; ends when their blocks are on SSD."""
    for tokens in LENGTHS:
        answer = ask(cluster, prompt_of(tokens))
        check(directory, prompt_of(tokens), answer)
        assert answer.cached_tokens == 0
    settled(cluster, sum(full_blocks(tokens) for tokens in LENGTHS))


def crowded(cluster: Cluster, directory: Path) -> None:
    """Sixteen at once, of which some lose their memory on the way."""
    prompts = [prompt_of(20 + 7 * number, seed=number) for number in range(16)]
    answers = ask_together(cluster, prompts, tokens=60)
    for prompt, answer in zip(prompts, answers, strict=True):
        check(directory, prompt, answer, tokens=60)
    assert sum(event["preemptions"] for event in cluster.services["router"].events("request")) > 0


def stored(cluster: Cluster, directory: Path) -> None:
    """The prompts of `fresh` again, and every offset around a block's border with tails for decode and for prefill."""
    for tokens in LENGTHS:
        answer = ask(cluster, prompt_of(tokens))
        check(directory, prompt_of(tokens), answer)
        assert answer.cached_tokens == (tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    base = prompt_of(90)
    for shared in (31, 32, 33, 47, 48, 49):
        for tail in (2, 50):
            prompt = base[:shared] + prompt_of(tail, seed=shared + 1)
            answer = ask(cluster, prompt)
            check(directory, prompt, answer)
            assert answer.cached_tokens >= shared // BLOCK_TOKENS * BLOCK_TOKENS


def _bytes_per_block(directory: Path) -> int:
    from services.worker.model import load_model

    return load_model(directory, device="cpu", dtype="float32", block_tokens=BLOCK_TOKENS).layout.bytes_per_block


def test_a_prompt_that_ends_with_prefills_token_is_stored_all_the_same(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tiny("llama")
    with Cluster(directory, tmp_path, router_flags=ROUTER_FLAGS, block_tokens=BLOCK_TOKENS) as cluster:
        check(directory, prompt_of(100), ask(cluster, prompt_of(100), tokens=1), tokens=1)
        settled(cluster, full_blocks(100))
        answer = ask(cluster, prompt_of(100), tokens=8)
        check(directory, prompt_of(100), answer, tokens=8)
        assert answer.cached_tokens == 96
