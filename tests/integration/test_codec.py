"""Lossy codecs through the running services: smaller blocks, served again after a restart, never mixed with raw ones."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from common.clients.kvstore import KvStoreClient, StoreInfo
from common.codec import CodecName, StoredLayout
from services.worker.model import load_model
from tests.families import VOCAB_SIZE
from tests.integration.asking import ask, check, settled
from tests.integration.cluster import Cluster
from tests.integration.oracle import greedy

BLOCK_TOKENS = 16
ROUTER_FLAGS = ("--direct-tail-tokens", "40")

pytestmark = pytest.mark.timeout(300)


def prompt_of(tokens: int, seed: int = 0) -> list[int]:
    return random.Random(1000 * seed + tokens).choices(range(5, VOCAB_SIZE), k=tokens)


def cluster_of(directory: Path, data: Path, codec: CodecName) -> Cluster:
    return Cluster(
        directory, data, worker_flags=("--codec", codec), router_flags=ROUTER_FLAGS, block_tokens=BLOCK_TOKENS, decodes=1
    )


def logprob_error(directory: Path, prompt: list[int], tokens: int, answer_logprobs: tuple[float, ...]) -> float:
    _, exact = greedy(directory, prompt, tokens)
    return max(abs(ours - theirs) for ours, theirs in zip(answer_logprobs, exact, strict=False))


def bytes_per_write(cluster: Cluster) -> float:
    """Payload of a block, as the kvstore took it."""

    async def describe() -> StoreInfo:
        store = KvStoreClient(cluster.addresses["kvstore"])
        try:
            return await store.describe()
        finally:
            await store.close()

    info = asyncio.run(describe())
    return info.written_bytes / info.writes


@pytest.mark.parametrize("codec", ["fp8", "int8", "int4"])
def test_blocks_are_smaller_and_used_again_after_a_restart_by_decode_and_by_prefill(
    codec: CodecName, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = tiny("llama")
    stored = StoredLayout(load_model(directory, device="cpu", dtype="float32", block_tokens=BLOCK_TOKENS).layout, codec)
    with cluster_of(directory, tmp_path, codec) as cluster:
        base = prompt_of(200)
        check(directory, base, ask(cluster, base))  # nothing was loaded yet: exact
        settled(cluster, 200 // BLOCK_TOKENS)
        assert bytes_per_write(cluster) == stored.bytes_per_block
        cluster.restart()
        for tail, route in ((3, "direct"), (60, "storage_to_prefill")):
            prompt = base[:96] + prompt_of(tail, seed=9)
            answer = ask(cluster, prompt, tokens=1)
            assert answer.cached_tokens == 96, route
            assert logprob_error(directory, prompt, 1, answer.logprobs) < 0.5  # a wrong block is off by far more
        finished = [cluster.services["router"].wait_event("request", cached_tokens=96) for _ in range(2)]
        assert [event["route"] for event in finished] == ["direct", "storage_to_prefill"]


def test_a_prompt_that_ends_with_prefills_token_is_encoded_out_of_the_stage(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tiny("llama")
    with cluster_of(directory, tmp_path, "int8") as cluster:
        check(directory, prompt_of(100), ask(cluster, prompt_of(100), tokens=1), tokens=1)
        settled(cluster, 100 // BLOCK_TOKENS)
        answer = ask(cluster, prompt_of(100), tokens=1)
        assert answer.cached_tokens == 96
        assert logprob_error(directory, prompt_of(100), 1, answer.logprobs) < 0.05


def test_blocks_of_one_codec_are_nothing_to_another(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tiny("llama")
    for codec in ("int8", "raw"):
        with cluster_of(directory, tmp_path, codec) as cluster:
            answer = ask(cluster, prompt_of(100))
            assert answer.cached_tokens == 0
            check(directory, prompt_of(100), answer)
            settled(cluster, 100 // BLOCK_TOKENS)
    with cluster_of(directory, tmp_path, "int8") as cluster:
        assert ask(cluster, prompt_of(100), tokens=1).cached_tokens == 96
