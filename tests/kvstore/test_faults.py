"""Damaged, missing and foreign files; disks that fail, fill up or hang. A miss at worst, never fatal."""

import asyncio
import errno
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from common.storage import Admission
from common.transport.interface import Part, PartStatus
from services.kvstore.record import PAGE_BYTES, Geometry, SlotHeader, encode_slot
from services.kvstore.scan import WINDOW
from tests.kvstore.faulty import EIO, ENOSPC, FailingFiles, raising
from tests.kvstore.support import (
    CAPACITY,
    LENGTH,
    NAMESPACE,
    OTHER,
    Clock,
    Rig,
    bytes_on_disk,
    chain,
    flip,
    leftovers,
    offers,
    options,
    payload,
    rig,
    segment_files,
    slot_offset,
)

pytestmark = pytest.mark.usefixtures("engine")

OK, FAILED = PartStatus.OK, PartStatus.FAILED


async def filled(folder: Path, blocks: int = 10) -> list[bytes]:
    """A closed store with a chain in it."""
    keys = chain(blocks)
    async with rig(folder) as one:
        assert await one.put(keys) == [OK] * blocks
    return keys


@pytest.mark.parametrize("place", [0, 9, 13, 20, 60, 100, 115, 121, 125, 129, 133, 2000, 4093])
async def test_a_flipped_bit_in_a_header_makes_the_block_a_miss(tmp_path: Path, place: int) -> None:
    keys = await filled(tmp_path)
    path, offset = slot_offset(tmp_path, keys[4])
    flip(path, offset + place, 3)
    async with rig(tmp_path) as one:
        assert await one.get(keys) == [payload(key) for key in keys[:4]]
        assert await one.readable(keys) == set(keys) - {keys[4]}
        assert one.store.metrics.corrupt_blocks == 1
        assert (await one.put(keys))[4] is OK
        assert await one.get(keys) == [payload(key) for key in keys]


@pytest.mark.parametrize("place", [0, 2500, LENGTH - 1])
async def test_a_flipped_bit_in_a_recent_payload_is_found_at_start(tmp_path: Path, place: int) -> None:
    keys = await filled(tmp_path)
    path, offset = slot_offset(tmp_path, keys[4])
    flip(path, offset + PAGE_BYTES + place)
    async with rig(tmp_path) as one:
        assert len(await one.get(keys)) == 4
        assert one.store.metrics.corrupt_blocks == 1


async def test_a_flipped_bit_while_running_is_found_when_read_and_the_block_is_forgotten(tmp_path: Path) -> None:
    keys = chain(6)
    async with rig(tmp_path) as one:
        await one.put(keys)
        path, offset = slot_offset(tmp_path, keys[2])
        flip(path, offset + PAGE_BYTES + 100)
        good = [payload(key) for key in keys]
        assert await one.get(keys) == [*good[:2], PartStatus.CORRUPT, *good[3:]]
        assert await one.get(keys) == good[:2]
        assert one.store.metrics.corrupt_blocks == 1
        assert (await one.put(keys))[2] is OK
        assert await one.get(keys) == good
    async with rig(tmp_path) as one:
        assert await one.get(keys) == good


async def test_a_flipped_bit_in_the_padding_harms_nobody(tmp_path: Path) -> None:
    keys = await filled(tmp_path)
    path, offset = slot_offset(tmp_path, keys[4])
    flip(path, offset + PAGE_BYTES + LENGTH + 10)
    async with rig(tmp_path) as one:
        assert await one.get(keys) == [payload(key) for key in keys]


async def test_a_torn_block_is_erased_and_not_found_again(tmp_path: Path) -> None:
    keys = await filled(tmp_path)
    path, offset = slot_offset(tmp_path, keys[9])
    flip(path, offset + PAGE_BYTES)
    async with rig(tmp_path) as one:
        assert one.store.metrics.corrupt_blocks == 1
    async with rig(tmp_path) as one:
        assert one.store.metrics.corrupt_blocks == 0
        assert await one.get(keys) == [payload(key) for key in keys[:9]]


