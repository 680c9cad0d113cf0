"""`penstock store`: on a kvstore that runs, and on the directories of one that is stopped."""

import asyncio
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.clients.kvstore import KvStoreClient
from common.transport.region import Region
from services.cli.__main__ import main
from tests.kvstore.support import MIB, NAMESPACE, OTHER, chain, options, payload, rig, slot_offset
from tests.kvstore.test_process import LENGTH, process, put, running


class Said:
    """What a command printed, and its exit status."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status = status
        self.out = out
        self.err = err


class Console:
    """Runs commands in a thread, as they have an event loop of their own."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    async def __call__(self, *words: str) -> Said:
        self._capsys.readouterr()
        status = await asyncio.to_thread(self._run, words)
        return Said(status, *self._capsys.readouterr())

    @staticmethod
    def _run(words: tuple[str, ...]) -> int:
        try:
            return main(["store", *words])
        except SystemExit as end:
            return int(end.code or 0)


@pytest.fixture
def store(capsys: pytest.CaptureFixture[str]) -> Console:
    return Console(capsys)


@pytest.fixture
def region() -> Iterator[Region]:
    region = Region(64 * LENGTH)
    yield region
    region.close()


def flip(folder: Path, key: bytes, within: int) -> None:
    path, offset = slot_offset(folder, key)
    with path.open("r+b") as file:
        file.seek(offset + within)
        byte = file.read(1)[0]
        file.seek(offset + within)
        file.write(bytes([byte ^ 1]))


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def fill(folders: list[Path], count: int = 20) -> list[bytes]:
    """A stopped store of `count` blocks and as many of another namespace."""
    keys = chain(count)
    async with rig(folders, options(budget_bytes=8 * MIB)) as one:
        await one.put(keys)
        await one.put(chain(count, "other"), namespace=OTHER, length=3 * 4096)
    return keys


# Stopped


async def test_check_of_a_good_store_changes_nothing_and_says_so(tmp_path: Path, store: Console) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    await fill(folders)
    before = files_of(tmp_path)
    said = await store("check", "--folder", str(folders[0]), "--folder", str(folders[1]))
    assert said.status == 0 and "all is well" in said.out and "40 blocks" in said.out and "disk 1 of [0, 2)" in said.out
    assert files_of(tmp_path) == before
    said = await store("check", "--folder", str(folders[0]), "--folder", str(folders[1]), "--json", "--mib-per-s", "1000")
    found = json.loads(said.out)
    assert found["blocks"] == 40 and found["problems"] == found["notes"] == [] and found["read_bytes"] > 40 * 4096
    assert found["namespaces"][NAMESPACE]["blocks"] == 20


async def test_check_names_everything_that_is_wrong(tmp_path: Path, store: Console) -> None:
    keys = await fill([tmp_path])
    flip(tmp_path, keys[3], 4096 + 7)
    flip(tmp_path, keys[9], 60)
    segments = sorted((tmp_path / "namespaces" / OTHER).glob("*.seg"))
    with segments[0].open("r+b") as file:
        file.truncate(4096 + 100)
    (tmp_path / "namespaces" / NAMESPACE / "notes.txt").write_text("mine")
    (tmp_path / "namespaces" / NAMESPACE / "00000099.seg").write_bytes(b"x" * 8192)
    before = files_of(tmp_path)
    said = await store("check", "--folder", str(tmp_path))
    assert said.status == 1
    assert f"payload of block {keys[3].hex()} doesn't match" in said.out
    assert "header is damaged" in said.out and "short read" in said.out and "its header says" in said.out
    assert "00000099.seg: segment page is damaged" in said.out and "notes.txt: not a segment" in said.out
    assert files_of(tmp_path) == before


async def test_stat_of_a_stopped_store_reads_headers_only(tmp_path: Path, store: Console) -> None:
    keys = await fill([tmp_path])
    flip(tmp_path, keys[3], 4096 + 7)  # only check would see it
    said = await store("stat", "--folder", str(tmp_path))
    assert said.status == 0 and "40 blocks" in said.out and NAMESPACE[:16] in said.out


