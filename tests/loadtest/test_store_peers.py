"""The comparison of stores: what it counts, what it says of a store that can't run, and one real run."""

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest import bench_store_peers
from loadtest.peers.worker import Got, Put, Session, Shape

SHAPE = Shape(blocks=4, block_bytes=8192, seed=7)


class Forgetful:
    """Takes all blocks, loses one and damages one."""

    how = "in memory"

    def __init__(self) -> None:
        self.stored: dict[tuple[int, int], bytes] = {}

    def forget(self) -> None:
        return

    def put(self, round_: int, blocks: Sequence[bytes]) -> Put:
        self.stored |= {(round_, i): block for i, block in enumerate(blocks)}
        self.stored.pop((round_, 1))
        self.stored[round_, 2] = b"x" + self.stored[round_, 2][1:]
        return Put(list(range(len(blocks))), 0.5, None, None)

    def get(self, round_: int, indices: Sequence[int]) -> Got:
        found = [self.stored.get((round_, i)) for i in indices]
        return Got(1.0, [None if block is None else memoryview(block) for block in found])

    batched_get = get

    def close(self) -> None:
        return


def test_lost_and_wrong_blocks_are_told_apart_from_right_ones(tmp_path: Path) -> None:
    session = Session(Forgetful(), SHAPE, tmp_path)
    assert session.put(0) == {"accepted": 4, "accepted_s": 0.5, "stored_s": None, "durable_s": None}
    assert session.get(0) == {"seconds": 1.0, "asked": 4, "right": 2, "wrong": 1}
    session.put(1)
    assert session.verify() == {"asked": 8, "right": 4, "wrong": 2, "how": "in memory"}


def test_a_block_is_the_same_in_every_process_and_differs_from_the_others() -> None:
    blocks = {SHAPE.block(round_, index) for round_ in range(3) for index in range(4)}
    assert len(blocks) == 12 and {len(block) for block in blocks} == {8192}
    assert SHAPE.block(1, 2) == Shape(4, 8192, 7).block(1, 2)


async def bench(*flags: str) -> dict[str, Any]:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtest.bench_store_peers", "--blocks", "4", "--block-bytes", "65536", "--rounds", "1", *flags,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    out, _ = await child.communicate()
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    return answer


async def test_every_block_that_a_real_kvstore_accepts_is_read_back(tmp_path: Path) -> None:
    answer = await bench("--only", "penstock", "--data", str(tmp_path))
    assert answer["penstock_accepted_blocks"] == answer["penstock_readable_blocks"] == 4 * (bench_store_peers.LAG + 1)
    assert answer["penstock_wrong_blocks"] == 0 and answer["penstock_by"]
    assert {f"penstock_{name}_gb_per_s" for name in bench_store_peers.OPERATIONS} <= set(answer)
    assert not list(tmp_path.iterdir())


async def test_a_peer_that_cannot_be_installed_is_not_run_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder can be made here")
    answer = await bench("--only", "lmcache", "--environment", str(tmp_path / "file" / "env"))
    assert "venv" in answer["lmcache_not_run"] and "ended with" in answer["lmcache_not_run"]
