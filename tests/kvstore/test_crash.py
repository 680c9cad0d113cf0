"""Power cuts at every point of a small life of the store: nothing committed is lost, nothing wrong is served."""

import itertools
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.storage import BlockMeta
from common.transport.interface import PartStatus
from services.kvstore import checkpoint, scan, writer
from services.kvstore.options import StoreOptions
from services.kvstore.record import PAGE_BYTES, SEGMENT_MAGIC, SLOT_MAGIC, STORE_MAGIC, Geometry
from tests.kvstore.faulty import Event, RecordingFiles, disk_after_crash
from tests.kvstore.support import (
    NAMESPACE,
    OTHER,
    ROOT,
    Rig,
    bytes_on_disk,
    chain,
    flip,
    leftovers,
    offers,
    options,
    rig,
    room_for,
    slot_offset,
)

SLOT_BYTES, LENGTH = 8192, 2500
BUDGET_BYTES = room_for(8, geometry=Geometry(LENGTH, 2))
CHAINS = [(NAMESPACE, chain(5, f"crash{i}")) for i in range(4)] + [(OTHER, chain(4, "other")), (NAMESPACE, chain(5, "crash0"))]
SPOILED = chain(2, "after the damage")
EVERYTHING = sorted({(namespace, key) for namespace, keys in [*CHAINS, (NAMESPACE, SPOILED)] for key in keys})

pytestmark = pytest.mark.usefixtures("engine")


def small() -> StoreOptions:
    return options(budget_bytes=BUDGET_BYTES, segment_bytes=4096 + 2 * SLOT_BYTES, read_depth=1)


async def live(one: Rig, files: RecordingFiles) -> None:
    """Fills the store, evicts, rewrites, gives segments away; marks what is committed after every step.

    After every second chain all segments get checkpoints, which the next writes take away again.
    """
    for i, (namespace, keys) in enumerate(CHAINS):
        if i % 2:
            await one.store.checkpoints.save_all()
        for batch in (keys[:2], keys[2:]):
            at = keys.index(batch[0])
            reserved = await one.store.reserve(namespace, _offers(keys, at, len(batch)), None)
            files.mark(_stored(one))  # eviction shrank it, before anything is overwritten
            if reserved.token is not None:
                await one.fill(reserved, batch, LENGTH)
                one.store.release(reserved.token)
            files.mark(_stored(one))
    await _spoil(one, files)


async def _spoil(one: Rig, files: RecordingFiles) -> None:
    """Damages a block on the disk, lets it be found (it is erased), and writes another one into its slot."""
    key = min(one.stored(NAMESPACE))
    path, offset = slot_offset(files.root, key)
    flip(path, offset + PAGE_BYTES)
    assert await one.get([key], length=LENGTH) == [PartStatus.CORRUPT]
    files.mark(_stored(one))
    await one.store.settle()
    assert await one.put(SPOILED, length=LENGTH) == [PartStatus.OK] * len(SPOILED)
    files.mark(_stored(one))


def step(event: Event) -> str:
    """What the store was doing, in the words of docs/formats.md, "Writing"."""
    match event.kind:
        case "write" if event.data.startswith(SEGMENT_MAGIC):
            return "segment page"
        case "write" if event.data.startswith(SLOT_MAGIC):
            return "slot"
        case "write" if event.data.startswith(STORE_MAGIC):
            return "store file"
        case "write" if event.data.startswith(checkpoint.MAGIC):
            return "checkpoint"
        case "write" if not any(event.data):
            return "erase"
        case "create" | "rename" | "remove":
            return f"{event.kind} {Path(event.path).suffix or Path(event.path).name}"
        case kind:
            return kind


STEPS = {
    "create .tmp", "allocate", "segment page", "sync", "rename .tmp", "sync_folder",
    "slot", "erase", "remove .seg", "store file", "create .ckp-tmp", "checkpoint", "rename .ckp-tmp", "remove .ckp",
}  # fmt: skip


def _offers(keys: list[bytes], start: int, count: int) -> list[BlockMeta]:
    return offers(keys[start : start + count], keys[start - 1] if start else ROOT, LENGTH)


def _stored(one: Rig) -> frozenset[tuple[str, bytes]]:
    return frozenset((namespace, key) for namespace in (NAMESPACE, OTHER) for key in one.stored(namespace))


def committed_at(events: Sequence[Event], crash: int) -> frozenset[tuple[str, bytes]]:
    """What was stored at the crash: of the marks around it, what both agree on."""
    before: frozenset[tuple[str, bytes]] = frozenset()
    for event in events[:crash]:
        if event.kind == "mark":
            before = event.mark  # type: ignore[assignment]
    after = next((event.mark for event in events[crash:] if event.kind == "mark"), before)
    return before & after  # type: ignore[operator, no-any-return]


async def survives(folder: Path, committed: frozenset[tuple[str, bytes]]) -> int:
    """Reopens what a crash left; how many damaged blocks were found."""
    async with rig(folder, small()) as one:
        readable = {
            (namespace, key) for namespace, key in EVERYTHING if await one.readable([key], namespace, LENGTH)
        }  # `readable` asserts that no wrong bytes are served
        assert committed <= readable
        assert bytes_on_disk(folder) <= BUDGET_BYTES
        assert not leftovers(folder)
        namespace, keys = CHAINS[0]
        assert PartStatus.FAILED not in await one.put(keys, namespace=namespace, length=LENGTH)
        return one.store.metrics.corrupt_blocks


@pytest.mark.parametrize("window", [scan.WINDOW, 4], ids=["window", "tiny window"])
@pytest.mark.timeout(300)
async def test_every_crash_point_keeps_what_was_committed_and_serves_nothing_wrong(
    tmp_path: Path, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "WINDOW", window)
    monkeypatch.setattr(writer, "WINDOW", window)
    monkeypatch.setattr(writer, "BATCH_MAX", min(writer.BATCH_MAX, window))
    origin = tmp_path / "origin"
    files = RecordingFiles(origin)
    async with rig(origin, small(), files=files) as one:
        await live(one, files)
        assert one.store.metrics.evictions and one.store.metrics.segment_evictions
        await one.store.drain(1.0)
    assert {step(event) for event in files.events} >= STEPS  # so that there is a crash before and after each of them
    files.close_all()
    assert sum(event.kind == "rename" and event.target.endswith(".ckp") for event in files.events) > 8
    damaged = 0
    for crash, seed in itertools.product(range(len(files.events) + 1), range(2)):
        folder = tmp_path / "crashed"
        folder.mkdir()
        disk_after_crash(files.events, crash, folder, random.Random(f"{crash}/{seed}"))
        try:
            damaged += await survives(folder, committed_at(files.events, crash))
        except AssertionError as error:
            raise AssertionError(f"crash after {crash} events, seed {seed}: {error}") from error
        shutil.rmtree(folder)
    assert damaged  # or the harness tears nothing


async def test_a_crash_of_the_process_alone_loses_nothing(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    files = RecordingFiles(origin)
    async with rig(origin, small(), files=files) as one:
        await live(one, files)
        stored = _stored(one)
    files.close_all()
    await survives(origin, stored)
