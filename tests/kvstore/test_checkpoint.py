"""Checkpoints: a start believes them only where nothing was written since; otherwise they cost a scan, never a block."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from common.transport.interface import PartStatus
from services.kvstore import checkpoint
from services.kvstore.checkpoint import Checkpoint, footprint_bytes, slots_that_fit
from services.kvstore.checkpoints import QUIET_S
from services.kvstore.entries import ENTRY
from services.kvstore.files import Files
from services.kvstore.record import Geometry, SegmentHeader
from services.kvstore.segment import Segment
from tests.kvstore.faulty import EIO, FailingFiles, RecordingFiles
from tests.kvstore.support import CAPACITY, LENGTH, NAMESPACE, OTHER, SEGMENT, Clock, Rig, bytes_on_disk, chain, options, rig

HEADER = SegmentHeader(bytes(range(32)), Geometry(100, 2), 3)


def checkpoint_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.ckp"))


async def fill(folder: Path, keys: Sequence[bytes]) -> None:
    """A store that ended cleanly."""
    async with rig(folder) as one:
        await one.put(keys)
        assert await one.store.drain(1.0)


class CountingFiles(Files):
    """Counts reads of segment files behind their first page."""

    def __init__(self) -> None:
        self.slot_reads = 0
        self._segments: set[int] = set()

    def open(self, path: Path, flags: int) -> int:
        fd = super().open(path, flags)
        self._segments.discard(fd)
        if path.suffix == ".seg":
            self._segments.add(fd)
        return fd

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.slot_reads += fd in self._segments and offset > 0
        return super().read(fd, buffers, offset)


def test_a_checkpoint_has_exactly_these_bytes(tmp_path: Path) -> None:
    segment = Segment(Files(), tmp_path / "00000003.seg", -1, HEADER, direct=False, writable=True)
    entries = np.zeros(1, ENTRY)
    entries[0] = (1, 0xC1CAEBE5, 7, 9, [0x4B4B4B4B4B4B4B4B] * 4, [0x5050505050505050] * 4, b"T" * 16, 0x65000000, 0)
    data = checkpoint.encode(segment, Checkpoint(entries, 0x64000000))
    assert data[:80].hex() == (
        "504e53544b434b50" "01000000" "00000000" + bytes(range(32)).hex() + "64000000" "02000000" "03000000" "01000000"
        "0000006400000000" "70dd4de0" "00000000"
    )  # fmt: skip
    assert data[80:124] == bytes(44) and data[124:128].hex() == "40733400"
    assert data[128:].hex() == (
        "01000000" "e5ebcac1" "0700000000000000" "0900000000000000" + 32 * "4b" + 32 * "50" + 16 * "54" + "00000065" "00000000"
    )  # fmt: skip
    back = checkpoint.decode(data, segment)
    assert isinstance(back, Checkpoint) and back.time_s == 0x64000000 and back.entries.tobytes() == entries.tobytes()


@pytest.mark.parametrize("at", range(0, 128 + 112, 5))
def test_a_flipped_bit_makes_a_checkpoint_unusable(tmp_path: Path, at: int) -> None:
    segment = Segment(Files(), tmp_path / "00000003.seg", -1, HEADER, direct=False, writable=True)
    data = bytearray(checkpoint.encode(segment, Checkpoint(np.zeros(1, ENTRY), 1)))
    data[at] ^= 4
    assert isinstance(checkpoint.decode(bytes(data), segment), str)


@pytest.mark.parametrize("length", [0, 5, 127, 128, 128 + 111, 128 + 113])
def test_a_checkpoint_of_another_length_is_unusable(tmp_path: Path, length: int) -> None:
    segment = Segment(Files(), tmp_path / "00000003.seg", -1, HEADER, direct=False, writable=True)
    data = checkpoint.encode(segment, Checkpoint(np.zeros(1, ENTRY), 1))
    assert isinstance(checkpoint.decode(data.ljust(300, b"\0")[:length], segment), str)


@pytest.mark.parametrize("slots", [(0, 0), (0, 2)])
def test_a_checkpoint_that_names_impossible_slots_is_unusable(tmp_path: Path, slots: tuple[int, int]) -> None:
    segment = Segment(Files(), tmp_path / "00000003.seg", -1, HEADER, direct=False, writable=True)
    entries = np.zeros(2, ENTRY)
    entries["slot"] = slots
    assert isinstance(checkpoint.decode(checkpoint.encode(segment, Checkpoint(entries, 1)), segment), str)


async def test_after_a_clean_end_a_start_reads_no_slot_and_finds_everything(tmp_path: Path) -> None:
    keys = chain(10)
    await fill(tmp_path, keys)
    files = CountingFiles()
    async with rig(tmp_path, files=files) as one:
        assert files.slot_reads == 0
        assert one.stored() == set(keys)
        assert len(await one.get(keys)) == 10


async def test_recency_survives_a_clean_end(tmp_path: Path) -> None:
    older, newer = chain(3, "older"), chain(3, "newer")
    async with rig(tmp_path) as one:
        await one.put(older)
        await one.put(newer)
        await one.put(chain(1, "later"))
        await one.get(older)
        await one.store.drain(1.0)
    async with rig(tmp_path) as one:
        await one.put(chain(CAPACITY - 7 + 3, "more"))
        assert set(older) <= one.stored()
        assert not set(newer) & one.stored()


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "of another segment", "removed"])
async def test_an_unusable_checkpoint_costs_a_scan_and_no_block(tmp_path: Path, damage: str) -> None:
    keys = chain(10)
    await fill(tmp_path, keys)
    first, second, *_ = checkpoint_files(tmp_path)
    data = first.read_bytes()
    match damage:
        case "flipped":
            first.write_bytes(data[:150] + bytes([data[150] ^ 1]) + data[151:])
        case "cut":
            first.write_bytes(data[:-1])
        case "emptied":
            first.write_bytes(b"")
        case "of another segment":
            first.write_bytes(second.read_bytes())
        case _:
            first.unlink()
    files = CountingFiles()
    async with rig(tmp_path, files=files) as one:
        assert files.slot_reads
        assert await one.readable(keys) == set(keys)
        assert len(checkpoint_files(tmp_path)) == len(files_of(one)) - 1


def files_of(one: Rig) -> list[Segment]:
    return [segment for shelf in one.store.space.shelves.values() for segment in shelf.segments.values()]


async def test_a_checkpoint_is_gone_for_good_before_its_segment_is_written_to(tmp_path: Path) -> None:
    await fill(tmp_path, chain(CAPACITY))
    files = RecordingFiles(tmp_path)
    async with rig(tmp_path, files=files) as one:
        before = len(files.events)
        assert await one.put(chain(1, "more")) == [PartStatus.OK]
    files.close_all()
    kinds = [event.kind for event in files.events[before:]]
    assert kinds == ["remove", "sync_folder", "write", "sync"]


async def test_a_checkpoint_that_cannot_be_removed_keeps_its_segment_from_being_written_to(tmp_path: Path) -> None:
    keys = chain(CAPACITY)
    await fill(tmp_path, keys)
    files = FailingFiles()
    async with rig(tmp_path, files=files) as one:
        files.fail["remove"] = EIO
        assert await one.put(chain(1, "more")) == [PartStatus.FAILED]
        del files.fail["remove"]
        await one.check()
    async with rig(tmp_path) as one:
        assert await one.readable(keys) == set(keys)


async def test_a_segment_that_is_quiet_gets_a_checkpoint(tmp_path: Path) -> None:
    clock = Clock()
    async with rig(tmp_path, clock=clock) as one:
        await one.put(chain(3))
        for _ in range(2):
            one.store.sweep()
            await one.store.settle()
        assert not checkpoint_files(tmp_path)
        clock.now += QUIET_S + 1
        one.store.sweep()
        await one.store.settle()
        assert len(checkpoint_files(tmp_path)) == 1
        assert await one.put(chain(4)) == [*[2] * 3, PartStatus.OK]
        assert not checkpoint_files(tmp_path)


async def test_a_write_waits_for_a_checkpoint_that_is_about_to_be_saved_and_discards_it(tmp_path: Path) -> None:
    """Found by the crash loop: what was written while the saving was queued was lost at the next start."""
    clock, gate = Clock(), threading.Event()
    async with rig(tmp_path, clock=clock) as one:
        assert await one.put(chain(CAPACITY, "old")) == [PartStatus.OK] * CAPACITY  # all segments are full
        clock.now += QUIET_S + 1
        held = [asyncio.create_task(one.store.file_calls.run(0, lambda: gate.wait(30))) for _ in range(8)]  # every thread is busy
        await asyncio.sleep(0)  # they are submitted
        one.store.sweep()
        writing = asyncio.create_task(one.put(chain(CAPACITY, "new")))
        await asyncio.wait([writing], timeout=0.2)  # time enough for one that doesn't wait
        gate.set()
        assert await writing == [PartStatus.OK] * CAPACITY
        await asyncio.gather(*held)
        await one.store.settle()
        assert not checkpoint_files(tmp_path)
    async with rig(tmp_path) as one:
        assert len(await one.get(chain(CAPACITY, "new"))) == CAPACITY


class WatchingFiles(Files):
    """Looks at the folder before and after every call that makes or changes a file."""

    def __init__(self, folder: Path) -> None:
        self.peak_bytes = 0
        self._folder = folder

    def look(self) -> None:
        self.peak_bytes = max(self.peak_bytes, bytes_on_disk(self._folder))

    def write(self, fd: int, buffer: memoryview, offset: int) -> int:
        try:
            return super().write(fd, buffer, offset)
        finally:
            self.look()

    def allocate(self, fd: int, length: int) -> None:
        super().allocate(fd, length)
        self.look()

    def rename(self, old: Path, new: Path) -> None:
        self.look()
        super().rename(old, new)
        self.look()


async def test_checkpoints_have_their_place_in_the_budget_also_while_they_are_written(tmp_path: Path) -> None:
    """One segment less and it would not be full; one file more and it would be over."""
    chosen = options(io="threads")
    files = WatchingFiles(tmp_path)
    for name in ("first", "second"):
        async with rig(tmp_path, chosen, files=files) as one:
            await one.put(chain(CAPACITY, name))
            assert len(files_of(one)) == 8
            assert one.store.space.used_bytes == chosen.budget_bytes
            await one.store.drain(1.0)
            assert len(checkpoint_files(tmp_path)) == 8
    assert options().budget_bytes - footprint_bytes(SEGMENT) < files.peak_bytes <= options().budget_bytes


async def test_a_budget_that_takes_no_checkpoints_costs_a_segment(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        await one.put(chain(CAPACITY))
    async with rig(tmp_path, options(budget_bytes=options().budget_bytes - 1)) as one:
        assert len(files_of(one)) == 7
        await one.store.drain(1.0)
        assert bytes_on_disk(tmp_path) <= one.store.options.budget_bytes


@pytest.mark.parametrize("slots", [1, 2, 35, 36, 37, 1000])
def test_segments_are_as_large_as_their_place_in_the_budget(slots: int) -> None:
    footprint = footprint_bytes(Geometry(LENGTH, slots))
    assert slots_that_fit(LENGTH, footprint) == slots
    assert slots_that_fit(LENGTH, footprint - 1) == slots - 1


def test_a_checkpoint_of_every_slot_takes_no_more_than_is_reserved(tmp_path: Path) -> None:
    segment = Segment(Files(), tmp_path / "00000003.seg", -1, HEADER, direct=False, writable=True)
    data = checkpoint.encode(segment, Checkpoint(np.zeros(HEADER.geometry.slots_per_segment, ENTRY), 1))
    assert len(data) <= footprint_bytes(HEADER.geometry) - HEADER.geometry.segment_bytes < len(data) + 4096


async def test_a_checkpoint_goes_with_its_segment_and_one_left_behind_is_not_believed_by_the_next(tmp_path: Path) -> None:
    await fill(tmp_path, chain(CAPACITY, "old"))
    (path, *_) = checkpoint_files(tmp_path)
    data = path.read_bytes()
    keys = chain(CAPACITY, "new")
    async with rig(tmp_path) as one:
        await one.put(keys, namespace=OTHER)
        assert one.store.metrics.segment_evictions
        missing = [file for file in (tmp_path / "namespaces" / NAMESPACE).glob("*.ckp") if not file.with_suffix(".seg").exists()]
        assert not missing
    gone = [number for number in range(8) if not path.with_name(f"{number:08d}.seg").exists()]
    path.with_name(f"{gone[0]:08d}.ckp").write_bytes(data)
    async with rig(tmp_path, options(budget_bytes=2 * options().budget_bytes)) as one:
        again = chain(CAPACITY, "again")
        await one.put(again)
        assert await one.readable(again) == set(again)
