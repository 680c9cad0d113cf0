"""The crash loop: a short one holds, one over a store that doesn't sync is caught, and power cuts are power cuts."""

import asyncio
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from common.disk.pages import aligned
from loadtest.crash.forgetful import ForgetfulFiles
from loadtest.crash.ledger import BrokenPromise, Promise
from loadtest.crash.life import Store, disk_bytes
from loadtest.crash.plan import CARRIERS, Death, plan_of
from services.kvstore.record import PAGE_BYTES


async def crash_loop(folder: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtest.crash_loop", "--data", str(folder), "--seed", "11", *flags,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, log = await child.communicate()
    assert child.returncode is not None
    assert out, f"no JSON line; status {child.returncode}: {log.decode()}"
    return child.returncode, json.loads(out.splitlines()[-1])


@pytest.mark.timeout(300)
async def test_ten_kills_break_no_promise(tmp_path: Path) -> None:
    status, answer = await crash_loop(tmp_path, "--kills", "10")
    assert (status, answer["seed"], answer["kills"]) == (0, 11, 10)
    assert {promise.value.replace(" ", "_"): 0 for promise in Promise}.items() <= answer.items()
    assert answer["power_cuts"] and answer["committed_blocks"] and answer["checked_blocks"]
    assert 0 < answer["peak_bytes"] <= answer["budget_bytes"]
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(300)
async def test_a_store_that_does_not_sync_is_caught(tmp_path: Path) -> None:
    status, answer = await crash_loop(tmp_path, "--kills", "100", "--flag=--no-durable")
    assert (status, answer["lost_blocks"], answer["wrong_bytes"]) == (1, 1, 0)
    assert answer["kills"] < 100
    assert list(tmp_path.iterdir())  # what is left, to look at


def test_a_plan_follows_from_its_seed_and_all_kinds_occur() -> None:
    plans = [plan_of(f"3/0/{life}") for life in range(200)]
    assert plans == [plan_of(f"3/0/{life}") for life in range(200)]
    assert {plan.death for plan in plans} == set(Death) and {plan.carrier for plan in plans} == set(CARRIERS)
    assert {plan.while_starting for plan in plans} == {plan.warning_s is None for plan in plans} == {True, False}


class Never(random.Random):
    """Nothing reaches the disk by itself."""

    def choice(self, options: Any) -> Any:
        return options[0]


def test_what_is_not_synced_is_read_back_and_is_not_on_the_disk(tmp_path: Path) -> None:
    files, path = ForgetfulFiles(Never()), tmp_path / "file"
    fd = files.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    files.allocate(fd, 4 * PAGE_BYTES)
    page, back = aligned(2 * PAGE_BYTES), bytearray(PAGE_BYTES + 100)
    page[:] = b"n" * len(page)
    assert files.write(fd, page, PAGE_BYTES) == len(page)
    assert files.read(fd, [memoryview(back)], 0) == len(back)
    assert back == bytes(PAGE_BYTES) + b"n" * 100
    assert path.read_bytes() == bytes(4 * PAGE_BYTES)
    files.sync(fd)
    assert path.read_bytes() == bytes(PAGE_BYTES) + b"n" * len(page) + bytes(PAGE_BYTES)
    files.write(fd, page, 0)
    files.remove(path)
    files.close(fd)
    assert not any(files._unsynced.values())


def test_a_folder_over_its_budget_breaks_the_promise(tmp_path: Path) -> None:
    store = Store(tmp_path, 64 << 10)
    store.data.mkdir()
    (store.data / "a").write_bytes(b"x" * (60 << 10))
    store.measure()
    assert store.peak_bytes == disk_bytes(store.data) == 60 << 10
    (store.data / "b").write_bytes(b"x" * (8 << 10))
    with pytest.raises(BrokenPromise, match="over budget: 69632 bytes on disk of 65536"):
        store.measure()