@pytest.mark.parametrize("wrong", ["namespace", "slot", "segment", "payload_bytes"])
async def test_a_valid_header_in_the_wrong_place_is_not_a_block(tmp_path: Path, wrong: str) -> None:
    keys = await filled(tmp_path)
    path, offset = slot_offset(tmp_path, keys[4])
    segment, slot = int(path.stem), (offset - PAGE_BYTES) // 12288
    facts = {"namespace": bytes.fromhex(NAMESPACE), "slot": slot, "segment": segment, "payload_bytes": LENGTH}
    facts[wrong] = bytes(32) if wrong == "namespace" else facts[wrong] + 1  # type: ignore[operator]
    forged = SlotHeader(key=keys[4], parent=keys[3], sequence=5, payload_crc32c=0, **facts)  # type: ignore[arg-type]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(encode_slot(forged))
    async with rig(tmp_path) as one:
        assert len(await one.get(keys)) == 4
        assert one.store.metrics.corrupt_blocks == 1


async def test_a_slot_of_a_later_format_is_left_alone(tmp_path: Path) -> None:
    import struct

    from common.transport.memory import crc32c

    keys = await filled(tmp_path, CAPACITY)
    path, offset = slot_offset(tmp_path, keys[-1])
    with path.open("r+b") as file:
        file.seek(offset)
        page = bytearray(file.read(PAGE_BYTES))
        struct.pack_into("<I", page, 8, 2)
        struct.pack_into("<I", page, PAGE_BYTES - 4, crc32c(page[:-4]))
        file.seek(offset)
        file.write(page)
    async with rig(tmp_path) as one:
        await one.put(chain(CAPACITY, "new"))
    assert path.read_bytes()[offset : offset + PAGE_BYTES] == page


async def test_a_missing_segment_is_misses_only(tmp_path: Path) -> None:
    keys = await filled(tmp_path, 12)
    segment_files(tmp_path)[1].unlink()
    async with rig(tmp_path) as one:
        assert len(await one.readable(keys)) == 8
        await one.put(keys)
        assert await one.get(keys) == [payload(key) for key in keys]


@pytest.mark.parametrize("size", [0, 100, PAGE_BYTES, PAGE_BYTES + 12288, PAGE_BYTES + 12288 + 5000, 4 * 12288])
async def test_a_truncated_segment_keeps_the_blocks_before_the_cut(tmp_path: Path, size: int) -> None:
    keys = await filled(tmp_path, 4)
    (path,) = segment_files(tmp_path)
    os.truncate(path, size)
    whole = max(0, size - PAGE_BYTES) // 12288
    async with rig(tmp_path) as one:
        assert await one.get(keys) == [payload(key) for key in keys[:whole]]
        assert await one.put(keys) == [Admission.PRESENT] * whole + [OK] * (4 - whole)
        assert await one.get(keys) == [payload(key) for key in keys]
        assert bytes_on_disk(tmp_path) <= one.store.options.budget_bytes


async def test_extra_files_are_reported_and_left_alone(tmp_path: Path) -> None:
    keys = await filled(tmp_path, 4)
    folder = tmp_path / "namespaces"
    extra = [folder / "note.txt", folder / NAMESPACE / "readme", folder / NAMESPACE / "12.seg", folder / "ab" / "x.seg"]
    for path in extra:
        path.parent.mkdir(exist_ok=True)
        path.write_text("not ours")
    async with rig(tmp_path) as one:
        assert await one.get(keys) == [payload(key) for key in keys]
        await one.put(chain(CAPACITY, "more"))
    assert [path.read_text() for path in extra] == ["not ours"] * 4


