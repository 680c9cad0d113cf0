"""Where the blocks of leases lie, as the peer on this host said: asked for as seldom as their readers allow.

1. A lease's first reader asks for its parts only, and the descriptors are closed when its read is over: most
   read all they want in one call.
2. Who comes again under the same lease for what follows his last parts asks for the blocks behind them as well, more each time.
   That answer is kept for the reads that follow. Who jumps about asks for his parts.
3. It is closed when a newer one replaces it, when a read by it went wrong, after IDLE_S without use, and with the
   connection. A file that was removed keeps its space until then.

What is kept outlives its lease by IDLE_S at most; the checksums that came with it find out where a block was overwritten.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

from common.transport.connection import Connection
from common.transport.interface import PARTS_MAX, Extent, LeaseToken, Part, PartStatus
from common.transport.located import Located

LEASES_MAX = 64  # known at once: of each at most one answer is kept
AHEAD_MIN, AHEAD_MAX = 64, 256  # parts more than asked for, which cost both sides 2 us each
IDLE_S = 0.25
ITEM_MAX = 0xFFFFFFFF  # what a frame holds


class Places:
    """One reader's view of where its parts lie: item i is its part i. `close` it when nothing is read there any more."""

    def __init__(self, extents: Sequence[Extent | PartStatus], located: Located) -> None:
        self.extents = extents
        self._located: Located | None = located

    def close(self) -> None:
        """Idempotent."""
        if self._located is not None:
            self._located.close()
            self._located = None


class _Lease:
    """What is known under one token."""

    def __init__(self) -> None:
        self.asked = 0  # parts of the newest answer
        self.next_item = -1  # behind the newest read
        self.extents: dict[Part, Extent] = {}
        self.kept: Located | None = None
        self.used_s = 0.0

    def keep(self, parts: Sequence[Part], located: Located) -> None:
        self.drop()
        located.hold()
        self.kept = located
        self.extents = {part: extent for part, extent in zip(parts, located.parts, strict=True) if isinstance(extent, Extent)}

    def drop(self) -> None:
        if self.kept is not None:
            self.kept.close()
        self.kept, self.extents = None, {}


class LeasePlaces:
    """Of one connection that offers extents. `close` when done."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._leases: OrderedDict[LeaseToken, _Lease] = OrderedDict()  # the longest unused first
        self._timer: asyncio.TimerHandle | None = None

    async def find(self, token: LeaseToken, parts: Sequence[Part], *, deadline_s: float) -> Places:
        """Raises `TransferFailed`, `TimeoutError`."""
        known = self.known(token, parts)
        if known is not None:
            return known
        lease = self._leases.setdefault(token, _Lease())
        self._leases.move_to_end(token)
        while len(self._leases) > LEASES_MAX:
            self._leases.popitem(last=False)[1].drop()
        in_order = lease.asked and parts[0].item == lease.next_item
        ahead = min(max(2 * lease.asked, AHEAD_MIN), AHEAD_MAX) if in_order else 0
        lease.next_item = parts[-1].item + 1
        wanted = [*parts, *_behind(parts, ahead)]
        located = await self._connection.locate(token, wanted, deadline_s=deadline_s)
        lease.asked = len(wanted)
        if ahead and self._leases.get(token) is lease:
            lease.keep(wanted, located)
            self._touch(lease)
        return Places(located.parts[: len(parts)], located)

    def known(self, token: LeaseToken, parts: Sequence[Part]) -> Places | None:
        """Without asking."""
        lease = self._leases.get(token)
        if lease is None or lease.kept is None:
            return None
        extents = [lease.extents.get(part) for part in parts]
        found = [extent for extent in extents if extent is not None]
        if len(found) < len(parts):
            return None
        lease.kept.hold()
        lease.next_item = parts[-1].item + 1
        self._touch(lease)
        return Places(found, lease.kept)

    def forget(self, token: LeaseToken) -> None:
        """A read by what is known failed. Idempotent."""
        lease = self._leases.pop(token, None)
        if lease is not None:
            lease.drop()

    def close(self) -> None:
        """Idempotent."""
        while self._leases:
            self._leases.popitem()[1].drop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _touch(self, lease: _Lease) -> None:
        loop = asyncio.get_running_loop()
        lease.used_s = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(IDLE_S, self._drop_idle)

    def _drop_idle(self) -> None:
        loop = asyncio.get_running_loop()
        for lease in self._leases.values():
            if loop.time() - lease.used_s >= IDLE_S:
                lease.drop()
        busy = any(lease.kept is not None for lease in self._leases.values())
        self._timer = loop.call_later(IDLE_S, self._drop_idle) if busy else None


def _behind(parts: Sequence[Part], count: int) -> list[Part]:
    """The blocks that a reader in order wants next."""
    last = parts[-1]
    if last.offset:
        return []
    count = min(count, PARTS_MAX - len(parts), ITEM_MAX - last.item)
    return [Part(last.item + 1 + i, 0, last.length) for i in range(count)]
