"""The failure ladder, with real processes: whatever dies, the tokens are the oracle's and nothing is left behind."""

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from services.kvstore.record import PAGE_BYTES, SlotHeader, decode_slot, encode_slot
from tests.integration.asking import ask, check, settled, stored_blocks
from tests.integration.cluster import Cluster
from tests.integration.oracle import greedy
from tests.integration.test_oracle import BLOCK_TOKENS, ROUTER_FLAGS, prompt_of

pytestmark = pytest.mark.timeout(300)
QUIET_DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def directory(tiny: Callable[[str], Path]) -> Path:
    return tiny("llama")


@pytest.fixture(scope="module")
def cluster(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    flags = (*ROUTER_FLAGS, "--failover-wait-s", "10")
    with Cluster(
        directory, tmp_path_factory.mktemp("faults"), decodes=2, router_flags=flags, block_tokens=BLOCK_TOKENS
    ) as cluster:
        yield cluster


def status(cluster: Cluster) -> dict[str, Any]:
    document: dict[str, Any] = httpx.get(f"{cluster.url}/v1/penstock/status", timeout=10, trust_env=False).json()
    return document


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Polls another process, bounded."""
    until = time.monotonic() + QUIET_DEADLINE_S
    while not condition():
        assert time.monotonic() < until, f"not within {QUIET_DEADLINE_S} s: {what}"
        time.sleep(0.1)


def quiet(cluster: Cluster) -> None:
    """Nothing runs, and every block and slot is where it belongs."""

    def at_rest() -> bool:
        found = status(cluster)
        loads = [member["load"] for member in found["members"] if member.get("load") and member["connected"]]
        full = all(load.get("pool_blocks_free") == load.get("pool_blocks_total") for load in loads)
        return found["in_flight"] == 0 and not any(load.get("running") or load.get("waiting") for load in loads) and full

    try:
        wait_until(at_rest, "the cluster at rest")
    except AssertionError:
        raise AssertionError(json.dumps(status(cluster), indent=1)) from None


def stream_ids(cluster: Cluster, prompt: list[int], tokens: int) -> Iterator[list[int]]:
    body = {
        "model": cluster.model.name,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
    }
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=120, trust_env=False) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                for choice in chunk["choices"]:
                    yield choice.get("token_ids") or []


def test_a_client_that_vanishes_mid_stream_leaves_nothing_running(cluster: Cluster) -> None:
    stream = stream_ids(cluster, prompt_of(60, seed=1), 900)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    quiet(cluster)
    events = cluster.services["router"].events("request")
    assert events[-1]["status"] == "cancelled"


def test_prefill_that_dies_is_replaced_by_decode_itself(cluster: Cluster, directory: Path) -> None:
    cluster.kill_one("prefill-0")
    for seed in (2, 3):
        check(directory, prompt_of(120, seed), ask(cluster, prompt_of(120, seed)))
    quiet(cluster)
    cluster.start_worker("prefill", 0)
    cluster.services["prefill-0"].wait_event("ready")


def test_prefill_that_stalls_or_dies_with_a_request_is_replaced_by_another(directory: Path, tmp_path: Path) -> None:
    """One process is stopped, so that what it is asked for stays unanswered; the second time it is killed meanwhile."""
    with Cluster(directory, tmp_path, prefills=2, router_flags=ROUTER_FLAGS, block_tokens=BLOCK_TOKENS) as cluster:
        check(directory, prompt_of(120, seed=30), ask(cluster, prompt_of(120, seed=30)))
        document = httpx.get(f"{cluster.url}/v1/penstock/explain", timeout=10, trust_env=False).json()
        (first, other) = sorted(("prefill-0", "prefill-1"), key=lambda name: name != document["decisions"][0]["took"]["prefill"])
        stopped = cluster.services[first].process

        def is_there() -> bool:
            return any(member["id"] == first and member["sequences_live"] for member in status(cluster)["members"])

        for seed, meanwhile in ((31, lambda: None), (32, lambda: cluster.kill_one(first))):
            stopped.send_signal(signal.SIGSTOP)
            with ThreadPoolExecutor(1) as pool:
                asking = pool.submit(ask, cluster, prompt_of(120, seed))
                wait_until(is_there, f"the request at {first}")
                meanwhile()
                check(directory, prompt_of(120, seed), asking.result())
            document = httpx.get(f"{cluster.url}/v1/penstock/explain", timeout=10, trust_env=False).json()
            took = document["decisions"][0]["took"]
            assert took["prefill"] == other and took["prefill_retries"] == 1 and "prefill:" in took["fallback"]
            if stopped.poll() is None:
                stopped.send_signal(signal.SIGCONT)
        quiet(cluster)


def test_a_stream_goes_on_when_its_decode_worker_is_killed(cluster: Cluster, directory: Path) -> None:
    prompt, tokens = prompt_of(50, seed=4), 400
    expected, _ = greedy(directory, prompt, tokens)
    got: list[int] = []
    victim = ""
    for ids in stream_ids(cluster, prompt, tokens):
        got += ids
        if not victim and len(got) >= 3:
            live = [member for member in status(cluster)["members"] if member["role"] == "decode" and member["sequences_live"]]
            victim = live[0]["id"]
            cluster.kill_one(victim)
    assert got == expected
    cluster.start_worker("decode", int(victim[-1]))
    cluster.services[victim].wait_event("ready")


def test_a_flipped_bit_on_disk_is_recomputed_and_counted(directory: Path, tmp_path: Path) -> None:
    prompt = prompt_of(100, seed=5)
    with Cluster(directory, tmp_path, router_flags=ROUTER_FLAGS, block_tokens=BLOCK_TOKENS) as cluster:
        check(directory, prompt, ask(cluster, prompt))
        settled(cluster, 6)
        _flip_a_bit(tmp_path / "kv", block=2)
        answer = ask(cluster, prompt)
        check(directory, prompt, answer)
        assert answer.cached_tokens == 2 * BLOCK_TOKENS
        wait_until(lambda: _corrupt_blocks(cluster) > 0, "the corrupt block counted")
        request = cluster.services["router"].events("request")[-1]
        assert "block 2 of 6: corrupt" in request["fallback"]


def _flip_a_bit(store: Path, block: int) -> None:
    """Damages the payload of the slot that was written after `block` others, under the running kvstore."""
    (segment,) = store.rglob("*.seg")
    content = segment.read_bytes()
    first = content.index(b"PNSTKBLK")
    slot_bytes = content.index(b"PNSTKBLK", first + 1) - first
    place = first + block * slot_bytes + 4096 + 5
    with segment.open("r+b") as file:
        file.seek(place)
        file.write(bytes([content[place] ^ 0x10]))
        os.fsync(file.fileno())


def test_blocks_of_another_namespace_on_disk_are_recomputed_and_counted(directory: Path, tmp_path: Path) -> None:
    """As a folder that somebody renamed, or a header that lies: good blocks, of another model."""
    prompt = prompt_of(100, seed=7)
    with Cluster(directory, tmp_path, router_flags=ROUTER_FLAGS, block_tokens=BLOCK_TOKENS) as cluster:
        check(directory, prompt, ask(cluster, prompt))
        settled(cluster, 6)
        cluster.stop()
        blocks = _make_foreign(tmp_path / "kv")
        cluster.start()
        answer = ask(cluster, prompt)
        check(directory, prompt, answer)
        assert answer.cached_tokens == 0
        wait_until(lambda: _corrupt_blocks(cluster) == blocks, f"{blocks} foreign blocks counted")
        settled(cluster, 6)
        assert ask(cluster, prompt).cached_tokens > 0


def _make_foreign(store: Path) -> int:
    """Rewrites every slot's header, checksum and all, to say that its block is of another namespace; how many.

    As after a crash, without the checkpoint of a clean end, so that the headers are what the store starts from.
    """
    for checkpoint in store.rglob("*.ckp"):
        checkpoint.unlink()
    (segment,) = store.rglob("*.seg")
    content = bytearray(segment.read_bytes())
    found = 0
    for at in range(PAGE_BYTES, len(content), PAGE_BYTES):
        header = decode_slot(content[at : at + PAGE_BYTES])
        if isinstance(header, SlotHeader):
            content[at : at + PAGE_BYTES] = encode_slot(msgspec.structs.replace(header, namespace=b"\x0f" * 32))
            found += 1
    assert found >= 6
    segment.write_bytes(content)
    return found


def test_on_a_full_disk_prompts_are_served_and_nothing_is_stored(directory: Path, tmp_path: Path) -> None:
    prompt = prompt_of(100, seed=8)
    module = "tests.integration.full_disk"
    with Cluster(directory, tmp_path, router_flags=ROUTER_FLAGS, block_tokens=BLOCK_TOKENS, kvstore_module=module) as cluster:
        for _ in range(2):
            check(directory, prompt, ask(cluster, prompt))
        quiet(cluster)
        cluster.services["kvstore"].wait_event("no_new_segment", reason=f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}")
        assert stored_blocks(cluster) == 0


def test_killed_all_at_once_while_blocks_are_written_the_cluster_comes_back_with_the_oracles_tokens(
    directory: Path, tmp_path: Path
) -> None:
    """Every process, by SIGKILL, the moment the last answer is there; the store is striped over two folders."""
    prompts = [prompt_of(50 + 30 * i, seed=20 + i) for i in range(4)]
    flags = ("--data", str(tmp_path / "kv2"))
    with Cluster(directory, tmp_path, router_flags=ROUTER_FLAGS, block_tokens=BLOCK_TOKENS, kvstore_flags=flags) as cluster:
        for prompt in prompts:
            check(directory, prompt, ask(cluster, prompt))
        for name in list(cluster.services):
            cluster.kill_one(name)
        cluster.start()
        for prompt in prompts:
            check(directory, prompt, ask(cluster, prompt))
        settled(cluster, sum(len(prompt) // BLOCK_TOKENS for prompt in prompts))
        for prompt in prompts:
            answer = ask(cluster, prompt)
            check(directory, prompt, answer)
            assert answer.cached_tokens == (len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        assert _corrupt_blocks(cluster) == 0
        assert all(list((tmp_path / name).rglob("*.seg")) for name in ("kv", "kv2"))
        quiet(cluster)


def test_without_a_kvstore_prompts_are_recomputed(directory: Path, tmp_path: Path) -> None:
    prompt = prompt_of(100, seed=6)
    with Cluster(directory, tmp_path, router_flags=ROUTER_FLAGS, block_tokens=BLOCK_TOKENS) as cluster:
        check(directory, prompt, ask(cluster, prompt))
        settled(cluster, 6)
        cluster.kill_one("kvstore")
        answer = ask(cluster, prompt)
        check(directory, prompt, answer)
        assert answer.cached_tokens == 0
        quiet(cluster)


def _corrupt_blocks(cluster: Cluster) -> int:
    return sum((member.get("store") or {}).get("corrupt_blocks", 0) for member in status(cluster)["members"])