async def test_one_block_is_dumped_from_disk(tmp_path: Path, store: Console) -> None:
    keys = await fill([tmp_path])
    raw = tmp_path / "block"
    said = await store("dump-block", keys[4].hex(), "--folder", str(tmp_path), "--raw", str(raw))
    assert said.status == 0 and raw.read_bytes() == payload(keys[4]) and keys[3].hex() in said.out  # its parent
    said = await store("dump-block", keys[4].hex(), "--folder", str(tmp_path))
    assert payload(keys[4])[:16].hex(" ") in said.out and "more; --raw FILE" in said.out
    flip(tmp_path, keys[4], 5000)
    said = await store("dump-block", keys[4].hex(), "--folder", str(tmp_path))
    assert said.status == 1 and "doesn't match its checksum" in said.err
    said = await store("dump-block", "00" * 32, "--folder", str(tmp_path))
    assert said.status == 1 and "in none of these folders" in said.err


async def test_a_store_that_runs_is_not_checked_from_outside(tmp_path: Path, store: Console) -> None:
    async with rig(tmp_path):
        said = await store("check", "--folder", str(tmp_path))
        assert said.status == 1 and f"in use by process {os.getpid()}" in said.err


async def test_a_store_does_not_start_while_it_is_checked(tmp_path: Path) -> None:
    await fill([tmp_path / "data"])
    with (tmp_path / "data" / "LOCK").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        async with process(tmp_path) as one:
            assert "is in use by" in (await one.until("failed"))["reason"]


# Running


async def test_a_running_store_is_described(tmp_path: Path, store: Console, region: Region) -> None:
    async with running(tmp_path, "--data", str(tmp_path / "more")) as (_, client, ready):
        await put(client, region, chain(8))
        await client.count(NAMESPACE, chain(10))
        said = await store("stat", "--at", ready["grpc"])
        assert said.status == 0 and "8 blocks" in said.out and "found 8 (80.0%)" in said.out
        assert said.out.count("serving") == 2 and NAMESPACE[:16] in said.out
        stat: dict[str, Any] = json.loads((await store("stat", "--at", ready["grpc"], "--json")).out)
        assert stat["info"]["blocks"] == 8 and stat["counters"]["hit_blocks"] == 8
        assert [disk["state"] for disk in stat["info"]["disks"]] == ["serving"] * 2
        assert stat["namespaces"][0]["payload_bytes"] == LENGTH


async def test_a_block_of_a_running_store_is_dumped(tmp_path: Path, store: Console, region: Region) -> None:
    keys = chain(4)
    async with running(tmp_path) as (_, client, ready):
        await put(client, region, keys)
        raw = tmp_path / "block"
        said = await store("dump-block", keys[2].hex(), "--at", ready["grpc"], "--raw", str(raw))
        assert said.status == 0 and raw.read_bytes() == payload(keys[2], LENGTH)
        assert keys[1].hex() in said.out and "00000000.seg" in said.out
        said = await store("dump-block", "00" * 32, "--at", ready["grpc"])
        assert said.status == 1 and "is not stored at" in said.err
        assert (await client.describe()).leases == 0


async def test_blocks_are_evicted_by_key_fraction_and_namespace(tmp_path: Path, store: Console, region: Region) -> None:
    keys = chain(10)

    async def blocks(client: KvStoreClient) -> int:
        return (await client.describe()).blocks

    async with running(tmp_path) as (_, client, ready):
        await put(client, region, keys)
        said = await store("evict", "--at", ready["grpc"], "--key", keys[8].hex())
        assert "2 blocks evicted, 0 kept" in said.out and await blocks(client) == 8
        said = await store("evict", "--at", ready["grpc"], "--fraction", "0.5")
        assert "4 blocks evicted" in said.out and await client.count(NAMESPACE, keys) == 4
        found = await client.lookup(NAMESPACE, keys[:3], 30.0)
        assert found is not None
        said = await store("evict", "--at", ready["grpc"], "--namespace", NAMESPACE)
        assert "1 blocks evicted, 3 kept" in said.out and await blocks(client) == 3
        await client.release(found.token)
        said = await store("evict", "--at", ready["grpc"], "--namespace", NAMESPACE)
        assert "3 blocks evicted, 0 kept" in said.out and await blocks(client) == 0
        assert list((tmp_path / "data").rglob("*.seg")) == []
        assert "0 blocks evicted" in (await store("evict", "--at", ready["grpc"], "--namespace", OTHER)).out


