"""One contract for both I/O engines: whole, bounded, in order, and patient with the kernel."""

import asyncio
import errno
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from common.disk import ring as ring_module
from common.disk import ring_engine, turns
from common.disk.batch import NotStarted
from common.disk.devices import DeviceEngines
from common.disk.engine import Engine, Machine, open_engine
from common.disk.pages import PAGE_BYTES, aligned
from common.disk.ring import Ring, RingUnavailable, open_ring
from common.disk.transfer import Op, Transfer
from common.errors import Overloaded, SettingsError
from tests.kvstore.faulty import EIO, FailingFiles

PAGES = 8


@pytest.fixture
def files() -> FailingFiles:
    return FailingFiles()


@pytest.fixture(params=["io_uring", "threads", "io_uring of several", "threads of several"])
def engine(request: pytest.FixtureRequest, files: FailingFiles) -> Iterator[Engine]:
    name, _, several = request.param.partition(" of ")
    try:
        made = open_engine(files, name, label="test", depth=2, pending_max=10)
        if several:
            made = DeviceEngines([made, open_engine(files, name, label="other", depth=2, pending_max=10)], 10)
    except SettingsError as error:
        pytest.skip(str(error))
    assert made.name == name
    yield made
    made.close()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file whose page n is full of byte n + 1."""
    path = tmp_path / "file"
    path.write_bytes(b"".join(bytes([n + 1]) * PAGE_BYTES for n in range(PAGES)))
    opened = os.open(path, os.O_RDWR)
    yield opened
    os.close(opened)


def read(fd: int, page: int, pages: int = 1) -> Transfer:
    return Transfer(Op.READ, fd, [aligned(pages * PAGE_BYTES)], page * PAGE_BYTES)


class Gate:
    """Holds calls until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.opened = threading.Event()

    def __call__(self, *_: object) -> None:
        self.entered.release()
        assert self.opened.wait(30)


async def test_results_come_in_order_and_errors_are_results(engine: Engine, fd: int) -> None:
    def wrong() -> int:
        raise ValueError("not what was written")

    plain, checked = read(fd, 0), Transfer(Op.READ, fd, [aligned(PAGE_BYTES)], PAGE_BYTES, lambda: 77)
    bad = Transfer(Op.READ, fd, [aligned(PAGE_BYTES)], 0, wrong)
    results = await engine.submit([plain, checked, bad, Transfer(Op.READ, -5, [aligned(PAGE_BYTES)])]).done
    assert results[:2] == [PAGE_BYTES, 77] and isinstance(results[2], ValueError)
    assert isinstance(results[3], OSError) and results[3].errno == errno.EBADF
    assert plain.buffers[0][0] == 1 and checked.buffers[0][-1] == 2
    assert await engine.submit([]).done == [] and engine.pending == 0


async def test_what_is_written_and_synced_is_read_back_through_several_buffers(engine: Engine, fd: int) -> None:
    source = aligned(3 * PAGE_BYTES)
    source[:] = os.urandom(len(source))
    assert await engine.submit([Transfer(Op.WRITE, fd, [source[:PAGE_BYTES], source[PAGE_BYTES:]], PAGE_BYTES)]).done
    assert await engine.submit([Transfer(Op.SYNC, fd)]).done == [0]
    into = [aligned(2 * PAGE_BYTES), aligned(PAGE_BYTES)]
    assert await engine.submit([Transfer(Op.READ, fd, into, PAGE_BYTES)]).done == [3 * PAGE_BYTES]
    assert bytes(into[0]) + bytes(into[1]) == bytes(source)


async def test_short_transfers_are_finished(engine: Engine, fd: int, files: FailingFiles) -> None:
    files.fail["read"] = lambda fd, buffers, offset: os.preadv(fd, [buffers[0][:PAGE_BYTES]], offset)
    files.fail["write"] = lambda fd, buffer, offset: os.pwrite(fd, buffer[:PAGE_BYTES], offset)
    source = aligned(3 * PAGE_BYTES)
    source[:] = os.urandom(len(source))
    assert await engine.submit([Transfer(Op.WRITE, fd, [source], 0)]).done == [len(source)]
    whole = read(fd, 0, 3)
    assert await engine.submit([whole]).done == [len(source)]
    assert whole.buffers[0] == source


