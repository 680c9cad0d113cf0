"""One store over several directories: striping, shares of the budget, identity, and disks that fail."""

import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import Unavailable
from common.transport.interface import PartStatus
from services.kvstore import disk_watch
from services.kvstore.budget import Room, budget_that_fits, split
from services.kvstore.disk import DiskState, read_identity
from services.kvstore.files import Files
from services.kvstore.identity import Claim, seat
from services.kvstore.record import StoreIdentity, Unreadable
from tests.kvstore.faulty import FailingFiles
from tests.kvstore.several import disks_of, folders, on_folder, three
from tests.kvstore.support import NAMESPACE, OTHER, bytes_on_disk, chain, offers, rig, room_for, slot_offset

OK = PartStatus.OK


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the probes of a disk."""
    monkeypatch.setattr(disk_watch, "PAUSE_S", 0.0)


def raising(number: int) -> Callable[..., int | None]:
    def fail(*_: object) -> int | None:
        raise OSError(number, os.strerror(number))

    return fail


def break_disk(
    files: FailingFiles, folder: Path, number: int = errno.EIO, calls: Sequence[str] = ("read", "write", "open", "sync")
) -> None:
    for call in calls:
        files.fail[call] = on_folder(folder, raising(number))


# Striping and space


async def test_a_chain_goes_round_all_disks(tmp_path: Path) -> None:
    keys = chain(12)
    async with rig(folders(tmp_path), three()) as one:
        assert await one.put(keys[:7]) == [OK] * 7
        assert await one.put(keys[7:], keys[6]) == [OK] * 5
        where = disks_of(one, keys)
        assert all(after == (before + 1) % 3 for before, after in zip(where, where[1:], strict=False))
        assert len(await one.get(keys)) == 12
    async with rig(folders(tmp_path)[::-1], three()) as one:  # the order in which they are named doesn't matter
        assert len(await one.get(keys)) == 12


async def test_first_blocks_of_chains_are_spread_too(tmp_path: Path) -> None:
    async with rig(folders(tmp_path), three()) as one:
        keys = [chain(1, f"chain{i}")[0] for i in range(9)]
        for key in keys:
            assert await one.put([key]) == [OK]
        assert Counter(disks_of(one, keys)) == {0: 3, 1: 3, 2: 3}


async def test_every_disk_keeps_its_share_of_the_budget(tmp_path: Path) -> None:
    async with rig(folders(tmp_path), three()) as one:
        for i in range(40):
            assert await one.put(chain(4, f"chain{i}")) == [OK] * 4
            for disk in one.store.disks:
                assert bytes_on_disk(disk.folder) <= disk.used_bytes <= disk.budget_bytes
        assert [disk.used_bytes for disk in one.store.disks] == [room_for(8)] * 3
        assert len(one.stored()) == 96


async def test_a_lowered_budget_is_met_on_every_disk(tmp_path: Path) -> None:
    keys = chain(90)
    async with rig(folders(tmp_path), three()) as one:
        await one.put(keys)
    async with rig(folders(tmp_path), three(budget_bytes=room_for(12, disks=3))) as one:
        assert all(bytes_on_disk(disk.folder) <= room_for(4) for disk in one.store.disks)
        stored = len(await one.get(keys))
        assert stored == len(one.stored()) <= 48  # prefix-closed


async def test_two_namespaces_share_the_disks(tmp_path: Path) -> None:
    async with rig(folders(tmp_path), three()) as one:
        mine, other = chain(60), chain(60, "other")
        await one.put(mine)
        await one.put(other, namespace=OTHER)
        assert len(await one.get(other, OTHER)) == 60
        numbers = Counter(path.name for path in tmp_path.rglob("*.seg"))
        assert max(numbers.values()) > 1  # each disk counts its own segments


ROOMS = st.lists(
    st.builds(Room, st.integers(0, 3), *[st.integers(1, 1 << 44)] * 2, st.integers(0, 1 << 42)), min_size=1, max_size=8
)


@given(ROOMS, st.integers(1 << 20, 1 << 45))
def test_shares_hold_the_budget_and_every_disks_limit(rooms: list[Room], budget: int) -> None:
    shares = split(budget, rooms)
    assert sum(shares) <= budget
    beside = Counter(room.device for room in rooms)
    limits = [budget_that_fits(budget, room.free_bytes // beside[room.device], room.held_bytes) for room in rooms]
    assert all(0 <= share <= limit for share, limit in zip(shares, limits, strict=True))
    if sum(limits) >= budget:
        assert sum(shares) > budget - len(rooms) - budget * 1e-9  # what one disk can't take, others do


def test_shares_follow_the_sizes_of_the_file_systems() -> None:
    def room(device: int, size: int, free: int = 10_000) -> Room:
        return Room(device, size, free, 0)

    assert split(900, [room(1, 1000), room(2, 2000)]) == [300, 600]
    assert split(900, [room(1, 1000), room(1, 1000)]) == [450, 450]
    assert split(900, [room(1, 1000, 100), room(2, 1000)]) == [80, 820]
    assert split(900, [room(1, 1000)]) == [900]


# Identity


def claim(store: int | None, disk: int = 0, disks: int = 1, segments: bool = True) -> Claim:
    return Claim(None if store is None else StoreIdentity(bytes([store] * 16), disk, disks), segments)


def told(claims: Sequence[Claim]) -> list[tuple[int, int] | str]:
    seating = seat(claims, bytes(16))
    return [one if isinstance(one, str) else (one.disk, one.disks) for one in seating.seats]


def test_new_directories_get_numbers_in_order() -> None:
    assert told([claim(None), claim(None)]) == [(0, 2), (1, 2)]
    assert told([claim(None), claim(1, 0, 2), claim(1, 1, 2)]) == [(2, 3), (0, 3), (1, 3)]


def test_a_missing_directory_is_named_and_its_number_is_not_given_away() -> None:
    seating = seat([claim(1, 0, 3), claim(1, 2, 3), claim(None)], bytes(16))
    assert seating.missing == [1] and seating.joined == [2]
    assert [one.disk for one in seating.seats if not isinstance(one, str)] == [0, 2, 3]


def test_directories_of_another_store_and_copies_are_left_alone() -> None:
    assert "another store" in str(told([claim(1, 0, 2), claim(2, 1, 2), claim(1, 1, 2)])[1])
    assert "another store" in str(told([claim(2, 0, 2), claim(1, 0, 2), claim(1, 1, 2)])[0])  # most decide
    assert "one is a copy" in str(told([claim(1, 0, 2), claim(1, 0, 2)])[1])


def test_an_unreadable_identity_is_left_alone_unless_there_is_no_other() -> None:
    damaged, newer = Claim(Unreadable.DAMAGED, True), Claim(Unreadable.NEWER, True)
    assert told([damaged]) == [(0, 1)]
    assert "delete it" in str(told([damaged, claim(1, 0, 2)])[0])
    assert "later version" in str(told([newer])[0])


@given(st.permutations([claim(1, 0, 3), claim(1, 1, 3), claim(1, 2, 3), claim(2, 0, 1)]))
def test_the_order_of_the_directories_changes_nothing(claims: list[Claim]) -> None:
    seats = told(claims)
    for one, given_ in zip(seats, claims, strict=True):
        assert isinstance(given_.identity, StoreIdentity)
        assert (one == (given_.identity.disk, 3)) == (given_.identity.store[0] == 1)


async def test_a_missing_directory_costs_misses_and_comes_back(tmp_path: Path) -> None:
    keys = chain(12)
    all_three = folders(tmp_path)
    async with rig(all_three, three()) as one:
        await one.put(keys)
        where = disks_of(one, keys)
    async with rig(all_three[:2], three()) as one:
        assert await one.readable(keys) == {key for key, disk in zip(keys, where, strict=True) if disk != 2}
        later = chain(4, "later")
        assert await one.put(later) == [OK] * 4
    async with rig(all_three, three()) as one:
        assert len(await one.get(keys)) == 12 and len(await one.get(later)) == 4
        assert [disk.identity.disk for disk in one.store.disks if disk.identity] == [0, 1, 2]


async def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    mine, foreign = folders(tmp_path, 2), tmp_path / "foreign"
    async with rig(mine, three()) as one:
        await one.put(chain(8))
    async with rig(foreign) as one:
        await one.put(chain(4, "foreign"))
    before = {path: path.read_bytes() for path in foreign.rglob("*") if path.is_file() and path.name != "LOCK"}
    async with rig([*mine, foreign], three()) as one:
        assert [disk.state for disk in one.store.disks] == [DiskState.SERVING, DiskState.SERVING, DiskState.LOST]
        assert "another store" in one.store.disks[2].problem
        assert len(await one.get(chain(8))) == 8 and await one.get(chain(4, "foreign")) == []
        await one.put(chain(30, "more"))
    assert {path: path.read_bytes() for path in foreign.rglob("*") if path.is_file() and path.name != "LOCK"} == before


async def test_a_store_without_identity_is_taken_as_it_is(tmp_path: Path) -> None:
    keys = chain(8)
    first, second = folders(tmp_path, 2)
    async with rig(first) as one:
        await one.put(keys)
    (first / "STORE").unlink()
    async with rig([first, second], three()) as one:
        assert len(await one.get(keys)) == 8
    assert read_identity(Files(), first) != read_identity(Files(), second)


async def test_a_damaged_identity_of_the_only_directory_is_written_again(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        await one.put(chain(8))
    page = bytearray((tmp_path / "STORE").read_bytes())
    page[20] ^= 1
    for damaged in (bytes(page), b"", bytes(page[:100])):
        (tmp_path / "STORE").write_bytes(damaged)
        async with rig(tmp_path) as one:
            assert len(await one.get(chain(8))) == 8
        assert isinstance(read_identity(Files(), tmp_path), StoreIdentity)


async def test_a_copied_directory_is_left_alone(tmp_path: Path) -> None:
    first, copy = folders(tmp_path, 2)
    async with rig(first) as one:
        await one.put(chain(4))
    shutil.copytree(first, copy)
    async with rig([first, copy], three()) as one:
        assert "one is a copy" in one.store.disks[1].problem
        assert len(await one.get(chain(4))) == 4


async def test_a_directory_that_cannot_be_made_is_lost_and_the_rest_serves(tmp_path: Path) -> None:
    (tmp_path / "ssd1").write_text("a file")
    async with rig(folders(tmp_path), three()) as one:
        assert [disk.state for disk in one.store.disks] == [DiskState.SERVING, DiskState.LOST, DiskState.SERVING]
        assert await one.put(chain(6)) == [OK] * 6
        assert set(disks_of(one, chain(6))) == {0, 2}


async def test_one_directory_that_another_process_has_stops_the_start(tmp_path: Path) -> None:
    async with rig(folders(tmp_path)[1]):
        with pytest.raises(Unavailable, match=f"ssd1 is in use by process {os.getpid()}"):
            async with rig(folders(tmp_path), three()):
                pass
    async with rig(folders(tmp_path), three()):  # nothing stayed locked
        pass


async def test_torn_blocks_of_a_disk_that_was_away_are_found(tmp_path: Path) -> None:
    first, second = folders(tmp_path, 2)
    small = three(durable=False, budget_bytes=room_for(64, disks=3))
    async with rig([first, second], small) as one:
        keys = chain(2)
        await one.put(keys)
    path, offset = slot_offset(second, keys[disks_of_first(first, keys)])
    with path.open("r+b") as file:
        file.seek(offset + 4096)
        file.write(b"torn")
    async with rig(first, small) as one:  # meanwhile the numbers go on, past the window
        for i in range(11):
            await one.put(chain(100, f"chain{i}"))
    async with rig([first, second], small) as one:
        assert one.store.metrics.corrupt_blocks == 1


def disks_of_first(first: Path, keys: Sequence[bytes]) -> int:
    """Which of two keys is not on the first disk."""
    data = b"".join(path.read_bytes() for path in first.rglob("*.seg"))
    return 0 if keys[0] not in data else 1


# Disks that fail


async def test_a_disk_that_dies_costs_misses_and_nothing_else(tmp_path: Path) -> None:
    keys, files = chain(30), FailingFiles()
    async with rig(folders(tmp_path), three(), files=files) as one:
        await one.put(keys)
        where = disks_of(one, keys)
        break_disk(files, folders(tmp_path)[1])
        got = await one.get(keys)
        assert all((item is PartStatus.FAILED) == (disk == 1) for item, disk in zip(got, where, strict=True))
        await one.store.settle()
        assert one.store.disks[1].state is DiskState.LOST
        assert one.stored() == {key for key, disk in zip(keys, where, strict=True) if disk != 1}
        assert await one.readable(keys) == one.stored()
        later = chain(20, "later")
        assert await one.put(later) == [OK] * 20
        assert set(disks_of(one, later)) == {0, 2}
        assert one.store.metrics.lost_blocks + one.store.metrics.corrupt_blocks == 10
    async with rig(folders(tmp_path), three()) as one:  # it was only away
        assert len(await one.readable(keys)) >= 20


async def test_writes_under_way_on_a_dying_disk_fail_by_themselves(tmp_path: Path) -> None:
    keys, files = chain(12), FailingFiles()
    async with rig(folders(tmp_path), three(), files=files) as one:
        reserved = await one.store.reserve(NAMESPACE, offers(keys), None)
        assert reserved.token is not None
        break_disk(files, folders(tmp_path)[0])
        results = await one.fill(reserved, keys)
        one.store.release(reserved.token)
        assert Counter(results) == {OK: 8, PartStatus.FAILED: 4}
        await one.store.settle()
        assert one.store.disks[0].state is DiskState.LOST
        assert PartStatus.FAILED not in await one.put(keys)
        assert len(await one.get(keys)) == 12


async def test_a_disk_that_takes_no_writes_still_serves(tmp_path: Path) -> None:
    keys, files = chain(30), FailingFiles()
    async with rig(folders(tmp_path), three(), files=files) as one:
        await one.put(keys)
        break_disk(files, folders(tmp_path)[2], errno.EROFS, ("write",))
        for i in range(40):
            await one.put(chain(4, f"chain{i}"))
            await one.store.settle()
            if one.store.disks[2].state is not DiskState.SERVING:
                break
        assert one.store.disks[2].state is DiskState.READ_ONLY
        assert len(await one.get(keys)) == 30
        later = chain(8, "later")
        assert await one.put(later) == [OK] * 8
        assert 2 not in disks_of(one, later)


async def test_one_bad_block_does_not_cost_the_disk(tmp_path: Path) -> None:
    keys, files = chain(12), FailingFiles()
    async with rig(folders(tmp_path), three(), files=files) as one:
        await one.put(keys)
        path, offset = slot_offset(tmp_path, keys[4])

        def bad(fd: int, _: object, at: int) -> int | None:
            if os.readlink(f"/proc/self/fd/{fd}") == str(path) and at == offset + 4096:
                raise OSError(errno.EIO, "bad sector")
            return None

        files.fail["read"] = bad
        assert [item is PartStatus.FAILED for item in await one.get(keys)] == [i == 4 for i in range(12)]
        await one.store.settle()
        assert [disk.state for disk in one.store.disks] == [DiskState.SERVING] * 3
        assert one.stored() == set(keys) - {keys[4]}
        assert sum(disk.errors for disk in one.store.disks) == 1


async def test_an_unmounted_directory_is_lost_after_its_first_error(tmp_path: Path) -> None:
    keys, files = chain(9), FailingFiles()
    async with rig(folders(tmp_path), three(), files=files) as one:
        await one.put(keys)
        (folders(tmp_path)[2] / "STORE").unlink()  # what a mount point without its file system looks like
        one.store.watch.failed_on(
            next(s for s in one.store.space.shelves[NAMESPACE].segments.values() if s.disk == 2), OSError(errno.EIO, "gone")
        )
        await one.store.settle()
        assert one.store.disks[2].state is DiskState.LOST and "still mounted" in one.store.disks[2].problem
        assert len(one.stored()) == 6


async def test_a_lost_disk_under_a_lease_leaves_everything_accounted_for(tmp_path: Path) -> None:
    keys, files = chain(9), FailingFiles()
    async with rig(folders(tmp_path), three(), files=files) as one:
        await one.put(keys)
        found = one.store.lookup(NAMESPACE, keys, None, lease=True)
        assert found.token is not None
        break_disk(files, folders(tmp_path)[0])
        await one.get(keys)
        await one.store.settle()
        one.store.release(found.token)
        await one.put(chain(9, "later"))


def truncate(segment: Path) -> None:
    os.truncate(segment, 4096 + 12288 + 100)


def copy_from_another_disk(segment: Path) -> None:
    """A segment that says it is another one."""
    shutil.copy(segment, segment.with_name("00000077.seg"))


def add_rubbish(segment: Path) -> None:
    segment.with_name("00000055.seg").write_bytes(b"\xff" * 20_000)
    segment.with_name("readme").write_text("mine")
    segment.with_name("00000056.tmp").write_bytes(b"begun")
    (segment.parent.parent / "not a namespace").mkdir()


FAULTS: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "missing": Path.unlink,
    "misnamed": copy_from_another_disk,
    "extra": add_rubbish,
    "empty": lambda segment: os.truncate(segment, 0),
    "zeroed": lambda segment: segment.write_bytes(bytes(segment.stat().st_size)),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_damaged_files_on_one_disk_cost_only_their_own_blocks(tmp_path: Path, fault: str) -> None:
    keys = chain(30)
    async with rig(folders(tmp_path), three()) as one:
        await one.put(keys)
        where = disks_of(one, keys)
        await one.store.drain(1.0)  # a clean end: checkpoints are there
    FAULTS[fault](sorted((tmp_path / "ssd1").rglob("*.seg"))[0])
    async with rig(folders(tmp_path), three()) as one:
        assert [disk.state for disk in one.store.disks] == [DiskState.SERVING] * 3
        readable = await one.readable(keys)
        assert readable >= {key for key, disk in zip(keys, where, strict=True) if disk != 1}
        await one.store.settle()
        await one.put(keys)
        assert len(await one.get(keys)) == 30
        assert all(bytes_on_disk(disk.folder) <= disk.budget_bytes for disk in one.store.disks)


async def test_segments_that_cannot_be_written_on_one_disk_are_served(tmp_path: Path) -> None:
    keys, files = chain(30), FailingFiles()
    async with rig(folders(tmp_path), three()) as one:
        await one.put(keys)

    def refuse(path: Path, flags: int) -> int | None:
        if path.suffix == ".seg" and flags & os.O_RDWR:
            raise OSError(errno.EACCES, "read-only file")
        return None

    files.fail["open"] = on_folder(folders(tmp_path)[1], refuse)
    async with rig(folders(tmp_path), three(), files=files) as one:
        assert len(await one.get(keys)) == 30
        later = chain(8, "later")
        assert await one.put(later) == [OK] * 8