async def test_a_segment_of_another_namespace_is_never_served(tmp_path: Path) -> None:
    keys = await filled(tmp_path, 4)
    (path,) = segment_files(tmp_path)
    foreign = tmp_path / "namespaces" / OTHER
    foreign.mkdir()
    shutil.copy(path, foreign / path.name)
    shutil.copy(path, path.with_name("00000007.seg"))
    async with rig(tmp_path) as one:
        assert await one.get(keys, OTHER) == []
        assert await one.get(keys) == [payload(key) for key in keys]
        assert await one.put(keys, namespace=OTHER) == [OK] * 4
        assert await one.get(keys, OTHER) == [payload(key) for key in keys]
        assert bytes_on_disk(tmp_path) <= one.store.options.budget_bytes


async def test_the_leftover_of_an_unfinished_segment_is_removed(tmp_path: Path) -> None:
    keys = await filled(tmp_path, 4)
    leftover = tmp_path / "namespaces" / NAMESPACE / "00000001.tmp"
    leftover.write_bytes(bytes(1000))
    async with rig(tmp_path) as one:
        assert await one.get(keys) == [payload(key) for key in keys]
    assert not leftover.exists()


async def test_a_read_only_segment_is_served_and_nothing_is_written_there(tmp_path: Path) -> None:
    keys = await filled(tmp_path, 4)
    (path,) = segment_files(tmp_path)
    before = path.read_bytes()
    files = FailingFiles()

    def read_only(opened: Path, flags: int) -> None:
        if opened == path and flags & os.O_RDWR:
            raise OSError(errno.EROFS, "read-only file system")

    files.fail["open"] = read_only
    more = chain(CAPACITY, "more")
    async with rig(tmp_path, files=files) as one:
        assert await one.get(keys) == [payload(key) for key in keys]
        stored = await one.put(more)
        assert stored.count(OK) == CAPACITY - 4
        assert await one.get(keys) == [payload(key) for key in keys]
    assert path.read_bytes() == before


async def test_a_segment_that_cannot_be_opened_is_misses_only(tmp_path: Path) -> None:
    keys = await filled(tmp_path, 8)
    first = segment_files(tmp_path)[0]
    files = FailingFiles()
    files.fail["open"] = lambda path, flags: EIO() if path == first else None
    async with rig(tmp_path, files=files) as one:
        assert len(await one.readable(keys)) == 4
        assert (await one.put(keys)).count(OK) == 4
    assert first.exists()


async def test_a_disk_error_while_reading_fails_that_part_only(tmp_path: Path) -> None:
    keys, files = chain(6), FailingFiles()
    async with rig(tmp_path, files=files) as one:
        await one.put(keys)
        _, bad = slot_offset(tmp_path, keys[2])
        path, _ = slot_offset(tmp_path, keys[2])
        inode = path.stat().st_ino

        def fail(fd: int, buffers: Sequence[memoryview], offset: int) -> int | None:
            return EIO() if (os.fstat(fd).st_ino, offset) == (inode, bad + PAGE_BYTES) else None

        files.fail["read"] = fail
        good = [payload(key) for key in keys]
        assert await one.get(keys) == [*good[:2], FAILED, *good[3:]]
        assert await one.get(keys) == good[:2]
        assert one.store.metrics.failed_reads == 1


async def test_a_short_read_fails_that_part_only(tmp_path: Path) -> None:
    keys, files = chain(1), FailingFiles()
    async with rig(tmp_path, files=files) as one:
        await one.put(keys)
        files.fail["read"] = lambda fd, buffers, offset: 512
        assert await one.get(keys) == [FAILED]
        files.fail.clear()
        assert await one.get(keys) == []


async def test_a_short_write_is_finished(tmp_path: Path) -> None:
    keys, files = chain(3), FailingFiles()
    files.fail["write"] = lambda fd, buffer, offset: os.pwrite(fd, buffer[:4096], offset)
    async with rig(tmp_path, files=files) as one:
        assert await one.put(keys) == [OK] * 3
        assert await one.get(keys) == [payload(key) for key in keys]


