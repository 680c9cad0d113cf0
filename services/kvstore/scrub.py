"""The background scrub: reads every stored block, slowly, and drops what has gone bad.

    IDLE --start--> RUNNING --end, stop--> IDLE

A pass begins when it is due or asked for, at a segment chosen at random: so it needs no memory of what
an earlier process had done, and over many short lives every segment has its turn. One block is read at
a time, at most `bytes_per_s`, and only when no other read is waiting (or after `PATIENCE_S`, so that a
busy store is scrubbed too). Header and payload are compared with what the index says; a block that differs
is condemned, as one is that a reader finds bad. While a disk doesn't answer, its blocks are passed over.
"""

import asyncio
import random
import time
from collections.abc import Iterator
from enum import StrEnum
from functools import partial

import msgspec

from common.disk.pages import aligned
from common.errors import Overloaded
from common.logs import Log
from services.kvstore import file_calls
from services.kvstore.record import PAGE_BYTES, SlotHeader, decode_slot
from services.kvstore.segment import CorruptPayload, Segment
from services.kvstore.shelf import Shelf
from services.kvstore.slot_states import SlotState
from services.kvstore.store import Store

log = Log("scrub")
PATIENCE_S = 1.0  # a block waits at most this long for the readers to be idle
POLL_S = 0.02


class ScrubState(StrEnum):
    IDLE = "idle"
    RUNNING = "running"


class ScrubProgress(msgspec.Struct):
    """A pass that runs, or the last one."""

    blocks_done: int = 0
    blocks_total: int = 0
    bytes_done: int = 0
    corrupt: int = 0
    seconds: float = 0.0


class Scrub:
    """Belongs to the event loop. `run` goes on until cancelled."""

    def __init__(self, store: Store, *, bytes_per_s: int, every_s: float, choice: random.Random | None = None) -> None:
        self.state = ScrubState.IDLE
        self.progress = ScrubProgress()
        self.passes = 0
        self.bytes_per_s = bytes_per_s
        self._store = store
        self._every_s = every_s
        self._choice = choice or random.Random()
        self._asked = asyncio.Event()
        self._stopped = asyncio.Event()
        self._hanging: set[int] = set()  # disks that owe an answer, by position
        self._free_at_s = 0.0

    def start(self) -> None:
        """Begins a pass soon. Idempotent."""
        self._stopped.clear()
        self._asked.set()

    def stop(self) -> None:
        """Ends the pass that runs. Idempotent."""
        self._asked.clear()
        self._stopped.set()

    async def run(self) -> None:
        """A pass whenever it is due or asked for. The first one is due after a random part of the time between two."""
        wait_s = self._choice.random() * self._every_s
        while True:
            try:
                await asyncio.wait_for(self._asked.wait(), wait_s if self._every_s else None)
            except TimeoutError:
                self._stopped.clear()
            self._asked.clear()
            await self.run_once()
            wait_s = self._every_s

    async def run_once(self) -> None:
        """One pass, to its end or until `stop`."""
        began_s = time.monotonic()
        self.state, self.progress = ScrubState.RUNNING, ScrubProgress(blocks_total=self._store.blocks)
        log.event("scrub_started", blocks=self.progress.blocks_total, bytes_per_s=self.bytes_per_s)
        try:
            for shelf, slot in self._blocks():
                if self._stopped.is_set():
                    return
                await self._turn(PAGE_BYTES + shelf.geometry.padded_bytes)
                await self._verify(shelf, slot)
                self.progress.seconds = time.monotonic() - began_s
            self.passes += 1
            self._store.metrics.scrub_passes += 1
        finally:
            self.state = ScrubState.IDLE
            log.event("scrub_ended", **msgspec.structs.asdict(self.progress))

    def _blocks(self) -> Iterator[tuple[Shelf, int]]:
        """Every slot with a block in it, segment by segment, from a random one on. The store changes meanwhile."""
        shelves = list(self._store.space.shelves.values())
        segments = [(shelf, position, segment) for shelf in shelves for position, segment in shelf.segments.items()]
        first = self._choice.randrange(len(segments)) if segments else 0
        for shelf, position, segment in segments[first:] + segments[:first]:
            for slot in shelf.segment_slots(position):
                if shelf.segments.get(position) is not segment:
                    break  # removed meanwhile
                if shelf.state(slot) is SlotState.STORED and segment.disk not in self._hanging:
                    yield shelf, slot

    async def _turn(self, length: int) -> None:
        """Waits until so many bytes may be read."""
        now_s = time.monotonic()
        self._free_at_s = max(self._free_at_s, now_s)
        if self._free_at_s > now_s:
            await asyncio.sleep(self._free_at_s - now_s)
        self._free_at_s += length / self.bytes_per_s
        give_up_s = time.monotonic() + PATIENCE_S
        while self._store.readers.pending and time.monotonic() < give_up_s:  # noqa: ASYNC110 - readers have no event for idleness
            await asyncio.sleep(POLL_S)

    async def _verify(self, shelf: Shelf, slot: int) -> None:
        index = shelf.index
        key, sequence, checksum = index.key(slot), index.sequence(slot), index.checksum(slot)
        if key is None:
            return
        segment, within = shelf.place(slot)
        verify = partial(_verify, segment, within, key, sequence, checksum)
        reading = asyncio.create_task(self._store.file_calls.run(segment.disk, verify))
        self._hanging.add(segment.disk)
        index.offers.pin(slot)

        def read(_: object) -> None:
            self._hanging.discard(segment.disk)
            index.offers.unpin(slot)

        reading.add_done_callback(read)
        await asyncio.wait([reading], timeout=file_calls.LATE_S)
        if not reading.done():
            return
        result = reading.result()
        if isinstance(result, Overloaded):
            return
        length = PAGE_BYTES + shelf.geometry.padded_bytes
        self.progress.blocks_done += 1
        self.progress.bytes_done += length
        self._store.metrics.scrubbed_blocks += 1
        self._store.metrics.scrubbed_bytes += length
        if result is True:
            return
        assert isinstance(result, BaseException)
        self.progress.corrupt += 1
        self._store.metrics.scrub_corrupt_blocks += 1
        self._store.watch.failed_on(segment, result)
        self._store.erasures.condemn(shelf, slot, sequence, f"scrub: {result}")


def _verify(segment: Segment, within: int, key: bytes, sequence: int, checksum: int) -> bool:
    page = aligned(PAGE_BYTES)
    segment.read_header(within, page)
    header = decode_slot(page)
    if not isinstance(header, SlotHeader) or (header.key, header.sequence) != (key, sequence):
        raise CorruptPayload(f"the header of slot {within} of {segment.path} is not the block's")
    segment.read_own(within, checksum)
    return True