async def test_chains_are_pinned_and_let_go(tmp_path: Path, store: Console, region: Region) -> None:
    keys, other = chain(4), chain(2, "other")
    async with running(tmp_path) as (_, client, ready):
        await put(client, region, keys)
        await put(client, region, other)
        said = await store("pin", keys[2].hex(), other[1].hex(), "--for-s", "600", "--at", ready["grpc"])
        assert said.status == 0 and f"{keys[2].hex()}: 3 blocks kept for 600 s" in said.out and "2 blocks kept" in said.out
        said = await store("evict", "--at", ready["grpc"], "--fraction", "1")
        assert "1 blocks evicted, 5 kept" in said.out and await client.count(NAMESPACE, keys) == 3
        assert "pins: 2, which keep" in (await store("stat", "--at", ready["grpc"])).out
        said = await store("unpin", keys[2].hex(), keys[0].hex(), "--at", ready["grpc"])
        assert said.status == 1 and "3 blocks no longer kept" in said.out and f"{keys[0].hex()} is not pinned" in said.err
        said = await store("evict", "--at", ready["grpc"], "--fraction", "1")
        assert "3 blocks evicted, 2 kept" in said.out
        said = await store("pin", keys[0].hex(), "--at", ready["grpc"])
        assert said.status == 1 and "is not stored at" in said.err


async def test_a_scrub_is_started_and_watched(tmp_path: Path, store: Console, region: Region) -> None:
    keys = chain(6)
    async with running(tmp_path, "--scrub-bytes-per-s", str(1 << 40)) as (_, client, ready):
        await put(client, region, keys)
        assert "idle, no pass yet" in (await store("scrub", "--at", ready["grpc"])).out
        said = await store("scrub", "--at", ready["grpc"], "--start", "--wait")
        assert said.status == 0 and "6 of 6 blocks" in said.out and "0 bad" in said.out
        flip(tmp_path, keys[5], 4096 + 1)
        said = await store("scrub", "--at", ready["grpc"], "--start", "--wait")
        assert said.status == 1 and "1 bad" in said.out
        assert await client.count(NAMESPACE, keys) == 5
        assert "idle" in (await store("scrub", "--at", ready["grpc"], "--stop")).out
    async with running(tmp_path, "--scrub-bytes-per-s", "0") as (_, _, ready):
        said = await store("scrub", "--at", ready["grpc"], "--start")
        assert said.status == 1 and "scrub_bytes_per_s = 0" in said.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected one of stat, check"),
        (("chekc",), "invalid choice: 'chekc'"),
        (("check",), "--folder"),
        (("check", "--folder", "x", "--mib-per-s", "0"), "'0': expected a number over 0"),
        (("check", "--folder", "/does/not/exist"), "/does/not/exist is no store"),
        (("evict",), "say what: --key, --namespace or --fraction"),
        (("evict", "--fraction", "1.5"), "'1.5': expected a number over 0, at most 1"),
        (("evict", "--key", "AB" * 32), "expected 64 lower-case hex digits"),
        (("evict", "--key", "ab" * 32, "--fraction", "0.1"), "not both"),
        (("pin",), "KEY"),
        (("pin", "ab" * 32, "--for-s", "0"), "'0': expected whole seconds, 1 to"),
        (("dump-block",), "KEY"),
        (("dump-block", "12"), "expected 64 lower-case hex digits"),
        (("stat", "--folder", "x", "--at", "y:1"), "give one of them"),
        (("scrub", "--start", "--stop"), "not allowed with"),
    ],
)
async def test_what_cannot_be_meant_is_refused_with_advice(store: Console, words: tuple[str, ...], message: str) -> None:
    said = await store(*words)
    assert said.status == 2 and message in said.err


async def test_without_a_cluster_or_an_answer_the_command_says_what_to_do(tmp_path: Path, store: Console) -> None:
    said = await store("stat", "--data", str(tmp_path))
    assert said.status == 1 and "--at HOST:PORT" in said.err
    said = await store("stat", "--at", "127.0.0.1:1")
    assert said.status == 1 and "127.0.0.1:1" in said.err
