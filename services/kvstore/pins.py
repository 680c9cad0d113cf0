"""Prefixes that operators want kept: not evicted, for space or for a quota, until a time.

1. `pin` keeps the stored part of a chain, for so many seconds from now; pinning it again sets a new time.
2. `unpin`, or the end of its time, lets it go its usual way.

Pins are in memory: a store that starts again has none. They don't make a block's own time longer, and a block
that turns out bad goes all the same. Invariant: at most `PINS_MAX` pins, and what they keep is at most half of the
blocks that the budget has room for.
"""

from collections.abc import Callable, Sequence

import msgspec

from common.blocks import Namespace
from common.errors import Overloaded
from services.kvstore.column import Slots
from services.kvstore.shelf import Shelf

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

    def __init__(self, clock: Callable[[], float], budget_bytes: Callable[[], int]) -> None:
        self._clock = clock
        self._budget_bytes = budget_bytes
        self._pins: dict[tuple[Namespace, bytes], Pin] = {}

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def kept_bytes(self) -> int:
        """Of the slots that pins keep, each once."""
        shelves = {id(pin.shelf): pin.shelf for pin in self._pins.values()}
        return sum(self._kept(shelf) * shelf.geometry.slot_bytes for shelf in shelves.values())

    def pin(self, shelf: Shelf, keys: Sequence[bytes], slots: Slots, for_s: float) -> None:
        """Keeps blocks `slots`, the stored prefix of `keys`, which isn't empty. Raises `Overloaded`."""
        name = (shelf.namespace, keys[len(slots) - 1])
        before = self._pins.pop(name, None)
        last = int(slots[-1])
        self._pins[name] = Pin(shelf, slots, shelf.index.sequence(last), self._clock() + for_s)
        shelf.index.pin(last)
        if len(self._pins) > PINS_MAX or self.kept_bytes > SHARE_MAX * self._budget_bytes():
            self._let_go(self._pins.pop(name))
            if before is not None:
                self._pins[name] = before
            raise Overloaded(
                f"{len(self._pins)} pins keep {self.kept_bytes} bytes, {len(slots)} blocks more were asked for: "
                f"at most {PINS_MAX} pins and {SHARE_MAX:.0%} of the budget; unpin some, or wait until their time is over"
            )
        if before is not None:
            self._let_go(before)

    def unpin(self, namespace: Namespace, key: bytes) -> int:
        """Ends the pin whose last block this is. How many blocks it kept."""
        pin = self._pins.pop((namespace, key), None)
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
        pin.shelf.index.unpin(int(pin.slots[-1]))

    def _kept(self, shelf: Shelf) -> int:
        return len({slot for pin in self._pins.values() if pin.shelf is shelf for slot in pin.slots.tolist()})