@pytest.mark.parametrize("call", ["write", "sync"])
async def test_a_disk_error_while_writing_fails_the_block_and_retires_its_slot(tmp_path: Path, call: str) -> None:
    keys, files = chain(3), FailingFiles()
    async with rig(tmp_path, files=files) as one:
        await one.put(keys[:1])
        files.fail[call] = EIO
        assert await one.put(keys) == [Admission.PRESENT, FAILED, FAILED]
        files.fail.clear()
        assert await one.get(keys) == [payload(keys[0])]
        assert await one.put(keys) == [Admission.PRESENT, OK, OK]
        assert one.store.metrics.failed_writes == 2


async def test_a_bad_place_among_slots_that_are_written_together_costs_its_own_block_only(tmp_path: Path) -> None:
    files = FailingFiles()
    async with rig(tmp_path, options(), files=files) as one:
        keys = chain(4)
        geometry = Geometry(LENGTH, 4)
        begin, end = geometry.slot_offset(2), geometry.slot_offset(3)
        files.fail["write"] = lambda fd, buffer, offset: EIO() if begin <= offset < end else None
        assert await one.put(keys) == [OK, OK, FAILED, OK]
        assert one.stored() == {keys[0], keys[1], keys[3]}
        del files.fail["write"]
        assert await one.put(keys[2:3], keys[1]) == [OK]
        assert len(await one.get(keys)) == 4


async def test_a_full_disk_at_a_write_drops_the_block_and_reading_goes_on(tmp_path: Path) -> None:
    keys, files = chain(3), FailingFiles()
    async with rig(tmp_path, files=files) as one:
        await one.put(keys[:1])
        files.fail["write"] = ENOSPC
        assert await one.put(keys) == [Admission.PRESENT, PartStatus.FULL, PartStatus.FULL]
        assert await one.get(keys) == [payload(keys[0])]
        files.fail.clear()
        assert await one.put(keys) == [Admission.PRESENT, OK, OK]


@pytest.mark.parametrize("step", ["open", "allocate", "write", "sync", "rename", "sync_folder"])
async def test_a_disk_too_full_for_a_new_segment_leaves_no_trace_of_it(tmp_path: Path, step: str) -> None:
    keys, files = chain(8), FailingFiles()
    async with rig(tmp_path, files=files) as one:
        assert await one.put(keys[:4]) == [OK] * 4
        files.fail[step] = ENOSPC
        assert await one.put(keys) == [Admission.PRESENT] * 4 + [Admission.DROPPED] * 4
        files.fail.clear()
        assert len(segment_files(tmp_path)) == 1 and not leftovers(tmp_path)
        assert await one.get(keys) == [payload(key) for key in keys[:4]]
        assert await one.put(chain(2, "new")) == [OK, OK]  # by eviction: the disk isn't asked again at once
        assert len(segment_files(tmp_path)) == 1


async def test_a_segment_that_can_be_neither_made_nor_taken_away_counts_against_the_budget(tmp_path: Path) -> None:
    files, clock = FailingFiles(), Clock()
    async with rig(tmp_path, files=files, clock=clock) as one:
        await one.put(chain(4))
        files.fail |= {"sync_folder": ENOSPC, "remove": ENOSPC}
        for i in range(3):
            await one.put(chain(4, f"chain{i}"))
            clock.now += 10  # past the pause after a failed allocation
            assert bytes_on_disk(tmp_path) <= one.store.space.used_bytes
        assert len(segment_files(tmp_path)) == 4 and len(one.store.space.shelves[NAMESPACE].segments) == 1
        files.fail.clear()
        for i in range(10):
            await one.put(chain(4, f"later{i}"))
        assert bytes_on_disk(tmp_path) <= one.store.options.budget_bytes


async def test_a_disk_too_full_for_a_new_namespace_costs_that_namespace_only(tmp_path: Path) -> None:
    keys, files = chain(3), FailingFiles()
    async with rig(tmp_path, files=files) as one:
        await one.put(keys)
        files.fail["make_folder"] = ENOSPC
        assert await one.put(keys, namespace=OTHER) == [Admission.DROPPED] * 3
        files.fail.clear()
        assert await one.get(keys) == [payload(key) for key in keys]