@pytest.mark.parametrize("moved", [0, 512])
async def test_a_transfer_that_stops_is_an_error(engine: Engine, fd: int, files: FailingFiles, moved: int) -> None:
    files.fail["read"] = lambda fd, buffers, offset: moved
    (result,) = await engine.submit([read(fd, 0)]).done
    assert isinstance(result, OSError) and result.errno == errno.EIO and f"short read of {moved} of 4096" in str(result)
    (beyond,) = await engine.submit([read(fd, PAGES)]).done
    assert isinstance(beyond, OSError)


@pytest.mark.parametrize("call", ["read", "write", "sync"])
async def test_a_failing_disk_is_a_result(engine: Engine, fd: int, files: FailingFiles, call: str) -> None:
    files.fail[call] = EIO
    (result,) = await engine.submit([Transfer(Op(call), fd, [] if call == "sync" else [aligned(PAGE_BYTES)])]).done
    assert isinstance(result, OSError) and result.errno == errno.EIO
    assert engine.pending == 0


async def test_what_was_not_started_by_the_deadline_is_given_up_and_the_rest_waited_for(
    engine: Engine, fd: int, files: FailingFiles
) -> None:
    gate = Gate()
    files.fail["read"] = gate
    batch = engine.submit([read(fd, page) for page in range(4)], deadline_s=0.02)
    for _ in range(engine.depth):
        await asyncio.to_thread(gate.entered.acquire)
    later = engine.submit([read(fd, 5)], deadline_s=0.02)
    assert [type(result) for result in await later.done] == [NotStarted]
    assert not batch.done.done()
    gate.opened.set()
    assert [result if isinstance(result, int) else type(result) for result in await batch.done] == [
        PAGE_BYTES,
        PAGE_BYTES,
        NotStarted,
        NotStarted,
    ]
    assert engine.pending == 0


async def test_pending_transfers_are_bounded(engine: Engine, fd: int, files: FailingFiles) -> None:
    gate = Gate()
    files.fail["read"] = gate
    batch = engine.submit([read(fd, 0)] * 10)
    with pytest.raises(Overloaded, match="at most 10"):
        engine.submit([read(fd, 1)])
    gate.opened.set()
    assert await batch.done == [PAGE_BYTES] * 10


async def test_a_device_that_hangs_holds_up_only_its_own(files: FailingFiles, fd: int, tmp_path: Path) -> None:
    gate = Gate()
    path = tmp_path / "hanging"
    path.write_bytes(bytes(PAGE_BYTES))
    hanging = os.open(path, os.O_RDONLY)
    files.fail["read"] = lambda at, *_: gate() if at == hanging else None
    engine = DeviceEngines([open_engine(files, "auto", label="test", depth=2, pending_max=99) for _ in range(2)], 99)
    stuck = engine.submit([Transfer(Op.READ, hanging, [aligned(PAGE_BYTES)], device=1)] * 8)
    for _ in range(2):
        await asyncio.to_thread(gate.entered.acquire)
    assert await engine.submit([read(fd, page) for page in range(8)]).done == [PAGE_BYTES] * 8
    mixed = engine.submit([read(fd, 0), Transfer(Op.READ, hanging, [aligned(PAGE_BYTES)], device=1)], 0.02)
    engine.abandon(stuck)
    result = await asyncio.wait_for(mixed.done, 30)
    assert result[0] == PAGE_BYTES and isinstance(result[1], NotStarted)
    gate.opened.set()
    assert [type(one) for one in await stuck.done] == [int] * 2 + [NotStarted] * 6
    assert engine.pending == 0
    engine.close()
    os.close(hanging)


async def test_a_long_batch_does_not_hold_up_a_short_one(
    engine: Engine, fd: int, files: FailingFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "SHORT_BYTES", PAGE_BYTES)
    gate, started = Gate(), []

    def fail(_: int, buffers: Sequence[memoryview], offset: int) -> None:
        started.append(offset)
        gate()

    files.fail["read"] = fail
    long = engine.submit([read(fd, 0)] * 6)
    short = engine.submit([read(fd, 1)])
    await asyncio.to_thread(gate.entered.acquire)
    gate.opened.set()
    await asyncio.gather(long.done, short.done)
    assert started.index(PAGE_BYTES) <= 3


