"""Where a new block may lie: the byte budget, new segments, segments of other namespaces, eviction.

For a slot, in this order: a free one; a new segment, while the budget has room; a segment of another
namespace in which everything is colder than what would have to go here; the block that eviction
gives up. Nothing of that: there is no space.

Invariants:
- The bytes of all segment files, those being created and those that can't be used included, never
  exceed the budget (a budget that was lowered is met at start by dropping the coldest segments).
- A segment with a leased block, or with a leased block's ancestor, is never taken.
"""

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from common.blocks import Namespace
from common.errors import Overloaded
from common.logs import Log
from services.kvstore.eviction import LeafLru
from services.kvstore.files import Files
from services.kvstore.io_pool import IoPool
from services.kvstore.metrics import Metrics
from services.kvstore.record import PAGE_BYTES, SLOTS_MAX, Geometry, SegmentHeader
from services.kvstore.segment import Segment, create
from services.kvstore.shelf import Shelf, SlotState

log = Log("space")
FULL_PAUSE_S = 5.0  # after a failed allocation: don't ask the file system for every request
COMPARE_PAUSE_S = 5.0  # comparing namespaces looks at every block of the others
SEGMENTS_PER_BUDGET = 8  # a segment is at most this fraction, so that namespaces can share a small budget


class Space:
    """The store's disk space. Belongs to the event loop; files are made and removed in the pool."""

    def __init__(
        self,
        files: Files,
        folder: Path,
        pool: IoPool,
        metrics: Metrics,
        *,
        budget_bytes: int,
        segment_bytes: int,
        direct: bool,
        clock: Callable[[], float],
    ) -> None:
        self.shelves: dict[Namespace, Shelf] = {}
        self.budget_bytes = budget_bytes
        self.unusable_bytes = 0
        self.unusable_numbers: dict[Namespace, set[int]] = {}
        self._files = files
        self._folder = folder
        self._pool = pool
        self._metrics = metrics
        self._segment_bytes = segment_bytes
        self._direct = direct
        self._clock = clock
        self._changing = asyncio.Lock()
        self._changing_bytes = 0  # being created or removed
        self._full_until_s = 0.0
        self._compare_again_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def used_bytes(self) -> int:
        return self.unusable_bytes + self._changing_bytes + sum(shelf.segment_bytes for shelf in self.shelves.values())

    def shelf(self, namespace: Namespace, payload_bytes: int, ticks: Iterator[int]) -> Shelf | None:
        """The namespace's shelf, made when it is new; None when not even one block fits the budget."""
        shelf = self.shelves.get(namespace)
        if shelf is not None:
            return shelf
        geometry = self.geometry(payload_bytes)
        if geometry.segment_bytes > self.budget_bytes:
            return None
        return self.add_found(namespace, geometry, ticks)

    def add_found(self, namespace: Namespace, geometry: Geometry, ticks: Iterator[int]) -> Shelf:
        """The shelf of a namespace, which at start is found on disk."""
        slots_expected = self.budget_bytes // geometry.slot_bytes
        shelf = self.shelves[namespace] = Shelf(namespace, geometry, LeafLru(), ticks, slots_expected)
        return shelf

    def geometry(self, payload_bytes: int) -> Geometry:
        """Sizes of a new namespace's segments."""
        slot_bytes = Geometry(payload_bytes, 1).slot_bytes
        room = min(self._segment_bytes, self.budget_bytes // SEGMENTS_PER_BUDGET) - PAGE_BYTES
        return Geometry(payload_bytes, min(SLOTS_MAX, max(1, room // slot_bytes)))

    async def prepare(self, shelf: Shelf, slots: int) -> None:
        """Gets free slots by new segments, as far as that is right. `take` may evict beyond.

        Goes on when the caller is cancelled: a segment that was made must be accounted for.
        """
        if shelf.free_slots >= slots:
            return
        task = asyncio.create_task(self._prepare(shelf, slots))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        shelf.preparing += 1
        task.add_done_callback(lambda _: setattr(shelf, "preparing", shelf.preparing - 1))
        await asyncio.shield(task)

    async def settle(self) -> None:
        """Waits until no segment is being made or removed."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def forget_empty(self) -> None:
        """Drops shelves that have nothing and that nobody is about to fill."""
        for namespace in [name for name, shelf in self.shelves.items() if not shelf.segments and not shelf.preparing]:
            del self.shelves[namespace]

    async def _prepare(self, shelf: Shelf, slots: int) -> None:
        async with self._changing:
            while shelf.free_slots < slots:
                if self.used_bytes + shelf.geometry.segment_bytes <= self.budget_bytes:
                    if not await self._grow(shelf):
                        return
                elif not await self._take_over(shelf):
                    return

    def take(self, shelf: Shelf) -> int | None:
        """A slot to write into, evicting if need be; None: there is no space."""
        slot = shelf.take()
        if slot is None and shelf.evict() is not None:
            self._metrics.evictions += 1
            slot = shelf.take()
        return slot

    def fit_budget(self) -> None:
        """At start: drops the coldest segments until the budget is met. Blocking."""
        while self.used_bytes > self.budget_bytes:
            chosen = self._coldest_segment(list(self.shelves.values()))
            if chosen is None:
                log.error("over_budget", used_bytes=self.used_bytes, budget_bytes=self.budget_bytes)
                return
            shelf, number, _ = chosen
            segment = self._empty_segment(shelf, number)
            log.event("segment_dropped", path=str(segment.path), reason="over the budget")
            try:
                segment.remove()
            except OSError as error:
                self._note_unremoved(segment, error)

    async def _grow(self, shelf: Shelf) -> bool:
        if self._clock() < self._full_until_s:
            return False
        folder = self._folder / shelf.namespace
        number = shelf.next_segment_number(self.unusable_numbers.get(shelf.namespace, set()).__contains__)
        header = SegmentHeader(shelf.namespace_bytes, shelf.geometry, number)
        self._changing_bytes += shelf.geometry.segment_bytes
        try:
            (result,) = await self._pool.submit([partial(self._create, folder, header)]).done
        except Overloaded:
            return False
        finally:
            self._changing_bytes -= shelf.geometry.segment_bytes
        if isinstance(result, BaseException):
            self._full_until_s = self._clock() + FULL_PAUSE_S
            log.warning("no_new_segment", path=str(folder), bytes=header.geometry.segment_bytes, reason=str(result))
            return False
        for slot in reversed(shelf.add_segment(result)):
            shelf.free(slot)
        return True

    def _create(self, folder: Path, header: SegmentHeader) -> Segment:
        if not folder.exists():
            self._files.make_folder(folder)
            self._files.sync_folder(folder.parent)
        return create(self._files, folder, header, direct=self._direct)

    async def _take_over(self, shelf: Shelf) -> bool:
        """Removes another namespace's segment if all in it is colder than what `shelf` would evict."""
        own = shelf.index.coldest_tick()
        others = [other for other in self.shelves.values() if other is not shelf]
        if not others or (own is not None and self._clock() < self._compare_again_s):
            return False
        chosen = self._coldest_segment(others)
        if chosen is None or (own is not None and chosen[2] >= own):
            self._compare_again_s = self._clock() + COMPARE_PAUSE_S
            return False
        other, number, _ = chosen
        segment = self._empty_segment(other, number)
        log.event("segment_taken", path=str(segment.path), by=shelf.namespace)
        self._changing_bytes += other.geometry.segment_bytes
        try:
            (result,) = await self._pool.submit([partial(_remove, segment)]).done
        except Overloaded as refused:
            result = refused
        finally:
            self._changing_bytes -= other.geometry.segment_bytes
        if isinstance(result, BaseException):
            self._note_unremoved(segment, result)
        return True

    def _coldest_segment(self, shelves: list[Shelf]) -> tuple[Shelf, int, int] | None:
        """The segment whose hottest block (descendants elsewhere included) is coldest, and that heat."""
        best: tuple[Shelf, int, int] | None = None
        for shelf in shelves:
            for number in shelf.segments:
                heat = _heat(shelf, number)
                if heat is not None and (best is None or heat < best[2]):
                    best = (shelf, number, heat)
        return best

    def _empty_segment(self, shelf: Shelf, number: int) -> Segment:
        for slot in shelf.index.subtree(_stored(shelf, number)):
            shelf.forget(slot)
            self._metrics.segment_evictions += 1
        return shelf.remove_segment(number)

    def _note_unremoved(self, segment: Segment, error: BaseException) -> None:
        segment.close()
        self.unusable_bytes += segment.geometry.segment_bytes
        self.unusable_numbers.setdefault(Namespace(segment.namespace.hex()), set()).add(segment.number)
        log.error("segment_not_removed", path=str(segment.path), reason=str(error))


def _remove(segment: Segment) -> bool:
    segment.remove()
    return True


def _stored(shelf: Shelf, number: int) -> list[int]:
    return [slot for slot in shelf.segment_slots(number) if shelf.state(slot) is SlotState.STORED]


def _heat(shelf: Shelf, number: int) -> int | None:
    """Latest use of anything that would go with this segment; None when something may not go."""
    if any(shelf.state(slot) in (SlotState.IN_FLIGHT, SlotState.ERASING) for slot in shelf.segment_slots(number)):
        return None
    heat = 0
    for slot in shelf.index.subtree(_stored(shelf, number)):
        if shelf.index.pinned(slot):
            return None
        heat = max(heat, shelf.policy.tick(slot))
    return heat
