"""Taking blocks out at an operator's word: by key, the coldest, or a whole namespace.

What goes is erased on disk, so that it stays gone after a restart. What is leased, what a leased block
hangs on, and what lies where nothing can be written stays, and is counted. Each call is bounded.
"""

import asyncio
from collections.abc import Sequence

import msgspec

from common.blocks import Namespace
from services.kvstore.segment import Segment
from services.kvstore.shelf import Shelf
from services.kvstore.store import Store

BLOCKS_MAX = 4096  # of one call


class Removed(msgspec.Struct, frozen=True):
    """What a call did."""

    evicted: int = 0
    kept: int = 0
    freed_bytes: int = 0


async def remove_keys(store: Store, namespace: Namespace | None, keys: Sequence[bytes]) -> Removed:
    """Removes blocks and all that hangs on them, at most `BLOCKS_MAX`: what is over that is kept."""
    gone: list[tuple[Shelf, int]] = []
    kept = 0
    for shelf in _shelves(store, namespace):
        wanted = dict.fromkeys(shelf.index.subtree([slot for key in keys if (slot := shelf.index.find(key)) is not None]))
        for slot in list(wanted):
            at: int | None = slot
            while at in wanted and at is not None and _may_go(shelf, at) and len(gone) < BLOCKS_MAX:
                above = shelf.index.parent(at)
                shelf.condemn(at)
                gone.append((shelf, at))
                del wanted[at]
                at = above  # whose last child this may have been
        kept += len(wanted)
    return await _erased(store, gone, kept)


async def remove_coldest(store: Store, namespace: Namespace | None, count: int) -> Removed:
    """Removes so many blocks, in the order in which eviction would take them, over all namespaces or one."""
    gone: list[tuple[Shelf, int]] = []
    while len(gone) < min(count, BLOCKS_MAX):
        heat = [(tick, shelf) for shelf in _shelves(store, namespace) if (tick := shelf.index.coldest_tick()) is not None]
        if not heat:
            break
        shelf = min(heat, key=lambda one: one[0])[1]
        slot = shelf.condemn_coldest()
        assert slot is not None
        gone.append((shelf, slot))
    return await _erased(store, gone, 0)


async def remove_namespace(store: Store, namespace: Namespace) -> Removed:
    """Removes all of a namespace that may go, and its files."""
    shelf = store.space.shelves.get(namespace)
    if shelf is None:
        return Removed()
    evicted, freed_bytes = await store.space.changes.clear(shelf)
    rest = await remove_coldest(store, namespace, BLOCKS_MAX)
    return Removed(evicted + rest.evicted, len(shelf.index), freed_bytes)


def _may_go(shelf: Shelf, slot: int) -> bool:
    return shelf.index.offers.evictable(slot) and shelf.place(slot)[0].writable


def _shelves(store: Store, namespace: Namespace | None) -> list[Shelf]:
    return [shelf for name, shelf in store.space.shelves.items() if namespace in (None, name)]


async def _erased(store: Store, gone: Sequence[tuple[Shelf, int]], kept: int) -> Removed:
    by_segment: dict[int, tuple[Shelf, Segment, list[int]]] = {}
    for shelf, slot in gone:
        segment = shelf.place(slot)[0]
        by_segment.setdefault(id(segment), (shelf, segment, []))[2].append(slot)
    await asyncio.gather(*(store.erasures.erase(shelf, segment, slots) for shelf, segment, slots in by_segment.values()))
    store.metrics.removed_blocks += len(gone)
    return Removed(len(gone), kept)
