"""One slot that a write lease fills, from reservation to stored block.

A missing entry in `NEXT` is our bug:

    RESERVED --receive--> FILLING --commit--> WRITING --done--> STORED
       |                    |  \\--abort--> RESERVED   \\--fail--> GONE
       +------close---------+----close (when its buffer comes back)--> GONE
"""

from enum import IntEnum, auto

import msgspec


class WriteState(IntEnum):
    RESERVED = auto()  # a slot is ours, no bytes yet
    FILLING = auto()  # a carrier is receiving into the buffer
    WRITING = auto()  # on its way to the disk
    STORED = auto()
    GONE = auto()  # failed, or given up; the slot went back


NEXT: dict[WriteState, dict[str, WriteState]] = {
    WriteState.RESERVED: {"receive": WriteState.FILLING, "close": WriteState.GONE},
    WriteState.FILLING: {"commit": WriteState.WRITING, "abort": WriteState.RESERVED, "close": WriteState.GONE},
    WriteState.WRITING: {"done": WriteState.STORED, "fail": WriteState.GONE},
    WriteState.STORED: {},
    WriteState.GONE: {},
}


class WriteItem(msgspec.Struct, eq=False, gc=False):
    """One slot to be filled. Whose the block will be, and for how long, its lease says."""

    slot: int
    key: bytes
    parent: bytes
    state: WriteState = WriteState.RESERVED
    image: memoryview | None = None  # header page and payload, while FILLING or WRITING

    def step(self, event: str) -> None:
        self.state = NEXT[self.state][event]
