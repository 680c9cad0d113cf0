"""A disk of several that hangs, without an error: what is late is noticed, and holds up nothing on the others."""

import asyncio
import random
import threading
from pathlib import Path

import pytest

from common.storage import Admission
from common.transport.interface import PartStatus
from services.kvstore import disk_watch, file_calls, segment_changes
from services.kvstore import store as store_module
from services.kvstore.checkpoints import QUIET_S
from services.kvstore.disk import DiskState
from services.kvstore.removal import remove_namespace
from services.kvstore.scan import WINDOW
from services.kvstore.scrub import Scrub
from services.kvstore.segment import Segment
from tests.kvstore.faulty import FailingFiles
from tests.kvstore.several import disks_of, folders, hanging, on_folder, three
from tests.kvstore.support import NAMESPACE, Clock, Rig, bytes_on_disk, chain, offers, rig, room_for

OK = PartStatus.OK


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the probes of a disk."""
    monkeypatch.setattr(disk_watch, "PAUSE_S", 0.0)


def segments_of(one: Rig) -> list[Segment]:
    return [segment for shelf in one.store.space.shelves.values() for segment in shelf.segments.values()]


async def test_a_disk_that_hangs_is_given_up(tmp_path: Path) -> None:
    keys, files, release = chain(9), FailingFiles(), threading.Event()

    async with rig(folders(tmp_path), three(), files=files, read_deadline_s=0.2) as one:
        await one.put(keys)
        one.store.watch.probe_deadline_s = 0.2
        files.fail["read"] = on_folder(folders(tmp_path)[1], hanging(release))
        assert PartStatus.EXPIRED in await one.get(keys)
        async with asyncio.timeout(30):
            while one.store.disks[1].state is DiskState.SERVING:
                await asyncio.wait([asyncio.create_task(one.store.watch.settle())])
        release.set()
        assert one.stored() == {key for key, disk in zip(keys, [0, 1, 2] * 3, strict=True) if disk != 1}


async def test_writes_that_never_come_back_hold_up_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "WRITE_LATE_S", 0.1)
    keys, files, release = chain(9), FailingFiles(), threading.Event()

    async with rig(folders(tmp_path), three(budget_bytes=room_for(60, disks=3), reserved_bytes_max=1 << 30), files=files) as one:
        await one.put(keys)
        on_the_lost = {key for key, disk in zip(keys, disks_of(one, keys), strict=True) if disk == 1}
        room = await one.store.reserve(NAMESPACE, offers(chain(30, "room")), None)
        assert room.token is not None
        one.store.release(room.token)  # every disk has free slots now
        one.store.watch.probe_deadline_s = 2.0
        for call in ("read", "write", "sync"):
            files.fail[call] = on_folder(folders(tmp_path)[1], hanging(release))
        try:
            stuck = asyncio.create_task(one.put(chain(9, "stuck")))
            async with asyncio.timeout(50):
                while one.store.disks[1].state is not DiskState.LOST:
                    await asyncio.wait([asyncio.create_task(one.store.watch.settle())], timeout=0.01)
                for i in range(22):  # numbers go on past the window, though those of the stuck writes were never closed
                    assert set(await one.put(chain(50, f"chain{i}"))) == {OK}
            assert one.store.writer.next_sequence > WINDOW + 9 and not stuck.done()
        finally:
            release.set()
        await stuck
    async with rig(folders(tmp_path), three(budget_bytes=room_for(60, disks=3))) as one:
        assert await one.readable(keys) >= on_the_lost


@pytest.mark.parametrize("call", ["allocate", "sync_folder"])
async def test_a_disk_that_hangs_while_a_segment_is_made_holds_up_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(segment_changes, "PATIENCE_S", 0.1)
    files, release = FailingFiles(), threading.Event()
    async with rig(folders(tmp_path), three(), files=files) as one:
        await one.put(chain(1))  # the namespace's folders are there
        disks = one.store.disks
        made = [disk.segment_bytes for disk in disks]
        files.fail[call] = on_folder(folders(tmp_path)[1], hanging(release))
        try:
            for i in range(16):  # more than the hanging disk's threads, and all that the others have room for
                assert set(await one.put(chain(4, f"chain{i}"))) <= {OK, Admission.DROPPED}
            assert disks[1].segment_bytes == made[1] and disks[1].changing_bytes == room_for(1) - room_for(0)
            assert disks[0].segment_bytes == disks[2].segment_bytes == room_for(8) - room_for(0)
            assert all(bytes_on_disk(disk.folder) <= disk.used_bytes <= disk.budget_bytes for disk in disks)
        finally:
            release.set()
        await one.store.settle()
        assert disks[1].segment_bytes == made[1] + room_for(1) - room_for(0)  # late, not lost
        del files.fail[call]
        assert set(await one.put(chain(40, "after"))) == {OK}
        assert disks[1].segment_bytes == room_for(8) - room_for(0)


async def test_a_disk_that_hangs_while_a_segment_is_made_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_changes, "PATIENCE_S", 0.1)
    monkeypatch.setattr(file_calls, "LATE_S", 0.1)
    files, release = FailingFiles(), threading.Event()
    async with rig(folders(tmp_path), three(), files=files) as one:
        keys = chain(12)
        assert await one.put(keys) == [OK] * 12
        disks = one.store.disks
        one.store.watch.probe_deadline_s = 0.2
        for call in ("allocate", "read", "write"):
            files.fail[call] = on_folder(folders(tmp_path)[1], hanging(release))
        try:
            reserving = asyncio.create_task(one.store.reserve(NAMESPACE, offers(chain(30, "more")), None))
            async with asyncio.timeout(30):
                while disks[1].state is not DiskState.LOST:
                    await asyncio.wait([asyncio.create_task(one.store.watch.settle())], timeout=0.01)
            one.store.release((await reserving).token or b"")
            assert one.stored() == {key for key, disk in zip(keys, [0, 1, 2] * 4, strict=True) if disk != 1}
            assert set(await one.put(chain(30, "others"))) == {OK}
        finally:
            release.set()
        await one.store.settle()
        assert bytes_on_disk(disks[1].folder) <= disks[1].used_bytes <= disks[1].budget_bytes


async def test_a_hanging_disk_keeps_no_checkpoints_from_being_saved_elsewhere(tmp_path: Path) -> None:
    clock, files, release = Clock(), FailingFiles(), threading.Event()
    async with rig(folders(tmp_path), three(), files=files, clock=clock) as one:
        await one.put(chain(36))
        files.fail["rename"] = on_folder(folders(tmp_path)[1], hanging(release))
        clock.now += QUIET_S + 1
        saved = {disk.position: sum(segment.disk == disk.position for segment in segments_of(one)) for disk in one.store.disks}
        try:
            async with asyncio.timeout(30):
                while sum(segment.checkpointed for segment in segments_of(one)) < saved[0] + saved[2] + 1:
                    one.store.sweep()
                    await asyncio.wait([asyncio.create_task(one.store.checkpoints.settle())], timeout=0.01)
        finally:
            release.set()


async def test_a_hanging_disk_keeps_no_blocks_from_being_scrubbed_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_calls, "LATE_S", 0.1)
    files, release = FailingFiles(), threading.Event()
    async with rig(folders(tmp_path), three(), files=files) as one:
        keys = chain(24)
        await one.put(keys)
        one.store.watch.probe_deadline_s = 30.0  # not given up before the pass has ended
        files.fail["read"] = on_folder(folders(tmp_path)[1], hanging(release))
        scrub = Scrub(one.store, bytes_per_s=1 << 40, every_s=0, choice=random.Random(1))
        try:
            async with asyncio.timeout(30):
                await scrub.run_once()
            assert scrub.progress.blocks_done == 16 and not scrub.progress.corrupt
        finally:
            release.set()
        await one.store.settle()
        async with asyncio.timeout(30):
            while scrub.progress.blocks_done < 24:  # when it has answered, its blocks are scrubbed again
                await scrub.run_once()
        assert one.stored() == set(keys)


async def test_a_segment_whose_removal_hangs_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the removal, when it comes, would take the new segment of that name."""
    monkeypatch.setattr(segment_changes, "PATIENCE_S", 0.1)
    files, release = FailingFiles(), threading.Event()
    async with rig(folders(tmp_path), three(), files=files) as one:
        await one.put(chain(12, "old"))
        files.fail["remove"] = on_folder(folders(tmp_path)[1], hanging(release))
        try:
            assert (await remove_namespace(one.store, NAMESPACE)).evicted == 12
            keys = chain(12, "new")
            assert await one.put(keys) == [OK] * 12
        finally:
            release.set()
        await one.store.settle()
        assert [segment.path for segment in segments_of(one) if not segment.path.exists()] == []
        assert len(await one.get(keys)) == 12
        del files.fail["remove"]
        await remove_namespace(one.store, NAMESPACE)
        assert [disk.used_bytes for disk in one.store.disks] == [room_for(0)] * 3
    async with rig(folders(tmp_path), three()) as one:
        await one.put(keys)
        assert [segment.path.name for segment in segments_of(one)] == ["00000000.seg"] * 3  # names are used again
