"""The background scrub, and taking blocks out by hand."""

import asyncio
import errno
import os
import random
from pathlib import Path

from common.transport.interface import PartStatus
from services.kvstore.removal import remove_coldest, remove_keys, remove_namespace
from services.kvstore.scrub import Scrub, ScrubState
from tests.kvstore.faulty import FailingFiles
from tests.kvstore.support import LENGTH, NAMESPACE, OTHER, Rig, bytes_on_disk, chain, flip, rig, slot_offset

OK = PartStatus.OK
FAST = 1 << 40


def scrub_of(one: Rig, seed: int = 0, bytes_per_s: int = FAST, every_s: float = 0) -> Scrub:
    return Scrub(one.store, bytes_per_s=bytes_per_s, every_s=every_s, choice=random.Random(seed))


def flip_in(folder: Path, key: bytes, within: int) -> None:
    path, offset = slot_offset(folder, key)
    flip(path, offset + within, 2)


async def test_a_pass_reads_every_block_and_changes_nothing_that_is_good(tmp_path: Path) -> None:
    keys = chain(20)
    for seed in range(3):  # wherever it begins
        async with rig(tmp_path) as one:
            await one.put(keys)
            scrub = scrub_of(one, seed)
            await scrub.run_once()
            progress = scrub.progress
            assert (progress.blocks_done, progress.blocks_total, progress.corrupt) == (20, 20, 0)
            assert progress.bytes_done == 20 * 12288 == one.store.metrics.scrubbed_bytes
            assert scrub.passes == 1 and scrub.state is ScrubState.IDLE
            assert len(await one.get(keys)) == 20


async def test_bad_payloads_and_headers_become_misses_and_stay_so(tmp_path: Path) -> None:
    keys = chain(12)
    async with rig(tmp_path) as one:
        await one.put(keys)
        flip_in(tmp_path, keys[3], 4096 + LENGTH - 1)  # payload
        flip_in(tmp_path, keys[7], 80)  # the header's parent
        scrub = scrub_of(one)
        await scrub.run_once()
        await one.store.settle()
        assert scrub.progress.corrupt == one.store.metrics.corrupt_blocks == one.store.metrics.scrub_corrupt_blocks == 2
        assert one.stored() == set(keys) - {keys[3], keys[7]}
        assert (await one.put(keys)).count(OK) == 2
    async with rig(tmp_path) as one:
        assert one.store.metrics.corrupt_blocks == 0
        assert len(await one.get(keys)) == 12


async def test_an_unreadable_block_becomes_a_miss(tmp_path: Path) -> None:
    keys, files = chain(6), FailingFiles()
    async with rig(tmp_path, files=files) as one:
        await one.put(keys)
        _, bad = slot_offset(tmp_path, keys[5])

        def fail(fd: int, _: object, offset: int) -> int | None:
            if offset == bad + 4096 and os.readlink(f"/proc/self/fd/{fd}").endswith(".seg"):
                raise OSError(errno.EIO, "bad sector")
            return None

        files.fail["read"] = fail
        scrub = scrub_of(one)
        await scrub.run_once()
        assert keys[5] not in one.stored() and scrub.progress.corrupt >= 1


async def test_a_pass_is_stopped_and_started(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        await one.put(chain(12))
        scrub = scrub_of(one, bytes_per_s=1)  # a block takes hours
        running = asyncio.create_task(scrub.run())
        scrub.start()
        async with asyncio.timeout(10):
            while scrub.state is not ScrubState.RUNNING or not scrub.progress.blocks_done:
                await asyncio.sleep(0)
        assert scrub.progress.blocks_done == 1  # the bandwidth cap holds the second back
        running.cancel()
        await asyncio.wait([running])
        assert scrub.state is ScrubState.IDLE and scrub.passes == 0
        scrub = scrub_of(one)
        running = asyncio.create_task(scrub.run())
        scrub.start()
        async with asyncio.timeout(10):
            while not scrub.passes:
                await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait([running])


async def test_passes_come_by_themselves_when_they_are_due(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        await one.put(chain(4))
        scrub = scrub_of(one, every_s=0.001)
        running = asyncio.create_task(scrub.run())
        async with asyncio.timeout(20):
            while scrub.passes < 3:
                await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait([running])


async def test_blocks_that_go_while_a_pass_runs_do_no_harm(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        await one.put(chain(30))
        scrub = scrub_of(one)
        scrubbing = asyncio.create_task(scrub.run_once())
        for i in range(20):
            await one.put(chain(8, f"chain{i}"))
            await one.put(chain(8, f"other{i}"), namespace=OTHER)
        await scrubbing
        assert scrub.progress.corrupt == 0


# Removal


async def test_a_key_goes_with_all_that_hangs_on_it_and_stays_gone(tmp_path: Path) -> None:
    stem, left, right = chain(4), chain(5, "left"), chain(6, "right")
    async with rig(tmp_path) as one:
        await one.put(stem)
        await one.put(left, stem[-1])
        await one.put(right, stem[-1])
        removed = await remove_keys(one.store, None, [left[2], left[1], left[4]])
        assert (removed.evicted, removed.kept) == (4, 0)
        assert one.stored() == {*stem, left[0], *right}
        assert (await remove_keys(one.store, OTHER, [stem[0]])).evicted == 0
        assert one.store.metrics.removed_blocks == 4
    async with rig(tmp_path) as one:
        assert one.stored() == {*stem, left[0], *right}
        assert (await remove_keys(one.store, NAMESPACE, [stem[0]])).evicted == 11
    async with rig(tmp_path) as one:
        assert one.stored() == set()


async def test_leased_blocks_and_what_they_hang_on_are_kept(tmp_path: Path) -> None:
    keys = chain(8)
    async with rig(tmp_path) as one:
        await one.put(keys)
        found = one.store.lookup(NAMESPACE, keys[:5], None, lease=True)
        assert found.token is not None
        removed = await remove_keys(one.store, None, [keys[0]])
        assert (removed.evicted, removed.kept) == (3, 5)
        assert (await remove_coldest(one.store, None, 100)).evicted == 0
        assert (await remove_namespace(one.store, NAMESPACE)).kept == 5
        one.store.release(found.token)
        assert len(await one.get(keys)) == 5
        assert (await remove_namespace(one.store, NAMESPACE)).evicted == 5


async def test_the_coldest_go_first_over_all_namespaces(tmp_path: Path) -> None:
    old, new, other = chain(4, "old"), chain(4, "new"), chain(4, "other")
    async with rig(tmp_path) as one:
        await one.put(old)
        await one.put(other, namespace=OTHER)
        await one.put(new)
        assert (await remove_coldest(one.store, None, 4)).evicted == 4
        assert one.stored() == set(new) and one.stored(OTHER) == set(other)
        assert (await remove_coldest(one.store, NAMESPACE, 4)).evicted == 4
        assert one.stored() == set() and one.stored(OTHER) == set(other)


async def test_a_namespace_gives_its_files_back(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        await one.put(chain(10))
        await one.put(chain(10, "other"), namespace=OTHER)
        before = bytes_on_disk(tmp_path)
        removed = await remove_namespace(one.store, NAMESPACE)
        assert removed.evicted == 10 and removed.kept == 0
        assert before - bytes_on_disk(tmp_path) == removed.freed_bytes > 0
        assert one.stored() == set() and len(one.stored(OTHER)) == 10
        assert await one.put(chain(10)) == [OK] * 10