async def test_a_closed_engine_finishes_what_is_queued_and_takes_no_more(engine: Engine, fd: int) -> None:
    batch = engine.submit([read(fd, page % PAGES) for page in range(10)])
    await asyncio.to_thread(engine.close)
    assert await batch.done == [PAGE_BYTES] * 10
    with pytest.raises(Overloaded):
        engine.submit([read(fd, 0)])


async def test_what_the_kernel_has_no_room_for_goes_again(fd: int) -> None:
    refused = []

    class Busy(Machine):
        def ring(self, entries: int) -> Ring:
            return BusyRing(entries)

    class BusyRing(Ring):
        def reap(self) -> list[tuple[int, int]]:
            results = super().reap()
            if results and len(refused) < 3:
                refused.extend(results[:1])
                results[0] = (results[0][0], -errno.EAGAIN)
            return results

    if _ring_reason():
        pytest.skip(_ring_reason())
    engine = open_engine(Busy(), "io_uring", label="test", depth=2, pending_max=10)
    assert await engine.submit([read(fd, page) for page in range(3)]).done == [PAGE_BYTES] * 3
    assert len(refused) == 3
    engine.close()


class Watched(Machine):
    """Notes how many transfers are at the kernel whenever some are handed over."""

    def __init__(self) -> None:
        self.at_once: list[int] = []

    def ring(self, entries: int) -> Ring:
        at_once = self.at_once

        class WatchedRing(Ring):
            def submit(self, *, wait: bool = False) -> None:
                at_once.append(self.in_flight)
                super().submit(wait=wait)

        return WatchedRing(entries)


async def test_no_more_than_enough_bytes_are_at_the_kernel_at_once(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_engine, "KERNEL_BYTES", 2 * PAGE_BYTES)
    if _ring_reason():
        pytest.skip(_ring_reason())
    machine = Watched()
    engine = open_engine(machine, "io_uring", label="test", depth=8, pending_max=20)
    pages = [read(fd, page) for page in range(PAGES)]
    broken = Transfer(Op.READ, -5, [aligned(PAGE_BYTES)])
    results = await engine.submit([*pages, broken, *pages]).done
    assert results[:PAGES] == results[PAGES + 1 :] == [PAGE_BYTES] * PAGES and max(machine.at_once) == 2
    assert await engine.submit([read(fd, 0, PAGES)]).done == [PAGES * PAGE_BYTES]  # one that is larger goes alone
    engine.close()


