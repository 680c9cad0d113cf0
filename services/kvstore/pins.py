"""Prefixes that operators want kept: not evicted, for space or for a quota, until a time.

1. `keep` keeps the stored part of a chain, `keep_block` a block and those that it hangs on, for so many seconds from now;
   the same again sets a new time.
2. 0 seconds, or the end of its time, let it go its usual way.

Pins are in memory: a store that starts again has none. They don't make a block's own time longer, and a block
that turns out bad goes all the same. Invariant: at most `PINS_MAX` pins, and what they keep is at most half of the
blocks that the budget has room for.
"""

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from common.blocks import Namespace
from common.errors import Overloaded
from services.kvstore.column import Slots
from services.kvstore.shelf import Shelf
from services.kvstore.space import Space

PINS_MAX = 1024
SHARE_MAX = 0.5  # of the budget


class Pin(msgspec.Struct, frozen=True):
    """The last block is pinned, which keeps those before it."""

    shelf: Shelf
    slots: Slots
    sequence: int  # of the last block: whether the slot still holds it
    until_s: float


class Pins:
    """By namespace and last key. Belongs to the event loop; `clock` is monotonic."""

    def __init__(self, clock: Callable[[], float], space: Space) -> None:
        self._clock = clock
        self._space = space
        self._pins: dict[tuple[Namespace, bytes], Pin] = {}

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def kept_bytes(self) -> int:
        """Of the slots that pins keep, each once."""
        shelves = {id(pin.shelf): pin.shelf for pin in self._pins.values()}
        return sum(self._kept(shelf) * shelf.geometry.slot_bytes for shelf in shelves.values())

    def keep(self, namespace: Namespace, keys: Sequence[bytes], for_s: float) -> int:
        """Keeps the stored prefix of a chain for a time, 0: no longer; its blocks. Raises `Overloaded`."""
        shelf = self._space.shelves.get(namespace)
        return self._keep(shelf, shelf.index.prefix(keys), for_s) if shelf is not None else 0

    def keep_block(self, key: bytes, for_s: float) -> int:
        """`keep`, of a block wherever it is stored, and of the stored ones that it hangs on."""
        for shelf in self._space.shelves.values():
            slot = shelf.index.find(key)
            if slot is not None:
                lineage: list[int] = []
                while slot is not None:
                    lineage.append(slot)
                    slot = shelf.index.parent(slot)
                return self._keep(shelf, np.array(lineage[::-1], np.int32), for_s)
        return 0

    def _keep(self, shelf: Shelf, slots: Slots, for_s: float) -> int:
        """Blocks that follow each other in a chain."""
        if len(slots):
            key = shelf.index.key(int(slots[-1]))
            assert key is not None
            if not for_s:
                return self._unpin((shelf.namespace, key))
            self._pin((shelf.namespace, key), shelf, slots, for_s)
        return len(slots)

    def _pin(self, name: tuple[Namespace, bytes], shelf: Shelf, slots: Slots, for_s: float) -> None:
        before = self._pins.pop(name, None)
        last = int(slots[-1])
        self._pins[name] = Pin(shelf, slots, shelf.index.sequence(last), self._clock() + for_s)
        shelf.index.offers.pin(last)
        if len(self._pins) > PINS_MAX or self.kept_bytes > SHARE_MAX * self._space.budget_bytes:
            self._let_go(self._pins.pop(name))
            if before is not None:
                self._pins[name] = before
            raise Overloaded(
                f"{len(self._pins)} pins keep {self.kept_bytes} bytes, {len(slots)} blocks more were asked for: "
                f"at most {PINS_MAX} pins and {SHARE_MAX:.0%} of the budget; unpin some, or wait until their time is over"
            )
        if before is not None:
            self._let_go(before)

    def _unpin(self, name: tuple[Namespace, bytes]) -> int:
        """How many blocks the pin kept; 0 when there is none."""
        pin = self._pins.pop(name, None)
        if pin is None:
            return 0
        self._let_go(pin)
        return len(pin.slots)

    def sweep(self) -> None:
        """Ends pins whose time is over, or whose last block is gone."""
        now_s = self._clock()
        for name, pin in list(self._pins.items()):
            if pin.until_s <= now_s or not self._holds(pin):
                self._let_go(self._pins.pop(name))

    def _holds(self, pin: Pin) -> bool:
        last = int(pin.slots[-1])
        return pin.shelf.index.key(last) is not None and pin.shelf.index.sequence(last) == pin.sequence

    def _let_go(self, pin: Pin) -> None:
        pin.shelf.index.offers.unpin(int(pin.slots[-1]))

    def _kept(self, shelf: Shelf) -> int:
        return len({slot for pin in self._pins.values() if pin.shelf is shelf for slot in pin.slots.tolist()})