async def test_a_disk_too_full_to_sync_fails_the_block_and_reading_goes_on(tmp_path: Path) -> None:
    keys, files = chain(3), FailingFiles()
    async with rig(tmp_path, files=files) as one:
        await one.put(keys[:1])
        files.fail["sync"] = ENOSPC
        assert set((await one.put(keys))[1:]) <= {PartStatus.FULL, FAILED}
        assert await one.get(keys) == [payload(keys[0])]
        files.fail.clear()
        assert await one.put(keys) == [Admission.PRESENT, OK, OK]


@pytest.mark.parametrize("fault", [EIO, ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("call", ["write", "sync"])
async def test_a_bad_block_that_cannot_be_erased_is_a_miss_and_its_slot_is_not_used(
    tmp_path: Path, call: str, fault: Callable[..., int | None]
) -> None:
    keys, files = chain(CAPACITY), FailingFiles()
    async with rig(tmp_path, files=files) as one:
        await one.put(keys)
        path, offset = slot_offset(tmp_path, keys[-1])
        flip(path, offset + PAGE_BYTES)
        files.fail[call] = fault
        assert (await one.get(keys))[-1] is PartStatus.CORRUPT
        await one.store.settle()
        files.fail.clear()
        assert await one.get(keys) == [payload(key) for key in keys[:-1]]
        assert (await one.put(chain(CAPACITY, "new"))).count(OK) == CAPACITY - 1
        assert await one.readable(keys[-1:]) == set()


async def test_a_clock_that_goes_back_ends_no_lease_and_makes_none_immortal(tmp_path: Path) -> None:
    keys, clock = chain(2), Clock()
    async with rig(tmp_path, options(lease_s=10.0), clock=clock) as one:
        await one.put(keys)
        found = one.store.lookup(NAMESPACE, keys, 10.0, lease=True)
        assert found.token is not None
        clock.now -= 500
        one.store.sweep()
        assert one.store.leases.get(found.token) is not None
        assert await one.get(keys) == [payload(key) for key in keys]
        one.store.renew(found.token, 10.0)
        clock.now += 11
        one.store.sweep()
        assert one.store.leases.get(found.token) is None
    clock.now = 1.0
    async with rig(tmp_path, clock=clock) as one:
        assert await one.get(keys) == [payload(key) for key in keys]
        assert await one.put(chain(CAPACITY, "new")) == [OK] * CAPACITY  # the older ones go, whatever the clock says


async def test_a_segment_that_cannot_be_removed_still_counts(tmp_path: Path) -> None:
    files = FailingFiles()
    async with rig(tmp_path, files=files) as one:
        await one.put(chain(CAPACITY))
        files.fail["remove"] = raising(errno.EACCES)
        used = one.store.space.used_bytes
        await one.put(chain(1), namespace=OTHER)
        assert one.store.space.used_bytes == used
        assert bytes_on_disk(tmp_path) <= one.store.options.budget_bytes


class Gate:
    """Holds reads of a payload until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int | None:
        self.entered.set()
        self.opened.wait(30)
        return None


async def test_a_hanging_disk_costs_a_reader_its_deadline_and_nothing_else(tmp_path: Path) -> None:
    keys, files, gate = chain(2), FailingFiles(), Gate()
    async with rig(tmp_path, files=files, read_deadline_s=0.5) as one:
        await one.put(keys)
        files.fail["read"] = gate
        assert await one.get(keys) == [PartStatus.EXPIRED] * 2
        assert one.area.reads.buffers.taken_bytes > 0  # the disk may still write there
        del files.fail["read"]
        gate.opened.set()
        await _until_idle(one)
        assert await one.get(keys) == [payload(key) for key in keys]


async def test_a_read_into_the_callers_memory_returns_only_when_the_disk_is_done_with_it(tmp_path: Path) -> None:
    keys, files, gate = chain(4), FailingFiles(), Gate()
    async with rig(tmp_path, files=files, read_deadline_s=0.05) as one:
        await one.put(keys)
        found = one.store.lookup(NAMESPACE, keys, None, lease=True)
        assert found.token is not None
        files.fail["read"] = gate
        into = [memoryview(bytearray(LENGTH)) for _ in keys]
        reading = asyncio.create_task(one.area.read(found.token, [Part(i, 0, LENGTH) for i in range(4)], into))
        await asyncio.to_thread(gate.entered.wait, 30)
        done, _ = await asyncio.wait([reading], timeout=0.15)
        assert not done
        gate.opened.set()
        statuses = [status for status, _, _ in await reading]
        assert statuses[:2] == [OK, OK] and statuses[2:] == [PartStatus.EXPIRED] * 2  # two threads
        assert into[0] == payload(keys[0]) and not any(into[3])
        one.store.release(found.token)


async def test_a_cancelled_read_keeps_its_block_until_the_disk_is_done(tmp_path: Path) -> None:
    keys, files, gate = chain(1), FailingFiles(), Gate()
    async with rig(tmp_path, files=files) as one:
        await one.put(keys)
        found = one.store.lookup(NAMESPACE, keys, None, lease=True)
        assert found.token is not None
        files.fail["read"] = gate
        reading = asyncio.create_task(one.area.read(found.token, [Part(0, 0, LENGTH)], None))
        await asyncio.to_thread(gate.entered.wait, 30)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        one.store.release(found.token)
        assert one.store.space.shelves[NAMESPACE].evict() == 0  # still being read
        gate.opened.set()
        await _until_idle(one)
        assert one.store.space.shelves[NAMESPACE].evict() == 1


async def _until_idle(one: Rig) -> None:
    """Until all memory for reads is back: all of it can be had at once."""
    async with asyncio.timeout(30):
        buffers = await one.area.reads.buffers.take_all([one.area.reads.buffers.bytes_max])
    for buffer in buffers or []:
        one.area.reads.buffers.give_back(buffer)


async def test_only_the_last_writes_are_verified_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from services.kvstore import scan

    keys = await filled(tmp_path)
    path, offset = slot_offset(tmp_path, keys[0])
    flip(path, offset + PAGE_BYTES)
    monkeypatch.setattr(scan, "WINDOW", 4)
    async with rig(tmp_path) as one:
        assert one.store.metrics.corrupt_blocks == 0  # too old to be torn: found when it is read
        assert (await one.get(keys))[0] is PartStatus.CORRUPT
    assert WINDOW == 1024


async def test_a_peer_that_scribbles_over_its_memory_cannot_condemn_a_block(tmp_path: Path) -> None:
    keys, files = chain(1), FailingFiles()
    async with rig(tmp_path, files=files) as one:
        await one.put(keys)
        found = one.store.lookup(NAMESPACE, keys, None, lease=True)
        assert found.token is not None
        first = True

        def scribble(fd: int, buffers: Sequence[memoryview], offset: int) -> int | None:
            nonlocal first
            got = os.preadv(fd, buffers, offset)
            if first:
                buffers[0][0] ^= 1
            first = False
            return got

        files.fail["read"] = scribble
        into = [memoryview(bytearray(LENGTH))]
        ((status, _, _),) = await one.area.read(found.token, [Part(0, 0, LENGTH)], into)
        assert status is OK and into[0] == payload(keys[0])
        one.store.release(found.token)
        assert one.stored() == set(keys)


async def test_a_reserve_after_every_slot_has_failed_is_dropped(tmp_path: Path) -> None:
    files = FailingFiles()
    async with rig(tmp_path, files=files) as one:
        await one.put(chain(1, "first"))
        files.fail["write"] = EIO
        for i in range(2 * CAPACITY):
            outcome = await one.put(chain(1, f"c{i}"))
        assert outcome == [Admission.DROPPED]
        assert (await one.store.reserve(NAMESPACE, offers(chain(1, "x")), None)).token is None


async def test_options_are_what_the_tests_think(tmp_path: Path) -> None:
    async with rig(tmp_path, options()) as one:
        assert await one.put(chain(CAPACITY + 1)) == [*[OK] * CAPACITY, Admission.DROPPED]
