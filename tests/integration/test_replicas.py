"""Two kvstores that keep every chain: losing one loses nothing, and when it is back it is filled up again."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.asking import ask, check, settled
from tests.integration.cluster import Cluster
from tests.integration.test_faults import status, wait_until
from tests.integration.test_oracle import BLOCK_TOKENS, ROUTER_FLAGS, prompt_of

pytestmark = pytest.mark.timeout(300)
STORES = ("kvstore-0", "kvstore-1")


class Replicated(Cluster):
    """A cluster with two kvstores; each keeps its port over restarts, as static peers do."""

    def start_kvstore(self) -> None:
        for name in STORES:
            self.start_store(name)
        self.addresses["kvstore"] = ",".join(self.addresses[name] for name in STORES)

    def start_store(self, name: str) -> None:
        port = self.addresses.get(name, ":0").rpartition(":")[2]
        flags = ["--id", name, "--data", str(self.data / name), "--run-dir", self._run_dir(), "--port", port]
        self._spawn(name, "services.kvstore", [*flags, "--budget-bytes", str(64 << 20), *self.kvstore_flags])
        self.addresses[name] = self.services[name].wait_event("ready")["grpc"]

    def _stop_order(self) -> list[str]:
        return [*super()._stop_order(), *(name for name in STORES if name in self.services)]


def blocks(cluster: Cluster) -> dict[str, int]:
    """Blocks of each kvstore that is connected."""
    members = [member for member in status(cluster)["members"] if member["role"] == "kvstore" and member["usable"]]
    return {member["id"]: member["store"]["blocks"] for member in members}


def test_a_lost_kvstore_loses_nothing_and_is_filled_up_when_it_is_back(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tiny("llama")
    first, second = prompt_of(100, seed=1), prompt_of(100, seed=2)
    flags = (*ROUTER_FLAGS, "--replicas", "2", "--no-ready-needs-kvstore")
    with Replicated(directory, tmp_path, router_flags=flags, block_tokens=BLOCK_TOKENS) as cluster:
        check(directory, first, ask(cluster, first))
        settled(cluster, 12)
        assert blocks(cluster) == dict.fromkeys(STORES, 6 + 1)
        for lost, left in (STORES, STORES[::-1]):
            cluster.kill_one(lost)
            wait_until(lambda left=left: list(blocks(cluster)) == [left], "the loss noticed")  # type: ignore[misc]
            again = ask(cluster, first)
            check(directory, first, again)
            assert again.cached_tokens == 6 * BLOCK_TOKENS
            cluster.start_store(lost)
            wait_until(lambda: len(blocks(cluster)) == 2, "both stores connected again")
        cluster.kill_one(STORES[0])
        wait_until(lambda: len(blocks(cluster)) == 1, "the loss noticed")
        check(directory, second, ask(cluster, second))
        wait_until(lambda: blocks(cluster)[STORES[1]] == 14, "the second prompt stored once")
        cluster.start_store(STORES[0])
        wait_until(lambda: len(blocks(cluster)) == 2, "both stores connected again")
        check(directory, second, ask(cluster, second))
        wait_until(lambda: blocks(cluster) == dict.fromkeys(STORES, 14), "the second prompt stored twice")