class Chained(Machine):
    """Notes what is placed, by its page: a list for each chain."""

    def __init__(self) -> None:
        self.chains: list[list[int]] = [[]]

    def ring(self, entries: int) -> Ring:
        chains = self.chains

        class ChainedRing(Ring):
            def _move(self, single: Any, several: Any, flags: int, tag: int, fd: int, buffers: Any, offset: int) -> None:
                super()._move(single, several, flags, tag, fd, buffers, offset)
                chains[-1].append(offset // PAGE_BYTES)
                if not flags:
                    chains.append([])

        return ChainedRing(entries)


async def test_writes_wait_at_the_kernel_in_as_many_chains_as_the_disk_may_have(fd: int) -> None:
    if _ring_reason():
        pytest.skip(_ring_reason())
    machine = Chained()
    engine = open_engine(machine, "io_uring", label="test", depth=2, pending_max=20)
    pages = [aligned(PAGE_BYTES) for _ in range(7)]
    for number, page in enumerate(pages):
        page[:] = bytes([100 + number]) * PAGE_BYTES
    writes = [Transfer(Op.WRITE, fd, [page], number * PAGE_BYTES) for number, page in enumerate(pages)]
    broken = Transfer(Op.WRITE, -5, [aligned(PAGE_BYTES)], 77 * PAGE_BYTES)
    results = await engine.submit([*writes[:2], broken, *writes[2:], read(fd, 7), Transfer(Op.SYNC, fd)]).done
    assert isinstance(results.pop(2), OSError), "what comes after a failed write is written all the same"
    assert results == [PAGE_BYTES] * 8 + [0] and os.pread(fd, 8 * PAGE_BYTES, 0) == b"".join([*pages, bytes([8]) * PAGE_BYTES])
    assert machine.chains == [[0, 1, 77, 2, 3], [4, 5, 6], [7], []]
    engine.close()


async def test_of_reads_only_those_with_much_behind_them_wait_in_chains(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_engine, "MUCH_BYTES", 6 * PAGE_BYTES)
    if _ring_reason():
        pytest.skip(_ring_reason())
    machine = Chained()
    engine = open_engine(machine, "io_uring", label="test", depth=2, pending_max=20)
    reads = [read(fd, page) for page in range(8)]
    broken = Transfer(Op.READ, -5, [aligned(PAGE_BYTES)], 77 * PAGE_BYTES)
    results = await engine.submit([reads[0], broken, *reads[1:]]).done
    assert isinstance(results.pop(1), OSError), "what comes after a failed read is read all the same"
    assert results == [PAGE_BYTES] * 8
    assert [bytes(transfer.buffers[0]) for transfer in reads] == [bytes([1 + page]) * PAGE_BYTES for page in range(8)]
    assert machine.chains == [[0, 77, 1, 2, 3], [4], [5], [6], [7], []]
    engine.close()


async def test_of_what_is_left_half_is_at_the_kernel_so_that_little_comes_last(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_engine, "KERNEL_BYTES", 8 * PAGE_BYTES)
    monkeypatch.setattr(ring_engine, "LAST_BYTES", PAGE_BYTES)
    if _ring_reason():
        pytest.skip(_ring_reason())
    machine = Watched()
    engine = open_engine(machine, "io_uring", label="test", depth=32, pending_max=200)

    def checked(page: int) -> Transfer:
        return Transfer(Op.READ, fd, [aligned(PAGE_BYTES)], page % PAGES * PAGE_BYTES, lambda: PAGE_BYTES)

    engine.abandon(engine.submit([checked(page) for page in range(100)]))  # what is given up isn't left any more
    first = len(machine.at_once)
    await engine.submit([checked(page) for page in range(32)]).done
    assert max(machine.at_once) == 8 and machine.at_once[-1] == 0
    placed = [at_once for at_once in machine.at_once[first:] if at_once]
    assert placed[-1] == 1 and sorted(placed, reverse=True)[:2] == [8, 8], placed
    engine.close()


def test_the_engine_is_chosen_by_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forbidden(Machine):
        def ring(self, entries: int) -> Ring:
            raise RingUnavailable("forbidden here")

    chosen = open_engine(Forbidden(), "auto", label="test", depth=1, pending_max=1)
    assert chosen.name == "threads"
    chosen.close()
    with pytest.raises(SettingsError, match="forbidden here"):
        open_engine(Forbidden(), "io_uring", label="test", depth=1, pending_max=1)
    monkeypatch.setattr(ring_module.platform, "machine", lambda: "riscv64")
    with pytest.raises(RingUnavailable, match="riscv64"):
        open_ring(1)


def test_a_sandbox_that_forbids_the_calls_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(number: int, *arguments: int) -> int:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(ring_module.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(ring_module, "_call", forbidden)
    with pytest.raises(RingUnavailable, match="seccomp"):
        open_ring(1)


def _ring_reason() -> str:
    try:
        open_ring(1).close()
    except RingUnavailable as error:
        return str(error)
    return ""


def test_rest_and_advance_of_a_transfer() -> None:
    buffers: Sequence[memoryview] = [memoryview(bytearray(10)), memoryview(bytearray(5))]
    transfer = Transfer(Op.READ, 0, buffers)
    assert [len(buffer) for buffer in transfer.rest(0)] == [10, 5]
    assert [len(buffer) for buffer in transfer.rest(4)] == [6, 5]
    assert [len(buffer) for buffer in transfer.rest(12)] == [3]
    assert transfer.rest(15) == []
    assert transfer.advanced(10, 5) == 15
