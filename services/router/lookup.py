"""Finding a prompt's stored prefix in the kvstores that may keep it.

The first store in rendezvous order is asked for a lease, its replicas for a count, all at once. When a
replica holds more, or the first one doesn't answer, the lease is taken there instead. Any failure is a
miss at that store, and nothing else.
"""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TypeVar

import msgspec

from common.blocks import Namespace
from common.clients.kvstore import KvStoreClient, StoredPrefix
from common.errors import PenstockError
from services.router.stores import Found, LeaseKeeper

T = TypeVar("T")


class Answer(msgspec.Struct, frozen=True):
    """What the stores hold of a chain.

    Attributes:
        found: the longest prefix that is leased now; None: nothing is stored.
        replicated_blocks: leading blocks that all of them hold.
        failures: (address, reason) of stores that didn't answer.
    """

    found: Found | None = None
    replicated_blocks: int = 0
    failures: tuple[tuple[str, str], ...] = ()


async def look_up(
    stores: Sequence[KvStoreClient], namespace: Namespace, keys: Sequence[bytes], keeper: LeaseKeeper, deadline_s: float
) -> Answer:
    """Asks `stores`, best first; without any, nothing is stored. What is found is held by `keeper`.

    Not to be cancelled, but for the end of the process: see `give_back`. It ends within two deadlines.
    """
    if not stores:
        return Answer()
    first, *others = stores
    leased, *counted = await asyncio.gather(
        _tried(first.lookup(namespace, keys, keeper.lease_s, deadline_s=deadline_s)),
        *(_tried(store.count(namespace, keys, deadline_s=deadline_s)) for store in others),
    )
    failures = tuple(
        (store.address, answer.message)
        for store, answer in zip(stores, (leased, *counted), strict=True)
        if isinstance(answer, PenstockError)
    )
    found = None
    if isinstance(leased, StoredPrefix):
        found = Found(first, leased)
        keeper.hold(found)
    blocks = [found.prefix.blocks if found else 0, *(count if isinstance(count, int) else 0 for count in counted)]
    best = max(range(len(stores)), key=lambda i: (blocks[i], -i))
    if blocks[best] > blocks[0]:
        better = await _tried(stores[best].lookup(namespace, keys, keeper.lease_s, deadline_s=deadline_s))
        if isinstance(better, StoredPrefix):
            if found is not None:
                keeper.release(found)
            found = Found(stores[best], better)
            keeper.hold(found)
    return Answer(found, min(blocks), failures)


async def give_back(looking: Awaitable[Answer], keeper: LeaseKeeper) -> None:
    """Nobody takes the answer of a lookup: it goes on to its end, for a lease that is granted by then is told of by the reply alone."""
    answer = await looking
    if answer.found is not None:
        keeper.release(answer.found)


async def _tried(call: Awaitable[T]) -> T | PenstockError:
    try:
        return await call
    except PenstockError as error:
        return error
