"""What each slot of a namespace is used for, one byte a slot.

A slot's life:

    (segment added) -> FREE -take-> IN_FLIGHT -store-> STORED -evict-> FREE
                                        |                 +---condemn-> ERASING -> FREE or RETIRED
                                        +---give_back-> FREE, retire -> RETIRED

`FREE` slots may still carry the header of a block that was evicted: a restart may find it again,
whole, which is harmless. A condemned block's header is erased first, so that it isn't.
Slots of a segment that can't be written are STORED (and pinned, as evicting gains nothing) or RETIRED.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from services.kvstore.column import Slots


class SlotState(IntEnum):
    ABSENT = 0  # no segment has this slot number
    FREE = 1
    IN_FLIGHT = 2  # a write lease owns it
    STORED = 3
    ERASING = 4  # condemned; its header is being erased
    RETIRED = 5  # the disk fails there, or it can't be written


class SlotStates:
    """By slot number. A move names the state that it starts from: any other is our bug."""

    def __init__(self) -> None:
        self._states = bytearray()

    def __getitem__(self, slot: int) -> SlotState:
        return SlotState(self._states[slot])

    def add(self, slots: range) -> None:
        """The slots of a segment that is taken in: RETIRED."""
        self._states.extend(bytes(max(0, slots.stop - len(self._states))))
        self._states[slots.start : slots.stop] = bytes([SlotState.RETIRED]) * len(slots)

    def remove(self, slots: range) -> None:
        """The slots of a segment that is given up, all FREE or RETIRED."""
        assert all(self._states[slot] in (SlotState.FREE, SlotState.RETIRED) for slot in slots)
        self._states[slots.start : slots.stop] = bytes(len(slots))

    def move(self, slot: int, old: SlotState, new: SlotState) -> None:
        assert self._states[slot] == old, f"slot {slot} is {self[slot].name}, not {old.name}"
        self._states[slot] = new

    def move_all(self, slots: Slots | Sequence[int], old: SlotState, new: SlotState) -> None:
        states = np.frombuffer(self._states, np.uint8)
        at = np.asarray(slots, np.int32)
        assert (states[at] == old).all(), f"of the slots {slots} some are not {old.name}"
        states[at] = new

    def within(self, slots: range, state: SlotState) -> npt.NDArray[np.intp]:
        """Which of these slots are in a state, counted from the first."""
        return np.flatnonzero(np.frombuffer(self._states, np.uint8)[slots.start : slots.stop] == state)

    def counts(self) -> dict[SlotState, int]:
        """How many slots are in each state."""
        return {state: self._states.count(state) for state in SlotState}
